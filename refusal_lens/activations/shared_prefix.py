"""Run the shared prefix of all prompts once, for extraction and for interventions."""

import copy
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Int
from torch import Tensor

from ..models.forward import generation, input_device

if TYPE_CHECKING:
    from transformer_lens import HookedTransformer
    from transformer_lens.model_bridge import TransformerBridge


def can_share_prefix(model: "HookedTransformer | TransformerBridge", longest: int) -> bool:
    """Whether prompts of up to `longest` tokens keep their activations when a prefix runs once.

    Batches are padded between the prefix and the rest of each prompt, so positions must be rotary
    (taken from the mask) and a sliding window must hold every prompt. The model must be free of
    hooks, since a hook may address a token by its index, and must be measured to keep its keys.
    """
    return (
        model.cfg.positional_embedding_type == "rotary"
        and longest <= (generation(model).window(model) or longest)
        and not any(point.has_hooks() for point in model.hook_dict.values())
        and generation(model).keeps_keys(model)
    )


class SharedPrefix:
    """Keys and values of the tokens that every prompt begins with, one set for each recorded row.

        prefix = SharedPrefix(model)
        with undisturbed(model):
            model(tokens[:1, :8], **prefix.recording(8))
            logits = model(tokens[:, 8:], **prefix.following(mask[:, 8:], repeat=len(tokens)))

    Record only where `can_share_prefix` holds; run every pass inside `models.forward.undisturbed`.
    Hooks may add rows from layer to layer, so each layer keeps its own number of recorded rows.
    """

    def __init__(self, model: "HookedTransformer | TransformerBridge"):
        self.length = 0  # recorded tokens
        self._device = input_device(model)
        self._cache = generation(model).PrefixCache(model)

    def recording(self, n_tokens: int) -> dict[str, Any]:
        """Arguments of the pass that records one row of tokens; call once, right before the pass."""
        self.length = n_tokens
        mask = torch.ones(1, n_tokens, dtype=torch.long, device=self._device)
        return self._cache.arguments(mask, records=True, rows=1)

    def following(self, mask: Int[Tensor, "rows pos"], *, repeat: int = 1) -> dict[str, Any]:
        """Arguments of a pass over the tokens after the prefix, or over whole prompts without one.

        `mask` is 1 on these tokens and 0 on padding. Every recorded row serves `repeat` consecutive
        rows of the batch. Any number of passes can follow one recording.
        """
        return self._cache.arguments(mask, records=False, rows=repeat)

    def extended(
        self, mask: Int[Tensor, "_ pos"], *, rows: int | tuple[Int[Tensor, " row"], int]
    ) -> tuple["SharedPrefix", dict[str, Any]]:
        """A prefix that also holds the tokens of the next pass, and that pass's arguments.

        The pass leaves this prefix as it is. `rows` is the number of consecutive rows that each
        recorded row serves, or the recorded row of each (`models.forward.after_prefix`).
        """
        longer = copy.copy(self)
        longer.length, longer._cache = self.length + mask.shape[1], self._cache.copy()
        return longer, longer._cache.arguments(mask, records=True, rows=rows)
