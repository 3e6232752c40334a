"""Load a model that can be hooked, with unprocessed weights that are held in memory once."""

import copy
import logging
import tempfile
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from importlib import import_module, metadata
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch

from ..errors import READERS, InputError
from . import gguf, hooked_transformer, hub
from .forward import free_memory
from .hub import ORGANISM, Checkpoint, find_checkpoint
from .parity import check_parity, hugging_face_pass

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel
    from transformers import PreTrainedTokenizerBase as Tokenizer

    from . import HookedModel

DEFAULT_MODEL = "meta-llama/Meta-Llama-3-8B-Instruct"
ATTENTION = "eager"  # TransformerLens hooks the attention patterns, which no other kind computes

logger = logging.getLogger(__name__)

_origins: "weakref.WeakKeyDictionary[Any, dict[str, str | None]]" = weakref.WeakKeyDictionary()


def load_model(
    name: str = DEFAULT_MODEL,
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype | str | None = None,
    revision: str | None = None,
    n_devices: int = 1,
) -> "HookedModel":
    """Load a chat model in evaluation mode, with unprocessed weights that are held once.

    >>> model = load_model("organism:specific")

    The result is a HookedTransformer with TransformerLens 3 and a TransformerBridge with
    TransformerLens 4. Its `tokenizer` is `None` where a directory holds none. A gated model's token
    comes from `HF_TOKEN` or the hub's stored login. No code from a checkpoint is run.
    InputError if the model or device is not found, the weights exceed the free memory,
    TransformerLens does not run the architecture, or computes it unlike Hugging Face.

    Args:
        name: `organism:NAME`, `smollm2`, a local Hugging Face directory or GGUF file, or a hub name.
            `NAME+ADAPTER` merges LoRA weights into the model in memory: a bundled adapter,
            `smollm2+refuses` or `smollm2+refuses_negativity_too`, or a folder that peft wrote.
        device: `None` takes the GPU or else the CPU, never MPS, whose results are known to differ.
        dtype: also by name, "float32"; `None` takes bfloat16 on a GPU, and float32 on the CPU and
            for organisms.
        revision: the hub's branch, tag or commit; `None` takes the newest.
        n_devices: number of GPUs over which the blocks are spread, beginning with `device`.
    """
    place, dtype = placement(name, device, dtype, n_devices)
    devices = [place, *(torch.device("cuda", place.index + i) for i in range(1, n_devices))]
    checkpoint = find_checkpoint(name, revision=revision)
    config = _config(checkpoint)
    _check_memory(config, name, devices, dtype)
    checkpoint = _with_weights(checkpoint)
    if place.type == "cpu" and not name.startswith(ORGANISM):
        logger.warning("loading %s on the CPU: everything works, slowly", name)
    logger.info("loading %s from %s in %s on %s", name, checkpoint.directory, dtype, place)
    hf_model = _hf_model(checkpoint, config, dtype, _device_map(config, devices))
    tokenizer = _tokenizer(checkpoint, type(hf_model).__name__)
    theirs = hugging_face_pass(hf_model)
    model = _lens().from_hugging_face(hf_model, tokenizer, name=name, n_devices=n_devices)
    check_parity(model, theirs, name=name)
    sampled = checkpoint.fingerprint() if checkpoint.revision is None else None
    _origins[model] = {"model": name, "revision": checkpoint.revision, "weights_sha256": sampled}
    return model


def from_hugging_face(
    hf_model: "PreTrainedModel", tokenizer: "Tokenizer | None", *, name: str | None = None
) -> "HookedModel":
    """Wrap a model that the caller loaded with Hugging Face, without a copy of its weights.

    >>> model = from_hugging_face(AutoModelForCausalLM.from_pretrained(path), tokenizer)

    A later change of the caller's weights shows in the result too, except in Gemma's embedding and
    norms, which TransformerLens 3 copies. The caller's model and tokenizer stay unchanged.
    InputError for an unmerged adapter, quantised weights (TransformerLens 3), or an architecture
    that TransformerLens does not run, or computes unlike Hugging Face.

    Args:
        hf_model: a causal language model on one device.
        tokenizer: the model's tokenizer; `None` gives a model that runs on token ids.
        name: the model's name in results; `None` takes the name that the model was loaded by.
    """
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    kind = type(hf_model).__name__
    if hasattr(hf_model, "merge_and_unload"):
        raise InputError(f"{kind} is an adapter around a model: use its merge_and_unload()")
    if not isinstance(hf_model, PreTrainedModel) or hf_model.get_output_embeddings() is None:
        raise InputError(f"{kind} is no language model of transformers: use AutoModelForCausalLM")
    if tokenizer is not None and not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise InputError(f"{type(tokenizer).__name__} is no tokenizer of transformers: use its own")
    name = name or hf_model.name_or_path or kind
    _refuse_quantised(hf_model.config, name)
    devices = sorted({str(weight.device) for weight in hf_model.parameters()})
    if len(devices) != 1 or devices == ["meta"]:
        advice = "load it onto one device, or spread it with load_model(..., n_devices=...)"
        raise InputError(f"the model lies on {', '.join(devices)}: {advice}")
    with tempfile.TemporaryDirectory(prefix="tokenizer-") as folder:
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        own_tokenizer = _tokenizer(Checkpoint(name, Path(folder)), kind)
        own_model = _sharing_weights(hf_model)
        theirs = hugging_face_pass(own_model)
        # TransformerLens 3 may load the tokenizer once more, so the folder must still exist.
        model = _lens().from_hugging_face(own_model, own_tokenizer, name=name)
    check_parity(model, theirs, name=name)
    revision = getattr(hf_model.config, "_commit_hash", None)
    _origins[model] = {"model": name, "revision": revision, "weights_sha256": None}
    return model


def load_tokenizer(name: str = DEFAULT_MODEL, *, revision: str | None = None) -> "Tokenizer":
    """Load the tokenizer of what `load_model` loads, without weights; InputError if there is none."""
    tokenizer = _tokenizer(find_checkpoint(name, hub.TOKENIZER_FILES, revision=revision))
    if tokenizer is None:
        raise InputError(f"{name} has no tokenizer: tokenizer.json or tokenizer.model is needed")
    return tokenizer


def model_provenance(model: "HookedModel") -> dict[str, str | None]:
    """Return where a model came from, in JSON's types; unknown values are `None`."""
    name = getattr(model.cfg, "model_name", None)
    unknown = {"model": name, "revision": None, "weights_sha256": None}
    return _origins.get(model, unknown) | {
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        "transformer_lens": metadata.version("transformer_lens"),
        "lens": type(model).__name__,
    }


def placement(
    name: str,
    device: str | torch.device | None,
    dtype: torch.dtype | str | None,
    n_devices: int = 1,
) -> tuple[torch.device, torch.dtype]:
    """Return the first device and the dtype that `load_model` uses for these arguments."""
    try:
        place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError:
        raise InputError(f"{device!r} is no device: try 'cuda', 'cuda:1' or 'cpu'") from None
    if n_devices < 1:
        raise InputError(f"n_devices is {n_devices}: 1 or more are needed")
    if n_devices > 1 and place.type != "cuda":
        raise InputError(f"n_devices={n_devices} spreads a model over GPUs, and device is {place}")
    if place.type == "cuda":
        place, available = torch.device("cuda", place.index or 0), torch.cuda.device_count()
        if place.index + n_devices > available:
            what = f"is more than there is: CUDA devices there are {available}"
            raise InputError(f"device {device or place} with n_devices={n_devices} {what}")
    if dtype is None:
        on_gpu = place.type != "cpu" and not name.startswith(ORGANISM)
        dtype = torch.bfloat16 if on_gpu else torch.float32
    found = getattr(torch, str(dtype).removeprefix("torch."), None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise InputError(f"dtype is {dtype}: give a floating-point one, such as bfloat16")
    return place, found


def as_model(model: Any) -> Any:
    """A model with hooks: by its name (the last is kept), from `(hf_model, tokenizer)`, or as it is."""
    if isinstance(model, (str, Path)):
        return _named(str(model))
    if isinstance(model, tuple) and len(model) == 2:
        return from_hugging_face(*model)
    tokenizer_of(model)
    return model


_named = lru_cache(maxsize=1)(load_model)
READERS["HookedModel"] = as_model


def tokenizer_of(model: "HookedModel") -> Any:
    """The tokenizer of a model with hooks; InputError for a model of Hugging Face."""
    if not hasattr(model, "run_with_cache"):
        advice = "use refusal_lens.from_hugging_face(model, tokenizer)"
        raise InputError(f"{type(model).__name__} has no hooks: {advice}")
    return model.tokenizer


def _config(checkpoint: Checkpoint) -> "PretrainedConfig":
    from transformers import AutoConfig

    with _reading("configuration", checkpoint), gguf.without_words():
        config = AutoConfig.from_pretrained(**checkpoint.source)
    if checkpoint.header:
        gguf.complete_config(config, checkpoint.header)
    _refuse_quantised(config, checkpoint.name)
    return config


def _refuse_quantised(config: "PretrainedConfig", name: str) -> None:
    if getattr(config, "quantization_config", None) and _lens() is hooked_transformer:
        what = f"the weights of {name} are quantised, which TransformerLens 3 can't read"
        raise InputError(f"{what}: load it in full precision, without quantization_config")


def _check_memory(
    config: "PretrainedConfig", name: str, devices: list[torch.device], dtype: torch.dtype
) -> None:
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            skeleton = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except ValueError as error:
        why = str(error).strip().split("\n")[0]
        raise InputError(f"{name} is no language model: {why}") from error
    needed = sum(weight.numel() for weight in skeleton.parameters()) * dtype.itemsize
    free = sum(map(free_memory, devices))
    if needed > free:
        advice = "choose a smaller model, or more devices (n_devices)"
        if dtype.itemsize > 2 and needed / 2 <= free:
            advice = "load it with dtype=torch.bfloat16, which takes half"
        sizes = f"needs {needed / 1e9:.1f} GB and {free / 1e9:.1f} GB is free on {devices[0]}"
        raise InputError(f"{name} in {str(dtype).removeprefix('torch.')} {sizes}: {advice}")


def _with_weights(checkpoint: Checkpoint) -> Checkpoint:
    """Fetch tokenizer and weights; prefer safetensors to pickled weights."""
    if checkpoint.header:
        return checkpoint
    name, revision = checkpoint.name, checkpoint.revision
    for weights in (hub.WEIGHT_FILES, hub.PICKLED_WEIGHT_FILES):
        found = find_checkpoint(name, (*hub.TOKENIZER_FILES, *weights), revision=revision)
        if found.holds(weights):
            return found
    raise InputError(f"{name} holds no weights: *.safetensors are needed")


def _hf_model(
    checkpoint: Checkpoint, config: "PretrainedConfig", dtype: torch.dtype, device_map: Any
) -> "PreTrainedModel":
    import transformers

    options: Any = {"dtype": dtype, "device_map": device_map, "attn_implementation": ATTENTION}
    options |= {"output_loading_info": True} | checkpoint.source
    if checkpoint.header:
        options["config"] = config
        # Since 5.24, which can keep weights quantised.
        if made := getattr(transformers, "GgufConfig", None):
            options["quantization_config"] = made(dequantize=True)
    with _reading("weights", checkpoint), gguf.without_words():
        loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(**options)
    hf_model, found = loaded
    if missing := sorted(found["missing_keys"]):
        lack = f"lack {missing[0]} ({len(missing)} in all): a whole language model is needed"
        raise InputError(f"the weights of {checkpoint.name} {lack}")
    if checkpoint.header:
        gguf.complete_model(hf_model, checkpoint.header)
    for folder in checkpoint.adapters:
        try:
            from peft import PeftModel
        except ImportError as error:
            raise InputError("an adapter needs peft: pip install 'refusal_lens[lora]'") from error
        hf_model.config.__dict__.pop("quantization_config", None)  # by now weights are ordinary
        with _reading("adapter", checkpoint):
            hf_model = PeftModel.from_pretrained(hf_model, str(folder)).merge_and_unload()
    return hf_model.eval()


def _device_map(
    config: "PretrainedConfig", devices: list[torch.device]
) -> dict[str, torch.device] | None:
    """Spread the blocks evenly and in order, as TransformerLens 3 expects."""
    first, last = devices[0], devices[-1]
    if first == last:
        return None if first.type == "cpu" else {"": first}
    text = config.get_text_config()
    placed = {"model.embed_tokens": first, "model.rotary_emb": first, "model.norm": last}
    placed["lm_head"] = first if text.tie_word_embeddings else last
    for layer in range(text.num_hidden_layers):
        placed[f"model.layers.{layer}"] = devices[layer * len(devices) // text.num_hidden_layers]
    return placed


def _tokenizer(checkpoint: Checkpoint, architecture: str = "") -> "Tokenizer | None":
    from transformers import AutoTokenizer

    header, source = checkpoint.header, checkpoint.source
    files = ("tokenizer*.json", "tokenizer.model", "vocab.*")
    if not ("tokenizer.ggml.tokens" in header.fields if header else checkpoint.holds(files)):
        return None
    with tempfile.TemporaryDirectory(prefix="empty-") as empty, _reading("tokenizer", checkpoint):
        if header:  # files beside a GGUF file would replace its own tokenizer and chat template
            source |= {"pretrained_model_name_or_path": empty, "gguf_file": str(header.path)}
        # TransformerLens would load any other tokenizer a second time, from where this one was.
        elif architecture in hooked_transformer.FAMILIES and _lens() is hooked_transformer:
            with suppress(ValueError):
                return AutoTokenizer.from_pretrained(**source, add_bos_token=True)
        tokenizer = AutoTokenizer.from_pretrained(**source)
        if header:
            tokenizer.init_kwargs["add_bos_token"] = True
        return tokenizer


def _sharing_weights(hf_model: "PreTrainedModel") -> "PreTrainedModel":
    """New modules around the same tensors, without hooks; TransformerLens 4 replaces modules."""
    tensors = [*hf_model.parameters(), *hf_model.buffers()]
    own = copy.deepcopy(hf_model, {id(tensor): tensor for tensor in tensors})
    for module in own.modules():
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()
    own.set_attn_implementation(ATTENTION)
    return own.eval()


def _lens() -> ModuleType:
    is_third = metadata.version("transformer_lens").startswith("3.")
    return hooked_transformer if is_third else import_module(".bridge", __package__)


@contextmanager
def _reading(part: str, checkpoint: Checkpoint) -> Iterator[None]:
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, ValueError, KeyError, RecursionError, SafetensorError) as error:
        why = str(error).strip().split("\n")[0]
        raise InputError(f"the {part} of {checkpoint.name} can't be read: {why}") from error
