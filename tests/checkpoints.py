"""Tiny random models on disk, as Hugging Face writes real ones, and their true activations."""

from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

SPECIAL_TOKENS = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
)

SIZES: dict[str, Any] = {
    "vocab_size": 272,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 256,
    "eos_token_id": 260,
    "pad_token_id": None,
    "tie_word_embeddings": False,
}
"""Fit the tokenizer of `byte_tokenizer`; grouped-query attention unless a family says otherwise."""

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}

GEMMA = {"head_dim": 16, "tie_word_embeddings": True, "pad_token_id": 0}

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}),
    "llama without grouped queries": ("LlamaConfig", {"num_key_value_heads": 4}),
    "llama with tied embeddings": ("LlamaConfig", {"tie_word_embeddings": True}),
    "llama with wide heads": ("LlamaConfig", {"head_dim": 16}),
    "llama 3.1": ("LlamaConfig", {"rope_parameters": LLAMA3_ROPE}),
    "llama with linear scaling": (
        "LlamaConfig",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}},
    ),
    "mistral": ("MistralConfig", {"sliding_window": None, "head_dim": 16}),
    "mistral with a sliding window": ("MistralConfig", {"sliding_window": 5}),
    "qwen2": ("Qwen2Config", {}),
    "qwen2.5 with yarn": (
        "Qwen2Config",
        {
            "tie_word_embeddings": True,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 1e6,
                "factor": 4.0,
                "original_max_position_embeddings": 32,
            },
        },
    ),
    "qwen3": ("Qwen3Config", {"head_dim": 16}),
    "gemma": ("GemmaConfig", GEMMA | {"num_key_value_heads": 1}),
    "gemma2": (
        "Gemma2Config",
        GEMMA | {"sliding_window": 5, "query_pre_attn_scalar": 24},
    ),
    "gemma3": (
        "Gemma3TextConfig",
        GEMMA | {"sliding_window": 5, "query_pre_attn_scalar": 24, "num_hidden_layers": 7},
    ),
    "phi3": ("Phi3Config", {"sliding_window": None}),
    "phi4 mini": (
        "Phi3Config",
        {
            "sliding_window": None,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e4,
                "partial_rotary_factor": 0.5,
            },
        },
    ),
    "phi3 with longrope": (
        "Phi3Config",
        {
            "sliding_window": 7,
            "original_max_position_embeddings": 64,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 1e4,
                "short_factor": [1.1, 1.2, 1.3, 1.4],
                "long_factor": [2.0, 3.0, 4.0, 5.0],
                "original_max_position_embeddings": 64,
            },
        },
    ),
}
"""By name, the configuration class and what it changes of `SIZES`."""


def write_checkpoint(
    directory: Path,
    family: str = "llama",
    *,
    tokenizer: bool = True,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    **changes: Any,
) -> Path:
    """A random model of a family and its tokenizer, saved as a Hugging Face directory.

    Norm weights and biases are random too, so that leaving one out shows. `changes` are
    configuration values.
    """
    import transformers

    name, own = FAMILIES[family]
    values = SIZES | own | changes
    config = getattr(transformers, name)(**values)
    return write_random(directory, config, tokenizer=tokenizer, seed=seed, dtype=dtype)


def write_random(
    directory: Path,
    config: Any,
    *,
    tokenizer: bool = True,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> Path:
    """A random model of a configuration, saved as a Hugging Face directory."""
    import transformers

    generator = torch.Generator().manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 1:
                parameter.add_(0.1 * noise)
            else:
                parameter.copy_(noise / parameter.shape[-1] ** 0.5)
    directory.mkdir(parents=True, exist_ok=True)
    model.to(dtype).save_pretrained(directory)
    if tokenizer:
        byte_tokenizer().save_pretrained(directory)
    return directory


def byte_tokenizer(*, chat_template: str | None = "llama3", **settings: Any):
    """A tokenizer of bytes with Llama-3's special tokens; pads on the right, as Llama-3's does."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from refusal_lens.prompts.chat_template import LLAMA3_CHAT_TEMPLATE

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({byte: i for i, byte in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(list(SPECIAL_TOKENS))
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        **{"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>", "padding_side": "right"}
        | settings,
        chat_template=LLAMA3_CHAT_TEMPLATE if chat_template == "llama3" else chat_template,
    )


def hugging_face_layers(
    directory: Path,
    tokens: Int[Tensor, "batch pos"],
    mask: Int[Tensor, "batch pos"],
    *,
    dtype: torch.dtype = torch.float32,
) -> Float[Tensor, "batch pos layer d_model"]:
    """The output of every layer, from Hugging Face alone: the last before the final norm."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        directory, dtype=dtype, attn_implementation="eager"
    ).eval()
    last = []
    decoder = model.get_decoder()
    handle = decoder.norm.register_forward_pre_hook(lambda _, arguments: last.append(arguments[0]))
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        states = model(
            tokens, attention_mask=mask, position_ids=positions, output_hidden_states=True
        ).hidden_states
    handle.remove()
    return torch.stack([*states[1:-1], last[0]], dim=2)
