"""Keys and values of the tokens that all prompts open with, one set for each branch of a run.

The rows of a branched run are `(branch prompt)`, and their number grows from layer to layer, so
neither generation's own cache will do: here every layer keeps as many rows as there are branches at
that layer, and hands each to all prompts of its branch.
"""

from typing import Any

import torch
from einops import repeat
from jaxtyping import Float
from torch import Tensor

from ..models.forward import input_device
from ..models.load import LensModel


class HookedTransformerPrefix:
    """Stands where a HookedTransformer expects its key-value cache."""

    def __init__(self, model: LensModel):
        cfg = model.cfg
        heads = cfg.n_key_value_heads or cfg.n_heads
        self._entries = [_Entry(torch.empty(1, 0, heads, cfg.d_head)) for _ in range(cfg.n_layers)]
        self._mask = torch.ones(1, 0, dtype=torch.long, device=input_device(model))

    def options(self, n_tokens: int, n_prompts: int | None) -> dict[str, Any]:
        """Arguments of a forward pass over the next tokens; without prompts it is recorded."""
        for entry in self._entries:
            entry.n_prompts = n_prompts
        mask = self._mask.new_ones(1, n_tokens)
        return {"attention_mask": mask, "past_kv_cache": self}

    def __getitem__(self, layer: int) -> "_Entry":
        return self._entries[layer]

    def append_attention_mask(self, mask: Tensor) -> Tensor:
        """The mask over the prefix and the tokens after it."""
        whole = torch.cat([self._mask, mask], dim=-1)
        if self._entries[0].n_prompts is None:
            self._mask = whole
        return whole


class _Entry:
    """One layer's keys and values, `[branch pos head d_head]`.

    `past_keys` is what TransformerLens reads lengths from; it expects the batch of the tokens, 1.
    """

    n_prompts: int | None = None

    def __init__(self, nothing: Tensor):
        self.past_keys = nothing

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """The keys and values to attend to: the prefix's and these."""
        if self.n_prompts is None:
            self._keys, self._values, self.past_keys = keys, values, keys[:1]
            return keys, values
        return (
            torch.cat([_for_prompts(self._keys, self.n_prompts), keys], dim=1),
            torch.cat([_for_prompts(self._values, self.n_prompts), values], dim=1),
        )


class BridgePrefix:
    """Stands where a Hugging Face model expects its key-value cache."""

    def __init__(self, model: LensModel):
        from transformers.cache_utils import Cache, DynamicLayer

        class Layer(DynamicLayer):
            n_prompts: int | None = None

            def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> Any:
                if self.n_prompts is None:
                    return super().update(key_states, value_states)
                assert self.keys is not None
                assert self.values is not None
                return (
                    torch.cat([_for_prompts(self.keys, self.n_prompts), key_states], dim=-2),
                    torch.cat([_for_prompts(self.values, self.n_prompts), value_states], dim=-2),
                )

        self._layers = [Layer() for _ in range(model.cfg.n_layers)]
        self._cache = Cache(layers=list(self._layers))
        self._device = input_device(model)

    def options(self, n_tokens: int, n_prompts: int | None) -> dict[str, Any]:
        """Arguments of a forward pass over the next tokens; without prompts it is recorded."""
        for layer in self._layers:
            layer.n_prompts = n_prompts
        length = self._cache.get_seq_length() + n_tokens
        mask = torch.ones(1, length, dtype=torch.long, device=self._device)
        return {"attention_mask": mask, "past_key_values": self._cache}


def _for_prompts(rows: Float[Tensor, "branch ..."], n_prompts: int) -> Float[Tensor, "rows ..."]:
    return repeat(rows, "branch ... -> (branch prompt) ...", prompt=n_prompts)


Prefix = HookedTransformerPrefix | BridgePrefix


def empty_prefix(model: LensModel) -> Prefix:
    """A cache for the model's generation of TransformerLens, ready to record."""
    return (BridgePrefix if _is_bridge(model) else HookedTransformerPrefix)(model)


def without_prefix(model: LensModel, n_tokens: int) -> dict[str, Any]:
    """Arguments of a forward pass over whole prompts."""
    mask = torch.ones(1, n_tokens, dtype=torch.long, device=input_device(model))
    return {"attention_mask": mask} | ({"use_cache": False} if _is_bridge(model) else {})


def _is_bridge(model: LensModel) -> bool:
    return hasattr(model, "original_model")
