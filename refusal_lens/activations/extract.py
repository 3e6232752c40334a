"""Extract the residual stream of every layer from prompts; functions follow the data."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ..errors import InputError
from ..models import forward
from ..models.load import tokenizer_of
from ..prompts.contrast import Contrast
from ..prompts.protocol import Protocol
from ..prompts.tokenize import ChatInputs, build_inputs_with_chat_template, refuse_padding
from .batching import Rows, checked_rows, one_behind, plan_batches, run_halving
from .progress import RunBar, bar_of
from .shared_prefix import SharedPrefix

if TYPE_CHECKING:
    from ..models import HookedModel


class ContrastActivations(NamedTuple):
    """`resid_post` of both sides of a contrast: float32, on the CPU, in the prompts' order.
    >>> target, baseline = ContrastActivations(harmful, harmless)
    """

    target: Float[Tensor, "target layer d_model"]
    baseline: Float[Tensor, "baseline layer d_model"]


def get_layer_activations(
    model: "HookedModel",
    contrast: Contrast,
    *,
    protocol: Protocol = Protocol(),  # noqa: B008 (frozen)
    batch_size: int | None = None,
    progress: bool = True,
) -> ContrastActivations:
    """Return the activations of one contrast at every layer, at the protocol's one position.

    >>> target, baseline = get_layer_activations(model, load_contrast("refusal"))

    Layer `l` is `blocks.{l}.hook_resid_post`, or the protocol's other hook. `extract` runs several
    contrasts faster together and raises the same errors.

    Args:
        model, contrast: the model, which stays unchanged, and the two prompt sets.
        protocol: how a prompt becomes tokens, and the hook and position to read.
        batch_size, progress: prompts in a batch, or `None` for automatic; show a progress bar.
    """
    found = extract(model, [contrast], protocol=protocol, batch_size=batch_size, progress=progress)
    return found[contrast.name]


def extract(
    model: "HookedModel",
    contrasts: Sequence[Contrast],
    *,
    protocol: Protocol = Protocol(),  # noqa: B008
    batch_size: int | None = None,
    progress: bool = True,
) -> dict[str, ContrastActivations]:
    """Return the activations of several contrasts by name; small sets share batches.

    InputError for equal names, several positions, or errors of `get_prompt_activations`.

    Args:
        model, contrasts: the model, which stays unchanged, and contrasts of different names.
        protocol: how a prompt becomes tokens, and the hook and position to read.
        batch_size, progress: prompts in a batch, or `None` for automatic; show a progress bar.
    >>> target, baseline = extract(model, [load_contrast("alarm")])["alarm"]
    """
    names = [contrast.name for contrast in contrasts]
    if len(set(names)) < len(names):
        raise InputError(f"two contrasts have the same name, of {names}: rename one")
    if len(protocol.positions) != 1:
        asked = f"the protocol asks for {protocol.positions}"
        raise InputError(f"{asked}: choose one position, or use get_prompt_activations")
    options: dict[str, Any] = {"protocol": protocol, "batch_size": batch_size, "progress": progress}
    read = partial(get_prompt_activations, model, **options)
    return by_contrast(read, dict(zip(names, contrasts, strict=True)))


def by_contrast(
    read: Callable[..., Float[Tensor, "prompt pos layer d_model"]],
    contrasts: Mapping[str, Contrast],
) -> dict[str, ContrastActivations]:
    """Return activations by the contrasts' keys, from one call `read(prompts, labels=labels)`."""
    sides: list[tuple[str, Sequence[str]]] = []
    for one in contrasts.values():
        sides += [(f"{one.name}'s {one.target_name}", one.target)]
        sides += [(f"{one.name}'s {one.baseline_name}", one.baseline)]
    prompts = [prompt for _, side in sides for prompt in side]
    labels = [f"prompt {i} of {label}" for label, side in sides for i in range(len(side))]
    split = iter(read(prompts, labels=labels)[:, 0].split([len(side) for _, side in sides]))
    return {key: ContrastActivations(next(split), next(split)) for key in contrasts}


def get_prompt_activations(
    model: "HookedModel",
    prompts: Sequence[str],
    *,
    protocol: Protocol = Protocol(),  # noqa: B008
    batch_size: int | None = None,
    progress: bool = True,
    labels: Sequence[str] | None = None,
) -> Float[Tensor, "prompt pos layer d_model"]:
    """Return `resid_post` of every prompt at every layer and at the protocol's positions.

    float32, on the CPU, in the given order. Every batch size gives the numbers of single prompts,
    within 1e-5 relative in float32 and within rounding in bfloat16. Hooks on the model stay active.
    InputError without prompts, or if one exceeds context or memory or overflows the dtype.

    Args:
        model: the model, whose hooks, training mode and random state stay unchanged.
        prompts: user messages, without a chat template.
        protocol: how a prompt becomes tokens, and the hook and positions to read.
        batch_size: prompts in a batch, halved where memory runs out; `None` derives it.
        progress: show a progress bar over the prompts.
        labels: a name for each prompt in error messages; `None` numbers them.
    >>> activations = get_prompt_activations(model, ["How do I bake bread?", "Hello."])
    """
    refuse_padding(protocol)
    tokenizer: Any = tokenizer_of(model)  # where a model has none, the next line says so
    inputs = build_inputs_with_chat_template(tokenizer, prompts, protocol=protocol)
    labels = labels or [f"prompt {i}" for i in range(len(prompts))]
    n_layers = len(forward.hook_points(model, inputs.hook))
    activations = torch.empty(len(prompts), len(protocol.positions), n_layers, model.cfg.d_model)
    for rows, batch in read_residual_stream(
        model, inputs, batch_size=batch_size, progress=progress, labels=labels
    ):
        # Copying row by row converts to float32 without a copy of the whole batch.
        for row, activation in zip(rows.tolist(), batch, strict=True):
            activations[row] = activation
    return activations


def read_residual_stream(
    model: "HookedModel",
    inputs: ChatInputs,
    *,
    batch_size: int | None = None,
    progress: bool | RunBar = True,
    labels: Sequence[str] | None = None,
    only: Sequence[int] | None = None,
    points: Sequence[str] = (),
    combine: Callable[[list[Tensor]], Tensor] = partial(torch.stack, dim=2),  # noqa: B008
) -> Iterator[tuple[Int[Tensor, " batch"], Float[Tensor, "batch pos layer d_model"]]]:
    """Run tokens through the model and yield the rows and activations of each finished batch.

    Activations are on the CPU, in the model's dtype. Each row, or each of `only`, comes once, long
    rows first. The model is unchanged between batches, so the iteration can stop at any point.
    `points` are read instead of the protocol's; `combine` makes one tensor of their values.
    """
    rows = checked_rows(model, inputs, labels)
    rows = rows._replace(points=points or rows.points, combine=combine)
    plan = plan_batches(model, inputs, batch_size=batch_size, labels=labels, only=only)
    if not plan:
        return
    device, prefix, n_rows = forward.input_device(model), SharedPrefix(model), len(rows.tokens)
    if len(rows.prefix):
        recording = forward.without_logits(model) | prefix.recording(len(rows.prefix))
        with forward.undisturbed(model):
            model(rows.prefix[None].to(device), **recording)
    batches = run_halving(lambda batch: _run_batch(model, rows, batch, prefix), plan, rows, device)
    if not forward.must_block(device):
        batches = one_behind(batches)
    done = n_rows - sum(map(len, plan))
    with bar_of(progress, total=n_rows, initial=done, desc="prompts read") as bar:
        for batch, activations, finite, copied in batches:
            if copied:
                copied.synchronize()
            if not finite.all():
                index, layer = (~finite).nonzero()[0].tolist()
                problem = f"a non-finite activation at layer {layer} in {activations.dtype}"
                advice = "load the model in a wider dtype (bfloat16 or float32)"
                raise InputError(f"{rows.labels[batch[index]]} gives {problem}: {advice}")
            bar.update(len(batch))
            yield torch.tensor(batch), activations


def _run_batch(
    model: "HookedModel",
    rows: Rows,
    batch: list[int],
    prefix: SharedPrefix,
) -> tuple[list[int], Tensor, Bool[Tensor, "batch layer"], torch.cuda.Event | None]:
    """Rows, activations, whether these are finite, and when the CPU has them: never waits for CUDA."""
    lengths = rows.lengths[batch] - prefix.length
    width = int(lengths.max())
    mask = torch.arange(-width, 0) >= -lengths[:, None]
    columns, where = rows.from_end[batch].unique(return_inverse=True)
    tokens = forward.sent(rows.tokens[batch, -width:], forward.input_device(model))
    mask = forward.sent(mask.to(tokens.dtype), tokens.device)
    options: Any = forward.without_logits(model) | prefix.following(mask, repeat=len(batch))
    # An int or a slice as `pos_slice` would be a view that keeps every layer's whole stream alive.
    options |= {"names_filter": [*rows.points], "pos_slice": forward.copy_columns(columns % width)}
    with forward.undisturbed(model):
        _, cache = model.run_with_cache(tokens, return_cache_object=False, **options)
    device = cache[rows.points[0]].device
    streams = rows.combine([cache[name].to(device) for name in rows.points])
    each_row = torch.arange(len(batch), device=device)[:, None]
    activations = streams[each_row, forward.sent(where, device)]
    # Before the copy, for a GPU sees a hundred times as fast whether a number is finite.
    finite = activations.isfinite().all(-1).all(1)
    wait = forward.must_block(device)
    activations = activations.to("cpu", non_blocking=not wait)
    finite = finite.to("cpu", non_blocking=not wait)
    copied = torch.cuda.current_stream(device).record_event() if device.type == "cuda" else None
    return batch, activations, finite, copied
