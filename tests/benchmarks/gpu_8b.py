"""Llama-3-8B's true shape, bfloat16, random weights, on a GPU: `python tests/benchmarks/gpu_8b.py`.

Writes a checkpoint of that shape (16 GB; kept with `--directory`, and used again if it is there;
`loading.py` and `extraction.py` take the same folder), loads it with `load_model`, reads
the activations of 512 prompts with `get_layer_activations`, and compares them with Hugging Face's.
Prints a markdown table: time and peak memory of loading, prompts per second, the share of the
card's matrix peak (that of a large matrix product, measured in the same run), and the agreement.

`--shrink` goes the same way on the CPU with a model of the same depth and a hundredth of the width.
"""

import gc
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import psutil
import torch
import tyro
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))

from llama3 import llama3_tokenizer

from refusal_lens.activations.extract import get_layer_activations, read_residual_stream
from refusal_lens.models.load import load_model
from refusal_lens.prompts.contrast import BUNDLED, Contrast, load_contrast
from refusal_lens.prompts.tokenize import build_inputs_with_chat_template, encode_prompts

UNIT_ROUNDOFF = 2.0**-8
"""Of bfloat16: half the distance from 1 to the next number."""
COMPARED = 16
"""Prompts on which Hugging Face is run one at a time."""


def main(
    *,
    prompts: int = 512,
    shrink: bool = False,
    directory: Path | None = None,
    out: Path | None = None,
) -> None:
    """Run it all and print the table.

    Args:
        prompts: how many prompts to read.
        shrink: a narrow model on the CPU instead of the true shape on the GPU.
        directory: where the checkpoint is kept; a temporary folder unless given.
        out: a markdown file to write.
    """
    if not (shrink or torch.cuda.is_available()):
        raise SystemExit("no CUDA device: use --shrink to run the same on the CPU, much narrower")
    device = torch.device("cpu" if shrink else "cuda")
    with tempfile.TemporaryDirectory() as made:
        lines = measure(directory or Path(made) / "llama-3-8b-shape", device, prompts)
    table = "\n".join(lines)
    print(table)
    if out:
        out.write_text(table)


def measure(folder: Path, device: torch.device, n_prompts: int) -> list[str]:
    if not (folder / "config.json").exists():
        save_checkpoint(folder, device)
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    peak = matrix_peak(device)
    contrast = bundled(n_prompts)

    import transformer_lens  # noqa: F401  (no part of loading)
    import transformers.models.llama.modeling_llama  # noqa: F401

    memory = Memory(device)
    start = time.perf_counter()
    model = load_model(str(folder), device=device, dtype=torch.bfloat16)
    synchronise(device)
    load_seconds, on_host, on_device = time.perf_counter() - start, *memory.extra()

    warm_up = Contrast(name="warm-up", target=contrast.target[:8], baseline=contrast.baseline[:8])
    get_layer_activations(model, warm_up, progress=False)
    tokens: list[int] = []
    counting = model.embed.register_forward_pre_hook(
        lambda module, args: tokens.append(args[0].numel())
    )
    memory = Memory(device)
    start = time.perf_counter()
    read = get_layer_activations(model, contrast, progress=False)
    seconds = time.perf_counter() - start
    extra = max(memory.extra()) if device.type == "cuda" else memory.extra()[0]
    answer = sum(side.numel() * side.element_size() for side in read)
    counting.remove()

    texts = [*contrast.target, *contrast.baseline]
    inputs = build_inputs_with_chat_template(model.tokenizer, texts)
    batches = []
    for rows, _ in read_residual_stream(model, inputs, progress=False):
        width = int(inputs.mask[rows].sum(1).max())
        batches.append((inputs.tokens[rows, -width:], inputs.mask[rows, -width:]))
    sequences = encode_prompts(model.tokenizer, contrast.target[:COMPARED])
    depth, vocabulary = model.cfg.n_layers, model.cfg.d_vocab * model.cfg.d_model
    del model
    gc.collect()

    right, bare_seconds, their_seconds = hugging_face(folder, device, sequences, batches)
    difference = (read.target[: len(right)] - right).norm(dim=-1) / right.norm(dim=-1)
    bound = rounding_bound(depth)
    within = bool((difference <= bound).all())
    flops = 2 * (size / 2 - 2 * vocabulary) * sum(tokens)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    rows = [
        ("weights", f"{size / 1e9:.2f} GB"),
        ("load_model", f"{load_seconds:.1f} s"),
        ("Hugging Face's from_pretrained, after it", f"{their_seconds:.1f} s"),
        ("peak host memory while loading", f"{on_host / size:.2f} of the weights"),
        ("peak device memory while loading", f"{on_device / size:.2f} of the weights"),
        (f"get_layer_activations, {len(texts)} prompts", f"{seconds:.2f} s"),
        ("prompts per second", f"{len(texts) / seconds:.0f}"),
        ("tokens run, with the padding", f"{sum(tokens)}"),
        ("matrix peak, measured", f"{peak / 1e12:.2f} TFLOP/s"),
        ("share of it", f"{flops / seconds / peak:.0%}"),
        ("bare Hugging Face forward, same batches", f"{bare_seconds:.2f} s"),
        ("extra peak memory", f"{extra / size:.1%} of the weights"),
        ("the answer itself", f"{answer / size:.1%} of the weights"),
        ("distance from Hugging Face, first layer", f"{float(difference[:, 0].max()):.1e}"),
        ("distance from Hugging Face, last layer", f"{float(difference[:, -1].max()):.1e}"),
        ("bound, first and last layer", f"{float(bound[0]):.1e}, {float(bound[-1]):.1e}"),
        ("within the bound at every layer", "yes" if within else "NO"),
    ]
    versions = ", ".join(f"{p} {version(p)}" for p in ("torch", "transformers", "transformer_lens"))
    title = (
        "Llama-3-8B's shape" if device.type == "cuda" else "Shrunk shape: no measurement, a trial"
    )
    return [
        f"# {title}, bfloat16, random weights",
        "",
        f"On {name}. {versions}.",
        "",
        "| what | measured |",
        "|---|---|",
        *(f"| {what} | {value} |" for what, value in rows),
        "",
        "The distance is relative to the norm of Hugging Face's own, one prompt at a time, in "
        "bfloat16. Each side rounds the residual stream twice a block; the bound is that of a "
        "random walk, 4 x 2^-8 x sqrt(2 (layer + 1)).",
        "",
    ]


def rounding_bound(n_layers: int) -> Tensor:
    """How far two right answers in bfloat16 may lie apart at each layer, relative to their norm.

    Both round the residual stream twice a block, each time by up to the unit roundoff of its norm
    and in no common direction; what is added was rounded on the way, too. So the distance grows as
    a random walk of 2 (layer + 1) steps, by about two roundoffs for each side.
    """
    return 4 * UNIT_ROUNDOFF * (2 * torch.arange(1, n_layers + 1)).sqrt()


def save_checkpoint(folder: Path, device: torch.device) -> None:
    """Random weights of Llama-3-8B's shape, or a narrow one for the CPU."""
    from transformers import LlamaConfig, LlamaForCausalLM

    narrow = 1 if device.type == "cuda" else 16
    config = LlamaConfig(
        vocab_size=128_256,
        hidden_size=4096 // narrow,
        intermediate_size=14_336 // narrow,
        num_hidden_layers=32,
        num_attention_heads=32 // min(narrow, 4),
        num_key_value_heads=8 // min(narrow, 4),
        max_position_embeddings=8192,
        rope_parameters={"rope_type": "default", "rope_theta": 500_000.0},
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
        bos_token_id=128_000,
        eos_token_id=128_009,
        dtype=torch.bfloat16,
    )
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with device:
            model = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(before)
    model.save_pretrained(folder, max_shard_size="5GB")
    llama3_tokenizer().save_pretrained(folder)


def bundled(count: int) -> Contrast:
    contrasts = [load_contrast(name) for name in BUNDLED]
    target = [prompt for contrast in contrasts for prompt in contrast.target]
    baseline = [prompt for contrast in contrasts for prompt in contrast.baseline]
    return Contrast(name="all", target=target[: count // 2], baseline=baseline[: count // 2])


def matrix_peak(device: torch.device) -> float:
    """Floating-point operations a second of a large bfloat16 matrix product."""
    n = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for _ in range(2))
    return 2 * n**3 / statistics.median(timed(lambda: a @ b, device) for _ in range(20))


def timed(run: Callable[[], object], device: torch.device) -> float:
    synchronise(device)
    start = time.perf_counter()
    run()
    synchronise(device)
    return time.perf_counter() - start


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Memory:
    """What host and device come to hold at most, beyond what they held at the start."""

    def __init__(self, device: torch.device):
        gc.collect()
        self.device = device
        self.host = psutil.Process().memory_info().rss
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)
            self.held = torch.cuda.memory_allocated(device)

    def extra(self) -> tuple[int, int]:
        status = Path("/proc/self/status").read_text().splitlines()
        peak = next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))
        host = peak * 1024 - self.host
        if self.device.type != "cuda":
            return host, 0
        return host, torch.cuda.max_memory_allocated(self.device) - self.held


@torch.no_grad()
def hugging_face(
    folder: Path,
    device: torch.device,
    sequences: list[list[int]],
    batches: list[tuple[Tensor, Tensor]],
) -> tuple[Tensor, float, float]:
    """Its streams at the last token, each sequence alone, its seconds for bare batches and to load."""
    from transformers import AutoModelForCausalLM

    start = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, device_map=None if device.type == "cpu" else device
    )
    synchronise(device)
    load_seconds = time.perf_counter() - start
    model = model.eval()
    streams: list[Tensor] = []
    hooks = [
        block.register_forward_hook(
            lambda module, args, out: streams.append(
                (out[0] if isinstance(out, tuple) else out)[0, -1].float().cpu()
            )
        )
        for block in model.model.layers
    ]
    for ids in sequences:
        model.model(torch.tensor([ids], device=device), use_cache=False)
    for hook in hooks:
        hook.remove()

    def bare() -> None:
        for tokens, mask in batches:
            model.model(tokens.to(device), attention_mask=mask.to(device), use_cache=False)

    bare()  # as ours has had a batch before the clock started
    answer = torch.stack(streams).unflatten(0, (len(sequences), -1))
    return answer, timed(bare, device), load_seconds


if __name__ == "__main__":
    tyro.cli(main)
