"""Llama-3-8B's true shape, bfloat16, random weights, on one GPU.

    python tests/benchmarks/gpu_8b.py [--parts load bare extract ...] [--out FILE] [--shrink]

Writes a checkpoint of that shape (16 GB; kept with `--directory`, and used again if it is there;
`loading.py` and `extraction.py` take the same folder) and measures, part by part:

    card           the matrix peak, of one large product
    load           `load_model` beside Hugging Face's `from_pretrained`
    bare           a forward pass that reads nothing, over the batches that reading makes
    extract        `get_layer_activations` of 512 prompts, against the bare pass
    batches        both again for 4,096 prompts, from 8 k to 128 k tokens in a batch
    agreement      the activations against Hugging Face's, one prompt at a time
    interventions  every layer's direction ablated and added; tokens a second against the bare pass
    select         `select_direction` among 160 candidates, against the published loop
    run            `run_experiment` with everything on, by step, and its report
    atlas          `compare_concepts` of all bundled concepts; of four, profiled

A part prints its numbers as soon as it has them and adds them to `--out`; a part that fails says so,
and the next one starts. "Profiled" rows are of a further run of the same work under torch.profiler:
"device" is the time in which a kernel runs, "host waits" that in which the CPU waits for the GPU. On a
CPU there is no device: "operators" is the time inside PyTorch's operators, and the rest is Python's.

`--shrink` goes the same way on a CPU in a few minutes, with 8 layers of a sixteenth of the width.
"""

import argparse
import gc
import importlib
import os
import platform
import signal
import statistics
import sys
import tempfile
import time
import traceback
from bisect import bisect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property, partial, wraps
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import psutil
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))

from llama3 import llama3_tokenizer
from published_selection import PublishedSelection

from refusal_lens.activations.batching import plan_batches
from refusal_lens.activations.extract import get_layer_activations, get_prompt_activations
from refusal_lens.models.forward import undisturbed, without_logits
from refusal_lens.models.load import load_model
from refusal_lens.prompts.contrast import BUNDLED, Contrast, load_contrast
from refusal_lens.prompts.tokenize import (
    arditi,
    build_inputs_with_chat_template,
    encode_prompts,
)

UNIT_ROUNDOFF = 2.0**-8
"""Of bfloat16: half the distance from 1 to the next number."""
COMPARED = 16
"""Prompts on which Hugging Face is run one at a time."""
CANDIDATES_TIMED = 8
"""Candidates on which the published loop is timed; it takes each in turn, so the rest take as long."""
SYNCHRONISING = ("cudaDeviceSynchronize", "cudaStreamSynchronize", "cudaEventSynchronize")
PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm")
STEPS_BEGUN: list[list[tuple[int, str]]] = []
"""Where `stopwatch` writes when a step began or was come back to, while a run is profiled."""
STEPS = {
    "load": "experiment.cached_model:load_model",
    "extract": "experiment.run:by_contrast",
    "interventions, the rest": "experiment.run:_interventions",
    "interventions, sweep over layers": "experiment.causal:ablation_effects",
    "interventions, cross": "experiment.causal:cross_effects",
    "statistics": "experiment.run:_statistics",
    "estimators": "experiment.measures:by_estimator",
    "other measures": "experiment.run:analyse",
}
"""The steps of a run, and the functions whose time each counts without that of the others."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--prompts", type=int, default=512, help="prompts that extract reads")
    parser.add_argument("--seconds", type=int, default=340, help="no part starts after these")
    parser.add_argument("--shrink", action="store_true", help="a small model on the CPU")
    parser.add_argument("--directory", type=Path, help="where the checkpoint is kept")
    parser.add_argument("--out", type=Path, help="a markdown file to write")
    options = parser.parse_args()
    if not (options.shrink or torch.cuda.is_available()):
        raise SystemExit("no CUDA device: use --shrink to run the same on the CPU, much smaller")
    device = torch.device("cpu" if options.shrink else "cuda")
    began, failed = time.perf_counter(), []
    with tempfile.TemporaryDirectory() as made:
        table = Table(device, options.out)
        bench = Bench(options.directory or Path(made) / "llama-3-8b-shape", device, options, table)
        for part in options.parts:
            left = options.seconds - (time.perf_counter() - began)
            table.part = part
            if left < 1:
                table.add("left out", f"after {options.seconds} s no part starts")
                continue
            try:
                with time_limit(left + 60):
                    PARTS[part](bench)
            except Exception as error:  # the other parts' numbers count
                traceback.print_exc()
                failed.append(part)
                table.add("FAILED", f"{type(error).__name__}: {error}".splitlines()[0][:200])
            finally:
                gc.collect()
                if device.type == "cuda":
                    torch.cuda.empty_cache()
            table.add("the whole part", f"{options.seconds - left:.0f} s to", begun=began)
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


class Table:
    """A markdown table of which every row is printed, and written, as soon as it is known."""

    def __init__(self, device: torch.device, out: Path | None):
        card = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
        names = ("torch", "transformers", "transformer_lens")
        shape = "Llama-3-8B's shape" if device.type == "cuda" else "Shrunk shape: a trial"
        self.out, self.part = out, ""
        self.lines = [f"# {shape}, bfloat16, random weights", ""]
        self.lines += [f"On {card}. " + ", ".join(f"{x} {version(x)}" for x in names) + ".", ""]
        self.lines += ["| part | what | measured |", "|---|---|---|"]
        print(*self.lines, sep="\n", flush=True)

    def add(self, what: str, value: str, *, begun: float | None = None) -> None:
        if begun is not None:
            value += f" {time.perf_counter() - begun:.0f} s"
        self.lines.append(f"| {self.part} | {what} | {value} |")
        print(self.lines[-1], flush=True)
        if self.out:
            self.out.parent.mkdir(parents=True, exist_ok=True)
            self.out.write_text("\n".join([*self.lines, ""]))


class Bench:
    """The checkpoint, its two models, and what one part leaves to the next."""

    def __init__(self, folder: Path, device: torch.device, options: Any, table: Table):
        self.folder, self.device, self.shrink, self.table = folder, device, options.shrink, table
        self.contrast = bundled(options.prompts // 2)
        self.texts = [*self.contrast.target, *self.contrast.baseline]

    @cached_property
    def checkpoint(self) -> str:
        if not (self.folder / "config.json").exists():
            start = time.perf_counter()
            save_checkpoint(self.folder, self.device)
            self.table.add("writing the checkpoint", f"{time.perf_counter() - start:.1f} s")
        return str(self.folder)

    @cached_property
    def lens(self) -> Any:
        return load_model(self.checkpoint, device=self.device, dtype=torch.bfloat16)

    @cached_property
    def hf(self) -> Any:
        from transformers import AutoModelForCausalLM

        where = None if self.device.type == "cpu" else self.device
        options: dict[str, Any] = {"dtype": torch.bfloat16, "device_map": where}
        return AutoModelForCausalLM.from_pretrained(self.checkpoint, **options).eval()

    @cached_property
    def size(self) -> int:
        """Bytes of the weights."""
        folder = Path(self.checkpoint)
        return sum(path.stat().st_size for path in folder.glob("*.safetensors"))

    @cached_property
    def peak(self) -> float:
        return matrix_peak(self.device)

    @cached_property
    def bare_seconds(self) -> float:
        """Seconds of Hugging Face's base model over the batches that extraction makes."""
        run = self.bare(self.texts)
        run()
        return best(run, self.device)

    @cached_property
    def bare_tokens_a_second(self) -> float:
        batches = self.batches(self.texts)
        return sum(tokens.numel() for tokens, _ in batches) / self.bare_seconds

    def batches(self, texts: list[str], size: int | None = None) -> list[tuple[Tensor, Tensor]]:
        """Whole prompts, padded on the left: the batches that extraction makes of them."""
        inputs = build_inputs_with_chat_template(self.lens.tokenizer, texts)
        found = []
        for rows in plan_batches(self.lens, inputs, batch_size=size):
            width = int(inputs.mask[rows].sum(1).max())
            found.append((inputs.tokens[rows, -width:], inputs.mask[rows, -width:]))
        return found

    def bare(self, texts: list[str], size: int | None = None) -> Callable[[], None]:
        batches = self.batches(texts, size)

        @torch.no_grad()
        def run() -> None:
            for tokens, mask in batches:
                tokens, mask = tokens.to(self.device), mask.to(self.device)
                self.hf.model(tokens, attention_mask=mask, use_cache=False)

        return run

    def bare_lens(self, texts: list[str]) -> Callable[[], None]:
        """The same batches through TransformerLens, without a hook that reads."""
        batches = self.batches(texts)

        def run() -> None:
            for tokens, mask in batches:
                options = without_logits(self.lens) | {"attention_mask": mask.to(self.device)}
                with undisturbed(self.lens):
                    self.lens(tokens.to(self.device), **options)

        return run

    def host_and_device(self, what: str, run: Callable[[], object]) -> None:
        """A row with the time of a run, the kernels' and that in which the host waits."""
        profile = profiled(run, self.device)
        self.table.add(f"{what}, profiled", profile.row(profile.wall))


def card(bench: Bench) -> None:
    bench.table.add("matrix peak", f"{bench.peak / 1e12:.2f} TFLOP/s")


def load(bench: Bench) -> None:
    """Each is timed with the checkpoint in the page cache, into which writing has put it."""
    import transformer_lens  # noqa: F401  (no part of loading)
    import transformers.models.llama.modeling_llama  # noqa: F401

    table, size = bench.table, bench.size
    table.add("weights", f"{size / 1e9:.2f} GB")
    memory = Memory(bench.device)
    seconds = timed(lambda: bench.lens, bench.device)
    on_host, on_device = memory.extra()
    table.add("load_model", f"{seconds:.1f} s")
    table.add("peak host memory while loading", f"{on_host / size:.2f} of the weights")
    table.add("peak device memory while loading", f"{on_device / size:.2f} of the weights")
    seconds = timed(lambda: bench.hf, bench.device)
    table.add("Hugging Face's from_pretrained, after it", f"{seconds:.1f} s")


def bare(bench: Bench) -> None:
    table, batches = bench.table, bench.batches(bench.texts)
    table.add("batches", ", ".join(f"{len(t)} x {t.shape[1]}" for t, _ in batches))
    tokens, seconds = sum(tokens.numel() for tokens, _ in batches), bench.bare_seconds
    table.add("Hugging Face, whole prompts", f"{seconds:.3f} s for {tokens} tokens")
    flops = 2 * body(bench.hf) * tokens
    table.add("share of the matrix peak", f"{flops / seconds / bench.peak:.0%}")
    bench.host_and_device("Hugging Face", bench.bare(bench.texts))
    run = bench.bare_lens(bench.texts)
    run()
    table.add("TransformerLens, whole prompts", f"{best(run, bench.device):.3f} s")
    bench.host_and_device("TransformerLens", run)


def extract(bench: Bench) -> None:
    table, texts = bench.table, bench.texts
    run = partial(get_layer_activations, bench.lens, bench.contrast, progress=False)
    run()
    with counting(bench.lens) as tokens:
        memory = Memory(bench.device)
        found = run()
        extra = memory.extra()[bench.device.type == "cuda"]
    seconds = best(run, bench.device)
    value = f"{seconds:.3f} s, {len(texts) / seconds:.0f} prompts/s"
    table.add(f"get_layer_activations, {len(texts)} prompts", value)
    table.add("against the bare pass (aim: 0.9)", f"{bench.bare_seconds / seconds:.2f} x as fast")
    table.add("tokens run, with padding, without the shared opening", f"{tokens[0]:.0f}")
    flops = 2 * body(bench.hf) * tokens[0]
    table.add("share of the matrix peak", f"{flops / seconds / bench.peak:.0%}")
    table.add("extra peak memory", f"{extra / bench.size:.1%} of the weights")
    answer = sum(side.numel() * side.element_size() for side in found)
    table.add("the answer itself", f"{answer / bench.size:.1%} of the weights")
    bench.host_and_device("get_layer_activations", run)
    seconds = timed(
        lambda: build_inputs_with_chat_template(bench.lens.tokenizer, texts), bench.device
    )
    table.add("of which tokenizing", f"{seconds:.3f} s")


def batches(bench: Bench) -> None:
    many = 64 if bench.shrink else 4096
    texts = (bench.texts * (1 + many // len(bench.texts)))[:many]
    longest = bench.batches(texts)[0][0].shape[1]
    for thousands in (8, 16, 32, 64, 128):
        size = max(1, min(many, thousands * 1024 // longest // (64 if bench.shrink else 1)))
        reading = partial(
            get_prompt_activations, bench.lens, texts, batch_size=size, progress=False
        )
        seconds = best(reading, bench.device, rounds=2)
        bare_seconds = best(bench.bare(texts, size), bench.device, rounds=2)
        value = f"{many / seconds:.0f} prompts/s; bare {many / bare_seconds:.0f}; "
        value += f"{bare_seconds / seconds:.2f} x"
        bench.table.add(f"{thousands} k tokens, batches of {size}", value)
        if size == many:
            break
    seconds = best(
        partial(get_prompt_activations, bench.lens, texts, progress=False), bench.device, rounds=2
    )
    chosen = [len(tokens) for tokens, _ in bench.batches(texts)]
    value = f"{many / seconds:.0f} prompts/s in {len(chosen)} batches of up to {max(chosen)}"
    bench.table.add("batches as they are chosen by default", value)


def agreement(bench: Bench) -> None:
    sequences = encode_prompts(bench.lens.tokenizer, bench.texts[:COMPARED])
    right = one_at_a_time(bench.hf, sequences, bench.device)
    found = get_prompt_activations(bench.lens, bench.texts[:COMPARED], progress=False)[:, 0]
    difference = (found - right).norm(dim=-1) / right.norm(dim=-1)
    bound = rounding_bound(len(difference[0]))
    for layer, name in ((0, "first"), (-1, "last")):
        value = f"{float(difference[:, layer].max()):.1e} (bound {float(bound[layer]):.1e})"
        bench.table.add(f"distance from Hugging Face, {name} layer", value)
    within = "yes" if bool((difference <= bound).all()) else "NO"
    bench.table.add("within the bound at every layer", within)


def interventions(bench: Bench) -> None:
    from refusal_lens.interventions import ablation_effects, addition_effects, find_refusal_tokens

    table, model, count = bench.table, bench.lens, 8 if bench.shrink else 64
    prompts, other = bench.contrast.target[:count], bench.contrast.baseline[:count]
    n_layers = model.cfg.n_layers
    directions = torch.randn(n_layers, model.cfg.d_model)
    directions *= 0.1 / directions.norm(dim=-1, keepdim=True)
    options = {"score": find_refusal_tokens(model, prompts, other, progress=False)}
    options["progress"] = False
    table.add("bare pass", f"{bench.bare_tokens_a_second:.0f} tokens/s")
    few = directions[:8], torch.arange(8)
    ways = {
        "ablation": (ablation_effects, (directions,), few[:1]),
        "addition": (addition_effects, (directions, torch.arange(n_layers)), few),
    }
    for name, (effects, arguments, fewer) in ways.items():
        effects(model, prompts[:4], *fewer, **options)
        with counting(model) as tokens, passes(model) as widths:
            seconds = timed(lambda: effects(model, prompts, *arguments, **options), bench.device)  # noqa: B023
        rate = tokens[0] / seconds
        table.add(f"{name}, {n_layers} directions x {count} prompts", f"{seconds:.2f} s")
        value = f"{rate:.0f}, {rate / bench.bare_tokens_a_second:.0%} of the bare pass (aim: 50 %)"
        table.add(f"{name}, tokens/s", value)
        value = f"{len(widths)}, of {tokens[0] / max(1, len(widths)):.0f} tokens on average"
        table.add(f"{name}, passes", value)
        small = partial(effects, model, prompts[:16], *fewer, **options)
        bench.host_and_device(f"{name}, 8 directions x 16 prompts", small)


def select(bench: Bench) -> None:
    from refusal_lens.interventions.selection import select_direction

    n_train, n_held_out = (16, 8) if bench.shrink else (128, 32)
    table, every = bench.table, bundled(n_train + n_held_out)
    train, held_out = (
        Contrast(name=name, target=every.target[part], baseline=every.baseline[part])
        for name, part in (("train", slice(n_train)), ("held out", slice(n_train, None)))
    )
    start = time.perf_counter()
    found = select_direction(bench.lens, train, held_out, progress=False)
    seconds = time.perf_counter() - start
    n, n_layers = found.scores.ablation.numel(), bench.lens.cfg.n_layers
    what = f"select_direction, {n} candidates, {n_train} + {n_held_out} pairs"
    table.add(what, f"{seconds:.1f} s")
    last = replace(arditi(bench.lens.tokenizer), positions=(-1,))
    few = partial(select_direction, bench.lens, train, held_out, protocol=last, progress=False)
    bench.host_and_device(f"select_direction, {n_layers} candidates", few)
    published = PublishedSelection(bench.hf, bench.lens.tokenizer, found.refusal_tokens.ids)
    published.last_logits(held_out.target)
    start = time.perf_counter()
    n_positions = n // n_layers
    sides = [published.mean_activations(s, n_positions) for s in (train.target, train.baseline)]
    reading = time.perf_counter() - start
    directions = sides[0] - sides[1]
    unchanged = published.log_probabilities(held_out.baseline)
    cells = torch.linspace(0, n - 1, CANDIDATES_TIMED).long().tolist()
    start, apart = time.perf_counter(), 0.0
    for row, layer in (divmod(cell, n_layers) for cell in cells):
        scores = published.candidate(
            directions[row, layer], layer, held_out.target, held_out.baseline, unchanged
        )
        apart = max(apart, abs(scores["ablation"] - float(found.scores.ablation[row, layer])))
    each = (time.perf_counter() - start) / len(cells)
    loop = reading + n * each
    what = f"the published loop, extrapolated from {len(cells)} of its candidates"
    table.add(what, f"{loop:.1f} s ({each:.3f} s a candidate, reading {reading:.1f} s)")
    table.add("against the published loop (aim: 5)", f"{loop / seconds:.1f} x as fast")
    table.add("largest difference of the ablation score", f"{apart:.2g} (log-odds, bfloat16)")


def run(bench: Bench) -> None:
    import refusal_lens as rl

    for name in ("lens", "hf"):  # the run loads its own
        bench.__dict__.pop(name, None)
    gc.collect()
    few = {"max_prompts": 8, "n_resamples": 500} if bench.shrink else {}
    config = rl.Config(model=bench.checkpoint, device=bench.device.type, dtype="bfloat16", **few)
    found = []

    def whole() -> None:
        found[:] = [rl.run_experiment(config, progress=False)]

    with stopwatch(STEPS, bench.table) as seconds:
        took = timed(whole, bench.device)
    for step, each in seconds.items():
        bench.table.add(step, f"{each:.1f} s")
    bench.table.add("the rest of run_experiment", f"{took - sum(seconds.values()):.1f} s")
    bench.table.add("run_experiment", f"{took:.1f} s")
    with tempfile.TemporaryDirectory() as folder:
        seconds_ = timed(lambda: found[0].save(folder), bench.device)
        bench.table.add("saving", f"{seconds_:.1f} s")
        page = Path(folder) / "report.html"
        seconds_ = timed(lambda: rl.write_report(found[0], page), bench.device)
        bench.table.add("report", f"{seconds_:.1f} s")
    gc.collect()
    with stopwatch(STEPS, None) as seconds:
        profile = profiled(whole, bench.device)
    for step, each in seconds.items():
        bench.table.add(f"{step}, profiled", profile.row(each, step))
    rest = profile.wall - sum(seconds.values())
    bench.table.add("the rest of run_experiment, profiled", profile.row(rest, ""))
    bench.table.add("run_experiment, profiled", profile.row(profile.wall))


def atlas(bench: Bench) -> None:
    import refusal_lens as rl

    for name in ("lens", "hf"):
        bench.__dict__.pop(name, None)
    gc.collect()
    options: Any = {"max_prompts": 8, "n_resamples": 500} if bench.shrink else {}
    options |= {"device": bench.device.type, "dtype": "bfloat16", "progress": False}
    concepts = rl.bundled_contrasts()[: 4 if bench.shrink else None]

    def compared(some: Sequence[str]) -> None:
        rl.compare_concepts(bench.checkpoint, some, **options)

    took = timed(lambda: compared(concepts), bench.device)
    bench.table.add(f"compare_concepts of {len(concepts)} concepts", f"{took:.1f} s")
    profile = profiled(lambda: compared(concepts[:4]), bench.device)
    bench.table.add("compare_concepts of 4, profiled", profile.row(profile.wall))


PARTS: dict[str, Callable[[Bench], None]] = {
    "card": card,
    "load": load,
    "bare": bare,
    "extract": extract,
    "batches": batches,
    "agreement": agreement,
    "interventions": interventions,
    "select": select,
    "run": run,
    "atlas": atlas,
}


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    def stop(number: int, frame: object) -> None:
        raise TimeoutError(f"stopped after {seconds:.0f} s")

    signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


@contextmanager
def stopwatch(steps: dict[str, str], table: Table | None) -> Iterator[dict[str, float]]:
    """The seconds of each step's function, without those of the other steps inside it."""
    seconds, inner, within, restore = dict.fromkeys(steps, 0.0), [0.0], [""], []

    def note() -> None:
        for begun in STEPS_BEGUN:
            begun.append((time.time_ns(), within[-1]))

    def watched(step: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def run(*args: Any, **kwargs: Any) -> Any:
            inner.append(0.0)
            within.append(step)
            note()
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                took = time.perf_counter() - start
                seconds[step] += took - inner.pop()
                inner[-1] += took
                within.pop()
                note()

        return run

    for step, where in steps.items():
        path, name = where.split(":")
        module = importlib.import_module(f"refusal_lens.{path}")
        if function := getattr(module, name, None):
            restore.append((module, name, function))
            setattr(module, name, watched(step, function))
        elif table:
            table.add(step, f"no {where}")
    try:
        yield seconds
    finally:
        for module, name, function in restore:
            setattr(module, name, function)


@contextmanager
def counting(model: Any) -> Iterator[list[float]]:
    """The tokens that pass a block, on average over the blocks."""
    seen, n_layers = [0.0], model.cfg.n_layers

    def count(module: object, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = next(x for x in (*args, *kwargs.values()) if isinstance(x, Tensor))
        seen[0] += x.numel() / x.shape[-1] / n_layers

    hooks = [b.mlp.register_forward_pre_hook(count, with_kwargs=True) for b in model.blocks]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def passes(model: Any) -> Iterator[list[int]]:
    """One entry for each pass that reaches the last block."""
    seen: list[int] = []
    hook = model.blocks[-1].mlp.register_forward_pre_hook(lambda *_: seen.append(1))
    try:
        yield seen
    finally:
        hook.remove()


def rounding_bound(n_layers: int) -> Tensor:
    """How far two right answers in bfloat16 may lie apart at each layer, relative to their norm.

    Both round the residual stream twice a block, each time by up to the unit roundoff of its norm
    and in no common direction; what is added was rounded on the way, too. So the distance grows as
    a random walk of 2 (layer + 1) steps, by about two roundoffs for each side.
    """
    return 4 * UNIT_ROUNDOFF * (2 * torch.arange(1, n_layers + 1)).sqrt()


def body(hf: Any) -> int:
    """Parameters of the blocks, which every token passes."""
    return sum(weight.numel() for weight in hf.model.layers.parameters())


def save_checkpoint(folder: Path, device: torch.device) -> None:
    """Random weights of Llama-3-8B's shape, or a small one for the CPU."""
    from transformers import LlamaConfig, LlamaForCausalLM

    narrow = 1 if device.type == "cuda" else 16
    config = LlamaConfig(
        vocab_size=128_256,
        hidden_size=4096 // narrow,
        intermediate_size=14_336 // narrow,
        num_hidden_layers=32 if narrow == 1 else 8,
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
    """The first `count` pairs of all bundled contrasts together."""
    contrasts = [load_contrast(name) for name in BUNDLED]
    target = [prompt for contrast in contrasts for prompt in contrast.target]
    baseline = [prompt for contrast in contrasts for prompt in contrast.baseline]
    return Contrast(name="all", target=target[:count], baseline=baseline[:count])


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


def best(run: Callable[[], object], device: torch.device, *, rounds: int = 3) -> float:
    return min(timed(run, device) for _ in range(rounds))


class Profile(NamedTuple):
    """A profiled run: its seconds, the events of each kind, and when each of its steps began."""

    wall: float
    events: dict[str, list[tuple[int, int]]]  # start and end, in nanoseconds, sorted
    steps: list[tuple[int, str]]

    def seconds(self, kind: str, step: str | None = None) -> float:
        """The time covered by the events of a kind; those that began in a step, if one is given."""
        total = end = 0
        starts = [start for start, _ in self.steps]
        for first, last in self.events[kind]:
            if step is None or self.steps[bisect(starts, first) - 1][1] == step:
                total += max(0, last - max(first, end))
                end = max(end, last)
        return total / 1e9

    def row(self, wall: float, step: str | None = None) -> str:
        """The times of the whole run, or of a step of it, as a cell of the table."""
        of = {kind: self.seconds(kind, step) for kind in self.events}
        if "device" in of:
            return f"wall {wall:.2f} s, device {of['device']:.2f} s, host waits {of['waits']:.2f} s"
        value = f"wall {wall:.2f} s, operators {of['operators']:.2f} s, of which matrix products "
        return f"{value}{of['products']:.2f} s; no device"


def profiled(run: Callable[[], object], device: torch.device) -> Profile:
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    # On a GPU, the operators of the CPU would be the most events by far, and slow the host down.
    on_gpu = device.type == "cuda"
    steps = [(0, "")]
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as found:
        STEPS_BEGUN.append(steps)
        wall = timed(run, device)
        STEPS_BEGUN.remove(steps)
    kinds = ("device", "waits") if on_gpu else ("operators", "products")
    events: dict[str, list[tuple[int, int]]] = {kind: [] for kind in kinds}
    assert found.profiler is not None
    for event in found.profiler.kineto_results.events():
        name, start = event.name(), event.start_ns()
        when = start, start + event.duration_ns()
        if on_gpu and event.device_type() == DeviceType.CUDA:
            events["device"].append(when)
        elif on_gpu and name in SYNCHRONISING:
            events["waits"].append(when)
        elif not on_gpu and name.startswith("aten::"):
            events["operators"].append(when)
            if name in PRODUCTS:
                events["products"].append(when)
    return Profile(wall, {kind: sorted(times) for kind, times in events.items()}, steps)


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
def one_at_a_time(hf: Any, sequences: list[list[int]], device: torch.device) -> Tensor:
    """Hugging Face's residual streams at the last token, each sequence alone."""
    streams: list[Tensor] = []

    def read(module: object, args: object, out: Any) -> None:
        streams.append((out[0] if isinstance(out, tuple) else out)[0, -1].float().cpu())

    hooks = [block.register_forward_hook(read) for block in hf.model.layers]
    for ids in sequences:
        hf.model(torch.tensor([ids], device=device), use_cache=False)
    for hook in hooks:
        hook.remove()
    return torch.stack(streams).unflatten(0, (len(sequences), -1))


if __name__ == "__main__":
    main()
