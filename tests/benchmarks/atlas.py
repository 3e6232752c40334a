"""The map of concepts, step by step: `python tests/benchmarks/atlas.py MODEL [--concepts 14]`.

For each step of `compare_concepts`: seconds on the wall and of the CPU without those of steps inside
it, passes through the model, and tokens in them. A bare pass over random tokens, on the same threads,
gives the speed to compare with. Nothing is cached. It needs a machine with nothing else to do: beside
other work the CPU's own seconds grow several times over.

Required: SmolLM2-135M-Instruct, 14 concepts of 96 pairs, in 600 s on two cores.
"""

import argparse
import functools
import time
from collections import defaultdict
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import refusal_lens as rl
from refusal_lens.experiment import atlas, cached_model, causal, concepts, measures
from refusal_lens.interventions import ReplyOpenings

RESULTS = Path(__file__).parent / "results"
REQUIRED = 600
BARE = 8, 128  # prompts and tokens of a bare pass
STEPS: list[tuple[Any, str, str]] = [
    (cached_model, "load_model", "load the model"),
    (atlas, "by_contrast", "read the prompts"),
    (concepts.Concepts, "cosines", "cosines of all pairs"),
    (causal, "request_scores", "score unmodified requests"),
    (concepts, "opening_log_odds", "score kinds of replies"),
    (concepts, "ablation_effects", "score replies under interventions"),
    (concepts, "addition_effects", "score replies under interventions"),
    (concepts, "measured", "ablate all, read later layers"),
    (causal, "sweep_ablations", "sweep layers"),
    (causal, "constant_token", "first tokens of replies"),
    (concepts.Concepts, "evidence", "evidence"),
    (measures, "aurocs", "AUROC of each on each"),
]

Row = list[float]  # wall, CPU, passes, tokens


def timed(function: Callable[..., Any], step: str, rows: dict[str, Row], stack: list[str]) -> Any:
    @functools.wraps(function)
    def run(*args: Any, **options: Any) -> Any:
        name = step
        if function.__name__ == "measured" and isinstance(args[4], ReplyOpenings):
            name = "score replies under interventions"
        stack.append(name)
        wall, cpu = time.perf_counter(), time.process_time()
        try:
            return function(*args, **options)
        finally:
            seconds = time.perf_counter() - wall, time.process_time() - cpu
            stack.pop()
            for i, value in enumerate(seconds):
                rows[name][i] += value
                rows[stack[-1]][i] -= value

    return run


def counted(function: Callable[..., Any], rows: dict[str, Row], stack: list[str]) -> Any:
    @functools.wraps(function)
    def forward(self: Any, tokens: Any, *args: Any, **options: Any) -> Any:
        if options.get("stop_at_layer") != 0:
            rows[stack[-1]][2] += 1
            rows[stack[-1]][3] += tokens.numel()
        return function(self, tokens, *args, **options)

    return forward


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("--concepts", type=int, default=14)
    parser.add_argument("--prompts", type=int, default=96)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=RESULTS / "atlas.md")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    model = rl.load_model(arguments.model, device="cpu")
    tokens = torch.randint(0, model.cfg.d_vocab, BARE)
    with torch.no_grad():
        model(tokens, stop_at_layer=model.cfg.n_layers)
        start = time.perf_counter()
        for _ in range(5):
            model(tokens, stop_at_layer=model.cfg.n_layers)
    bare = 5 * tokens.numel() / (time.perf_counter() - start)
    rows: dict[str, Row] = defaultdict(lambda: [0.0] * 4)
    stack = ["the rest"]
    for where, name, step in STEPS:
        setattr(where, name, timed(getattr(where, name), step, rows, stack))
    type(model).forward = counted(type(model).forward, rows, stack)
    del model
    chosen = rl.bundled_contrasts()[: arguments.concepts]
    options: Any = {"max_prompts": arguments.prompts, "device": "cpu", "progress": False}
    timed(rl.compare_concepts, "the rest", rows, ["outside"])(arguments.model, chosen, **options)
    rows.pop("outside")
    text = table(rows, arguments, bare)
    print(text)
    arguments.out.write_text(text)


def table(rows: dict[str, Row], arguments: argparse.Namespace, bare: float) -> str:
    """The steps, the slowest first, as Markdown."""
    software = f"torch {torch.__version__}, transformer_lens {version('transformer_lens')}"
    lines = [
        "# How long a map of many concepts takes",
        "",
        f"`python tests/benchmarks/atlas.py {Path(arguments.model).name}`: {arguments.concepts} "
        f"concepts of {arguments.prompts} pairs, nothing cached, {arguments.threads} threads; "
        f"{software}. Bare: {bare:,.0f} tokens a second.",
        "",
        f"| {'step':34} |  wall |   CPU | passes |  tokens | tokens a second |",
        f"|{'---|' * 6}",
    ]
    for step, (wall, cpu, passes, n) in sorted(rows.items(), key=lambda row: -row[1][0]):
        lines.append(
            f"| {step:34} | {wall:5.1f} | {cpu:5.1f} | {passes:6.0f} | {n:7.0f} | {n / wall:15.0f} |"
        )
    total = sum(row[0] for row in rows.values())
    met = "met" if total <= REQUIRED else "MISSED"
    return "\n".join([*lines, "", f"In all {total:.0f} s, required {REQUIRED} s: {met}.", ""])


if __name__ == "__main__":
    main()
