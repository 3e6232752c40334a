"""What ablating or adding each of many directions does to the first token of the reply."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..errors import InputError, check_tensors
from ..models.load import LensModel
from ..prompts.protocol import Protocol
from .branches import run_branches
from .hooks import check_directions, stream_after
from .refusal_metric import RefusalTokens, next_token_kl, refusal_log_odds


@dataclass(frozen=True)
class Effects:
    """The first token under many interventions, prompt by prompt; float32, on the CPU.

    Attributes:
        unchanged: refusal log-odds of the model as it is.
        log_odds: refusal log-odds under each intervention, in the shape the directions had.
        kl: next-token KL(unchanged || under the intervention), in nats.
    """

    unchanged: Float[Tensor, " prompt"]
    log_odds: Float[Tensor, "*intervention prompt"]
    kl: Float[Tensor, "*intervention prompt"]


def ablation_effects(
    model: LensModel,
    prompts: Sequence[str],
    directions: Float[Tensor, "*intervention d_model"],
    *,
    refusal_tokens: RefusalTokens,
    protocol: Protocol = Protocol(),  # noqa: B008 (frozen)
    batch_size: int | None = None,
    progress: bool = True,
) -> Effects:
    """The effect of ablating each direction, everywhere, as `ablate_direction` does.

    `[layer d_model]` sweeps the directions of all layers, `[pos layer d_model]` those of several
    positions too. The same numbers as one at a time, whatever the batches (within 1e-4 in float32).
    NaN where a direction has a NaN; a direction of zeros has no effect.

    Raises:
        InputError: if there are no prompts, or one is longer than the model's context; if a
            direction is infinite or not of the model's width; if there are hooks on the model.

    Reference: Arditi et al. 2024, arXiv:2406.11717, sections 2.4 and B.
    """
    return _effects(
        model, prompts, directions, None, refusal_tokens, protocol, batch_size, progress
    )


def addition_effects(
    model: LensModel,
    prompts: Sequence[str],
    directions: Float[Tensor, "*intervention d_model"],
    layers: Int[Tensor, "..."],
    *,
    refusal_tokens: RefusalTokens,
    protocol: Protocol = Protocol(),  # noqa: B008
    batch_size: int | None = None,
    progress: bool = True,
) -> Effects:
    """The effect of adding each direction after its layer, as `add_direction` does.

    `layers` broadcasts against the directions: `torch.arange(n_layers)` for `[layer d_model]` or
    `[pos layer d_model]` adds each where it was read. Layer -1 is the embedding. Otherwise as
    `ablation_effects`.

    Raises:
        InputError: as `ablation_effects`, and if there is no such layer.
    """
    check_tensors(directions=(directions, "*intervention d_model"))
    try:
        each = layers.expand(directions.shape[:-1])
    except RuntimeError as error:
        raise InputError(
            f"layers of shape {list(layers.shape)} do not fit directions of shape "
            f"{list(directions.shape)}: give one layer to each"
        ) from error
    return _effects(
        model,
        prompts,
        directions,
        each.flatten().tolist(),
        refusal_tokens,
        protocol,
        batch_size,
        progress,
    )


def _effects(
    model: LensModel,
    prompts: Sequence[str],
    directions: Float[Tensor, "*intervention d_model"],
    layers: list[int] | None,
    refusal_tokens: RefusalTokens,
    protocol: Protocol,
    batch_size: int | None,
    progress: bool,
) -> Effects:
    check_tensors(directions=(directions, "*intervention d_model"))
    flat = directions.reshape(-1, directions.shape[-1])
    for layer in layers or ():
        stream_after(model, layer)  # also of directions that need no run
    unknown, nothing = flat.isnan().any(-1).cpu(), (flat == 0).all(-1).cpu()
    run = (~unknown & ~nothing).nonzero()[:, 0].tolist()
    check_directions(model, flat[run])
    outcomes = run_branches(
        model,
        prompts,
        flat[run],
        None if layers is None else [layers[i] for i in run],
        protocol=protocol,
        batch_size=batch_size,
        progress=progress,
    )
    unchanged = torch.full((len(prompts),), torch.nan)
    log_odds = torch.full((len(flat), len(prompts)), torch.nan)
    kl = torch.full_like(log_odds, torch.nan)
    for outcome in outcomes:
        odds = refusal_log_odds(outcome.logits, refusal_tokens).cpu()
        unchanged[outcome.prompts] = odds[0]
        ran = torch.tensor([run[i] for i in outcome.interventions], dtype=torch.long)
        where = ran[:, None], torch.tensor(outcome.prompts)
        log_odds[where] = odds[1:]
        kl[where] = next_token_kl(outcome.logits[:1], outcome.logits[1:]).cpu()
    log_odds[nothing], kl[nothing] = unchanged, 0.0
    shape = (*directions.shape[:-1], len(prompts))
    return Effects(unchanged, log_odds.reshape(shape), kl.reshape(shape))
