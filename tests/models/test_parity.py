"""The check at load: it passes what is right, and names the layer of every fault known."""

import math
import types
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from checkpoints import FAMILIES, byte_tokenizer, write_checkpoint, write_random

import refusal_lens as rl
from refusal_lens.errors import InputError
from refusal_lens.experiment.config import Config
from refusal_lens.models import load as load_module
from refusal_lens.models.load import from_hugging_face, load_model, placement
from refusal_lens.models.parity import Pass, check_parity, hugging_face_pass, rounding_bound

CPU = {"device": "cpu"}


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("parity") / "llama")


@pytest.fixture
def hf_model(llama):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)


def changed_after_wrapping(monkeypatch, change) -> None:
    """Let `change` act on the Hugging Face model's weights, which a hooked model shares."""
    real = load_module._lens()

    def wrap(hf_model, tokenizer, **options):
        weights = dict(hf_model.named_parameters())
        model = real.from_hugging_face(hf_model, tokenizer, **options)
        with torch.no_grad():
            change(weights)
        return model

    monkeypatch.setattr(load_module, "_lens", lambda: types.SimpleNamespace(from_hugging_face=wrap))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3"])
def test_rounding_alone_is_no_difference(tmp_path, family, dtype):
    # The other tests of this folder load every family in float32.
    assert family in FAMILIES
    load_model(str(write_checkpoint(tmp_path / "model", family)), dtype=dtype, **CPU)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("layer", [0, 2])
def test_a_weight_that_a_converter_changes_is_an_error_that_names_the_layer(
    llama, monkeypatch, layer, dtype
):
    weight = f"model.layers.{layer}.mlp.down_proj.weight"
    changed_after_wrapping(monkeypatch, lambda weights: weights[weight].mul_(1.5))
    with pytest.raises(InputError, match=rf"computes layer {layer} of .*llama wrongly"):
        load_model(str(llama), dtype=dtype, **CPU)


def test_a_changed_unembedding_is_seen_in_the_logits(llama, monkeypatch):
    changed_after_wrapping(monkeypatch, lambda weights: weights["lm_head.weight"].mul_(1.5))
    with pytest.raises(InputError, match="computes the logits of"):
        load_model(str(llama), **CPU)


def test_a_model_that_overflows_its_dtype_is_refused(llama, monkeypatch):
    weight = "model.layers.1.mlp.down_proj.weight"
    changed_after_wrapping(monkeypatch, lambda weights: weights[weight].mul_(torch.inf))
    with pytest.raises(InputError, match="computes layer 1 of"):
        load_model(str(llama), **CPU)


def loaded(load: Callable) -> tuple[Any, str]:
    """The model, or what is wrong with it."""
    try:
        return load(), ""
    except InputError as error:
        return None, str(error)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_an_adapter_that_is_not_merged_is_refused_or_computed_right(hf_model):
    # TransformerLens 3.9 drops the adapter's weights in silence.
    config = peft.LoraConfig(target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    adapted = peft.get_peft_model(hf_model, config)
    with pytest.raises(InputError, match=r"an adapter around a model: use its merge_and_unload"):
        from_hugging_face(adapted, byte_tokenizer())
    inner = adapted.get_base_model()
    tokens = torch.arange(40, 60)[None]
    expected = inner(tokens).logits
    model, complaint = loaded(lambda: from_hugging_face(inner, byte_tokenizer()))
    if model is None:
        assert "wrongly" in complaint
        assert "merge_and_unload" in complaint
    else:
        torch.testing.assert_close(model(tokens), expected)
    merged = from_hugging_face(adapted.merge_and_unload(), byte_tokenizer())
    torch.testing.assert_close(merged(tokens), expected, rtol=1e-4, atol=1e-5)


def test_falcon_s_new_decoder_layout_is_refused_or_computed_right(tmp_path):
    # TransformerLens 4.3 computes the layout of Falcon-40B, with two norms before a block, wrongly.
    from transformers import AutoModelForCausalLM, FalconConfig

    sizes = {"vocab_size": 272, "hidden_size": 32, "num_hidden_layers": 3}
    sizes |= {"num_attention_heads": 4, "num_kv_heads": 2, "new_decoder_architecture": True}
    sizes |= {"multi_query": False}
    config = FalconConfig(**sizes, alibi=False, bias=False, bos_token_id=256, eos_token_id=260)
    directory = write_random(tmp_path / "falcon", config)
    model, complaint = loaded(lambda: load_model(str(directory), **CPU))
    if model is None:
        assert "TransformerLens" in complaint
        return
    tokens = torch.arange(40, 60)[None]
    theirs = AutoModelForCausalLM.from_pretrained(directory, attn_implementation="eager").eval()
    torch.testing.assert_close(model(tokens), theirs(tokens).logits, rtol=1e-3, atol=1e-4)


def test_the_bound_is_above_rounding_and_below_the_smallest_fault_seen():
    # Measured with SmolLM2 (30 layers), the organisms (32) and 17 families: at most twice
    # eps * sqrt(2 * depth) in float32, where the constant is far larger, and 0.75 times in bfloat16.
    assert rounding_bound(torch.float32, 32) < 2e-4
    assert rounding_bound(torch.bfloat16, 32) < 0.26
    for depth in (1, 8, 80):
        assert rounding_bound(torch.bfloat16, depth) > 2 * 2**-7 * math.sqrt(2 * depth)


def test_one_token_that_rounding_sends_elsewhere_is_no_fault(llama, hf_model):
    theirs = hugging_face_pass(hf_model.eval())
    model = load_model(str(llama), **CPU)
    theirs.layers[:, 3] *= 2
    check_parity(model, theirs, name="one token")
    theirs.layers[:, 3:] *= 2
    with pytest.raises(InputError, match="computes layer 0 of five tokens wrongly"):
        check_parity(model, Pass(*theirs), name="five tokens")


def test_a_model_of_hugging_face_handed_over_as_it_is_gets_the_name_of_the_function(hf_model):
    contrast = rl.load_contrast("refusal")
    for use in (
        lambda: rl.get_layer_activations(hf_model, contrast, progress=False),
        lambda: rl.run_experiment(Config(), model=hf_model, progress=False),
    ):
        with pytest.raises(InputError, match=r"LlamaForCausalLM has no hooks: .*from_hugging_face"):
            use()


def test_a_dtype_can_be_given_by_name(llama):
    assert load_model(str(llama), dtype="float64", **CPU).cfg.dtype == torch.float64
    assert placement("x", "cpu", "torch.float16")[1] == torch.float16
    for wrong in ("float31", "int8", "nn"):
        with pytest.raises(InputError, match=f"dtype is {wrong}: give a floating-point one"):
            placement("x", "cpu", wrong)
