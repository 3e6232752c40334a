"""A loaded Hugging Face model becomes a HookedTransformer without a second copy of its weights.

TransformerLens 3 only; TransformerLens 4 wraps the Hugging Face model itself. TransformerLens's own
path reads the architecture off the model's name, fills a freshly initialised model, and copies
every weight into it. Here the model is built on the meta device, which holds no data, and then
takes the Hugging Face tensors themselves, reshaped as views.
"""

import tempfile
import warnings
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

LONGEST_ROTARY_TABLE = 32_768
"""Positions for which sine and cosine are tabulated, whatever longer context a config promises."""

FAMILIES = {
    "LlamaForCausalLM",
    "MistralForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
    "Phi3ForCausalLM",
    "GemmaForCausalLM",
    "Gemma2ForCausalLM",
    "Gemma3ForCausalLM",
    "Gemma3ForConditionalGeneration",
}
"""Decoders of one shape (RMS norm, rotary, gated MLP), read from their own configuration."""


def hooked_transformer(
    hf_model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase | None",
    *,
    model_name: str,
    directory: Path,
    n_devices: int = 1,
) -> Any:
    """Make a HookedTransformer that shares its weights with a Hugging Face model.

    No weight processing: no folded norms, no centring; the residual stream is the model's own.
    Gemma's embedding and norms are the exception to sharing, because TransformerLens stores them
    scaled.

    Raises:
        InputError: if the architecture has parts that TransformerLens 3 has no place for.
    """
    from transformer_lens import HookedTransformer
    from transformer_lens.loading_from_pretrained import get_pretrained_state_dict

    cfg = _hooked_config(hf_model, model_name=model_name, directory=directory, n_devices=n_devices)
    _refuse_unknown_biases(hf_model, cfg.original_architecture)
    with warnings.catch_warnings(), torch.device("meta"):
        warnings.filterwarnings(
            "ignore", "HookedTransformer is deprecated", category=DeprecationWarning
        )
        model = HookedTransformer(cfg, tokenizer, move_to_device=False)
    with torch.no_grad():
        converted = get_pretrained_state_dict(str(directory), cfg, hf_model)
        weights = _fitted(converted, model, cfg)
        buffers = _buffers(hf_model, model, cfg)
    # Set beforehand: loading leaves a rotary table of another length than the model's own as it is,
    # and the model's own begins with 2,048 positions of whatever context.
    for name, buffer in buffers.items():
        path, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(path), leaf, buffer)
    model.load_state_dict(weights | buffers, strict=True, assign=True)
    return model.eval()


def _hooked_config(
    hf_model: "PreTrainedModel", *, model_name: str, directory: Path, n_devices: int
) -> Any:
    """The HookedTransformerConfig of a model, from its configuration and never from its name."""
    from transformer_lens.config import HookedTransformerConfig

    architecture = type(hf_model).__name__
    where: dict[str, Any] = {
        "device": str(hf_model.device),
        "n_devices": n_devices,
        "dtype": hf_model.dtype,
        "model_name": model_name.rstrip("/").split("/")[-1],
        "original_architecture": architecture,
        "init_weights": False,
    }
    if architecture in FAMILIES:
        config = hf_model.config.get_text_config()
        return HookedTransformerConfig(**_decoder_fields(config, architecture), **where)
    return _config_by_transformer_lens(hf_model, directory, where)


def _decoder_fields(config: Any, architecture: str) -> dict[str, Any]:
    """What the families share, and by which of their own fields they differ."""
    n_heads = config.num_attention_heads
    d_head = getattr(config, "head_dim", None) or config.hidden_size // n_heads
    ropes = config.rope_parameters
    rope = ropes.get("full_attention", ropes)
    local_rope = ropes.get("sliding_attention") or rope
    # A converter that always writes grouped keys and values needs the count even if it is n_heads.
    always_grouped = architecture.startswith(("Gemma", "Mistral", "Qwen2"))
    grouped = always_grouped or config.num_key_value_heads != n_heads
    local = _local_layers(config)
    is_gemma = architecture.startswith("Gemma")
    fields: dict[str, Any] = {
        "d_model": config.hidden_size,
        "d_head": d_head,
        "n_heads": n_heads,
        "n_key_value_heads": config.num_key_value_heads if grouped else None,
        "d_mlp": config.intermediate_size,
        "n_layers": config.num_hidden_layers,
        "n_ctx": _context_length(config, rope),
        "d_vocab": config.vocab_size,
        "eps": config.rms_norm_eps,
        "act_fn": getattr(config, "hidden_activation", None) or config.hidden_act,
        "normalization_type": "RMS",
        "final_rms": True,
        "gated_mlp": True,
        "positional_embedding_type": "rotary",
        "rotary_adjacent_pairs": False,
        "rotary_dim": int(d_head * rope.get("partial_rotary_factor", 1.0)),
        "rotary_base": rope["rope_theta"],
        "rotary_base_local": local_rope["rope_theta"] if local_rope is not rope else None,
        "use_qk_norm": architecture.startswith(("Qwen3", "Gemma3")),
        "use_normalization_before_and_after": architecture.startswith(("Gemma2", "Gemma3")),
        "default_prepend_bos": not architecture.startswith("Qwen"),
        "tie_word_embeddings": config.tie_word_embeddings,
    }
    if any(local):
        fields |= {
            "use_local_attn": True,
            "window_size": config.sliding_window,
            "attn_types": ["local" if is_local else "global" for is_local in local],
        }
    if is_gemma and getattr(config, "query_pre_attn_scalar", None):
        fields["attn_scale"] = config.query_pre_attn_scalar**0.5
    if getattr(config, "attn_logit_softcapping", None):
        fields["attn_scores_soft_cap"] = config.attn_logit_softcapping
    if getattr(config, "final_logit_softcapping", None):
        fields["output_logits_soft_cap"] = config.final_logit_softcapping
    return fields


def _local_layers(config: Any) -> list[bool]:
    """Which layers attend only to a sliding window of earlier positions."""
    if not getattr(config, "sliding_window", None):
        return [False] * config.num_hidden_layers
    if kinds := getattr(config, "layer_types", None):
        return [kind == "sliding_attention" for kind in kinds]
    return [True] * config.num_hidden_layers


def _context_length(config: Any, rope: dict[str, Any]) -> int:
    """How many positions the rotary table covers.

    Where the scaling of the angles depends on the length of the input, it is the length up to which
    they are the unscaled ones.
    """
    longest = config.max_position_embeddings
    if rope["rope_type"] in ("dynamic", "longrope"):
        longest = rope.get("original_max_position_embeddings") or longest
    return min(longest, LONGEST_ROTARY_TABLE)


def _config_by_transformer_lens(
    hf_model: "PreTrainedModel", directory: Path, where: dict[str, Any]
) -> Any:
    """TransformerLens's own reading of a configuration, for the other architectures it knows."""
    from transformer_lens.loading_from_pretrained import get_pretrained_model_config

    # It guesses the architecture from the path, so it is shown one that says nothing.
    with tempfile.TemporaryDirectory(prefix="model-") as nameless:
        link = Path(nameless) / "model"
        link.symlink_to(directory.resolve(), target_is_directory=True)
        try:
            cfg = get_pretrained_model_config(
                str(link),
                hf_cfg=hf_model.config.to_dict(),
                device=where["device"],
                n_devices=where["n_devices"],
                dtype=where["dtype"],
            )
        except (AttributeError, KeyError, NotImplementedError, ValueError) as error:
            raise InputError(
                f"TransformerLens 3 has no {where['original_architecture']} ({directory}): install "
                "transformer_lens>=4, which does more architectures"
            ) from error
    cfg.model_name = where["model_name"]
    cfg.tokenizer_name = None
    return cfg


def _refuse_unknown_biases(hf_model: "PreTrainedModel", architecture: str | None) -> None:
    """The converters of these families drop biases in silence, all but Qwen2's own three."""
    if architecture not in FAMILIES:
        return
    carried = ("q_proj.bias", "k_proj.bias", "v_proj.bias") if "Qwen2" in architecture else ()
    for name, _ in hf_model.named_parameters():
        is_decoder = "vision" not in name and "multi_modal" not in name
        if is_decoder and name.endswith(".bias") and not name.endswith(carried):
            raise InputError(
                f"TransformerLens 3 has no place for {name} in a {architecture}: install "
                "transformer_lens>=4, which runs this model as it is"
            )


def _fitted(
    converted: dict[str, torch.Tensor], model: torch.nn.Module, cfg: Any
) -> dict[str, torch.Tensor]:
    """The converted weights, each where and in the dtype in which the model uses it.

    Converters create absent biases on the CPU, and for Phi-3 two per block that no module has.
    """
    wanted = dict(model.named_parameters())
    fitted = {}
    for name, parameter in wanted.items():
        device = _device_of(name, cfg)
        if name in converted:
            fitted[name] = converted[name].detach().to(device, parameter.dtype)
        elif name.rsplit(".", 1)[-1].startswith(("b_", "_b_")):
            fitted[name] = torch.zeros(parameter.shape, dtype=parameter.dtype, device=device)
        else:
            raise RuntimeError(f"the converted weights lack {name}")
    return fitted


def _device_of(name: str, cfg: Any) -> torch.device:
    """The device of a parameter or buffer, as TransformerLens spreads blocks over devices."""
    from transformer_lens.utilities.multi_gpu import get_device_for_block_index

    if name.startswith("blocks."):
        return get_device_for_block_index(int(name.split(".")[1]), cfg)
    last = name.startswith(("ln_final", "unembed"))
    return get_device_for_block_index(cfg.n_layers - 1 if last else 0, cfg)


def _buffers(
    hf_model: "PreTrainedModel", model: torch.nn.Module, cfg: Any
) -> dict[str, torch.Tensor]:
    """Real values for what the meta device left without, one tensor for all blocks alike."""
    shared: dict[tuple[str, ...], torch.Tensor] = {}
    tables = cache(partial(_rotary_tables, hf_model, cfg.n_ctx))
    filled = {}
    for name, buffer in model.named_buffers():
        path, _, leaf = name.rpartition(".")
        device = _device_of(name, cfg)
        attention = getattr(model.get_submodule(path), "attn_type", "global")
        key = (leaf, attention, str(device))
        if key not in shared:
            if leaf == "IGNORE":
                value = torch.tensor(-torch.inf)
            elif leaf == "mask":
                value = torch.zeros(buffer.shape, dtype=buffer.dtype)
            elif leaf in ("rotary_sin", "rotary_cos"):
                value = tables(attention)[leaf].to(buffer.dtype)
            else:
                raise RuntimeError(f"no value is known for the buffer {name}")
            shared[key] = value.to(device)
        filled[name] = shared[key]
    return filled


def _rotary_tables(
    hf_model: "PreTrainedModel", n_ctx: int, attention: str
) -> dict[str, torch.Tensor]:
    """Sines and cosines of every position, each `[n_ctx, rotary_dim]`, as Hugging Face has them.

    So every scaling of the angles (Llama 3.1's, YaRN, ...) is right because it is the model's own.
    `attention` is `global` or `local`: some models turn differently in the two.
    """
    rotary = getattr(hf_model.get_decoder(), "rotary_emb", None)
    if rotary is None:
        raise InputError(
            "this architecture's rotary embedding is not where Llama's is, so TransformerLens 3 "
            "can't be given it: install transformer_lens>=4, which runs this model as it is"
        )
    device = next(rotary.buffers()).device
    kind = {}
    if hasattr(rotary, "layer_types"):
        kind["layer_type"] = "sliding_attention" if attention == "local" else "full_attention"
    example = torch.zeros(1, dtype=hf_model.dtype, device=device)
    cos, sin = rotary(example, torch.arange(n_ctx, device=device)[None], **kind)
    return {"rotary_cos": cos[0], "rotary_sin": sin[0]}
