"""The cache's cost and gain: `python tests/benchmarks/cache.py --out FILE`.

Extracts the activations of the four bundled contrasts without a cache (plain), with an empty cache
(cold) and with the cache that the cold run filled (warm), in turns. Plain and cold start with a
loaded model. The warm run starts with nothing loaded, loads a tokenizer and must load no model. The
cost is the median over the rounds of cold over plain, so that other load on the machine hits both.

Required: warm at least 4 times faster than cold; cold at most 1.05 times plain.
"""

import os
import platform
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import tyro

from refusal_lens.activations.extract import by_contrast
from refusal_lens.activations.store import Cache
from refusal_lens.experiment.cached_model import CachedModel
from refusal_lens.experiment.config import Config
from refusal_lens.prompts.contrast import load_contrast

LEAST_GAIN, MOST_COST = 4.0, 1.05
CONTRASTS = ("refusal", "negativity", "positivity", "alarm")


@dataclass(frozen=True)
class Benchmark:
    """Seconds for all bundled prompts without a cache, with an empty cache and with a full one."""

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

    def cached(self, name: str, cache: Cache) -> CachedModel:
        return CachedModel(Config(model=name, device=self.device), cache)

    def measure(self, name: str) -> str:
        contrasts = {contrast: load_contrast(contrast) for contrast in CONTRASTS}
        loaded = self.cached(name, Cache(None))
        plain, cold, warm = [], [], []
        extract(loaded, contrasts)  # the first run pays for what later runs find ready
        for i in range(self.rounds):
            with tempfile.TemporaryDirectory(dir=self.folder) as folder:
                cache = Cache(folder)
                turns = [(plain, Cache(None)), (cold, cache)]
                for seconds, into in turns if i % 2 else turns[::-1]:
                    loaded.cache = into
                    seconds.append(extract(loaded, contrasts))
                later = self.cached(name, cache)
                warm.append(extract(later, contrasts))
                assert "model" not in vars(later)
                ((n_files, n_prompts, n_bytes),) = cache.holdings().values()
        gain = statistics.median(cold) / statistics.median(warm)
        cost = statistics.median(c / p for c, p in zip(cold, plain, strict=True))
        holds = gain >= LEAST_GAIN and cost <= MOST_COST
        times = " | ".join(f"{statistics.median(seconds):.3f}" for seconds in (plain, cold, warm))
        return (
            f"| {name} | {n_prompts} | {n_bytes / 1e6:.1f} MB in {n_files} files | "
            f"{times} | {gain:.0f} | {cost:.3f} | {'holds' if holds else 'FAILS'} |"
        )


def extract(model: CachedModel, contrasts: dict) -> float:
    start = time.perf_counter()
    by_contrast(partial(model.prompt_activations, progress=False), contrasts)
    return time.perf_counter() - start


if __name__ == "__main__":
    tyro.cli(Benchmark)()
