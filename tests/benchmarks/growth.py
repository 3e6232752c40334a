"""How time and memory grow with the number of prompts: everything of a run but interventions.

    python tests/benchmarks/growth.py [--prompts 100 400 1600 4050] [--directory DIR] [--out FILE]

Random activations of Llama-3-8B's shape, 32 layers of width 4096, with a planted difference in each
of two paired contrasts, lie in one file a set (2.1 GB at 4,050 prompts), which is mapped into memory:
`--directory` keeps the files. `analyse` reduces the first n prompts of each to results; its steps are
timed, without the other steps inside them, and saving and the report after it. "Own memory" is the
highest RssAnon: without the mapped file's pages, which the system takes back when it needs them.
"Reading" runs the 2 n prompts of one contrast through organism:specific, a much smaller model.

`--layers 2 --width 64` tries it out in seconds.
"""

import argparse
import itertools
import platform
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from gpu_8b import stopwatch
from torch import Tensor

import refusal_lens as rl
from refusal_lens.activations.extract import get_prompt_activations
from refusal_lens.experiment.run import analyse
from refusal_lens.prompts.contrast import BUNDLED, load_contrast

SETS = ("harmful", "harmless", "negative", "neutral")
STEPS = {
    "statistics": "experiment.run:_statistics",
    "estimators": "experiment.measures:by_estimator",
    "similarities": "experiment.measures:by_metric",
    "projections": "experiment.measures:projections",
    "AUROC": "experiment.measures:aurocs",
    "components": "experiment.measures:in_components",
    "the rest": "experiment.run:analyse",
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--prompts", type=int, nargs="+", default=[100, 400, 1600, 4050])
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--directory", type=Path, help="where the activations are kept")
    parser.add_argument("--out", type=Path, help="a markdown file to write")
    options = parser.parse_args()
    columns = [*STEPS, "saving", "report", "all", "own memory", "reading"]
    lines = [
        "# Growth with the number of prompts",
        "",
        f"Pairs of prompts in each of two contrasts; {options.layers} layers of width "
        f"{options.width}; seconds on {torch.get_num_threads()} threads of a {platform.machine()} "
        f"CPU, memory in GB; torch {torch.__version__}.",
        "",
        f"| pairs | {' | '.join(columns)} |",
        f"|---{'|---' * len(columns)}|",
    ]
    print(*lines, sep="\n", flush=True)
    model = rl.load_model("organism:specific")
    with tempfile.TemporaryDirectory() as made:
        folder = options.directory or Path(made)
        shape = max(options.prompts), options.layers, options.width
        files = [activations_on_disk(folder / name, i, shape) for i, name in enumerate(SETS)]
        for n in options.prompts:
            values = [*measure(n, files, shape), reading(model, 2 * n)]
            lines.append(f"| {n:,} | {' | '.join(f'{value:.1f}' for value in values)} |")
            print(lines[-1], flush=True)
            if options.out:
                options.out.write_text("\n".join([*lines, ""]))


def activations_on_disk(path: Path, seed: int, shape: tuple[int, int, int]) -> Path:
    """Normal rows, of which a few dimensions vary more and have a mean, as in real models."""
    n_prompts, n_layers, width = shape
    if path.exists() and path.stat().st_size >= 4 * n_prompts * n_layers * width:
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    spread = torch.linspace(0, -4, width).exp()
    planted = torch.zeros(width)
    planted[seed // 2 * 5 : seed // 2 * 5 + 10] = 1.0 - seed % 2
    planted[-3:] += 100
    with path.open("wb") as file:
        for start in range(0, n_prompts, 64):
            some = min(64, n_prompts - start)
            rows = torch.randn(some, n_layers, width, generator=generator) * spread + planted
            file.write(rows.numpy().tobytes())
    return path


def measure(n: int, files: list[Path], shape: tuple[int, int, int]) -> list[float]:
    """Seconds of each step, of saving, of the report and of all, and the highest own memory."""
    sides = [mapped(path, (n, *shape[1:])) for path in files]
    start = time.perf_counter()
    with stopwatch(STEPS, None) as seconds, own_memory() as gigabytes:
        results = analyse(
            {"refusal": (sides[0], sides[1]), "negativity": (sides[2], sides[3])},
            contrasts=numbered(n),
        )
        with tempfile.TemporaryDirectory() as folder:
            analysed = time.perf_counter()
            results.save(folder)
            saved = time.perf_counter()
            rl.write_report(results, Path(folder) / "report.html")
            written = time.perf_counter()
    after = [saved - analysed, written - saved, written - start]
    return [*seconds.values(), *after, gigabytes[0]]


def mapped(path: Path, shape: tuple[int, int, int]) -> Tensor:
    size = shape[0] * shape[1] * shape[2]
    return torch.from_file(str(path), shared=True, size=size).unflatten(0, shape)


def numbered(n: int) -> dict[str, rl.Contrast]:
    def contrast(part: str, target: str, baseline: str) -> rl.Contrast:
        sides = [tuple(f"{name} prompt {i}" for i in range(n)) for name in (target, baseline)]
        named = {"target_name": target, "baseline_name": baseline}
        return rl.Contrast(part, *sides, paired=True, **named)

    return {
        "refusal": contrast("refusal", *SETS[:2]),
        "negativity": contrast("negativity", *SETS[2:]),
    }


def reading(model, n: int) -> float:
    contrasts = [load_contrast(name) for name in BUNDLED]
    prompts = [text for c in contrasts for side in (c.target, c.baseline) for text in side]
    texts = list(itertools.islice(itertools.cycle(prompts), n))
    start = time.perf_counter()
    get_prompt_activations(model, texts, progress=False)
    return time.perf_counter() - start


@contextmanager
def own_memory() -> Iterator[list[float]]:
    """The highest RssAnon, in GB, of what this process held meanwhile."""
    highest, done = [0.0], threading.Event()

    def watch() -> None:
        while not done.wait(0.02):
            status = Path("/proc/self/status").read_text().splitlines()
            held = next(int(x.split()[1]) for x in status if x.startswith("RssAnon")) / 1e6
            highest[0] = max(highest[0], held)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield highest
    finally:
        done.set()
        thread.join()


if __name__ == "__main__":
    main()
