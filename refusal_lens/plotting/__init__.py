"""Tensors -> plotly figures: functions that compute, show and write nothing.

A concept (refusal, negativity, ...) keeps its colour in every figure, and no two styles differ by
colour only. Prompts and names are shown verbatim, never as markup. Functions raise `InputError` for
arguments that do not fit together, impossible layers or cells, negative norms and unknown themes.
To save a figure, use plotly's `write_html`, or `write_image` with kaleido and Chrome.
"""

from ..errors import lenient
from .depth import cosine_by_layer, log_odds_by_ablated_layer, metric_panel, norms_by_layer
from .matrices import cosine_matrix, cross_effects, position_by_layer, selection_scores
from .prompts import projections_by_layer, prompts_in_plane
from .specification import specification_curve
from .theme import page

__all__ = [
    "cosine_by_layer",
    "cosine_matrix",
    "cross_effects",
    "log_odds_by_ablated_layer",
    "metric_panel",
    "norms_by_layer",
    "page",
    "position_by_layer",
    "projections_by_layer",
    "prompts_in_plane",
    "selection_scores",
    "specification_curve",
]

for _name in __all__:  # here, at the edge, arrays and lists pass for tensors
    globals()[_name] = lenient(globals()[_name])
    globals()[_name].__module__ = __name__  # where pickle finds it again
