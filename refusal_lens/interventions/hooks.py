"""A direction removed from, or added to, the residual stream while the model runs.

Both functions return hooks, to be used in either of TransformerLens's ways, alone or together:

    with model.hooks(fwd_hooks=ablate_direction(model, direction)):
        logits = model(tokens, attention_mask=mask)

    logits = model.run_with_hooks(tokens, attention_mask=mask, fwd_hooks=add_direction(...))

A hook returns a new tensor and never writes into the one it is given; weights are not touched.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from ..errors import InputError, check_tensors
from ..models.load import LensModel

Hook = tuple[str, Callable[..., Tensor]]
"""The name of a hook point, and what to do there: `fn(x, hook) -> x`."""

EMBEDDING = -1
"""As a layer: what the embedding wrote, before block 0."""


def ablate_direction(model: LensModel, direction: Float[Tensor, "*batch d_model"]) -> list[Hook]:
    r"""Hooks that remove the component along a direction from every write to the residual stream.

    `x - (x . u) u`, `u` the direction at norm 1, for what the embedding, every attention layer and
    every MLP writes, at all positions; after a norm that stands between a layer and the stream, as
    in Gemma 2. So the stream never holds anything along `u`, and the model computes what it would
    with `u` projected out of all weights that write to the stream. Neither the direction's norm nor
    its sign matters. The projection is computed in float32.

    `[d_model]` is one direction for all rows; `[batch d_model]` gives each row its own. Two
    ablations one after the other remove both directions only if these are orthogonal.

    Raises:
        InputError: if the direction is zero, not finite, or not of the model's width; if the model
            has no hook on what a layer writes.

    Reference: Arditi et al. 2024, arXiv:2406.11717, section 2.4.
    """
    check_directions(model, direction)
    norm = direction.float().norm(dim=-1, keepdim=True)
    if (norm == 0).any():
        raise InputError("the direction to ablate is zero: there is nothing to remove")
    return projection_hooks(model, direction.float() / norm)


def add_direction(
    model: LensModel, direction: Float[Tensor, "*batch d_model"], layer: int
) -> list[Hook]:
    """Hooks that add a direction to the residual stream after one layer, at all positions.

    Added as it is, its norm included, to `blocks.{layer}.hook_resid_post`; layer -1 is what the
    embedding wrote. The published method adds at a block's input: its layer `l` is `l - 1` here.
    `[batch d_model]` gives each row its own direction.

    Raises:
        InputError: if the direction is zero, not finite, or not of the model's width; if there is
            no such layer.

    Reference: Arditi et al. 2024, arXiv:2406.11717, section 2.4.
    """
    check_directions(model, direction)
    if (direction == 0).all(-1).any():
        raise InputError("the direction to add is zero: there is nothing to add")

    def add(x: Tensor, hook: object) -> Tensor:
        return (x + per_row(direction.float(), x)).to(x.dtype)

    return [(stream_after(model, layer), add)]


def projection_hooks(model: LensModel, units: Float[Tensor, "*batch d_model"]) -> list[Hook]:
    """Hooks that project unit directions out of every write; a zero row leaves its row alone."""

    def project(x: Tensor, hook: object) -> Tensor:
        unit, wide = per_row(units, x), x.float()
        along = torch.linalg.vecdot(wide, unit).unsqueeze(-1)
        return torch.addcmul(wide, along, unit, value=-1).to(x.dtype)

    return [(name, project) for name in writes(model)]


def writes(model: LensModel) -> list[str]:
    """The hook points of all writes to the residual stream, the embedding's first."""
    names = [stream_after(model, EMBEDDING)]
    present = model.hook_dict
    for layer in range(model.cfg.n_layers):
        names.append(f"blocks.{layer}.hook_attn_out")
        if not getattr(model.cfg, "attn_only", False):
            names.append(f"blocks.{layer}.hook_mlp_out")
    if missing := [name for name in names if name not in present]:
        raise InputError(
            f"this model has no {missing[0]}, so what that layer writes can't be changed: "
            "directions can be added to its residual stream, not ablated from it"
        )
    return names


def stream_after(model: LensModel, layer: int) -> str:
    """The hook point of the residual stream after a layer; -1 is after the embedding."""
    n_layers = model.cfg.n_layers
    if not EMBEDDING <= layer < n_layers:
        raise InputError(f"there is no layer {layer}: choose -1 (the embedding) to {n_layers - 1}")
    return "blocks.0.hook_resid_pre" if layer == EMBEDDING else f"blocks.{layer}.hook_resid_post"


def check_directions(model: LensModel, directions: Float[Tensor, "*batch d_model"]) -> None:
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


def per_row(
    directions: Float[Tensor, "*batch d_model"], x: Float[Tensor, "batch pos d_model"]
) -> Float[Tensor, "*batch 1 d_model"]:
    """Directions as they broadcast over the positions of a batch, on its device."""
    return directions.to(x.device).unsqueeze(-2)
