"""TransformerLens 3: a `HookedTransformer` with views of a Hugging Face model's weights."""

import copy
import json
import tempfile
import warnings
from contextlib import nullcontext
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import InputError
from .forward import of_rows

if TYPE_CHECKING:
    from transformer_lens import HookedTransformer
    from transformers import PreTrainedModel
    from transformers import PreTrainedTokenizerBase as Tokenizer

LONGEST_ROTARY_TABLE = 32_768  # positions, however long a context the config promises

# Decoders with RMS norm, rotary positions and gated MLP, which are configured from their fields.
DECODERS = json.loads(Path(__file__).with_name("decoder_fields.json").read_text("utf-8"))
FAMILIES = DECODERS["architectures"]


def from_hugging_face(
    hf_model: "PreTrainedModel", tokenizer: "Tokenizer | None", *, name: str, n_devices: int = 1
) -> "HookedTransformer":
    """Share a Hugging Face model's raw weights; copy only Gemma's scaled embedding and norms."""
    from transformer_lens import HookedTransformer
    from transformer_lens.loading_from_pretrained import get_pretrained_state_dict

    cfg = _config(hf_model, name, n_devices)
    _refuse_unknown_biases(hf_model, type(hf_model).__name__)
    with warnings.catch_warnings(), torch.device("meta"):  # the meta device holds no data
        warnings.filterwarnings("ignore", "HookedTransformer is deprecated", DeprecationWarning)
        model = HookedTransformer(cfg, tokenizer, move_to_device=False)
    with torch.no_grad():
        # TransformerLens takes "." for a local model and converts the weights of `hf_model`.
        try:
            converted = get_pretrained_state_dict(".", cfg, hf_model)
        except (AttributeError, KeyError, NotImplementedError, RuntimeError, ValueError) as error:
            raise _unsupported(f"can't convert the weights of {name}: {error}") from error
        weights = _fitted(converted, model, cfg)
        buffers = _buffers(hf_model, model, cfg)
    # A new model's rotary table holds 2,048 positions, and loading would keep that length.
    for path, buffer in buffers.items():
        module, _, leaf = path.rpartition(".")
        setattr(model.get_submodule(module), leaf, buffer)
    try:
        model.load_state_dict(weights | buffers, strict=True, assign=True)
    except RuntimeError as error:  # a weight that no converter took, or of another shape
        why = str(error).strip().split("\n")[-1].strip()
        raise _unsupported(f"can't convert the weights of {name}: {why}") from error
    return model.eval()


def _config(hf_model: "PreTrainedModel", name: str, n_devices: int) -> Any:
    """The HookedTransformerConfig of a model, built from its configuration, never from its name."""
    from transformer_lens.config import HookedTransformerConfig
    from transformer_lens.loading_from_pretrained import get_pretrained_model_config

    architecture, model_name = type(hf_model).__name__, name.rstrip("/").split("/")[-1]
    device: Any = {"device": str(hf_model.device), "dtype": hf_model.dtype, "n_devices": n_devices}
    if architecture in FAMILIES:
        fields = _decoder_fields(hf_model.config.get_text_config(), architecture)
        return HookedTransformerConfig(**fields, **device, model_name=model_name)
    config: Any = copy.deepcopy(hf_model.config)
    config.architectures = [architecture]
    if architecture == "GPT2LMHeadModel":
        config.n_ctx = config.n_positions  # a name that transformers 5 dropped
    # TransformerLens guesses the architecture from some paths, but not from this neutral path.
    with tempfile.TemporaryDirectory(prefix="model-") as folder:
        config.save_pretrained(folder)
        try:
            cfg = get_pretrained_model_config(folder, hf_cfg=config.to_dict(), **device)
        except AttributeError as error:  # transformers 5 renamed or dropped some fields
            raise _unsupported(f"can't read the configuration of {name}: {error}") from error
        except (KeyError, NotImplementedError, ValueError) as error:
            raise _unsupported(f"has no {architecture} ({name})") from error
    cfg.model_name, cfg.tokenizer_name = model_name, None
    return cfg


def _decoder_fields(config: Any, architecture: str) -> dict[str, Any]:
    n_heads = config.num_attention_heads
    d_head = getattr(config, "head_dim", None) or config.hidden_size // n_heads
    ropes = config.rope_parameters
    rope = ropes.get("full_attention", ropes)
    local_rope = ropes.get("sliding_attention") or rope
    # A converter that always writes grouped keys and values needs the count even if it is n_heads.
    grouped = architecture.startswith(("Gemma", "Mistral", "Qwen2"))
    grouped |= config.num_key_value_heads != n_heads
    longest = config.max_position_embeddings
    if rope["rope_type"] in ("dynamic", "longrope"):  # longer prompts have other angles
        longest = rope.get("original_max_position_embeddings") or longest
    own = {field: getattr(config, theirs) for field, theirs in DECODERS["renamed"].items()}
    fields = DECODERS["fixed"] | own
    fields |= {
        "original_architecture": architecture,
        "d_head": d_head,
        "n_key_value_heads": config.num_key_value_heads if grouped else None,
        "n_ctx": min(longest, LONGEST_ROTARY_TABLE),
        "act_fn": getattr(config, "hidden_activation", None) or config.hidden_act,
        "rotary_dim": int(d_head * rope.get("partial_rotary_factor", 1.0)),
        "rotary_base": rope["rope_theta"],
        "rotary_base_local": local_rope["rope_theta"] if local_rope is not rope else None,
        "use_qk_norm": architecture.startswith(("Qwen3", "Gemma3")),
        "use_normalization_before_and_after": architecture.startswith(("Gemma2", "Gemma3")),
        "default_prepend_bos": not architecture.startswith("Qwen"),
    }
    if window := getattr(config, "sliding_window", None):
        kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * fields["n_layers"]
        types = ["local" if kind == "sliding_attention" else "global" for kind in kinds]
        if "local" in types:
            fields |= {"use_local_attn": True, "window_size": window, "attn_types": types}
    if scalar := getattr(config, "query_pre_attn_scalar", None):
        fields["attn_scale"] = scalar**0.5
    for field, cap in (("attn_scores", "attn_logit"), ("output_logits", "final_logit")):
        if value := getattr(config, f"{cap}_softcapping", None):
            fields[f"{field}_soft_cap"] = value
    return fields


def _refuse_unknown_biases(hf_model: "PreTrainedModel", architecture: str) -> None:
    """Raise InputError for biases that the converters drop in silence: all but Qwen2's three."""
    carried = ("q_proj.bias", "k_proj.bias", "v_proj.bias") if "Qwen2" in architecture else ()
    for name, _ in hf_model.named_parameters() if architecture in FAMILIES else ():
        is_decoder = "vision" not in name and "multi_modal" not in name
        if is_decoder and name.endswith(".bias") and not name.endswith(carried):
            raise _unsupported(f"has no place for {name} in a {architecture}")


def _unsupported(what: str) -> InputError:
    advice = "install transformer_lens>=4, which runs more architectures"
    return InputError(f"TransformerLens 3 {what}: {advice}")


def _fitted(converted: dict[str, Tensor], model: torch.nn.Module, cfg: Any) -> dict[str, Tensor]:
    """The converted weights, each on the device and in the dtype in which the model uses it."""
    fitted = {}
    for name, parameter in model.named_parameters():
        weight = converted.get(name)  # converters leave out some biases, which are zero
        if weight is None and name.rsplit(".", 1)[-1].startswith(("b_", "_b_")):
            weight = torch.zeros(parameter.shape)
        if weight is not None:
            fitted[name] = weight.detach().to(_device_of(name, cfg), parameter.dtype)
    return fitted


def _device_of(name: str, cfg: Any) -> torch.device:
    """The device of a parameter or buffer, as TransformerLens spreads blocks over devices."""
    from transformer_lens.utilities.multi_gpu import get_device_for_block_index

    if name.startswith("blocks."):
        return get_device_for_block_index(int(name.split(".")[1]), cfg)
    last = name.startswith(("ln_final", "unembed"))
    return get_device_for_block_index(cfg.n_layers - 1 if last else 0, cfg)


def _buffers(hf_model: "PreTrainedModel", model: torch.nn.Module, cfg: Any) -> dict[str, Tensor]:
    """Values for the buffers, which the meta device left empty; equal buffers share one tensor."""
    tables = cache(partial(_rotary_tables, hf_model, cfg))

    @cache
    def value(leaf: str, attention: str, shape: torch.Size, device: Any, dtype: Any) -> Tensor:
        if leaf == "IGNORE":
            return torch.tensor(-torch.inf, device=device)
        if leaf == "mask":
            return torch.zeros(shape, dtype=dtype, device=device)
        if not leaf.startswith("rotary_"):
            raise _unsupported(f"leaves the buffer {leaf} of a {type(hf_model).__name__} empty")
        return tables(attention)[leaf].to(device, dtype)

    filled = {}
    for name, buffer in model.named_buffers():
        path, _, leaf = name.rpartition(".")
        attention = getattr(model.get_submodule(path), "attn_type", "global")
        filled[name] = value(leaf, attention, buffer.shape, _device_of(name, cfg), buffer.dtype)
    return filled


def _rotary_tables(hf_model: "PreTrainedModel", cfg: Any, attention: str) -> dict[str, Tensor]:
    """Hugging Face's sines and cosines, `[n_ctx, rotary_dim]`, for `global` or `local` attention."""
    rotary = getattr(hf_model.get_decoder(), "rotary_emb", None)
    if rotary is None:
        raise _unsupported(f"can't find the rotary embedding of a {type(hf_model).__name__}")
    device = next(rotary.buffers()).device
    kind = {}
    if hasattr(rotary, "layer_types"):
        kind["layer_type"] = "sliding_attention" if attention == "local" else "full_attention"
    example = torch.zeros(1, dtype=hf_model.dtype, device=device)
    first, second = rotary(example, torch.arange(cfg.n_ctx, device=device)[None], **kind)
    cos, sin = (first[0], second[0]) if first[0, 0, 0] else (second[0], first[0])  # GPT-J's order
    if 2 * cos.shape[1] == cfg.rotary_dim:  # each angle once, for the two dimensions that it turns
        pairs = cfg.rotary_adjacent_pairs
        cos, sin = (t.repeat_interleave(2, 1) if pairs else t.repeat(1, 2) for t in (cos, sin))
    return {"rotary_cos": cos, "rotary_sin": sin}


def without_logits(model: "HookedTransformer") -> dict[str, Any]:
    """Arguments that end a forward pass before the unembedding and keep no cache."""
    return {"stop_at_layer": model.cfg.n_layers}


def window(model: "HookedTransformer") -> int | None:
    """How many tokens back some layer's attention reaches, if not to the first."""
    return model.cfg.window_size


def keeps_keys(model: "HookedTransformer") -> bool:
    """Whether every attention fills the cache it is given."""
    return True


keeping_keys = nullcontext  # the attention needs no help to fill its cache


def prefix_layers(model: "HookedTransformer") -> list["_PrefixLayer"]:
    """The layers of a prefix without tokens."""
    cfg = model.cfg
    nothing = torch.empty(1, 0, cfg.n_key_value_heads or cfg.n_heads, cfg.d_head)
    return [_PrefixLayer(nothing) for _ in range(cfg.n_layers)]


def prefix_arguments(
    model: "HookedTransformer", layers: list["_PrefixLayer"], whole: Tensor, n_tokens: int
) -> dict[str, Any]:
    """Arguments of a pass over `n_tokens` after a prefix, if any; `whole` is the mask over both."""
    for layer in layers:
        layer.n_token_rows = len(whole)
    prefix = _PrefixCache(layers, whole) if layers else None
    return {"attention_mask": whole[:, -n_tokens:], "past_kv_cache": prefix}


class _PrefixCache(list["_PrefixLayer"]):
    """The layers of a prefix and the mask over the prefix and the tokens after it."""

    def __init__(self, layers: list["_PrefixLayer"], whole: Tensor):
        super().__init__(layers)
        self._whole = whole

    def append_attention_mask(self, mask: Tensor) -> Tensor:
        return self._whole


class _PrefixLayer:
    """Keys and values of one layer, `[row pos head d_head]`, one set for each recorded row."""

    records, rows, n_token_rows = False, 1, 1

    def __init__(self, nothing: Tensor):
        self.keys = self.values = nothing

    @property
    def past_keys(self) -> Tensor:
        """Keys from whose shape a HookedTransformer takes the rows of tokens and their offset."""
        return self.keys[:1].expand(self.n_token_rows, -1, -1, -1)

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, ...]:
        if self.keys.shape[1]:
            keys = torch.cat([of_rows(self.keys, self.rows), keys], 1)
            values = torch.cat([of_rows(self.values, self.rows), values], 1)
        if self.records:
            self.keys, self.values = keys, values
        return keys, values
