"""Draw the figure of the README from a fresh run, and print the table beside it.

    python tests/benchmarks/readme_figures.py

Runs the experiment on the three bundled organisms with every prompt (about a minute on two
cores), writes `notebooks/figures/cosine_across_depth.png` and prints the rows of the README's
table of verdicts. Drawing it needs the packages kaleido and pillow, and a Chrome or Chromium.
"""

from io import BytesIO
from pathlib import Path

from PIL import Image

import refusal_lens as rl

ORGANISMS = ("specific", "entangled", "oblivious")
FIGURES = Path(__file__).parents[2] / "notebooks" / "figures"


def main() -> None:
    """Run, draw and print."""
    curves, intervals, rows = {}, {}, []
    for name in ORGANISMS:
        results = rl.run_experiment(rl.Config(model=f"organism:{name}"), progress=False)
        measure, cosine, reading = results.table()[0]
        label = f"{name} (verdict: {results.verdict.answer})"
        sure = results.statistics["negativity"]
        curves[label] = results.similarities["refusal_vs_negativity"]
        if sure.lower.isfinite().all() and sure.upper.isfinite().all():
            intervals[label] = sure.lower, sure.upper
        rows.append(f"| `{name}` | {results.verdict.answer} | {cosine:+.2f} | {reading} |")
        print(results, end="\n\n", flush=True)
    figure = rl.plotting.cosine_by_layer(
        curves,
        interval=intervals,
        highlight=results.layer,
        title=f"{measure[:1].upper()}{measure[1:]} in three models whose answer is known",
    )
    FIGURES.mkdir(exist_ok=True)
    drawn = Image.open(BytesIO(figure.to_image("png", width=760, height=430, scale=2)))
    # A palette is a quarter of the size, and such a figure has few colours.
    few = drawn.convert("RGB").quantize(128, dither=Image.Dither.NONE)
    few.save(FIGURES / "cosine_across_depth.png", optimize=True)
    print(*rows, sep="\n")


if __name__ == "__main__":
    main()
