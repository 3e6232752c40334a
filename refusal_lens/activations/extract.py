"""Prompts -> the residual stream of every layer at the positions asked for, read or remembered.

`residual_stream` says how the model is run. Here prompts become its tokens; with a cache, what was
read before is not computed again, and each batch is stored as it ends; with several processes, each
runs some of the batches. A run that was cut off goes on with the very batches that it had left.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from ..errors import InputError
from ..experiment.distributed import ALONE, Team
from ..experiment.lazy_model import LazyModel
from ..models.load import LensModel
from ..prompts.contrast import Contrast
from ..prompts.protocol import Protocol
from ..prompts.tokenize import build_inputs_with_chat_template, check_prompts, refuse_padding
from .batching import names_read, plan_batches, read_residual_stream
from .store import Cache, StoredActivations


class ContrastActivations(NamedTuple):
    """`resid_post` of both sides of a contrast: float32, on the CPU, in the prompts' order."""

    target: Float[Tensor, "target layer d_model"]
    baseline: Float[Tensor, "baseline layer d_model"]


def get_layer_activations(
    model: LensModel | LazyModel,
    contrast: Contrast,
    *,
    protocol: Protocol = Protocol(),  # noqa: B008 (frozen)
    batch_size: int | None = None,
    progress: bool = True,
    cache: Cache | None = None,
    team: Team = ALONE,
) -> ContrastActivations:
    """Activations of one contrast at every layer, read at the protocol's one position.

    Layer `l` is `blocks.{l}.hook_resid_post` (or the protocol's other hook), in the units of the
    residual stream. The options,
    errors and guarantees are those of `get_prompt_activations`; several contrasts of one run are
    faster together, with `extract`.

    Raises:
        InputError: as `get_prompt_activations`, and where the protocol asks for several positions.
    """
    found = extract(
        model,
        [contrast],
        protocol=protocol,
        batch_size=batch_size,
        progress=progress,
        cache=cache,
        team=team,
    )
    return found[contrast.name]


def extract(
    model: LensModel | LazyModel,
    contrasts: Sequence[Contrast],
    *,
    protocol: Protocol = Protocol(),  # noqa: B008
    batch_size: int | None = None,
    progress: bool = True,
    cache: Cache | None = None,
    team: Team = ALONE,
) -> dict[str, ContrastActivations]:
    """Activations of several contrasts, by name, from one run over all their prompts.

    Small sets share batches and the prefix, instead of each paying for its own. Otherwise as
    `get_layer_activations`.

    Raises:
        InputError: as `get_layer_activations`, and where two contrasts have the same name.
    """
    names = [contrast.name for contrast in contrasts]
    if len(set(names)) < len(names):
        raise InputError(f"two contrasts have the same name, of {names}: rename one")
    if len(protocol.positions) != 1:
        raise InputError(
            f"a contrast is read at one position, the protocol asks for {protocol.positions}: "
            "choose one, or use get_prompt_activations"
        )
    sides = [
        (f"{contrast.name}'s {name}", prompts)
        for contrast in contrasts
        for name, prompts in (
            (contrast.target_name, contrast.target),
            (contrast.baseline_name, contrast.baseline),
        )
    ]
    prompts = [prompt for _, side in sides for prompt in side]
    labels = [f"prompt {i} of {name}" for name, side in sides for i in range(len(side))]
    activations = _run(model, prompts, labels, protocol, batch_size, progress, cache, team)
    of_sides = iter(activations[:, 0].split([len(side) for _, side in sides]))
    return {name: ContrastActivations(next(of_sides), next(of_sides)) for name in names}


def get_prompt_activations(
    model: LensModel | LazyModel,
    prompts: Sequence[str],
    *,
    protocol: Protocol = Protocol(),  # noqa: B008
    batch_size: int | None = None,
    progress: bool = True,
    cache: Cache | None = None,
    team: Team = ALONE,
) -> Float[Tensor, "prompt pos layer d_model"]:
    """`resid_post` of every prompt at every layer and at the protocol's positions, in their order.

    float32, on the CPU. Any batch size gives what each prompt gives alone (within 1e-5 relative in
    float32; in bfloat16 up to its own rounding, which depends on the shapes multiplied). No
    gradient is kept, and the model is left as it was found: hooks, training mode, random state.
    Hooks that are on the model take part, so that a model under intervention can be read too.

    Args:
        batch_size: prompts to a batch. `None` finds it from the free memory and each batch's
            length. Either is halved where memory runs out, and the run goes on from there.
        progress: show a progress bar over the prompts.
        cache: where finished prompts are stored as they come, and looked for first. It is used with
            a `LazyModel` alone, which is loaded only if a prompt is missing: of a model that is
            handed over nothing tells what was done to it. Resumed or not, a run gives the same bits.
        team: the processes over which the work is divided; all of them call this alike, and each
            is given everything, the same bits as one process alone.

    Raises:
        InputError: without prompts; where a prompt is longer than the model's context, gives a
            non-finite activation (an overflow of float16 or bfloat16), or does not fit in memory.
    """
    labels = [f"prompt {i}" for i in range(len(prompts))]
    return _run(model, prompts, labels, protocol, batch_size, progress, cache, team)


def _run(
    model: LensModel | LazyModel,
    prompts: Sequence[str],
    labels: Sequence[str],
    protocol: Protocol,
    batch_size: int | None,
    progress: bool,
    cache: Cache | None,
    team: Team,
) -> Float[Tensor, "prompt pos layer d_model"]:
    if not prompts:
        raise InputError("there are no prompts to run: hand over at least one")
    check_prompts(prompts)
    refuse_padding(protocol)
    if cache is None or not isinstance(model, LazyModel):
        return _run_missing(model, prompts, labels, None, protocol, batch_size, progress, team)
    stored = cache.activations(_key(model, protocol))
    once = {prompt: row for row, prompt in reversed([*enumerate(prompts)])}
    distinct = sorted(once.values())
    texts, names = [prompts[row] for row in distinct], [labels[row] for row in distinct]
    found = _run_missing(model, texts, names, stored, protocol, batch_size, progress, team)
    if len(texts) == len(prompts):
        return found
    place = {prompt: i for i, prompt in enumerate(texts)}
    return found[[place[prompt] for prompt in prompts]]


def _run_missing(
    model: LensModel | LazyModel,
    prompts: Sequence[str],
    labels: Sequence[str],
    stored: StoredActivations | None,
    protocol: Protocol,
    batch_size: int | None,
    progress: bool,
    team: Team,
) -> Float[Tensor, "prompt pos layer d_model"]:
    """What is stored, by anybody, as it is; the rest is run, by everybody a part of it."""
    activations = torch.empty(0)
    here: set[int] = set()
    for found, batch in stored.read(prompts) if stored else ():
        if not here:
            activations = torch.zeros(len(prompts), *batch.shape[1:])
        activations[found] = batch
        here.update(found)
    held = team.gather((here, tuple(activations.shape)))
    shapes = [shape for rows, shape in held if rows]
    missing = {*range(len(prompts))}.difference(*(rows for rows, _ in held))
    # Each prompt counts once when everybody's are added up.
    for rows, _ in held[: team.rank]:
        activations[[*(here & rows)]] = 0
    if not missing:
        return team.add_up(activations if here else torch.zeros(shapes[0]))
    ready: list[Any] = []

    def prepare() -> list[list[int]]:
        lens = model() if isinstance(model, LazyModel) else model
        inputs = build_inputs_with_chat_template(lens.tokenizer, prompts, protocol=protocol)
        ready.extend((lens, inputs))
        return plan_batches(
            lens, inputs, batch_size=batch_size, labels=labels, only=sorted(missing)
        )

    plan = team.agreed(prepare)[0]
    lens, inputs = ready
    if not here:
        n_read = len(names_read(lens, inputs.hook))
        activations = torch.zeros(len(prompts), len(protocol.positions), n_read, lens.cfg.d_model)

    def run() -> None:
        batches = read_residual_stream(
            lens,
            inputs,
            batch_size=batch_size,
            progress=progress and team.leads,
            labels=labels,
            only=[row for batch in team.share(plan) for row in batch],
        )
        with stored.writer() if stored else nullcontext() as store:
            for rows, batch in batches:
                # Row by row: converted on the way, without a copy of the whole batch.
                for row, read in zip(rows.tolist(), batch, strict=True):
                    activations[row] = read
                if store:
                    store([prompts[row] for row in rows.tolist()], batch)

    team.agreed(run)
    return team.add_up(activations)


def _key(model: LazyModel, protocol: Protocol) -> dict[str, Any]:
    """Everything but the prompt itself that decides what is read of a prompt."""
    choices = protocol.to_dict()
    del choices["name"]
    return {**model.identity, "protocol": choices}
