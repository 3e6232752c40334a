"""Draw the figures of the README from fresh runs, and print the numbers beside them.

    python tests/benchmarks/readme_figures.py [depth] [sensitivity]

`depth` runs the experiment on the three bundled organisms with every prompt, writes
`notebooks/figures/cosine_across_depth.png` and prints the rows of the README's table of verdicts.
`sensitivity` compares every specification on `organism:specific`, writes
`notebooks/figures/sensitivity.png` and prints the table. The pictures are drawn as those of the
notebooks: by Chromium and its driver (chromium, chromium-driver), selenium and pillow.
"""

import base64
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from notebook_outputs import browser, picture

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
    write(figure.update_layout(height=430), "cosine_across_depth.png")
    print(*rows, sep="\n")


def draw_sensitivity() -> None:
    """The cosine of one model under every specification."""
    model = rl.load_model("organism:specific")
    contrasts = rl.load_contrast("refusal"), rl.load_contrast("negativity")
    found = rl.run_sensitivity(model, contrasts, progress=False)
    print(found)
    write(found.figure(), "sensitivity.png")


def write(figure: "go.Figure", name: str) -> None:
    """Write a figure as a small PNG."""
    FIGURES.mkdir(exist_ok=True)
    with browser() as driver:
        drawn = picture(driver, json.loads(figure.to_json()))
    (FIGURES / name).write_bytes(base64.b64decode(drawn))


DRAWINGS = {"depth": draw_depth, "sensitivity": draw_sensitivity}

if __name__ == "__main__":
    for asked in sys.argv[1:] or DRAWINGS:
        DRAWINGS[asked]()
