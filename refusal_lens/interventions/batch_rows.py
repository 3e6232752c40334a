"""Batches whose rows are prompts under interventions, each row under its own."""

from collections.abc import Callable, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from ..models.forward import drop_earlier_positions
from .hooks import EMBEDDING, Hook, can_join_rows, projection_hooks, stream_after

if TYPE_CHECKING:
    from ..models import HookedModel

ROOM_ON_CPU, ROOM_ON_GPU = 2**28, 2**33  # bytes of the keys, values and logits of a pass


class Interventions(NamedTuple):
    """Directions and the layers after which each is added; without layers they are ablated.

    An ablation sets the component to `references` (0 without them); it may be of several orthogonal
    directions, some of them zero. `last_position` changes the prompt's last token alone, and neither
    the tokens before it nor those of the reply.
    """

    directions: Float[Tensor, "intervention *several d_model"]
    layers: list[int] | None = None
    references: Float[Tensor, "intervention *several layer"] | None = None
    last_position: bool = False

    def at(self, rows: Sequence[int], device: torch.device | str) -> "Interventions":
        """Some of the interventions, on a device."""
        layers = None if self.layers is None else [self.layers[i] for i in rows]
        references = None if self.references is None else self.references[rows].float().to(device)
        directions = self.directions[rows].float().to(device)
        return Interventions(directions, layers, references, self.last_position)


def most_rows(model: "HookedModel", n_recorded: int) -> int:
    """How many rows may run at a time, each with its own keys and values of so many tokens."""
    cfg, weight = model.cfg, next(model.parameters())
    width = 2 * cfg.n_layers * (cfg.n_key_value_heads or cfg.n_heads) * cfg.d_head
    a_row = width * n_recorded * weight.element_size() + 4 * cfg.d_vocab
    return max(1, (ROOM_ON_GPU if weight.is_cuda else ROOM_ON_CPU) // a_row)


def last_logits(
    model: "HookedModel",
    tokens: Int[Tensor, "_ pos"],
    start: Float[Tensor, "row pos d_model"],
    hooks: list[Hook],
    arguments: dict[str, Any],
) -> Float[Tensor, "_ 1 d_vocab"]:
    """Logits of the last position, where `start` replaces the embedding's output.

    Most models take the rows from `start`, and so as many rows of tokens as of the mask are enough.
    """
    if can_join_rows(model):
        tokens = tokens[: len(arguments["attention_mask"])]
    else:
        arguments = {"attention_mask": torch.ones_like(tokens)}
    embedded: Hook = (stream_after(model, EMBEDDING), lambda x, hook: start)
    # The hooks of one point run in this order: start, change, read, drop all positions but the last.
    with model.hooks(fwd_hooks=[embedded, *hooks, drop_earlier_positions(model)]):
        return model(tokens, **arguments)


def joining_hooks(
    model: "HookedModel",
    start: Float[Tensor, "prompt pos d_model"],
    these: Interventions,
) -> list[Hook]:
    """Hooks that append the rows of each addition to the batch after the addition's layer."""

    def joining(layer: int, added: Float[Tensor, "new d_model"]) -> Hook:
        def join(x: Tensor, hook: object) -> Tensor:
            new = x[: len(start)] + added.to(x.device)[:, None, None]
            return torch.cat([x, new.flatten(0, 1).to(x.dtype)])

        return stream_after(model, layer), join

    layers = these.layers or []
    return [
        joining(layer, these.directions[list(same)])
        for layer, same in groupby(range(len(layers)), key=layers.__getitem__)
    ]


def hooks_by_row(
    model: "HookedModel",
    these: Interventions,
    rows: Int[Tensor, " row"],
    *,
    position: int | None = None,
) -> list[Hook]:
    """Hooks that give each row of a batch its intervention: 0 is none, `i + 1` the i-th.

    A `position`, counted from the end, is the only one that they change. OPT's MLP has one axis for
    rows and positions.
    """

    def by_row(change: Callable[..., Any]) -> Callable[..., Tensor]:
        def hook_fn(x: Tensor, hook: object) -> Tensor:
            whole = x.reshape(len(rows), -1, x.shape[-1])
            if position is None:
                return change(whole, hook).view_as(x)
            changed = whole.clone()
            changed[:, position] = change(whole[:, position, None], hook)[:, 0]
            return changed.view_as(x)

        return hook_fn

    def by_row_of(values: Tensor) -> Tensor:
        """The values of each row, zero for the unmodified model."""
        return torch.cat([values.new_zeros(1, *values.shape[1:]), values])[rows]

    def adding(layer: int) -> Hook:
        here = torch.tensor([each == layer for each in these.layers or ()], device=rows.device)
        added = by_row_of(these.directions * here[:, None])[:, None]
        return stream_after(model, layer), lambda x, hook: (x + added.to(x.device)).to(x.dtype)

    rows, references = rows.to(these.directions.device), these.references
    if these.layers is None:
        units = by_row_of(functional.normalize(these.directions, dim=-1))
        several = units.view(len(rows), -1, units.shape[-1]).unbind(1)
        constants: Sequence[Tensor | None] = [None] * len(several)
        if references is not None:
            constants = by_row_of(references).view(len(rows), len(several), -1).unbind(1)
        pairs = zip(several, constants, strict=True)
        hooks = [each for unit, at in pairs for each in projection_hooks(model, unit, at)]
    else:
        hooks = [adding(layer) for layer in sorted(set(these.layers))]
    return [(name, by_row(change)) for name, change in hooks]
