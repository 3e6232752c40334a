"""Families of chat models as tiny random ones, and what is measured of each.

`tests/models/test_families.py` tests the table below; `tests/benchmarks/families.py` writes it into
the README.
"""

from importlib.metadata import version
from itertools import product
from typing import Any, NamedTuple

import torch
from checkpoints import byte_tokenizer
from torch import Tensor

GENERATION = int(version("transformer_lens").split(".")[0])
TOKENS = torch.randint(20, 250, (2, 9), generator=torch.Generator().manual_seed(1))
PROMPTS, BARE = ("Why is it so?", "Hi"), "{{ messages[0]['content'] }}"

SIZES: dict[str, Any] = {
    "vocab_size": 272,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}
UNGROUPED = {"num_key_value_heads": 4}
TIED = {"tie_word_embeddings": True}
WINDOW = {"sliding_window": 4}
GEMMA = {"head_dim": 8, "pad_token_id": 0, "tie_word_embeddings": True}
GEMMA4 = GEMMA | WINDOW | {"global_head_dim": 16, "vocab_size_per_layer_input": 272}
GEMMA4 |= {"hidden_size_per_layer_input": 8, "num_hidden_layers": 4, "num_kv_shared_layers": 2}
GEMMA4 |= {"layer_types": ["sliding_attention", "full_attention"] * 2}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
LLAMA3_ROPE = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0}
LLAMA3_ROPE |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 16}
YARN = {"rope_type": "yarn", "rope_theta": 1.5e5, "factor": 4.0, "beta_fast": 32.0}
YARN |= {"beta_slow": 1.0, "truncate": False, "original_max_position_embeddings": 16}
STATES = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_d_state": 8}
STATES |= {"mamba_chunk_size": 4}
GRANITE = {"residual_multiplier": 0.22, "embedding_multiplier": 3.0, "logits_scaling": 2.0}
SIGHT = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
SIGHT |= {"num_attention_heads": 2, "image_size": 28, "patch_size": 14}

# Older configurations have field names of their own, so they get no SIZES.
GPT = {"vocab_size": 272, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64}
GPT |= {"bos_token_id": 1, "eos_token_id": 2}
SHORT = {"vocab_size": 272, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
FALCON = SHORT | {"bias": False, "bos_token_id": 1, "eos_token_id": 2}
FALCON_40B = FALCON | {"num_kv_heads": 2, "new_decoder_architecture": True, "multi_query": False}
MAMBA = {"vocab_size": 272, "hidden_size": 32, "num_hidden_layers": 3, "state_size": 8}
OPT = SHORT | {"ffn_dim": 48, "max_position_embeddings": 64, "word_embed_proj_dim": 32}
NEOX = {key: value for key, value in SIZES.items() if key != "num_key_value_heads"}

NO, BOTH = (), (3, 4)
FAMILIES: dict[str, tuple[str, dict[str, Any], tuple[int, ...]]] = {
    "Llama 2": ("LlamaConfig", SIZES | UNGROUPED, BOTH),
    "Llama 3": ("LlamaConfig", SIZES, BOTH),
    "Llama 3.1, 3.2": ("LlamaConfig", SIZES | TIED | {"rope_parameters": LLAMA3_ROPE}, BOTH),
    "SmolLM2": ("LlamaConfig", SIZES | TIED, BOTH),
    "SmolLM3": ("SmolLM3Config", SIZES, (4,)),
    "Qwen2": ("Qwen2Config", SIZES, BOTH),
    "Qwen2.5": ("Qwen2Config", SIZES | TIED, BOTH),
    "Qwen3": ("Qwen3Config", SIZES | {"head_dim": 8}, BOTH),
    "Qwen3.5": (
        "Qwen3_5TextConfig",
        SIZES
        | {"num_hidden_layers": 4, "head_dim": 8, "linear_num_key_heads": 2}
        | {"linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8},
        (4,),
    ),
    "Gemma 1": ("GemmaConfig", SIZES | GEMMA | {"num_key_value_heads": 1}, BOTH),
    "Gemma 2": ("Gemma2Config", SIZES | GEMMA | WINDOW, BOTH),
    "Gemma 3": ("Gemma3TextConfig", SIZES | GEMMA | WINDOW | {"num_hidden_layers": 7}, BOTH),
    "Gemma 3 with sight": (
        "Gemma3Config",
        {"text_config": SIZES | GEMMA | WINDOW, "vision_config": SIGHT}
        | {"mm_tokens_per_image": 4, "image_token_index": 271},
        BOTH,
    ),
    "Gemma 4": ("Gemma4TextConfig", SIZES | GEMMA4, (4,)),
    "Gemma 4 with sight": (
        "Gemma4Config",
        {
            "text_config": SIZES | GEMMA4,
            "vision_config": SIGHT
            | {"patch_size": 4, "num_key_value_heads": 2, "head_dim": 8, "global_head_dim": 8},
            "audio_config": None,
        },
        (4,),
    ),
    "Mistral": ("MistralConfig", SIZES | WINDOW | {"head_dim": 8}, BOTH),
    "Mistral 3 with sight": (
        "Mistral3Config",
        {
            "text_config": SIZES | {"model_type": "mistral", "head_dim": 8},
            "vision_config": SIGHT | {"model_type": "pixtral", "head_dim": 8},
            "image_token_index": 271,
        },
        (4,),
    ),
    "LLaVA": (
        "LlavaConfig",
        {
            "text_config": SIZES | {"model_type": "llama"},
            "vision_config": SIGHT | {"model_type": "clip_vision_model", "projection_dim": 16},
            "image_token_index": 271,
        },
        (4,),
    ),
    "Mixtral": ("MixtralConfig", SIZES | EXPERTS, BOTH),
    "Phi-3, Phi-4": ("Phi3Config", SIZES, BOTH),
    "Phi": ("PhiConfig", SIZES | UNGROUPED, (4,)),
    "GPT-2": ("GPT2Config", GPT, BOTH),
    "GPT-J": ("GPTJConfig", GPT | {"rotary_dim": 4}, BOTH),
    "GPT-NeoX": ("GPTNeoXConfig", NEOX, BOTH),
    "CodeGen": ("CodeGenConfig", GPT | {"rotary_dim": 4}, NO),
    "OPT": ("OPTConfig", OPT | {"pad_token_id": 0}, BOTH),
    "BLOOM": (
        "BloomConfig",
        {"vocab_size": 272, "hidden_size": 32, "n_layer": 3, "n_head": 4},
        (4,),
    ),
    "OLMo": ("OlmoConfig", SIZES, (4,)),
    "OLMo 2": ("Olmo2Config", SIZES, (4,)),
    "OLMo 3": ("Olmo3Config", SIZES | WINDOW, BOTH),
    "Falcon 7B": ("FalconConfig", FALCON | {"multi_query": True, "parallel_attn": True}, (4,)),
    "Falcon 40B": (
        "FalconConfig",
        FALCON_40B,
        NO,
    ),
    "Falcon-H1": ("FalconH1Config", SIZES | STATES | {"mamba_d_ssm": 64}, (4,)),
    "Apertus": ("ApertusConfig", SIZES, (4,)),
    "gpt-oss": (
        "GptOssConfig",
        SIZES | EXPERTS | WINDOW | {"head_dim": 8, "rope_parameters": YARN},
        BOTH,
    ),
    "Granite": ("GraniteConfig", SIZES | GRANITE, (4,)),
    "Granite 4 hybrid": (
        "GraniteMoeHybridConfig",
        SIZES
        | GRANITE
        | STATES
        | EXPERTS
        | {"layer_types": ["mamba", "attention", "mamba"], "shared_intermediate_size": 32},
        NO,
    ),
    "StableLM": ("StableLmConfig", SIZES, (4,)),
    "Command R": ("CohereConfig", SIZES, (4,)),
    "LFM2": (
        "Lfm2Config",
        SIZES | {"block_multiple_of": 8, "layer_types": ["conv", "full_attention", "conv"]},
        (4,),
    ),
    "Mamba": ("MambaConfig", MAMBA, (4,)),
    "Mamba 2": (
        "Mamba2Config",
        MAMBA | {"num_heads": 8, "head_dim": 8, "n_groups": 1, "chunk_size": 4},
        (4,),
    ),
    "Jamba": (
        "JambaConfig",
        SIZES
        | {"num_hidden_layers": 4, "attn_layer_period": 2, "attn_layer_offset": 1}
        | {"expert_layer_period": 2, "num_experts": 2, "mamba_d_state": 8}
        | {"use_mamba_kernels": False},
        (4,),
    ),
    "Nemotron-H": (
        "NemotronHConfig",
        SIZES
        | {"num_hidden_layers": 4, "hybrid_override_pattern": "M*-M", "head_dim": 8}
        | {"mamba_num_heads": 8, "mamba_head_dim": 8, "ssm_state_size": 8, "n_groups": 1}
        | {"chunk_size": 4},
        (4,),
    ),
}
"""By name: the configuration's class, its values, the generations of TransformerLens that run it."""


class Measured(NamedTuple):
    """What two prompts of a few tokens show; relative to the norm of the vectors compared."""

    parity: float  # largest difference from Hugging Face over layers and logits
    left: float  # largest component left after an ablation, over layers
    before: float  # the same without the ablation
    rows_join: bool  # whether many interventions can share a pass
    apart: float  # largest difference of many interventions in a pass from each alone, in log-odds


def random_model(family: str) -> Any:
    """A random model of a family; norms and biases are random too, so that leaving one out shows."""
    import transformers

    name, values, _ = FAMILIES[family]
    config = getattr(transformers, name)(**values)
    sees = "vision_config" in values
    kind = transformers.AutoModelForImageTextToText if sees else transformers.AutoModelForCausalLM
    model = kind.from_config(config, attn_implementation="eager")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 1:
                parameter.add_(0.1 * noise)
            else:
                parameter.copy_(noise / parameter.shape[-1] ** 0.5)
    return model.eval()


@torch.no_grad()
def hugging_face_streams(hf_model: Any, tokens: Tensor) -> tuple[list[Tensor], Tensor]:
    """The output of every block, and the logits, from Hugging Face alone."""
    n_layers = hf_model.config.get_text_config().num_hidden_layers
    lists = [m for m in hf_model.get_decoder().modules() if isinstance(m, torch.nn.ModuleList)]
    outputs: list[Tensor] = []

    def record(module: Any, arguments: Any, output: Any) -> None:
        outputs.append(output if isinstance(output, Tensor) else output[0])

    blocks = next(modules for modules in lists if len(modules) == n_layers)
    handles = [block.register_forward_hook(record) for block in blocks]
    logits = hf_model(tokens).logits
    for handle in handles:
        handle.remove()
    return outputs, logits


@torch.no_grad()
def measure(family: str) -> Measured:
    """Load a family's random model and measure it; InputError where it is refused."""
    from refusal_lens.interventions.hooks import (
        ablate_direction,
        can_join_rows,
        check_interventions,
        stream_after,
    )
    from refusal_lens.models.load import from_hugging_face

    hf_model = random_model(family)
    theirs, their_logits = hugging_face_streams(hf_model, TOKENS)
    model = from_hugging_face(hf_model, byte_tokenizer(chat_template=BARE), name=family)
    check_interventions(model)
    direction = torch.randn(32, generator=torch.Generator().manual_seed(2))
    names = [stream_after(model, layer) for layer in range(model.cfg.n_layers)]

    def streams(hooks: Any) -> tuple[list[Tensor], Tensor]:
        with model.hooks(fwd_hooks=hooks):
            logits, cache = model.run_with_cache(TOKENS, names_filter=names)
        return [cache[name] for name in names], logits

    ours, our_logits = streams([])
    pairs = zip([*ours, our_logits], [*theirs, their_logits], strict=True)
    parity = max(((a - b).norm() / b.norm()).item() for a, b in pairs)
    ablated, _ = streams(ablate_direction(model, direction))
    left, before = (
        max(torch.cosine_similarity(x, direction, dim=-1).abs().max().item() for x in xs)
        for xs in (ablated, ours)
    )
    return Measured(parity, left, before, can_join_rows(model), many_apart_from_one(model))


def many_apart_from_one(model: Any) -> float:
    """The largest difference of log-odds between interventions that share passes and each alone."""
    from refusal_lens.interventions import (
        ablate_direction,
        ablation_effects,
        add_direction,
        addition_effects,
        refusal_log_odds,
    )
    from refusal_lens.interventions.hooks import stream_points
    from refusal_lens.prompts.tokenize import encode_prompts

    directions, ids = torch.randn(2, 32, generator=torch.Generator().manual_seed(3)), (40, 41)

    def ablate_at_last(model: Any, direction: Tensor) -> list[tuple[str, Any]]:
        def hook_fn(x: Tensor, hook: object) -> Tensor:
            x, unit = x.clone(), direction / direction.norm()
            x[..., -1, :] -= (x[..., -1, :] @ unit)[..., None] * unit
            return x

        return [(name, hook_fn) for name in stream_points(model)]

    options: dict[str, Any] = {"score": ids, "progress": False}
    ablated = ablation_effects(model, PROMPTS, directions, **options)
    at_last = ablation_effects(model, PROMPTS, directions, last_position=True, **options)
    added = addition_effects(model, PROMPTS, directions, torch.arange(2), **options)
    apart = 0.0
    for row, prompt in product(range(2), range(len(PROMPTS))):
        tokens = torch.tensor([encode_prompts(model.tokenizer, PROMPTS)[prompt]])
        for many, hooks in (
            (ablated, ablate_direction(model, directions[row])),
            (at_last, ablate_at_last(model, directions[row])),
            (added, add_direction(model, directions[row], row)),
        ):
            with model.hooks(fwd_hooks=hooks):
                alone = refusal_log_odds(model(tokens)[:, -1], ids)
            apart = max(apart, float((many.log_odds[row, prompt] - alone).abs().max()))
    return apart
