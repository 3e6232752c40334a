"""The cache's cost and gain: `python tests/benchmarks/cache.py --out FILE`.

The four bundled contrasts are read from one model three ways, in turns: without a cache, with an
empty one (cold) and with the one that this has just filled (warm). The model is loaded before the
clock starts, except in the warm run, which is given one that is not loaded and must leave it so. Of
the cost the median over the rounds of cold over plain is reported: what else runs then hits both.

Required: warm at least 20 times faster than cold; cold at most 1.05 times plain.
"""

import os
import platform
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import tyro

from refusal_lens.activations.extract import extract
from refusal_lens.activations.store import Cache
from refusal_lens.experiment.lazy_model import LazyModel
from refusal_lens.prompts.contrast import load_contrast

LEAST_GAIN, MOST_COST = 20.0, 1.05
CONTRASTS = ("refusal", "negativity", "positivity", "alarm")


@dataclass(frozen=True)
class Benchmark:
    """Seconds of reading all bundled prompts without a cache, with an empty and with a full one."""

    models: tuple[str, ...] = ("organism:specific",)
    """Models, as `load_model` takes them."""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    """Where they are run."""
    rounds: int = 15
    """How often each is read each way."""
    folder: Path | None = None
    """Where the cache is made; the disk matters. Default: where temporary files go."""
    out: Path | None = None
    """File for the table."""

    def __call__(self) -> None:
        rows = [self.measure(name) for name in self.models]
        text = "\n".join([*self.head(), *rows])
        print(text)
        if self.out:
            self.out.parent.mkdir(parents=True, exist_ok=True)
            self.out.write_text(text + "\n", "utf-8")

    def head(self) -> list[str]:
        place = torch.cuda.get_device_name() if self.device != "cpu" else platform.machine()
        packages = ", ".join(f"{name} {version(name)}" for name in ("transformer_lens", "torch"))
        return [
            f"`python {' '.join(sys.argv)}` on {place}, {torch.get_num_threads()} thread(s), "
            f"{packages}. Medians of {self.rounds} rounds, in seconds. Required: warm at least "
            f"{LEAST_GAIN:.0f} times faster than cold, cold at most {MOST_COST} times plain.",
            "",
            "| model | prompts | stored | plain | cold | warm | cold / warm | cold / plain | |",
            "|---|---|---|---|---|---|---|---|---|",
        ]

    def measure(self, name: str) -> str:
        contrasts = [load_contrast(contrast) for contrast in CONTRASTS]
        loaded = LazyModel(name, device=self.device)
        plain, cold, warm = [], [], []
        read(loaded, contrasts, None)  # the first run pays for what the later ones find ready
        for i in range(self.rounds):
            with tempfile.TemporaryDirectory(dir=self.folder) as folder:
                cache = Cache(folder)
                turns = [(plain, None), (cold, cache)]
                for seconds, into in turns if i % 2 else turns[::-1]:
                    seconds.append(read(loaded, contrasts, into))
                later = LazyModel(name, device=self.device)
                warm.append(read(later, contrasts, cache))
                assert not later.is_loaded
                held = cache.holdings()[0]
        gain = statistics.median(cold) / statistics.median(warm)
        cost = statistics.median(c / p for c, p in zip(cold, plain, strict=True))
        holds = gain >= LEAST_GAIN and cost <= MOST_COST
        times = " | ".join(f"{statistics.median(seconds):.3f}" for seconds in (plain, cold, warm))
        return (
            f"| {name} | {held.n_prompts} | {held.n_bytes / 1e6:.1f} MB in {held.n_files} files | "
            f"{times} | {gain:.0f} | {cost:.3f} | {'holds' if holds else 'FAILS'} |"
        )


def read(model: LazyModel, contrasts: list, cache: Cache | None) -> float:
    start = time.perf_counter()
    extract(model, contrasts, cache=cache, progress=False)
    return time.perf_counter() - start


if __name__ == "__main__":
    tyro.cli(Benchmark)()
