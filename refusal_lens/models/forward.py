"""A forward pass that stops before the logits and disturbs nothing, in either TransformerLens.

The one place that knows how `HookedTransformer` (TransformerLens 3) and `TransformerBridge` (4)
differ when they run: how to leave the unembedding out, and where keys and values are kept.
"""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Int
from torch import Tensor

Model = Any
"""A `model.LensModel`; this room lies on the same floor as that one."""


_keeping: "weakref.WeakKeyDictionary[Any, bool]" = weakref.WeakKeyDictionary()


def input_device(model: Model) -> torch.device:
    """Where tokens go in: of a model on several devices, the first."""
    return next(model.parameters()).device


@contextmanager
def undisturbed(model: Model) -> Iterator[None]:
    """No gradient and no dropout inside; every module's training mode as it was afterwards."""
    # A TransformerBridge keeps the Hugging Face model outside of its own module tree.
    trees = (model, model.original_model) if _is_bridge(model) else (model,)
    in_training = [module for tree in trees for module in tree.modules() if module.training]
    try:
        for module in in_training:
            module.training = False
        with torch.no_grad():
            yield
    finally:
        for module in in_training:
            module.training = True


def without_logits(model: Model) -> dict[str, Any]:
    """The arguments with which a forward pass ends before the unembedding and keeps nothing."""
    if not _is_bridge(model):
        return {"stop_at_layer": model.cfg.n_layers}
    return {
        "logits_to_keep": torch.arange(0),
        "output_attentions": False,
        "return_type": None,
        "use_cache": False,
    }


def must_block(device: torch.device) -> bool:
    """Whether a copy to or from a device must be waited for; on CUDA it need not.

    CUDA has taken what it was given from ordinary memory before it returns. MPS has not, and reads
    memory that may be another tensor's by then.
    """
    return device.type != "cuda"


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """A CPU tensor on a device, without waiting for what the device was asked to do before."""
    return tensor.to(device, non_blocking=not must_block(device))


def copy_columns(columns: Int[Tensor, " pos"]) -> Any:
    """A `pos_slice` for `run_with_cache` that copies these columns, counted from the first.

    A list would be sent to the GPU again at every layer, each time waiting for all before it.
    """
    from transformer_lens.utilities.slice import Slice

    there: dict[torch.device, Tensor] = {}

    class Columns(Slice):
        def apply(self, tensor: Tensor, dim: int = 0) -> Tensor:
            if tensor.device not in there:
                there[tensor.device] = sent(columns, tensor.device)
            return tensor.index_select(dim, there[tensor.device])

    return Columns(columns)


def can_share_prefix(model: Model, longest: int) -> bool:
    """Whether rows of up to `longest` tokens are read the same with their common opening run once.

    Padding then stands between the opening and the rest of a row. So positions must come from the
    mask, as they do for rotary embeddings; a sliding window must be longer than the rows; there must
    be no hooks on the model, because they may be about the token at a certain index; and keys and
    values must really be kept.
    """
    windows = [getattr(model.cfg, name, None) for name in ("window_size", "sliding_window")]
    return (
        model.cfg.positional_embedding_type == "rotary"
        and all(longest <= window for window in windows if window)
        and not any(point.has_hooks() for point in model.hook_dict.values())
        and (not _is_bridge(model) or _keeps_keys(model))
    )


def _keeps_keys(model: Model) -> bool:
    """Whether a bridge hands its attention the cache it is given, tried once a model.

    transformers 5.24 calls the cache by another name than TransformerLens 4.3 looks for, which then
    attends to the new tokens alone and says nothing.
    """
    if model not in _keeping:
        token = torch.zeros(1, 1, dtype=torch.long, device=input_device(model))
        options = without_logits(model) | {"return_type": "logits_and_cache", "use_cache": True}
        with undisturbed(model):
            _, cache = model(token, **options)
        _keeping[model] = cache is not None and cache.get_seq_length() == 1
    return _keeping[model]


def run_prefix(model: Model, tokens: Int[Tensor, " pos"]) -> "Prefix":
    """Run the tokens that all rows open with, once, and keep their keys and values."""
    row = rearrange(tokens, "pos -> 1 pos").to(input_device(model))
    with undisturbed(model):
        return (_BridgePrefix if _is_bridge(model) else _HookedTransformerPrefix)(model, row)


class _HookedTransformerPrefix:
    def __init__(self, model: Model, row: Int[Tensor, "1 pos"]):
        from transformer_lens.cache.key_value_cache import TransformerLensKeyValueCache

        self.length = row.shape[1]
        self._cache = TransformerLensKeyValueCache.init_cache(model.cfg, row.device)
        mask = torch.ones_like(row)
        model(row, attention_mask=mask, past_kv_cache=self._cache, **without_logits(model))
        self._cache.freeze()

    def before(self, mask: Int[Tensor, "batch pos"]) -> dict[str, Any]:
        """The arguments that put the prefix before a batch with this mask."""
        shape = (len(mask), -1, -1, -1)
        entries = [
            replace(
                entry,
                past_keys=entry.past_keys.expand(shape),
                past_values=entry.past_values.expand(shape),
            )
            for entry in self._cache.entries
        ]
        previous = self._cache.previous_attention_mask.expand(len(mask), -1)
        cache = replace(self._cache, entries=entries, previous_attention_mask=previous)
        return {"attention_mask": mask, "past_kv_cache": cache}


class _BridgePrefix:
    def __init__(self, model: Model, row: Int[Tensor, "1 pos"]):
        from transformers.cache_utils import Cache, DynamicLayer

        class FrozenLayer(DynamicLayer):
            """Puts what it holds before new keys and values, and keeps none of the new ones."""

            def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> Any:
                assert self.keys is not None
                assert self.values is not None
                shape = (len(key_states), -1, -1, -1)
                keys = torch.cat([self.keys.expand(shape), key_states], dim=-2)
                values = torch.cat([self.values.expand(shape), value_states], dim=-2)
                return keys, values

        self.length = row.shape[1]
        options = without_logits(model) | {"return_type": "logits_and_cache", "use_cache": True}
        _, grown = model(row, attention_mask=torch.ones_like(row), **options)
        frozen = [FrozenLayer() for _ in grown.layers]
        for layer, run in zip(frozen, grown.layers, strict=True):
            DynamicLayer.update(layer, run.keys, run.values)
        self._cache = Cache(layers=[*frozen])

    def before(self, mask: Int[Tensor, "batch pos"]) -> dict[str, Any]:
        """The arguments that put the prefix before a batch with this mask."""
        whole = torch.cat([mask.new_ones(len(mask), self.length), mask], dim=1)
        return {"attention_mask": whole, "past_key_values": self._cache}


Prefix = _HookedTransformerPrefix | _BridgePrefix
"""Keys and values of the tokens that all rows of a run open with."""


def _is_bridge(model: Model) -> bool:
    return hasattr(model, "original_model")
