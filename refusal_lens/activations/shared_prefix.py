"""Run the shared prefix of all prompts once, for extraction and for interventions."""

import copy
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Int
from torch import Tensor

from ..models.forward import generation, input_device, of_rows

if TYPE_CHECKING:
    from ..models import HookedModel


def can_share_prefix(model: "HookedModel", longest: int) -> bool:
    """Whether prompts of up to `longest` tokens keep their activations when a prefix runs once."""
    # Batches are padded behind the prefix, so positions must be rotary, taken from the mask. A hook
    # may address a token by its index.
    return (
        model.cfg.positional_embedding_type == "rotary"
        and longest <= (generation(model).window(model) or longest)
        and not any(point.has_hooks() for point in model.hook_dict.values())
        and generation(model).keeps_keys(model)
    )


class SharedPrefix:
    """Keys and values of the tokens that every prompt begins with, one set for each recorded row.

    Record only where `can_share_prefix` holds; run every pass inside `models.forward.undisturbed`.
    Hooks may add rows from layer to layer, so each layer keeps its own number of recorded rows.
    """

    def __init__(self, model: "HookedModel"):
        self._model = model
        self._layers = generation(model).prefix_layers(model)
        self._mask = torch.ones(1, 0, dtype=torch.long, device=input_device(model))

    @property
    def length(self) -> int:
        """The number of recorded tokens."""
        return self._mask.shape[1]

    def recording(self, n_tokens: int) -> dict[str, Any]:
        """Arguments of the pass that records one row of tokens; call once, right before the pass."""
        return self._arguments(self._mask.new_ones(1, n_tokens), records=True, rows=1)

    def following(self, mask: Int[Tensor, "rows pos"], *, repeat: int = 1) -> dict[str, Any]:
        """Arguments of any later pass; every recorded row serves `repeat` rows of the batch."""
        return self._arguments(mask, records=False, rows=repeat)

    def extended(
        self, mask: Int[Tensor, "_ pos"], *, rows: int | tuple[Int[Tensor, " row"], int]
    ) -> tuple["SharedPrefix", dict[str, Any]]:
        """A prefix that also holds the tokens of the next pass, and that pass's arguments.

        This prefix stays as it is. For `rows`, see `models.forward.of_rows`.
        """
        longer = copy.copy(self)
        longer._layers = [copy.copy(layer) for layer in self._layers]
        return longer, longer._arguments(mask, records=True, rows=rows)

    def _arguments(self, mask: Int[Tensor, "_ pos"], *, records: bool, rows: Any) -> dict[str, Any]:
        layers = self._layers if records or self.length else []
        for layer in layers:
            layer.records, layer.rows = records, rows
        # A mask of one row is that of all rows.
        before = self._mask if len(self._mask) == 1 else of_rows(self._mask, rows)
        n_rows = max(len(before), len(mask))
        whole = torch.cat([before.expand(n_rows, -1), mask.expand(n_rows, -1)], dim=1)
        self._mask = whole if records else self._mask
        return generation(self._model).prefix_arguments(self._model, layers, whole, mask.shape[1])
