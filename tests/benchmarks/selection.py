"""Choosing a direction: the three scores of every candidate, against the published method's loop.

    python tests/benchmarks/selection.py [--rounds 3] [--out FILE]

The candidates are five positions times 32 layers of organism:specific. Each is ablated on harmful and
on harmless prompts and added on harmless prompts. `published_selection.py` holds the published method
in plain Hugging Face code, one candidate after another in batches of 32. Both ways score the same
candidates on the same prompts and take turns, round by round. Seconds are medians over the rounds, the
ratio is the median of the rounds' ratios. The scores must agree for the times to count.
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
REQUIRED = 2.5


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
        found = select_direction(
            model, contrast, protocol=ARDITI, refusal_tokens=tokens, progress=False
        )
        between = time.perf_counter()
        harmful, harmless = (
            published.mean_activations(side, 5) for side in (train.target, train.baseline)
        )
        expected = published.scores(harmful - harmless, held_out.target, held_out.baseline)
        rounds.append((between - start, time.perf_counter() - between))
    own_time, published_time = (statistics.median(times) for times in zip(*rounds, strict=True))
    ratio = statistics.median(published / own for own, published in rounds)

    apart = max(
        float((getattr(found.scores, score) - values).abs().max())
        for score, values in expected.items()
    )
    met = "met" if ratio >= REQUIRED and apart <= LARGEST else "not met"
    lines = [
        "# Time to choose a direction",
        "",
        f"`python tests/benchmarks/selection.py`: {name}, {found.scores.ablation.numel()} candidates, "
        f"{len(held_out.target)} harmful and {len(held_out.baseline)} harmless prompts, "
        f"{torch.get_num_threads()} threads, {len(rounds)} rounds.",
        "",
        "| extracting the candidates and scoring them | seconds |",
        "|---|---|",
        f"| `select_direction` | {own_time:.1f} |",
        f"| the published method | {published_time:.1f} |",
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
