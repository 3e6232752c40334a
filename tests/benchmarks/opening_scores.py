"""The cost of scoring whole openings of refusals, against their first tokens alone.

    python tests/benchmarks/opening_scores.py [organism:specific FILE.gguf ...] [--rounds 3]

Both score the default prompts, 108 harmful and 108 harmless requests, in the unmodified model. They
take turns, and the fastest round of each counts. Aim: at most three times the time.

The tokens that all prompts begin with run once in both. What is left of a prompt is short, and behind
it the likely openings add tokens that must each be unembedded. "Least" is the ratio that their
multiplications alone would have, if none of them had to be copied, gathered or waited for.
"""

import argparse
import re
import time
from importlib.metadata import version
from itertools import takewhile
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

import torch

import refusal_lens as rl
from refusal_lens.interventions import opening_scores, openings_of
from refusal_lens.interventions.batched_runs import (
    checked_ids,
    first_token_logits,
    opening_log_odds,
)
from refusal_lens.interventions.reply_openings import REFUSAL
from refusal_lens.prompts.protocol import Protocol

RESULTS = Path(__file__).parent / "results"
MOST = 3.0


class Costs(NamedTuple):
    """Seconds of first tokens and of whole openings, tokens of a prompt, and the least ratio."""

    first: float
    whole: float
    own: float
    likely: float
    least: float


def compared(name: str, rounds: int) -> Costs:
    """What both ways of scoring cost in one model."""
    model, contrast = rl.load_model(name), rl.load_contrast("refusal")
    prompts = (*contrast.target, *contrast.baseline)
    openings = openings_of(model.tokenizer, REFUSAL)
    n_run = 0

    def counting(model, tokens, these, prefix, nodes, *rest):
        nonlocal n_run
        n_run += len(nodes)
        return run(model, tokens, these, prefix, nodes, *rest)

    run = opening_scores._next_token
    with patch.object(opening_scores, "_next_token", counting):
        opening_log_odds(model, prompts, openings, progress=False)
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
    ids = checked_ids(model, prompts, Protocol())
    columns = zip(*(row[:-2] for row in ids), strict=False)
    shared = len([*takewhile(lambda column: len({*column}) == 1, columns)])
    own, likely = sum(map(len, ids)) / len(ids) - shared, n_run / len(ids)
    layers = (
        each for key, each in model.named_parameters() if re.search(r"(blocks|layers)\.", key)
    )
    a_token, unembedding = (
        sum(each.numel() for each in layers),
        model.cfg.d_model * model.cfg.d_vocab,
    )
    prompt = own * a_token + unembedding
    least = 1 + likely * (a_token + unembedding) / prompt
    return Costs(min(seconds[0]), min(seconds[1]), own, likely, least)


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
        "| model | first tokens, s | whole openings, s | ratio | a prompt's own tokens | likely "
        "tokens behind it | least ratio |",
        "|---|---|---|---|---|---|---|",
    ]
    met = True
    for name in args.models:
        found = compared(name, args.rounds)
        met &= found.whole <= MOST * found.first
        shown = "+".join(Path(part).name for part in name.split("+"))
        ratio = found.whole / found.first
        cells = [shown, *(f"{x:.2f}" for x in (found.first, found.whole, ratio))]
        cells += [f"{found.own:.1f}", f"{found.likely:.1f}", f"{found.least:.2f}"]
        lines.append(f"| {' | '.join(cells)} |")
    verdict = "met" if met else "MISSED"
    lines += ["", f"Required: at most {MOST:g} times the first tokens; {verdict}."]
    text = "\n".join(lines) + "\n"
    args.out.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
