"""Loading a model, side by side: `python tests/benchmarks/loading.py`.

A random-weight Llama with Llama-3's vocabulary, stored in bfloat16 as Llama-3 is: by default one of
1.7 GB in float32, with `--size 8b` the true shape of Llama-3-8B, for a GPU. Loaded in float32 on
the CPU, in bfloat16 on a GPU. Every load has a process of its own, whose imports are done before
the clock starts and whose files are in the page cache. Seconds are medians over the rounds, in
which the contestants take turns; memory is the highest peak over what the process held before, over
the size of the weights in memory. TransformerLens's own path is its `from_pretrained_no_processing`,
step by step, since 3.x refuses a directory when called by that name; in 4.x it is
`boot_transformers`.

Host memory is given twice: all that is resident, and without the pages of the weights' file, which
safetensors maps: they are the kernel's copy of the file, dropped when anybody needs the room. Where
the dtype is converted they come on top of the weights, in Hugging Face's own load as in ours. What
is required is about the rest. It is sampled every millisecond.

With `--dtype bfloat16` on the CPU nothing is converted, and Hugging Face maps the file into memory
without reading it: what is left are the fixed costs of each.

Required: at most 1.3 times Hugging Face's own time, at most 1.15 times the weights in memory.
`--out` writes the table as markdown.
"""

import gc
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Literal

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import tyro

MOST_TIME, MOST_MEMORY = 1.3, 1.15
OURS, HUGGING_FACE, TRANSFORMER_LENS = "refusal_lens", "Hugging Face", "TransformerLens"

SHAPES = {
    "small": {
        "hidden_size": 1024,
        "intermediate_size": 3584,
        "num_hidden_layers": 12,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
    },
    "8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
}


@dataclass(frozen=True)
class Benchmark:
    """Time and peak memory of loading one model, by each contestant."""

    size: Literal["small", "8b"] = "small"
    """Shape of the model."""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    """Where it is loaded to."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """What it is loaded in. Default: float32 on the CPU, bfloat16 on a GPU."""
    rounds: int = 5
    """How often each contestant loads it."""
    directory: Path | None = None
    """Where the model is kept, and reused if it is there; else it is made for the run."""
    out: Path | None = None
    """File for the table."""

    def __call__(self) -> None:
        with tempfile.TemporaryDirectory() as made:
            directory = self.directory or Path(made) / "model"
            if not (directory / "config.json").exists():
                write_model(directory, self.size)
            stored = sum(path.stat().st_size for path in directory.glob("*.safetensors"))
            dtype = self.dtype or ("float32" if self.device == "cpu" else "bfloat16")
            weights = stored // torch.bfloat16.itemsize * getattr(torch, dtype).itemsize
            rounds = []
            for i in range(self.rounds + 1):
                turn = {
                    name: self.measure(name, directory, dtype)
                    for name in (HUGGING_FACE, OURS, TRANSFORMER_LENS)
                }
                if i:  # the first fills the page cache
                    rounds.append(turn)
        table = report(rounds, weights, self.device, dtype)
        print(table)
        if self.out:
            self.out.parent.mkdir(parents=True, exist_ok=True)
            self.out.write_text(table + "\n", "utf-8")

    def measure(self, name: str, directory: Path, dtype: str) -> dict[str, float]:
        """Load once, in a process of its own."""
        arguments = [name, str(directory), self.device, dtype]
        done = subprocess.run(
            [sys.executable, "-W", "ignore", __file__, "--once", *arguments],
            capture_output=True,
            text=True,
        )
        if done.returncode:
            raise RuntimeError(f"{name} failed:\n{done.stderr}")
        return json.loads(done.stdout.splitlines()[-1])


def write_model(directory: Path, size: str) -> None:
    """Random weights in Llama-3's format."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        **SHAPES[size],
        vocab_size=128_256,
        max_position_embeddings=8192,
        rope_parameters={"rope_type": "default", "rope_theta": 500_000.0},
        tie_word_embeddings=False,
        dtype=torch.bfloat16,
    )
    torch.set_default_dtype(torch.bfloat16)
    LlamaForCausalLM(config).save_pretrained(directory, max_shard_size="5GB")
    torch.set_default_dtype(torch.float32)


def by_hugging_face(directory: str, device: str, dtype: torch.dtype):
    from transformers import AutoModelForCausalLM

    device_map = None if device == "cpu" else {"": device}
    return AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, device_map=device_map)


def by_refusal_lens(directory: str, device: str, dtype: torch.dtype):
    from refusal_lens.models.load import load_model

    return load_model(directory, device=device, dtype=dtype)


def by_transformer_lens(directory: str, device: str, dtype: torch.dtype):
    if version("transformer_lens").startswith("4."):
        from transformer_lens.model_bridge import TransformerBridge

        return TransformerBridge.boot_transformers(
            directory, device=device, dtype=dtype, tokenizer=bare_tokenizer()
        )
    from transformer_lens import HookedTransformer
    from transformer_lens import loading_from_pretrained as loading
    from transformers import AutoModelForCausalLM

    cfg = loading.get_pretrained_model_config(directory, device=device, dtype=dtype)
    cfg.tokenizer_name = None
    hf_model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype)
    state_dict = loading.get_pretrained_state_dict(directory, cfg, hf_model, dtype=dtype)
    model = HookedTransformer(cfg, move_to_device=False)
    model.load_and_process_state_dict(
        state_dict,
        fold_ln=False,
        center_writing_weights=False,
        center_unembed=False,
        fold_value_biases=False,
    )
    model.move_model_modules_to_device()
    return model


def bare_tokenizer():
    """TransformerLens 4 loads no model without one."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE({"a": 0}, []))
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="a")


LOADERS = {
    HUGGING_FACE: by_hugging_face,
    OURS: by_refusal_lens,
    TRANSFORMER_LENS: by_transformer_lens,
}


def load_once(name: str, directory: str, device: str, dtype: str) -> dict[str, float]:
    """Seconds and peak bytes of one load in this process, imports done before."""
    import transformer_lens  # noqa: F401
    import transformers.models.llama.modeling_llama  # noqa: F401

    import refusal_lens.models.load  # noqa: F401

    if device != "cpu":
        torch.zeros(1, device=device)
        torch.cuda.reset_peak_memory_stats()
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here
    before, own_before = resident("VmRSS"), resident("RssAnon")
    with highest("RssAnon") as peak:
        start = time.perf_counter()
        model = LOADERS[name](directory, device, getattr(torch, dtype))
        if device != "cpu":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
    model.eval()
    return {
        "seconds": seconds,
        "host": resident("VmHWM") - before,
        "host, no mapped file": peak[0] - own_before,
        "device": 0 if device == "cpu" else torch.cuda.max_memory_allocated(),
    }


def resident(line: str) -> int:
    """Bytes of this process in memory now (VmRSS) or at most (VmHWM), as Linux counts them."""
    status = Path("/proc/self/status").read_text().split(f"{line}:")[1]
    return int(status.split()[0]) * 1024


@contextmanager
def highest(line: str):
    """The highest value of a line that the kernel keeps no peak of, as `[bytes]`."""
    peak, done = [resident(line)], threading.Event()

    def watch() -> None:
        while not done.wait(0.001):
            peak[0] = max(peak[0], resident(line))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield peak
    finally:
        done.set()
        watcher.join()
        peak[0] = max(peak[0], resident(line))


def report(rounds: list[dict], weights: int, device: str, dtype: str) -> str:
    """The table, with what is required and whether it holds."""
    own = "host, no mapped file"
    places = ["host", own] if device == "cpu" else ["host", own, "device"]
    lines = [
        "# Loading",
        "",
        f"Loading a {weights / 1e9:.2f} GB Llama in {dtype} on "
        f"{torch.cuda.get_device_name() if device != 'cpu' else platform.processor() or 'a CPU'} "
        f"({os.cpu_count()} cores), TransformerLens {version('transformer_lens')}, transformers "
        f"{version('transformers')}, torch {torch.__version__}; {len(rounds)} rounds.",
        "",
        "| | seconds | times Hugging Face | "
        + " | ".join(f"peak {p} / weights" for p in places)
        + " |",
        "|---|---|---|" + "---|" * len(places),
    ]
    for name in (HUGGING_FACE, OURS, TRANSFORMER_LENS):
        seconds = statistics.median(turn[name]["seconds"] for turn in rounds)
        peaks = [max(turn[name][p] for turn in rounds) / weights for p in places]
        cells = [f"{seconds:.2f}", f"{ratio(rounds, name):.2f}", *(f"{p:.2f}" for p in peaks)]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    memory = max(turn[OURS][p] for turn in rounds for p in places[1:]) / weights
    time_holds, memory_holds = ratio(rounds, OURS) <= MOST_TIME, memory <= MOST_MEMORY
    lines += [
        "",
        f"Required: at most {MOST_TIME} times Hugging Face ({'holds' if time_holds else 'FAILS'}), "
        f"at most {MOST_MEMORY} times the weights ({'holds' if memory_holds else 'FAILS'}).",
    ]
    return "\n".join(lines)


def ratio(rounds: list[dict], name: str) -> float:
    """Time over Hugging Face's, the median over rounds: what else runs then hits both alike."""
    return statistics.median(
        turn[name]["seconds"] / turn[HUGGING_FACE]["seconds"] for turn in rounds
    )


if __name__ == "__main__":
    if sys.argv[1:2] == ["--once"]:
        print(json.dumps(load_once(*sys.argv[2:])))
    else:
        tyro.cli(Benchmark)()
