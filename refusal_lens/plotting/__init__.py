"""Tensors -> plotly figures: functions that compute, show and write nothing.

Every figure has one look, light or dark, applied to that figure alone. Its colours keep to the
concept (refusal, negativity, harmful, ...) from figure to figure, and no two differ by colour only.
Text from outside (prompts, model names) is shown verbatim, never read as markup.

What is returned is an ordinary `plotly.graph_objects.Figure`, as wide as its page.
`figure.write_html(path, include_plotlyjs="directory")` writes a page of a few kB beside one shared
copy of plotly.js (4.6 MB, which `True` puts into every page). `figure.write_image("figure.pdf",
width=700)` writes a still one; plotly needs the package kaleido and a Chrome for that.
"""

from .depth import cosine_by_layer, log_odds_by_ablated_layer, metric_panel, norms_by_layer
from .matrices import cosine_matrix, cross_effects, position_by_layer
from .prompts import projections_by_layer, prompts_in_plane
from .selection import selection_scores
from .specification import specification_curve

__all__ = [
    "cosine_by_layer",
    "cosine_matrix",
    "cross_effects",
    "log_odds_by_ablated_layer",
    "metric_panel",
    "norms_by_layer",
    "position_by_layer",
    "projections_by_layer",
    "prompts_in_plane",
    "selection_scores",
    "specification_curve",
]
