"""load_model: the only place that knows how a model is loaded."""

import copy
import importlib.metadata
import logging
import tempfile
import weakref
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch

from ..errors import InputError
from .hooked_transformer import FAMILIES, hooked_transformer
from .hub import (
    ORGANISM,
    PICKLED_WEIGHT_FILES,
    TOKENIZER_FILES,
    WEIGHT_FILES,
    Checkpoint,
    find_checkpoint,
)

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

DEFAULT_MODEL = "meta-llama/Meta-Llama-3-8B-Instruct"

GIGABYTE = 1e9

logger = logging.getLogger(__name__)

_origins: "weakref.WeakKeyDictionary[Any, dict[str, str | None]]" = weakref.WeakKeyDictionary()


@runtime_checkable
class LensModel(Protocol):
    """What a HookedTransformer (TransformerLens 3) and a TransformerBridge (4) have in common.

    Checked by the presence of these names, so that any model of either kind passes, however it was
    loaded.
    """

    cfg: Any
    tokenizer: Any
    hook_dict: Any

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model."""
        ...

    def run_with_cache(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model and return its output and the activations asked for."""
        ...

    def run_with_hooks(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model with functions hooked to its activations."""
        ...

    def hooks(self, *args: Any, **kwargs: Any) -> Any:
        """Hook functions to activations for as long as a `with` block lasts."""
        ...

    def parameters(self, recurse: bool = True) -> Any:
        """The weights."""
        ...


def load_model(
    name: str = DEFAULT_MODEL,
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    revision: str | None = None,
    n_devices: int = 1,
) -> LensModel:
    """Load a chat model with TransformerLens, its weights unprocessed and held once.

    `name` is `organism:NAME`, a local Hugging Face directory, or a hub name, listed by
    TransformerLens or not. The result is a HookedTransformer where TransformerLens has one (3.x),
    a TransformerBridge where not (4.x), in evaluation mode; a directory without tokenizer files
    gives a model with `tokenizer` None, to be run on token ids.

    `device` is the GPU where there is one, else the CPU (never MPS unasked: its results are known
    to differ). `dtype` is bfloat16 on a GPU, and float32 on the CPU and for organisms; 8 billion
    parameters are 16 GB in bfloat16 and 32 GB in float32. `n_devices` spreads the blocks over
    that many GPUs, beginning with `device`.

    A gated model's token comes from `HF_TOKEN`, from the hub's stored login, or from the person
    at the terminal or notebook. No code from a checkpoint is run, and pickled weights are read as
    tensors only.

    Raises:
        InputError: if there is no such model or it can't be had; if its weights would not fit into
            free memory (says how much is needed and how much there is); if its architecture, or the
            way its weights are stored, is not one that TransformerLens runs; if there is no such
            device.
    """
    place, dtype = placement(name, device, dtype, n_devices)
    config_only = find_checkpoint(name, revision=revision)
    config = _config(config_only)
    _check_memory(config, name, place, dtype, n_devices)
    checkpoint = _with_weights(config_only)
    if place.type == "cpu" and not name.startswith(ORGANISM):
        logger.warning("loading %s on the CPU: everything works, slowly", name)
    logger.info("loading %s from %s in %s on %s", name, checkpoint.directory, dtype, place)
    hf_model = _hf_model(checkpoint, config, place, dtype, n_devices)
    tokenizer = _tokenizer(checkpoint, architecture=type(hf_model).__name__)
    model = _with_lens(hf_model, tokenizer, checkpoint, n_devices)
    _origins[model] = {
        "model": name,
        "revision": checkpoint.revision,
        "weights_sha256": checkpoint.fingerprint() if checkpoint.revision is None else None,
    }
    return model


def from_hugging_face(
    hf_model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase | None",
    *,
    name: str | None = None,
) -> LensModel:
    """A model that the caller loaded with Hugging Face, as every function here takes one.

    The weights are shared, not copied (Gemma's embedding and norms excepted, in TransformerLens 3),
    so what the caller does to them later shows here too. Nothing else is shared: the caller's model
    and tokenizer stay exactly as they are, hooks, training mode, attention implementation, padding
    side and padding token included. `name` is what results call the model; by default, what the
    model says it is.

    Raises:
        InputError: if it is no causal language model, is quantised or lies on several devices or on
            none; if its architecture is not one that TransformerLens runs.
    """
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    if not isinstance(hf_model, PreTrainedModel) or hf_model.get_output_embeddings() is None:
        raise InputError(
            f"{type(hf_model).__name__} is no language model of transformers: hand over one of "
            "AutoModelForCausalLM's"
        )
    if tokenizer is not None and not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise InputError(f"{type(tokenizer).__name__} is no tokenizer of transformers: use its own")
    if getattr(hf_model, "is_quantized", False) and _generation() < 4:
        raise InputError(
            "the model is quantised, which TransformerLens 3 can't read: load it without "
            "quantization_config"
        )
    devices = sorted({str(weight.device) for weight in hf_model.parameters()})
    if len(devices) != 1 or devices == ["meta"]:
        raise InputError(
            f"the model lies on {', '.join(devices)}: load it onto one device, or spread it with "
            "load_model(..., n_devices=...)"
        )
    name = name or hf_model.name_or_path or type(hf_model).__name__
    with tempfile.TemporaryDirectory(prefix="model-") as folder:
        directory = Path(folder)
        hf_model.config.save_pretrained(directory)
        checkpoint = Checkpoint(name, directory, None)
        own_tokenizer = None
        if tokenizer is not None:
            tokenizer.save_pretrained(directory)
            own_tokenizer = _tokenizer(checkpoint)
        model = _with_lens(_sharing_weights(hf_model), own_tokenizer, checkpoint, n_devices=1)
    revision = getattr(hf_model.config, "_commit_hash", None)
    _origins[model] = {"model": name, "revision": revision, "weights_sha256": None}
    return model


def _sharing_weights(hf_model: "PreTrainedModel") -> "PreTrainedModel":
    """Modules of their own around the same tensors, in evaluation mode.

    TransformerLens 4 puts its own modules in the place of those it is given.
    """
    tensors = [*hf_model.parameters(), *hf_model.buffers()]
    own = copy.deepcopy(hf_model, {id(tensor): tensor for tensor in tensors})
    for module in own.modules():
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()
    # As load_model asks for: these attention patterns are what TransformerLens's hooks read.
    own.set_attn_implementation("eager")
    return own.eval()


def placement(
    name: str, device: str | torch.device | None, dtype: torch.dtype | None, n_devices: int = 1
) -> tuple[torch.device, torch.dtype]:
    """The device and the dtype in which `load_model` loads a model for these arguments.

    Raises:
        InputError: if there is no such device, or the dtype is not a floating-point one.
    """
    place = _device(device, n_devices)
    if dtype is None:
        on_gpu = place.type != "cpu" and not name.startswith(ORGANISM)
        dtype = torch.bfloat16 if on_gpu else torch.float32
    if not dtype.is_floating_point:
        raise InputError(f"dtype is {dtype}: give a floating-point one, such as torch.bfloat16")
    return place, dtype


def load_tokenizer(
    name: str = DEFAULT_MODEL, *, revision: str | None = None
) -> "PreTrainedTokenizerBase":
    """Load a model's tokenizer alone, without its weights; `name` as `load_model` takes it.

    Raises:
        InputError: as `load_model`, and if the model has no tokenizer.
    """
    checkpoint = find_checkpoint(name, TOKENIZER_FILES, revision=revision)
    tokenizer = _tokenizer(checkpoint)
    if tokenizer is None:
        raise InputError(
            f"{name} has no tokenizer (no tokenizer.json, tokenizer.model or vocab.json)"
        )
    return tokenizer


def model_provenance(model: LensModel) -> dict[str, str | None]:
    """Where a model came from, in values that JSON can hold; `None` where that is unknown.

    `model` is the name it was loaded by, or TransformerLens's name for one loaded elsewhere;
    `revision` the hub's commit hash; `weights_sha256` the fingerprint of a local directory;
    `dtype`; `transformer_lens` the installed version, and `lens` the kind of model.
    """
    unknown = {"model": getattr(model.cfg, "model_name", None)}
    unknown |= {"revision": None, "weights_sha256": None}
    return _origins.get(model, unknown) | {
        "dtype": str(next(iter(model.parameters())).dtype).removeprefix("torch."),
        "transformer_lens": importlib.metadata.version("transformer_lens"),
        "lens": type(model).__name__,
    }


def _device(device: str | torch.device | None, n_devices: int) -> torch.device:
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        place = torch.device(device)
    except RuntimeError:
        raise InputError(f"{device!r} is no device: try 'cuda', 'cuda:1' or 'cpu'") from None
    if n_devices < 1:
        raise InputError(f"n_devices is {n_devices}; 1 or more are needed")
    if n_devices > 1 and place.type != "cuda":
        raise InputError(f"n_devices={n_devices} spreads a model over GPUs, and device is {place}")
    if place.type == "cuda":
        there = torch.cuda.device_count()
        if (place.index or 0) + n_devices > there:
            raise InputError(
                f"device {place} with n_devices={n_devices} is more than there is: CUDA devices "
                f"there are {there}"
            )
        return torch.device("cuda", place.index or 0)
    return place


def _config(checkpoint: Checkpoint) -> "PretrainedConfig":
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(checkpoint.directory, trust_remote_code=False)
    except (OSError, ValueError, KeyError, RecursionError) as error:
        raise InputError(
            f"the configuration of {checkpoint.name} can't be read: {_first_line(error)}"
        ) from error
    if getattr(config, "quantization_config", None) and _generation() < 4:
        raise InputError(
            f"the weights of {checkpoint.name} are stored quantised, which TransformerLens 3 can't "
            "read: load the full-precision model"
        )
    return config


def _with_weights(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint with its tokenizer and weights, safetensors where there are any."""
    name, revision = checkpoint.name, checkpoint.revision
    found = find_checkpoint(name, (*TOKENIZER_FILES, *WEIGHT_FILES), revision=revision)
    if not found.holds(WEIGHT_FILES):
        found = find_checkpoint(name, PICKLED_WEIGHT_FILES, revision=revision)
    if not found.holds((*WEIGHT_FILES, *PICKLED_WEIGHT_FILES)):
        raise InputError(f"{name} holds no weights: *.safetensors are needed")
    return found


def _check_memory(
    config: "PretrainedConfig",
    name: str,
    place: torch.device,
    dtype: torch.dtype,
    n_devices: int,
) -> None:
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            skeleton = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except ValueError as error:
        raise InputError(f"{name} is no language model: {_first_line(error)}") from error
    needed = sum(weight.numel() for weight in skeleton.parameters()) * dtype.itemsize
    free = _free_memory(place, n_devices)
    if needed > free:
        raise InputError(
            f"{name} in {str(dtype).removeprefix('torch.')} needs {needed / GIGABYTE:.1f} GB and "
            f"{free / GIGABYTE:.1f} GB is free on {place}: "
            + (
                "load it with dtype=torch.bfloat16, which takes half"
                if dtype.itemsize > 2 and needed / 2 <= free
                else "choose a smaller model, or more devices (n_devices)"
            )
        )


def _free_memory(place: torch.device, n_devices: int) -> int:
    """Bytes that can still be taken on the devices a model would lie on."""
    if place.type == "cuda":
        first = place.index or 0
        return sum(torch.cuda.mem_get_info(first + i)[0] for i in range(n_devices))
    import psutil

    return psutil.virtual_memory().available


def _hf_model(
    checkpoint: Checkpoint,
    config: "PretrainedConfig",
    place: torch.device,
    dtype: torch.dtype,
    n_devices: int,
) -> "PreTrainedModel":
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            checkpoint.directory,
            config=config,
            dtype=dtype,
            device_map=_device_map(config, place, n_devices),
            # Its attention patterns are what TransformerLens's hooks read.
            attn_implementation="eager",
            trust_remote_code=False,
            output_loading_info=True,
        )
    except (OSError, ValueError, SafetensorError) as error:
        raise InputError(
            f"the weights of {checkpoint.name} can't be read: {_first_line(error)}"
        ) from error
    hf_model, found = loaded
    if missing := sorted(found["missing_keys"]):
        raise InputError(
            f"the weights of {checkpoint.name} lack {missing[0]} ({len(missing)} in all): a whole "
            "language model is needed"
        )
    return hf_model.eval()


def _device_map(
    config: "PretrainedConfig", place: torch.device, n_devices: int
) -> dict[str, torch.device] | None:
    """Blocks spread evenly and in order, as TransformerLens 3 expects to find them."""
    if place.type == "cpu":
        return None
    if n_devices == 1:
        return {"": place}
    n_layers = config.get_text_config().num_hidden_layers
    first = place.index or 0
    last = torch.device(place.type, first + n_devices - 1)
    spread = {
        f"model.layers.{layer}": torch.device(place.type, first + layer * n_devices // n_layers)
        for layer in range(n_layers)
    }
    tied = config.get_text_config().tie_word_embeddings
    return {
        "model.embed_tokens": place,
        "model.rotary_emb": place,
        **spread,
        "model.norm": last,
        "lm_head": place if tied else last,
    }


def _tokenizer(
    checkpoint: Checkpoint, *, architecture: str = ""
) -> "PreTrainedTokenizerBase | None":
    from transformers import AutoTokenizer

    if not checkpoint.holds(("tokenizer*.json", "tokenizer.model", "vocab.*")):
        return None
    # So TransformerLens 3 loads it anew unless it was loaded so: a second for Llama-3's.
    again = _generation() < 4 and architecture in FAMILIES and checkpoint.names_bos()
    options = {"add_bos_token": True} if again else {}
    try:
        return AutoTokenizer.from_pretrained(
            checkpoint.directory, trust_remote_code=False, **options
        )
    except (OSError, ValueError) as error:
        raise InputError(
            f"the tokenizer of {checkpoint.name} can't be read: {_first_line(error)}"
        ) from error


def _with_lens(
    hf_model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase | None",
    checkpoint: Checkpoint,
    n_devices: int,
) -> Any:
    """The Hugging Face model with TransformerLens's hooks, whichever generation is installed."""
    if _generation() < 4:
        return hooked_transformer(
            hf_model,
            tokenizer,
            model_name=checkpoint.name,
            directory=checkpoint.directory,
            n_devices=n_devices,
        )
    from transformer_lens.model_bridge.sources import build_bridge_from_module

    try:
        return build_bridge_from_module(
            hf_model,
            type(hf_model).__name__,
            hf_config=hf_model.config,
            tokenizer=tokenizer,
            model_name=checkpoint.name,
        )
    except ValueError as error:
        raise InputError(
            f"TransformerLens does not run {checkpoint.name}: {_first_line(error)}"
        ) from error


def _generation() -> int:
    """3 where TransformerLens has its HookedTransformer, 4 where it has bridges in its stead."""
    return int(importlib.metadata.version("transformer_lens").split(".")[0])


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]
