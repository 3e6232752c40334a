"""Draw the figures of the README from fresh runs, and print the numbers beside them.

    python tests/benchmarks/readme_figures.py [depth] [sensitivity]

`depth` runs the experiment on the three bundled organisms with every prompt, writes
`notebooks/figures/cosine_across_depth.png` and prints the rows of the README's table of verdicts.
`sensitivity` compares every specification on `organism:specific`, writes
`notebooks/figures/sensitivity.png` and prints the table. Drawing needs the packages kaleido and
pillow, and a Chrome or Chromium.
"""

import sys
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

import refusal_lens as rl

if TYPE_CHECKING:
    import plotly.graph_objects as go

ORGANISMS = ("specific", "entangled", "oblivious")
FIGURES = Path(__file__).parents[2] / "notebooks" / "figures"


def draw_depth() -> None:
    """The cosine across depth in three models."""
    curves, intervals, rows = {}, {}, []
    for name in ORGANISMS:
        results = rl.run_experiment(rl.Config(model=f"organism:{name}"), progress=False)
        measure, cosine, published = results.table()[0]
        label = f"{name} (verdict: {results.verdict.answer})"
        sure = results.statistics["negativity"]
        curves[label] = results.similarities["refusal_vs_negativity"]
        if sure.lower.isfinite().all() and sure.upper.isfinite().all():
            intervals[label] = sure.lower, sure.upper
        rows.append(f"| `{name}` | {results.verdict.answer} | {cosine:+.2f} | {published} |")
        print(results, end="\n\n", flush=True)
    figure = rl.plotting.cosine_by_layer(
        curves,
        interval=intervals,
        highlight=results.layer,
        title=f"{measure[:1].upper()}{measure[1:]} in three models whose answer is known",
    )
    write(figure, "cosine_across_depth.png", 430)
    print(*rows, sep="\n")


def draw_sensitivity() -> None:
    """The cosine of one model under every specification."""
    model = rl.load_model("organism:specific")
    contrasts = rl.load_contrast("refusal"), rl.load_contrast("negativity")
    found = rl.run_sensitivity(model, contrasts, progress=False)
    print(found)
    write(found.figure(), "sensitivity.png", None)


def write(figure: "go.Figure", name: str, height: int | None) -> None:
    """Write a figure as a small PNG, at twice its displayed size."""
    FIGURES.mkdir(exist_ok=True)
    drawn = Image.open(BytesIO(figure.to_image("png", width=760, height=height, scale=2)))
    # With a palette the file is a quarter of the size; such a figure has few colours.
    few = drawn.convert("RGB").quantize(128, dither=Image.Dither.NONE)
    few.save(FIGURES / name, optimize=True)


DRAWINGS = {"depth": draw_depth, "sensitivity": draw_sensitivity}

if __name__ == "__main__":
    for asked in sys.argv[1:] or DRAWINGS:
        DRAWINGS[asked]()
