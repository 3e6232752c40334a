"""Choosing a direction: the three scores of every candidate, against the published method's loop.

    python tests/benchmarks/selection.py [--rounds 3] [--out FILE]

Candidates are five positions times 32 layers of organism:specific; each is ablated on harmful and on
harmless prompts and added on harmless ones. The published method is in `published_selection.py`, plain
Hugging Face code from the paper's formulas, one candidate after another in batches of 32. Same model,
same prompts, same candidates, in one run; the scores are compared before the times count. The two take
turns; seconds are medians over the rounds, the ratio is the median of the rounds' ratios.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import torch

from refusal_lens.interventions import find_refusal_tokens
from refusal_lens.interventions.selection import _split, select_direction
from refusal_lens.models.load import load_model, load_tokenizer
from refusal_lens.prompts.contrast import load_contrast
from refusal_lens.prompts.protocol import ARDITI

sys.path.insert(0, str(Path(__file__).parents[1]))
from published_selection import PublishedSelection

ORGANISM = "specific"
RESULTS = Path(__file__).parent / "results" / "selection.md"
LARGEST = 1e-4
REQUIRED = 5


def main() -> None:
    from transformers import AutoModelForCausalLM

    import refusal_lens

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    out = arguments.out
    name = f"organism:{ORGANISM}"
    model, contrast = load_model(name), load_contrast("refusal")
    train, held_out = _split(contrast)
    tokens = find_refusal_tokens(model, held_out.target, held_out.baseline, progress=False)
    folder = Path(refusal_lens.__file__).parent / "organisms" / ORGANISM
    hf = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    published = PublishedSelection(hf, load_tokenizer(name), tokens.ids)

    rounds = []
    for _ in range(arguments.rounds):
        start = time.perf_counter()
        ours = select_direction(
            model, contrast, protocol=ARDITI, refusal_tokens=tokens, progress=False
        )
        between = time.perf_counter()
        harmful, harmless = (
            published.mean_activations(side, 5) for side in (train.target, train.baseline)
        )
        theirs = published.scores(harmful - harmless, held_out.target, held_out.baseline)
        rounds.append((between - start, time.perf_counter() - between))
    our_time, their_time = (statistics.median(times) for times in zip(*rounds, strict=True))
    ratio = statistics.median(their / our for our, their in rounds)

    apart = max(
        float((getattr(ours.scores, score) - values).abs().max())
        for score, values in theirs.items()
    )
    met = "met" if ratio >= REQUIRED and apart <= LARGEST else "not met"
    lines = [
        "# Time to choose a direction",
        "",
        f"`python tests/benchmarks/selection.py`: {name}, {ours.scores.ablation.numel()} candidates, "
        f"{len(held_out.target)} harmful and {len(held_out.baseline)} harmless prompts, "
        f"{torch.get_num_threads()} threads, {len(rounds)} rounds.",
        "",
        "| reading the candidates and scoring them | seconds |",
        "|---|---|",
        f"| `select_direction` | {our_time:.1f} |",
        f"| the published method | {their_time:.1f} |",
        f"| ratio | {ratio:.1f} |",
        "",
        f"Largest difference of any score: {apart:.1e}. Required: at least {REQUIRED} times as fast, "
        f"scores within {LARGEST:g}; {met}.",
    ]
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
