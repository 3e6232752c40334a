"""The cost of scoring whole openings of refusals, against their first tokens alone.

    python tests/benchmarks/opening_scores.py [organism:specific FILE.gguf ...] [--rounds 3]

Both score the default prompts, 108 harmful and 108 harmless requests, in the unmodified model. They
take turns, and the fastest round of each counts. Aim: at most three times the time.
"""

import argparse
import time
from importlib.metadata import version
from pathlib import Path

import torch

import refusal_lens as rl
from refusal_lens.interventions import openings_of
from refusal_lens.interventions.batched_runs import first_token_logits, opening_log_odds
from refusal_lens.interventions.reply_openings import REFUSAL

RESULTS = Path(__file__).parent / "results"
MOST = 3.0


def compared(name: str, rounds: int) -> tuple[float, float]:
    """Seconds of the first tokens and of the whole openings."""
    model, contrast = rl.load_model(name), rl.load_contrast("refusal")
    prompts = (*contrast.target, *contrast.baseline)
    openings = openings_of(model.tokenizer, REFUSAL)
    ways = (
        lambda: first_token_logits(model, prompts, progress=False),
        lambda: opening_log_odds(model, prompts, openings, progress=False),
    )
    seconds: list[list[float]] = [[], []]
    for _ in range(rounds):
        for taken, way in zip(seconds, ways, strict=True):
            start = time.perf_counter()
            way()
            taken.append(time.perf_counter() - start)
    return min(seconds[0]), min(seconds[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", default=["organism:specific"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=RESULTS / "opening_scores.md")
    args = parser.parse_args()
    software = f"torch {torch.__version__}, transformer_lens {version('transformer_lens')}"
    lines = [
        "# What whole openings cost",
        "",
        f"`python tests/benchmarks/opening_scores.py`: 216 requests, {torch.get_num_threads()} "
        f"thread(s), fastest of {args.rounds} rounds; {software}.",
        "",
        "| model | first tokens, s | whole openings, s | ratio |",
        "|---|---|---|---|",
    ]
    met = True
    for name in args.models:
        first, whole = compared(name, args.rounds)
        met &= whole <= MOST * first
        shown = name if name.startswith("organism:") else Path(name).name
        lines.append(f"| {shown} | {first:.2f} | {whole:.2f} | {whole / first:.2f} |")
    verdict = "met" if met else "MISSED"
    lines += ["", f"Required: at most {MOST:g} times the first tokens; {verdict}."]
    text = "\n".join(lines) + "\n"
    args.out.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
