"""TransformerLens 4: a `TransformerBridge` wraps the Hugging Face model and runs its own pass."""

import copy
import inspect
import weakref
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Int
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from ..errors import InputError
from .forward import after_prefix, input_device, mask_after_prefix, undisturbed

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import PreTrainedModel
    from transformers import PreTrainedTokenizerBase as Tokenizer

_keeps_keys: "weakref.WeakKeyDictionary[TransformerBridge, bool]" = weakref.WeakKeyDictionary()
_renamed: "weakref.WeakSet[TransformerBridge]" = weakref.WeakSet()  # need `keeping_keys`


def from_hugging_face(
    hf_model: "PreTrainedModel", tokenizer: "Tokenizer | None", *, name: str, n_devices: int = 1
) -> "TransformerBridge":
    """Put TransformerLens's hooks into a Hugging Face model."""
    from transformer_lens.model_bridge.sources import build_bridge_from_module

    options: Any = {"hf_config": hf_model.config, "tokenizer": tokenizer, "model_name": name}
    try:
        return build_bridge_from_module(hf_model, type(hf_model).__name__, **options)
    except (AttributeError, KeyError, NotImplementedError, RuntimeError, ValueError) as error:
        why = str(error).strip().split("\n")[0]
        advice = "see whether TransformerLens 3 runs it, pip install 'transformer_lens<4'"
        raise InputError(f"TransformerLens 4 does not run {name}: {why}: {advice}") from error


def without_logits(model: "TransformerBridge") -> dict[str, Any]:
    """Arguments that end a forward pass before the unembedding and keep no cache."""
    nothing = {"output_attentions": False, "return_type": None, "use_cache": False}
    return {"logits_to_keep": torch.arange(0), **nothing}


def window(model: "TransformerBridge") -> int | None:
    """How many tokens back some layer's attention reaches, if not to the first."""
    config: Any = model.original_model.config
    return getattr(config.get_text_config(), "sliding_window", None)


def keeps_keys(model: "TransformerBridge") -> bool:
    """Whether every attention fills the cache it is given, measured once for each model."""
    # transformers 5.24 renamed the attention's `past_key_values` to `cache`, and TransformerLens
    # 4.3 takes the former name alone: its cache stays empty unless `keeping_keys` renames it.
    if model not in _keeps_keys:
        _keeps_keys[model] = _fills_cache(model)
        if not _keeps_keys[model]:
            _renamed.add(model)
            _keeps_keys[model] = _fills_cache(model)
    return _keeps_keys[model]


def _fills_cache(model: "TransformerBridge") -> bool:
    """Whether one token leaves its keys in every layer of Hugging Face's own cache."""
    config: Any = model.original_model.config
    cache: Any = DynamicCache(config=config.get_text_config())
    token = torch.zeros(1, 1, dtype=torch.long, device=input_device(model))
    with undisturbed(model):
        model(token, **without_logits(model) | {"use_cache": True, _cache_argument(model): cache})
    known = (DynamicLayer, DynamicSlidingWindowLayer)
    lengths = [layer.get_seq_length() for layer in cache.layers if type(layer) in known]
    return lengths == [1] * model.cfg.n_layers


@contextmanager
def keeping_keys(model: "TransformerBridge") -> Iterator[None]:
    """Give each attention the cache under its former name, where the model needs that name."""
    from transformer_lens.model_bridge.generalized_components.attention import AttentionBridge

    def rename(module: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        if "cache" in kwargs:
            kwargs["past_key_values"] = kwargs.pop("cache")
        return args, kwargs

    with ExitStack() as hooks:
        for module in model.modules() if model in _renamed else ():
            if isinstance(module, AttentionBridge):
                hooks.enter_context(module.register_forward_pre_hook(rename, with_kwargs=True))
        yield


def _cache_argument(model: "TransformerBridge") -> str:
    parameters = inspect.signature(model.original_model.forward).parameters
    return "cache" if "cache" in parameters else "past_key_values"


class PrefixCache:
    """The key-value cache of a `SharedPrefix`, as a Hugging Face model takes it."""

    def __init__(self, model: "TransformerBridge"):
        self._cache: Any = Cache(layers=[_PrefixLayer() for _ in range(model.cfg.n_layers)])
        self._argument = _cache_argument(model)
        self._mask = torch.ones(1, 0, dtype=torch.long, device=input_device(model))

    def copy(self) -> "PrefixCache":
        """A cache of the same keys and values, which records further ones by itself."""
        other = copy.copy(self)
        other._cache = Cache(layers=[copy.copy(layer) for layer in self._cache.layers])
        return other

    def arguments(self, mask: Int[Tensor, "row pos"], records: bool, rows: Any) -> dict[str, Any]:
        """Arguments of the next pass, which records or takes recorded rows (`after_prefix`)."""
        if not records and not self._mask.shape[1]:
            return {"attention_mask": mask, "use_cache": False}
        for layer in self._cache.layers:
            layer.records, layer.rows = records, rows
        whole = mask_after_prefix(self._mask, mask, rows=rows)
        self._mask = whole if records else self._mask
        return {"attention_mask": whole, self._argument: self._cache, "use_cache": True}


class _PrefixLayer(DynamicLayer):
    """Keys and values of one layer, `[row head pos d_head]`, one set for each recorded row."""

    records, rows = False, 1

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> Any:
        if not self.is_initialized:
            return super().update(key_states, value_states)
        prefix: Any = (self.keys, self.values)
        whole = after_prefix(prefix, (key_states, value_states), rows=self.rows, dim=2)
        if self.records:
            self.keys, self.values = whole
        return whole
