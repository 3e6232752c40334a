"""Hooks that ablate a direction from the residual stream, or add one, while the model runs.

A hook returns a new tensor and never writes into its input.
"""

import weakref
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize

from ..errors import InputError, InterventionError, check_tensors
from ..models.forward import input_device, undisturbed

if TYPE_CHECKING:
    from ..models import HookedModel

Hook = tuple[str, Callable[..., Tensor | None]]  # hook point and `fn(x, hook) -> new x`, or None
EMBEDDING = -1  # layer number of the embedding's output, before block 0
# Where a block reads the stream between its writes; `per_layer_input_gate` is Gemma 4's.
INSIDE_BLOCK = ("hook_resid_mid", "per_layer_input_gate.hook_in")

_checked: "weakref.WeakSet[Any]" = weakref.WeakSet()  # models that passed `check_interventions`
_rows_join: "weakref.WeakKeyDictionary[Any, bool]" = weakref.WeakKeyDictionary()


def ablate_direction(
    model: "HookedModel",
    direction: Float[Tensor, "*batch d_model"],
    reference: Float[Tensor, "*directions"] | float | None = None,
) -> list[Hook]:
    r"""Hooks that set the component of the residual stream along a direction to a constant.

    >>> with model.hooks(fwd_hooks=ablate_direction(model, r[20])):
    ...     logits = model(tokens)

        x <- x - (x . u) u + reference u,    u = direction / |direction|

    applies at all positions, in float32, wherever the stream is read: after the embedding, inside
    each block and after each block, whatever the block writes. Without a reference the component
    is removed, with the same effect as projecting `u` out of all weights that write to the stream
    (directional ablation; Arditi et al. 2024, arXiv:2406.11717, section 2.4). With the mean
    component of harmless prompts as reference the ablation is affine (Marshall et al. 2024,
    arXiv:2411.09003). Two successive ablations hold for both directions only if these are
    orthogonal.

    Args:
        model: the model.
        direction: of any norm, for all rows, or one for each row of the batch (`[batch d_model]`).
            InputError if zero, not finite, not of the model's width or one for each layer; a batch
            of another number of rows raises InputError when it runs.
        reference: the constant, in units of the stream: one for all, one for each direction, or
            one for each direction and layer; `None` is 0. Inside a block a layer's reference is
            that of the layer before, and the stream up to the middle of block 0 stays.
            InputError if not finite or of another shape.
    """
    _check_rows(model, direction)
    norm = direction.float().norm(dim=-1, keepdim=True)
    if (norm == 0).any():
        raise InputError("the direction to ablate is zero: there is nothing to remove")
    return projection_hooks(model, direction.float() / norm, reference)


def add_direction(
    model: "HookedModel",
    direction: Float[Tensor, "*batch d_model"],
    layer: int,
) -> list[Hook]:
    """Hooks that add a direction to the residual stream after one layer, at all positions.

    >>> with model.hooks(fwd_hooks=add_direction(model, 2 * r[20], layer=20)):
    ...     logits = model(tokens)

    Args:
        model: the model.
        direction: added with its norm to all rows, or one for each row of the batch
            (`[batch d_model]`). InputError if zero, not finite, not of the model's width or one for
            each layer; a batch of another number of rows raises InputError when it runs.
        layer: the block whose `hook_resid_post` is changed; -1 is the embedding's output. Arditi et
            al. (2024, arXiv:2406.11717, section 2.4) add at block inputs, so `l` is `l - 1` here.
    """
    _check_rows(model, direction)
    if (direction == 0).all(-1).any():
        raise InputError("the direction to add is zero: there is nothing to add")

    def add(x: Tensor, hook: object) -> Tensor:
        return (x + _for_rows(direction.float(), x)).to(x.dtype)

    return [(stream_after(model, layer), add)]


def projection_hooks(
    model: "HookedModel",
    units: Float[Tensor, "*batch d_model"],
    reference: Float[Tensor, "*directions"] | float | None = None,
) -> list[Hook]:
    """Hooks that set the components along unit directions; a zero vector changes nothing."""
    constant = torch.as_tensor(0.0 if reference is None else reference, dtype=torch.float32)
    if not constant.isfinite().all():
        raise InputError("the reference holds NaN or infinite values: give the component to set")
    n_layers, points = model.cfg.n_layers, [(p, _last_block(p)) for p in stream_points(model)]
    if constant.shape == (*units.shape[:-1], n_layers):
        # Before the end of block 0 no layer's reference holds, and the stream stays.
        points = [(name, layer) for name, layer in points if layer >= 0]
    elif constant.ndim and constant.shape != units.shape[:-1]:
        problem = f"references of shape {list(constant.shape)} for directions {list(units.shape)}"
        raise InputError(f"{problem}: hand over one number, [*batch] or [*batch {n_layers}]")
    else:
        constant = constant.expand(units.shape[:-1])[..., None].expand(*units.shape[:-1], n_layers)
    constant = constant.to(units.device)

    def project(x: Tensor, hook: object, *, layer: int) -> Tensor:
        unit, wide = _for_rows(units, x), x.float()
        component = _for_rows(constant[..., layer, None], x)
        along = torch.linalg.vecdot(wide, unit).unsqueeze(-1) - component
        return torch.addcmul(wide, along, unit, value=-1).to(x.dtype)

    return [(name, partial(project, layer=layer)) for name, layer in points]


def _last_block(point: str) -> int:
    """The block whose whole output a point of the stream holds; -1 before the end of block 0."""
    return int(point.split(".")[1]) - (not point.endswith("hook_resid_post"))


def stream_points(model: "HookedModel") -> list[str]:
    """The hook points between which a block reads or writes the residual stream, in order."""
    names = [stream_after(model, EMBEDDING)]
    for layer in range(model.cfg.n_layers):
        inside = [f"blocks.{layer}.{point}" for point in INSIDE_BLOCK]
        names += [name for name in inside if name in model.hook_dict] + [stream_after(model, layer)]
    return names


def stream_after(model: "HookedModel", layer: int) -> str:
    """The hook point of the residual stream after a layer; -1 is after the embedding."""
    n_layers = model.cfg.n_layers
    if not EMBEDDING <= layer < n_layers:
        raise InputError(f"there is no layer {layer}: choose -1 (the embedding) to {n_layers - 1}")
    return "blocks.0.hook_resid_pre" if layer == EMBEDDING else f"blocks.{layer}.hook_resid_post"


def check_directions(model: "HookedModel", directions: Float[Tensor, "*batch d_model"]) -> None:
    """Raise InputError unless directions are finite and of the model's width."""
    check_tensors(direction=(directions, "*batch d_model"))
    width = model.cfg.d_model
    if directions.shape[-1] != width:
        problem = f"{directions.shape[-1]} dimensions does not fit this model's {width}"
        raise InputError(f"a direction of {problem}: it comes from another model")
    if not directions.isfinite().all():
        raise InputError("the direction holds NaN or infinite values: choose another layer")


def _check_rows(model: "HookedModel", direction: Float[Tensor, "*batch d_model"]) -> None:
    """Raise InputError for what is no direction of the model, or holds one for each layer."""
    check_directions(model, direction)
    if direction.ndim > 2 or (direction.ndim == 2 and len(direction) == model.cfg.n_layers):
        problem = f"directions of shape {list(direction.shape)} are not one for all rows"
        raise InputError(f"{problem}: hand over a layer's, [d_model], such as directions[layer]")


def _for_rows(values: Float[Tensor, "*batch width"], x: Tensor) -> Tensor:
    """Values for all rows of a batch, or one for each row, as they broadcast over positions."""
    if values.ndim > 1 and values.shape[:-1] != x.shape[:1]:
        problem = f"directions of shape {list(values.shape)} met a batch of {len(x)} rows"
        raise InputError(f"{problem}: hand over one, such as directions[layer], or one a row")
    return values.to(x.device).unsqueeze(-2)


def check_interventions(model: "HookedModel") -> None:
    """Raise InputError unless additions and ablations are measured to be complete.

    Three passes over four tokens, once for each model, measure that

    - a direction added to the stream is there at the next hook point of the stream;
    - an ablated direction is absent at the next block and in whatever a block's modules read;
    - the logits follow from the stream after the last block.
    """
    if model in _checked:
        return
    unit = torch.randn(model.cfg.d_model, generator=torch.Generator().manual_seed(0))
    unit = normalize(unit, dim=-1).to(input_device(model))
    with undisturbed(model):
        for name, share in _shares_added(model, unit).items():
            if not share > 0.5:
                raise _incomplete(name, "a direction added to the stream before it is not found")
        for name, share in _shares_left(model, unit).items():
            if not share < (1e-2 if name.endswith("hook_resid_pre") else 0.5):
                raise _incomplete(name, "an ablated direction is found again")
        last = stream_after(model, model.cfg.n_layers - 1)
        logits = _short_pass(model, [(last, lambda x, hook: x[:, :1].expand_as(x))])
        if not (logits - logits[:, :1]).abs().max() <= 1e-2 * logits.std():
            raise _incomplete(last, "a change of the stream does not reach the logits")
    _checked.add(model)


def can_join_rows(model: "HookedModel") -> bool:
    """Whether rows of other prompts can join a pass at the embedding's output, measured once.

    Not where blocks read more of the prompt than the residual stream (Gemma 4's per-layer inputs
    come from the token ids), nor where the number of rows is fixed before block 0 (BLOOM).
    """
    if model not in _rows_join:
        tokens = torch.arange(10, 18, device=input_device(model)).view(2, 4)
        mask, start = torch.ones_like(tokens), stream_after(model, EMBEDDING)
        with undisturbed(model):
            apart = model(tokens, attention_mask=mask)
            embedded = model(tokens, attention_mask=mask, stop_at_layer=0)
            try:
                with model.hooks(fwd_hooks=[(start, lambda x, hook: embedded)]):
                    joined = model(tokens[:1], attention_mask=mask[:1])
                difference = (joined - apart).abs().max()
                _rows_join[model] = bool(difference < 0.05 * (apart[0] - apart[1]).abs().max())
            except RuntimeError:
                _rows_join[model] = False
    return _rows_join[model]


def _shares_added(model: Any, unit: Tensor) -> dict[str, float]:
    """Cosines, at each point of the stream, with what was added at the point before."""
    shares = {}

    def flip(x: Tensor, hook: Any, *, name: str, sign: int) -> Tensor:
        shares[name] = (-sign * _cosine(x, unit)).min().item()
        return _flooded(x, sign * unit)

    hooks: list[Hook] = []
    for layer in range(model.cfg.n_layers):
        for name, sign in ((f"blocks.{layer}.hook_resid_pre", 1), (stream_after(model, layer), -1)):
            hooks.append((name, partial(flip, name=name, sign=sign)))
    _short_pass(model, hooks)
    del shares[stream_after(model, EMBEDDING)]  # nothing was added before it
    return shares


def _shares_left(model: Any, unit: Tensor) -> dict[str, float]:
    """Share of an ablated component that is left at each block's input and in its modules."""
    shares, starts = {}, {}

    def start(x: Tensor, hook: Any, *, block: str) -> Tensor:
        shares[f"blocks.{block}.hook_resid_pre"] = _cosine(x, unit).abs().max().item()
        starts[block] = _flooded(x, unit)
        return starts[block]

    def inside(x: Any, hook: Any, *, name: str) -> None:
        whole = starts[name.split(".")[1]].float()
        # The first modules of a block read its unmodified input, and a norm's output is small.
        if isinstance(x, Tensor) and x.shape == whole.shape and not torch.equal(x.float(), whole):
            shares[name] = 1 - ((x.float() - whole).norm() / whole.norm()).item()

    hooks = projection_hooks(model, unit)
    for block in map(str, range(model.cfg.n_layers)):
        hooks.append((f"blocks.{block}.hook_resid_pre", partial(start, block=block)))
    for name in model.hook_dict:
        if name.startswith("blocks.") and name.endswith((".hook_in", ".hook_resid_mid")):
            hooks.append((name, partial(inside, name=name)))
    _short_pass(model, hooks)
    return shares


def _cosine(x: Tensor, unit: Tensor) -> Tensor:
    return cosine_similarity(x.float(), unit.to(x.device), dim=-1)


def _flooded(x: Tensor, unit: Tensor) -> Tensor:
    """A stream whose component along a unit vector is 100 times as large as all of the rest."""
    wide, unit = x.float(), unit.to(x.device)
    rest = wide - (wide @ unit)[..., None] * unit
    size = rest.norm(dim=-1).max().clamp(min=len(unit) ** 0.5)  # the output of a norm, at least
    return (rest + 100 * size * unit).to(x.dtype)


def _short_pass(model: Any, hooks: list[Hook]) -> Tensor:
    tokens = torch.arange(10, 14, device=input_device(model))[None]
    with model.hooks(fwd_hooks=hooks):
        return model(tokens, attention_mask=torch.ones_like(tokens)).float()


def _incomplete(name: str, what: str) -> InterventionError:
    return InterventionError(
        f"{what} at {name}: TransformerLens can't intervene in layer {name.split('.')[1]} of this "
        "model; its directions can be read and compared"
    )
