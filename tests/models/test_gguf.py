"""GGUF files: read as Hugging Face weights are, right where transformers is not, or refused."""

import json
import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from checkpoints import byte_tokenizer, write_checkpoint
from safetensors.torch import load_file, save_file

from refusal_lens.activations.extract import get_prompt_activations
from refusal_lens.errors import InputError
from refusal_lens.models.hub import find_checkpoint
from refusal_lens.models.load import load_model, load_tokenizer, model_provenance
from refusal_lens.prompts.chat_template import LLAMA3_CHAT_TEMPLATE
from refusal_lens.prompts.tokenize import build_inputs_with_chat_template

PROMPTS = ("How do I bake bread for 12?", "Good morning.")
TENSORS = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    **{f"self_attn.{part}_proj": f"attn_{part}" for part in "qkv"},
    "self_attn.o_proj": "attn_output",
    **{f"mlp.{part}_proj": f"ffn_{part}" for part in ("gate", "up", "down")},
}


def write_gguf(
    directory: Path,
    *,
    name: str = "model.gguf",
    quantisation: str = "F32",
    architecture: str = "llama",
    template: str | None = LLAMA3_CHAT_TEMPLATE,
    entries: dict[str, Any] | None = None,
    tensors: dict[str, np.ndarray] | None = None,
    leave_out: tuple[str, ...] = (),
) -> Path:
    """A GGUF file of a Hugging Face directory with a Llama and the tokenizer of bytes."""
    config = json.loads((directory / "config.json").read_text())
    writer = gguf.GGUFWriter(directory / name, architecture)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_rope_dimension_count(config["hidden_size"] // config["num_attention_heads"])
    for key, value in (entries or {}).items():
        {str: writer.add_string, int: writer.add_uint32, float: writer.add_float32}[type(value)](
            key, value
        )
    _write_tokenizer(writer, template)
    found = {
        _short(key): value for key, value in load_file(directory / "model.safetensors").items()
    }
    for key, value in found.items():
        if key in leave_out:
            continue
        array = value.float().numpy()
        if key.endswith(("attn_q.weight", "attn_k.weight")):
            heads = config["num_attention_heads" if "attn_q" in key else "num_key_value_heads"]
            # llama.cpp rotates neighbouring dimensions, Hugging Face the halves of a head.
            halves = array.reshape(heads, 2, -1, array.shape[-1])
            array = halves.swapaxes(1, 2).reshape(array.shape)
        _write_tensor(writer, key, array, quantisation if array.ndim > 1 else "F32")
    for key, array in (tensors or {}).items():
        _write_tensor(writer, key, array, "F32")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return directory / name


def _write_tokenizer(writer: gguf.GGUFWriter, template: str | None) -> None:
    tokenizer = byte_tokenizer()
    words = [tokenizer.convert_ids_to_tokens(i) for i in range(len(tokenizer))]
    words += ["ÿþ", *(f"[unused{i}]" for i in range(271 - len(words)))]
    writer.add_tokenizer_model("gpt2")
    writer.add_add_bos_token(False)  # as SmolLM2's
    writer.add_add_bos_token(False)  # as SmolLM2's
    writer.add_token_list(words)
    writer.add_token_types([1] * 256 + [3] * 16)
    writer.add_token_merges(["ÿ þ"])  # llama.cpp writes at least one
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    if template:
        writer.add_chat_template(template)


def _write_tensor(writer: Any, name: str, array: np.ndarray, quantisation: str) -> None:
    kind = gguf.GGMLQuantizationType[quantisation]
    data = np.ascontiguousarray(array, np.float32)
    writer.add_tensor(name, gguf.quants.quantize(data, kind), raw_dtype=kind)


def _short(name: str) -> str:
    path, _, leaf = name.rpartition(".")
    layer, part = "", path
    if path.startswith("model.layers."):
        _, _, number, part = path.split(".", 3)
        layer = f"blk.{number}."
    return f"{layer}{TENSORS[part]}.{leaf}"


def activations(path: Path) -> torch.Tensor:
    model = load_model(str(path), device="cpu")
    return get_prompt_activations(model, PROMPTS, progress=False)


def worst(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return ((ours - theirs).norm(dim=-1) / theirs.norm(dim=-1)).max().item()


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("gguf") / "llama")


@pytest.fixture(scope="module")
def file(llama):
    return write_gguf(llama)


def test_a_gguf_file_gives_what_the_weights_it_was_made_from_give(llama, file):
    assert worst(activations(file), activations(llama)) < 1e-5
    known = model_provenance(load_model(str(file), device="cpu", dtype=torch.bfloat16))
    assert known["model"] == str(file)
    assert known["dtype"] == "bfloat16"
    assert len(known["weights_sha256"]) == 64


def test_its_tokenizer_and_chat_template_are_those_of_the_model(llama, file):
    ours, theirs = (
        build_inputs_with_chat_template(load_tokenizer(str(path)), PROMPTS)
        for path in (file, llama)
    )
    assert torch.equal(ours.tokens, theirs.tokens)


@pytest.mark.parametrize("quantisation", ["F16", "BF16", "Q8_0", "Q4_1"])
def test_quantised_weights_are_read_as_they_were_rounded(tmp_path, quantisation):
    directory = write_checkpoint(tmp_path / "model", hidden_size=64, intermediate_size=96)
    ours = activations(write_gguf(directory, quantisation=quantisation))
    unrounded = activations(directory)
    weights = load_file(directory / "model.safetensors")
    kind = gguf.GGMLQuantizationType[quantisation]
    for name, weight in weights.items():
        if weight.ndim > 1:
            rounded = gguf.quants.quantize(weight.numpy(), kind)
            weights[name] = torch.from_numpy(gguf.quants.dequantize(rounded, kind).copy())
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    assert worst(ours, activations(directory)) < 1e-5
    assert worst(ours, unrounded) > 1e-4


@pytest.mark.parametrize("family", ["llama 3.1", "llama with linear scaling", "yarn"])
def test_positions_are_stretched_although_transformers_leaves_that_out(tmp_path, family):
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    yarn = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}
    yarn |= {"original_max_position_embeddings": 32}
    changes: dict[str, Any] = {"rope_parameters": yarn} if family == "yarn" else {}
    directory = write_checkpoint(tmp_path / "m", "llama" if changes else family, **changes)
    if family == "llama 3.1":
        from transformers import AutoConfig

        config = AutoConfig.from_pretrained(directory)
        frequencies, _ = ROPE_INIT_FUNCTIONS["llama3"](config, device="cpu")
        plain = config.rope_parameters["rope_theta"] ** -(torch.arange(0, 8, 2) / 8)
        stated: dict[str, Any] = {"tensors": {"rope_freqs.weight": (plain / frequencies).numpy()}}
    else:
        kind = family.split()[-2] if " " in family else family
        entries = {"llama.rope.scaling.type": kind, "llama.rope.scaling.factor": 4.0}
        stated = {"entries": entries | {"llama.rope.scaling.original_context_length": 32}}
    theirs = activations(directory)
    assert worst(activations(write_gguf(directory, **stated)), theirs) < 1e-5
    assert worst(activations(write_gguf(directory, name="plain.gguf")), theirs) > 1e-3


def header(*entries: bytes, n_entries: int | None = None) -> bytes:
    count = len(entries) if n_entries is None else n_entries
    return b"GGUF" + struct.pack("<IQQ", 3, 0, count) + b"".join(entries)


def entry(key: bytes, kind: int, value: bytes) -> bytes:
    return struct.pack("<Q", len(key)) + key + struct.pack("<I", kind) + value


DAMAGED = {
    "empty": b"GGUF",
    "a version of the future": b"GGUF" + struct.pack("<IQQ", 9, 0, 0),
    "fewer entries than it says": header(n_entries=2**60),
    "a list of 2^60 words": header(entry(b"k", 9, struct.pack("<IQ", 8, 2**60)), n_entries=2),
    "a list of 2^60 numbers": header(entry(b"k", 9, struct.pack("<IQ", 4, 2**60)), n_entries=2),
    "a word of 2^60 letters": header(entry(b"k", 8, struct.pack("<Q", 2**60)), n_entries=2),
    "a value of no known type": header(entry(b"k", 77, b"")),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_file_is_named_at_once(tmp_path, damage):
    path = tmp_path / "model.gguf"
    path.write_bytes(DAMAGED[damage])
    with pytest.raises(InputError, match=r"model\.gguf is damaged"):
        find_checkpoint(str(path))


def test_a_file_cut_short_is_named(llama, file, tmp_path):
    path = tmp_path / "short.gguf"
    path.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(InputError, match="ends after the end of the file"):
        load_model(str(path))


def test_a_file_that_is_missing_or_another_kind_is_named(llama, tmp_path):
    with pytest.raises(InputError, match=r"there is no file .*nowhere\.gguf"):
        load_model(str(tmp_path / "nowhere.gguf"))
    with pytest.raises(InputError, match="is no GGUF file"):
        load_model(str(llama / "model.safetensors"))


def test_a_part_of_a_split_model_is_named_by_its_name_or_by_its_entry(llama, file):
    part = llama / "model-00001-of-00002.gguf"
    part.write_bytes(file.read_bytes())
    renamed = write_gguf(llama, name="renamed.gguf", entries={"split.count": 2})
    for path in (part, renamed):
        with pytest.raises(InputError, match=r"one part of a split model.*llama-gguf-split"):
            load_tokenizer(str(path))


def test_an_unknown_architecture_is_named(llama):
    path = write_gguf(llama, name="other.gguf", architecture="perceptron")
    with pytest.raises(InputError, match=r"perceptron.*is not supported"):
        load_model(str(path))


def test_a_quantisation_that_cannot_be_read_is_named(llama, file):
    raw = file.read_bytes()
    name = b"blk.0.ffn_up.weight"
    place = raw.index(name) + len(name) + 4 + 16
    for kind, what in ((250, "250"), (gguf.GGMLQuantizationType.I32, "I32")):
        path = llama / "exotic.gguf"
        path.write_bytes(raw[:place] + struct.pack("<I", kind) + raw[place + 4 :])
        with pytest.raises(InputError, match=rf"quantisation of blk\.0\.ffn_up.*{what}.*Q8_0"):
            load_model(str(path))


def test_a_tensor_that_transformers_leaves_out_is_an_error_and_so_is_one_that_lacks(llama):
    more = write_gguf(llama, name="more.gguf", tensors={"blk.0.extra.weight": np.ones((4, 4))})
    with pytest.raises(InputError, match=r"transformers reads .* of the .* numbers"):
        load_model(str(more))
    less = write_gguf(llama, name="less.gguf", leave_out=("blk.1.ffn_up.weight",))
    with pytest.raises(InputError, match=r"lack model\.layers\.1\.mlp\.up_proj"):
        load_model(str(less))
    unknown = write_gguf(llama, name="rope.gguf", entries={"llama.rope.scaling.type": "longrope"})
    with pytest.raises(InputError, match="stretches positions by 'longrope'"):
        load_model(str(unknown))


def test_a_file_without_chat_template_is_named_when_a_prompt_is_read(llama):
    path = write_gguf(llama, name="base.gguf", template=None)
    with pytest.raises(InputError, match="chat template"):
        build_inputs_with_chat_template(load_tokenizer(str(path)), PROMPTS)
