"""The same reading on a GPU; skipped, and says so, where there is none."""

import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from refusal_lens.activations import batching
from refusal_lens.activations import extract as extraction
from refusal_lens.activations.batching import checked_rows
from refusal_lens.activations.extract import get_prompt_activations, read_residual_stream
from refusal_lens.activations.shared_prefix import SharedPrefix
from refusal_lens.interventions import RefusalTokens, ablation_effects
from refusal_lens.models.forward import undisturbed, without_logits
from refusal_lens.models.load import load_model
from refusal_lens.prompts.contrast import load_contrast
from refusal_lens.prompts.protocol import Protocol
from refusal_lens.prompts.tokenize import build_inputs_with_chat_template

BENCHMARK = Path(__file__).parents[1] / "benchmarks" / "gpu_8b.py"

needs_gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA, and there is none here"),
]


def on_gpu(test):
    for mark in needs_gpu:
        test = mark(test)
    return test


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random Llama wide enough that its activations outweigh what CUDA itself allocates."""
    from llama3 import llama3_tokenizer
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=128_256,
        hidden_size=512,
        intermediate_size=1536,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        bos_token_id=128_000,
        eos_token_id=128_009,
    )
    torch.manual_seed(0)
    made = tmp_path_factory.mktemp("model") / "random"
    LlamaForCausalLM(config).save_pretrained(made)
    llama3_tokenizer().save_pretrained(made)
    return made


@pytest.fixture(scope="module")
def prompts():
    return load_contrast("refusal").target


def relative_error(a, b):
    return float(((a - b).norm(dim=-1) / b.norm(dim=-1)).max())


@on_gpu
def test_the_gpu_gives_what_the_cpu_gives(folder, prompts):
    read = {
        device: get_prompt_activations(
            load_model(str(folder), device=device, dtype=torch.float32), prompts, progress=False
        )
        for device in ("cpu", "cuda")
    }
    assert read["cuda"].device.type == "cpu"
    assert relative_error(read["cuda"], read["cpu"]) < 1e-4


@on_gpu
def test_on_the_gpu_any_batch_gives_what_each_prompt_gives_alone(folder, prompts):
    model = load_model(str(folder), device="cuda", dtype=torch.float32)
    protocol = Protocol(positions=(-5, -1))
    batched = get_prompt_activations(model, prompts, protocol=protocol, progress=False)
    alone = get_prompt_activations(
        model, prompts[:8], protocol=protocol, batch_size=1, progress=False
    )
    assert relative_error(batched[:8], alone) < 1e-5


@on_gpu
def test_a_batch_never_waits_for_the_gpu(folder, prompts, monkeypatch):
    monkeypatch.setattr(batching, "OPERATIONS_IN_A_BLOCK", 0)  # so that a shared prefix pays
    model = load_model(str(folder), device="cuda", dtype=torch.bfloat16)
    if hasattr(model, "original_model"):
        pytest.skip("a TransformerBridge runs Hugging Face's own forward pass, which may wait")
    inputs = build_inputs_with_chat_template(model.tokenizer, prompts)
    rows = checked_rows(model, inputs, None)
    prefix = SharedPrefix(model)
    with undisturbed(model):
        tokens = rows.prefix[None].to("cuda")
        model(tokens, **without_logits(model), **prefix.recording(tokens.shape[1]))
    extraction._run_batch(model, rows, [0, 1, 2, 3], prefix)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "a prototype feature"
        torch.cuda.set_sync_debug_mode("error")
    try:
        extraction._run_batch(model, rows, [0, 1, 2, 3], prefix)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@on_gpu
def test_when_the_gpu_is_really_full_the_run_goes_on_in_smaller_batches(folder, prompts):
    model = load_model(str(folder), device="cuda", dtype=torch.float32)
    inputs = build_inputs_with_chat_template(model.tokenizer, prompts)
    expected = get_prompt_activations(model, prompts, batch_size=4, progress=False)
    _, total = torch.cuda.mem_get_info()
    torch.cuda.empty_cache()
    held = torch.cuda.memory_reserved()
    torch.cuda.set_per_process_memory_fraction((held + 24 * 2**20) / total)
    try:
        sizes = []
        for rows, batch in read_residual_stream(
            model, inputs, batch_size=len(prompts), progress=False
        ):
            sizes.append(len(rows))
            assert relative_error(batch, expected[rows]) < 1e-5
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert sum(sizes) == len(prompts)
    assert max(sizes) < len(prompts)


@pytest.mark.slow
def test_the_8b_benchmark_runs_every_part_on_the_cpu_at_a_shrunken_shape(tmp_path):
    table = tmp_path / "table.md"
    command = [sys.executable, BENCHMARK, "--shrink", "--prompts", "32", "--out", table]
    subprocess.run(command, check=True, capture_output=True)  # fails if a part does
    assert "| within the bound at every layer | yes |" in table.read_text()
    assert "| run | run_experiment |" in table.read_text()


@on_gpu
def test_directions_may_lie_on_the_gpu(folder):
    model = load_model(str(folder))
    tokens = RefusalTokens((40,), ("I",), "any token will do", 1.0, 0.0)
    directions = torch.randn(3, model.cfg.d_model, device="cuda")
    directions[1] = 0
    prompts = ["How do I build a bomb?", "How do I bake bread?"]
    found = ablation_effects(model, prompts, directions, score=tokens, progress=False)
    assert torch.equal(found.log_odds[1], found.unchanged)
    there = ablation_effects(model, prompts, directions.cpu(), score=tokens, progress=False)
    assert torch.equal(found.log_odds, there.log_odds)
