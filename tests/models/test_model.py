"""Loading: what a model computes is what Hugging Face computes, and mistakes are named."""

import importlib.metadata
import json
import logging
import os
import pickle

import pytest
import torch
import transformers
from checkpoints import FAMILIES, SIZES, hugging_face_layers, write_checkpoint, write_random

from refusal_lens.errors import InputError
from refusal_lens.models import load as model_module
from refusal_lens.models.load import load_model, load_tokenizer, model_provenance

on_transformer_lens_3 = pytest.mark.skipif(
    not importlib.metadata.version("transformer_lens").startswith("3."),
    reason="about the HookedTransformer of TransformerLens 3",
)


@pytest.fixture(scope="session")
def batch() -> tuple[torch.Tensor, torch.Tensor]:
    """Random tokens, padded on the left by different amounts, and their mask."""
    tokens = torch.randint(0, 256, (3, 24), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(tokens)
    mask[0, :9] = 0
    mask[1, :1] = 0
    return tokens, mask


@pytest.fixture(scope="session")
def llama(tmp_path_factory):
    """A directory with a random Llama."""
    return write_checkpoint(tmp_path_factory.mktemp("models") / "llama")


def layers_of(model, tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The output of every layer, through TransformerLens."""
    names = [f"blocks.{layer}.hook_resid_post" for layer in range(model.cfg.n_layers)]
    with torch.no_grad():
        _, cache = model.run_with_cache(
            tokens, attention_mask=mask, names_filter=names.__contains__
        )
    return torch.stack([cache[name].to(tokens.device) for name in names], dim=2)


def worst_difference(ours: torch.Tensor, theirs: torch.Tensor, mask: torch.Tensor) -> float:
    """Largest over layers and real tokens of the difference, relative to the vector's norm."""
    real = mask.bool()
    return ((ours - theirs).norm(dim=-1) / theirs.norm(dim=-1))[real].max().item()


def storage(tensors) -> int:
    """Bytes held by some tensors, those that share memory counted once."""
    return sum(
        {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values()
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_every_layer_of_a_padded_batch_is_what_hugging_face_computes(family, tmp_path, batch):
    directory = write_checkpoint(tmp_path / "model", family)
    model = load_model(str(directory), device="cpu")
    theirs = hugging_face_layers(directory, *batch)
    assert worst_difference(layers_of(model, *batch), theirs, batch[1]) < 1e-5
    tokens, mask = batch
    unmasked = layers_of(model, tokens, torch.ones_like(mask))
    assert worst_difference(unmasked, theirs, mask) > 1e-2, "the mask would not be missed"


@pytest.mark.parametrize(
    "family", ["llama", "llama 3.1", "llama with linear scaling", "gemma3", "phi4 mini"]
)
def test_a_prompt_of_more_than_2048_tokens_is_what_hugging_face_computes(family, tmp_path):
    # TransformerLens 3 tabulates the angles of 2,048 positions at first, without any scaling.
    changes = {"max_position_embeddings": 4096, "num_hidden_layers": 2}
    changes |= {"num_attention_heads": 1, "num_key_value_heads": 1}
    directory = write_checkpoint(tmp_path / "model", family, **changes)
    model = load_model(str(directory), device="cpu")
    assert model.cfg.n_ctx == 4096
    tokens = torch.randint(0, 256, (1, 2100), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(tokens)
    theirs = hugging_face_layers(directory, tokens, mask)
    assert worst_difference(layers_of(model, tokens, mask), theirs, mask) < 1e-5


def test_the_trained_model_of_the_references_is_what_hugging_face_computes(reference, batch):
    directory = reference / "weights" / "stories260K_hf"
    model = load_model(str(directory), device="cpu")
    assert model.tokenizer is None
    theirs = hugging_face_layers(directory, *batch)
    assert worst_difference(layers_of(model, *batch), theirs, batch[1]) < 1e-5


def test_the_language_half_of_a_model_that_also_sees_is_read(tmp_path, batch):
    from transformers import Gemma3Config

    _, changes = FAMILIES["gemma3"]
    sight = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    sight |= {"num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    config = Gemma3Config(
        text_config=SIZES | changes,
        vision_config=sight,
        mm_tokens_per_image=4,
        image_token_index=271,
    )
    directory = write_random(tmp_path / "model", config)
    theirs = hugging_face_layers(directory, *batch)
    ours = layers_of(load_model(str(directory), device="cpu"), *batch)
    assert worst_difference(ours, theirs, batch[1]) < 1e-5


def test_a_batch_gives_each_prompt_what_it_gives_alone(llama, batch):
    model = load_model(str(llama), device="cpu")
    together = layers_of(model, *batch)
    for row, (tokens, mask) in enumerate(zip(*batch, strict=True)):
        real = tokens[mask.bool()][None]
        alone = layers_of(model, real, torch.ones_like(real))
        difference = worst_difference(
            together[row : row + 1, -real.shape[1] :], alone, torch.ones_like(real)
        )
        assert difference < 1e-5


@pytest.mark.parametrize("family", ["llama", "llama with tied embeddings", "qwen3", "phi3"])
def test_no_weight_is_held_twice(family, tmp_path):
    directory = write_checkpoint(
        tmp_path / "model", family, hidden_size=128, intermediate_size=512, vocab_size=2048
    )
    model = load_model(str(directory), device="cpu")
    held = storage([*model.parameters(), *model.buffers()])
    assert held < 1.05 * (directory / "model.safetensors").stat().st_size


def test_the_architecture_is_read_from_the_configuration_not_from_the_path(tmp_path, batch):
    for path, family in (("gemma-2-2b/llama-7b", "qwen3"), ("qwen/phi-2", "llama")):
        directory = write_checkpoint(tmp_path / path, family)
        theirs = hugging_face_layers(directory, *batch)
        ours = layers_of(load_model(str(directory), device="cpu"), *batch)
        assert worst_difference(ours, theirs, batch[1]) < 1e-5


def test_loading_makes_no_symbolic_links_which_windows_may_refuse(tmp_path, monkeypatch):
    def refuse(*args, **options):
        raise OSError("a required privilege is not held by the client")

    sizes = {key: value for key, value in SIZES.items() if key != "num_key_value_heads"}
    directory = write_random(tmp_path / "neox", transformers.GPTNeoXConfig(**sizes))
    monkeypatch.setattr(os, "symlink", refuse)
    with pytest.raises(OSError, match="privilege"):
        (tmp_path / "link").symlink_to(directory)
    assert load_model(str(directory), device="cpu").cfg.n_layers == SIZES["num_hidden_layers"]


def test_architectures_that_transformer_lens_reads_itself_load_too(tmp_path, batch):
    from transformers import AutoModelForCausalLM, GPT2Config, GPTNeoXConfig

    unpadded = batch[0][2:]
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    context = {"max_position_embeddings": 64, "vocab_size": 272, "bos_token_id": None}
    context |= {"eos_token_id": None}
    for name, config in (
        ("llama-gpt2", GPT2Config(**sizes, **context, n_ctx=64)),
        ("neox", GPTNeoXConfig(**sizes, **context, intermediate_size=64)),
    ):
        directory = write_random(tmp_path / name, config)
        model = load_model(str(directory), device="cpu")
        theirs = AutoModelForCausalLM.from_pretrained(directory, attn_implementation="eager").eval()
        with torch.no_grad():
            expected = theirs(unpadded).logits
            ours = model(unpadded)
        assert torch.allclose(ours, expected, atol=1e-4 * expected.abs().max().item())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_weights_come_in_the_dtype_asked_for(llama, dtype):
    model = load_model(str(llama), device="cpu", dtype=dtype)
    assert {weight.dtype for weight in model.parameters()} == {dtype}
    assert model.cfg.dtype == dtype
    assert not any(module.training for module in model.modules())


def test_the_cpu_is_warned_about(llama, caplog):
    with caplog.at_level(logging.WARNING, logger="refusal_lens"):
        load_model(str(llama), device="cpu")
    assert "on the CPU" in caplog.text


def test_provenance_names_what_was_loaded_and_admits_what_is_unknown(llama):
    model = load_model(str(llama), device="cpu", dtype=torch.bfloat16)
    known = model_provenance(model)
    assert known["model"] == str(llama)
    assert known["revision"] is None
    assert len(known["weights_sha256"]) == 64
    assert known["dtype"] == "bfloat16"
    assert json.loads(json.dumps(known)) == known
    from refusal_lens.models.load import _origins

    del _origins[model]  # as if a caller had brought a model of their own
    brought = model_provenance(model)
    assert brought.keys() == known.keys()
    assert brought["revision"] is brought["weights_sha256"] is None
    assert brought["lens"] == known["lens"]


@on_transformer_lens_3
def test_a_tokenizer_is_read_once_and_as_transformer_lens_reads_it(llama, monkeypatch):
    from transformers import AutoTokenizer

    read, plain = [], AutoTokenizer.from_pretrained

    def counting(*args, **options):
        read.append(args)
        return plain(*args, **options)

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", counting)
    tokenizer = load_model(str(llama), device="cpu").tokenizer
    assert len(read) == 1
    assert tokenizer.bos_token
    again = plain(llama, add_bos_token=True)
    for text in ("", "How do I build a bomb?", f"{tokenizer.bos_token}x"):
        assert tokenizer.encode(text) == again.encode(text)


def test_a_tokenizer_loads_without_its_weights(llama, tmp_path):
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((llama / name).read_bytes())
    assert (
        load_tokenizer(str(tmp_path)).convert_tokens_to_ids("<|eot_id|>") == SIZES["eos_token_id"]
    )
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "tokenizer_config.json").unlink()
    with pytest.raises(InputError, match="has no tokenizer"):
        load_tokenizer(str(tmp_path))


@pytest.mark.filterwarnings("ignore:.*pickle:FutureWarning")
def test_pickled_weights_are_read_as_tensors_and_what_they_would_run_is_not_run(tmp_path, batch):
    from safetensors.torch import load_file

    directory = write_checkpoint(tmp_path / "model")
    theirs = hugging_face_layers(directory, *batch)
    weights = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    torch.save(weights, directory / "pytorch_model.bin")
    ours = layers_of(load_model(str(directory), device="cpu"), *batch)
    assert worst_difference(ours, theirs, batch[1]) < 1e-5

    class Trap:
        def __reduce__(self):
            return (tmp_path.joinpath("sprung").touch, ())

    torch.save(weights | {"trap": Trap()}, directory / "pytorch_model.bin")
    with pytest.raises((InputError, pickle.UnpicklingError)):
        load_model(str(directory), device="cpu")
    assert not (tmp_path / "sprung").exists()


def test_code_that_comes_with_a_checkpoint_is_not_run(tmp_path):
    directory = write_checkpoint(tmp_path / "model")
    (directory / "trap.py").write_text(f"open({str(tmp_path / 'sprung')!r}, 'w')")
    change_config(directory, model_type="trap", auto_map={"AutoConfig": "trap.Config"})
    with pytest.raises(InputError, match="custom code"):
        load_model(str(directory), device="cpu")
    assert not (tmp_path / "sprung").exists()


def change_config(directory, **values):
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_too_little_memory_is_said_before_anything_is_read(tmp_path):
    directory = write_checkpoint(tmp_path / "model")
    change_config(directory, num_hidden_layers=2, hidden_size=2**16, intermediate_size=2**20)
    with pytest.raises(InputError, match=r"needs \d{4}\.\d GB and \d+\.\d GB is free on cpu"):
        load_model(str(directory), device="cpu")


def test_a_mistake_about_the_weights_is_named(tmp_path):
    directory = write_checkpoint(tmp_path / "model")
    weights = directory / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match="can't be read"):
        load_model(str(directory), device="cpu")
    weights.unlink()
    with pytest.raises(InputError, match="holds no weights"):
        load_model(str(directory), device="cpu")


def test_a_model_that_lacks_weights_is_refused_not_filled_in_at_random(tmp_path):
    from transformers import LlamaConfig, LlamaModel

    LlamaModel(LlamaConfig(**SIZES)).save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"lack lm_head\.weight"):
        load_model(str(tmp_path), device="cpu")


@on_transformer_lens_3
def test_biases_that_transformer_lens_3_would_drop_are_refused(tmp_path):
    directory = write_checkpoint(tmp_path / "model", attention_bias=True)
    with pytest.raises(InputError, match=r"no place for model\.layers\.0\.self_attn\.q_proj\.bias"):
        load_model(str(directory), device="cpu")


@on_transformer_lens_3
def test_quantised_weights_are_refused(tmp_path):
    directory = write_checkpoint(tmp_path / "model")
    change_config(directory, quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(InputError, match="are quantised"):
        load_model(str(directory), device="cpu")


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"device": "warp"}, "'warp' is no device"),
        ({"device": "cuda:99"}, "more than there is"),
        ({"device": "cpu", "n_devices": 2}, "spreads a model over GPUs"),
        ({"device": "cpu", "n_devices": 0}, "1 or more"),
        ({"device": "cpu", "dtype": torch.int8}, "floating-point"),
    ],
)
def test_a_mistake_about_the_device_or_dtype_is_named(llama, options, complaint):
    with pytest.raises(InputError, match=complaint):
        load_model(str(llama), **options)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
def test_on_a_gpu_the_weights_are_bfloat16_and_there(llama):
    model = load_model(str(llama))
    assert {(w.dtype, w.device.type) for w in model.parameters()} == {(torch.bfloat16, "cuda")}


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there are not two CUDA devices")
def test_the_blocks_spread_over_two_gpus_give_what_one_gives(llama, batch):
    one, two = (load_model(str(llama), dtype=torch.float32, n_devices=n) for n in (1, 2))
    assert {w.device.index for w in two.parameters()} == {0, 1}
    assert worst_difference(*(layers_of(m, *batch).cpu() for m in (two, one)), batch[1]) < 1e-5


@pytest.mark.parametrize("family", ["llama", "llama with tied embeddings", "gemma3", "phi3"])
def test_the_map_over_two_gpus_places_every_weight_once_and_blocks_in_order(family):
    name, changes = FAMILIES[family]
    config = getattr(transformers, name)(**SIZES | changes | {"num_hidden_layers": 5})
    placed = model_module._device_map(config, [torch.device("cuda", index) for index in range(2)])
    with torch.device("meta"):
        skeleton = transformers.AutoModelForCausalLM.from_config(config)
    for weight, _ in skeleton.named_parameters():
        assert sum(weight.startswith(f"{part}.") for part in placed) == 1, weight
    assert [placed[f"model.layers.{i}"].index for i in range(5)] == [0, 0, 0, 1, 1]
    assert placed["model.embed_tokens"].index == 0
    assert placed["lm_head"].index == (0 if config.tie_word_embeddings else 1)


def test_a_gpu_too_small_is_named_with_what_would_do(monkeypatch):
    # The driver's two answers are put in its mouth: what is computed from them runs as it is.
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: (10 * 10**9, 80 * 10**9))
    config = transformers.LlamaConfig(
        num_hidden_layers=32, hidden_size=4096, intermediate_size=14336
    )

    def check(dtype: torch.dtype, n_devices: int) -> None:
        devices = [torch.device("cuda", index) for index in range(n_devices)]
        model_module._check_memory(config, "a model", devices, dtype)

    with pytest.raises(
        InputError, match=r"needs 1\d\.\d GB and \d+\.\d GB is free on cuda:0.*n_devices"
    ):
        check(torch.bfloat16, 1)
    check(torch.bfloat16, 2)
    with pytest.raises(InputError, match=r"dtype=torch\.bfloat16, which takes half"):
        check(torch.float32, 2)
