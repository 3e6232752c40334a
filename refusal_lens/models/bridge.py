"""TransformerLens 4: a `TransformerBridge` wraps the Hugging Face model and runs its own pass."""

import inspect
import weakref
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from ..errors import InputError
from .forward import input_device, of_rows, undisturbed

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
    """Whether one token leaves its keys in every layer of a cache, measured once for each model."""
    # transformers 5.24 renamed the attention's `past_key_values` to `cache`, and TransformerLens 4.3
    # takes the former name alone in most models: a second try hands the cache on under that name.
    while model not in _keeps_keys:
        config: Any = model.original_model.config
        cache: Any = DynamicCache(config=config.get_text_config())
        token = torch.zeros(1, 1, dtype=torch.long, device=input_device(model))
        filling = without_logits(model) | {"use_cache": True, _cache_argument(model): cache}
        with undisturbed(model):
            model(token, **filling)
        known = (DynamicLayer, DynamicSlidingWindowLayer)
        lengths = [layer.get_seq_length() for layer in cache.layers if type(layer) in known]
        fills = lengths == [1] * model.cfg.n_layers
        if fills or model in _renamed:
            _keeps_keys[model] = fills
        else:
            _renamed.add(model)
    return _keeps_keys[model]


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


def prefix_layers(model: "TransformerBridge") -> list["_PrefixLayer"]:
    """The layers of a prefix without tokens."""
    return [_PrefixLayer() for _ in range(model.cfg.n_layers)]


def prefix_arguments(
    model: "TransformerBridge", layers: list["_PrefixLayer"], whole: Tensor, n_tokens: int
) -> dict[str, Any]:
    """Arguments of a pass over `n_tokens` after a prefix, if any; `whole` is the mask over both."""
    prefix: Any = {_cache_argument(model): Cache(layers=layers)} if layers else {}  # type: ignore
    return {"attention_mask": whole, "use_cache": bool(layers)} | prefix


class _PrefixLayer(DynamicLayer):
    """Keys and values of one layer, `[row head pos d_head]`, one set for each recorded row."""

    records, rows = False, 1

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> Any:
        if self.keys is None or self.values is None:
            return super().update(key_states, value_states)
        keys = torch.cat([of_rows(self.keys, self.rows), key_states], 2)
        values = torch.cat([of_rows(self.values, self.rows), value_states], 2)
        if self.records:
            self.keys, self.values = keys, values
        return keys, values
