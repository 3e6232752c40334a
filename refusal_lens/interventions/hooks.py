"""Hooks that ablate a direction from the residual stream, or add one, while the model runs.

A hook returns a new tensor and never writes into its input.

    with model.hooks(fwd_hooks=ablate_direction(model, direction)):
        logits = model(tokens, attention_mask=mask)
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from ..errors import InputError, check_tensors

if TYPE_CHECKING:
    from transformer_lens import HookedTransformer
    from transformer_lens.model_bridge import TransformerBridge

Hook = tuple[str, Callable[..., Tensor | None]]  # hook point and `fn(x, hook) -> new x`, or None
EMBEDDING = -1  # layer number of the embedding's output, before block 0


def ablate_direction(
    model: "HookedTransformer | TransformerBridge", direction: Float[Tensor, "*batch d_model"]
) -> list[Hook]:
    r"""Hooks that remove the component along a direction from every write to the residual stream.

        x <- x - (x . u) u,    u = direction / |direction|

    applies to the outputs of the embedding, attention layers and MLPs, after any norm that follows
    the layer (Gemma 2), at all positions, in float32. The effect is the same as that of projecting
    `u` out of all weights that write to the residual stream (Arditi et al. 2024, arXiv:2406.11717,
    section 2.4). Two successive ablations remove both directions only if these are orthogonal.

    Args:
        model: InputError if the model lacks the hook point of a write.
        direction: of any norm, for all rows, or one for each row (`[batch d_model]`). InputError if
            zero, not finite, or not of the model's width.
    """
    check_directions(model, direction)
    norm = direction.float().norm(dim=-1, keepdim=True)
    if (norm == 0).any():
        raise InputError("the direction to ablate is zero: there is nothing to remove")
    return projection_hooks(model, direction.float() / norm)


def add_direction(
    model: "HookedTransformer | TransformerBridge",
    direction: Float[Tensor, "*batch d_model"],
    layer: int,
) -> list[Hook]:
    """Hooks that add a direction to the residual stream after one layer, at all positions.

    Args:
        model: the model.
        direction: added with its norm to all rows, or one for each row (`[batch d_model]`).
            InputError if zero, not finite, or not of the model's width.
        layer: the block whose `hook_resid_post` is changed; -1 is the embedding's output. Arditi et
            al. (2024, arXiv:2406.11717, section 2.4) add at block inputs, so `l` is `l - 1` here.
    """
    check_directions(model, direction)
    if (direction == 0).all(-1).any():
        raise InputError("the direction to add is zero: there is nothing to add")

    def add(x: Tensor, hook: object) -> Tensor:
        return (x + direction.float().to(x.device).unsqueeze(-2)).to(x.dtype)

    return [(stream_after(model, layer), add)]


def projection_hooks(
    model: "HookedTransformer | TransformerBridge", units: Float[Tensor, "*batch d_model"]
) -> list[Hook]:
    """Hooks that project unit directions out of every write; a zero vector changes nothing."""

    def project(x: Tensor, hook: object) -> Tensor:
        unit, wide = units.to(x.device).unsqueeze(-2), x.float()
        along = torch.linalg.vecdot(wide, unit).unsqueeze(-1)
        return torch.addcmul(wide, along, unit, value=-1).to(x.dtype)

    return [(name, project) for name in writes(model)]


def writes(model: "HookedTransformer | TransformerBridge") -> list[str]:
    """The hook points of all writes to the residual stream, first the embedding's."""
    layers = range(model.cfg.n_layers)
    outputs = ["attn_out"] if getattr(model.cfg, "attn_only", False) else ["attn_out", "mlp_out"]
    names = [f"blocks.{layer}.hook_{output}" for layer in layers for output in outputs]
    if missing := [name for name in names if name not in model.hook_dict]:
        raise InputError(
            f"this model has no {missing[0]}, so the output of that layer can't be changed: "
            "directions can be added to its residual stream, not ablated from it"
        )
    return [stream_after(model, EMBEDDING), *names]


def stream_after(model: "HookedTransformer | TransformerBridge", layer: int) -> str:
    """The hook point of the residual stream after a layer; -1 is after the embedding."""
    n_layers = model.cfg.n_layers
    if not EMBEDDING <= layer < n_layers:
        raise InputError(f"there is no layer {layer}: choose -1 (the embedding) to {n_layers - 1}")
    return "blocks.0.hook_resid_pre" if layer == EMBEDDING else f"blocks.{layer}.hook_resid_post"


def check_directions(
    model: "HookedTransformer | TransformerBridge", directions: Float[Tensor, "*batch d_model"]
) -> None:
    """Raise InputError unless directions are finite and of the model's width."""
    check_tensors(direction=(directions, "*batch d_model"))
    width = model.cfg.d_model
    if directions.shape[-1] != width:
        raise InputError(
            f"a direction of {directions.shape[-1]} dimensions does not fit this model's {width}: "
            "it comes from another model"
        )
    if not directions.isfinite().all():
        raise InputError("the direction holds NaN or infinite values: choose another layer")
