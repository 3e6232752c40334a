"""The three maps by which a direction is chosen of many."""

from collections.abc import Mapping, Sequence
from typing import Literal

import plotly.graph_objects as go
from jaxtyping import Float
from torch import Tensor

from ..errors import InputError
from .look import Theme
from .matrices import position_by_layer

_QUANTITIES = {
    "ablation": ("Refusal of harmful prompts once ablated", "mean refusal log-odds (nats)"),
    "addition": ("Refusal of harmless prompts once added", "mean refusal log-odds (nats)"),
    "kl": ("What ablation does to harmless prompts", "mean KL of the next token (nats)"),
}


def selection_scores(
    scores: Mapping[Literal["ablation", "addition", "kl"], Float[Tensor, "pos layer"]],
    *,
    positions: Sequence[int | str] | None = None,
    selected: tuple[int, int] | None = None,
    counting: Literal["input", "output"] = "input",
    theme: Theme = "light",
) -> dict[str, go.Figure]:
    """A heatmap of every candidate for each score that candidates are chosen by.

    Args:
        scores: "ablation", "addition" and "kl", each `[pos layer]`; NaN cells stay empty.
        positions: the positions' names; standard is -n to -1.
        selected: the (row, layer) outlined.
        counting: whether layer `l` is the input of block `l`, as Arditi et al. count, or its output.
        theme: "light" or "dark".

    Raises:
        InputError: as `position_by_layer`.
    """
    charts: dict[str, go.Figure] = {}
    for name, values in scores.items():
        if name not in _QUANTITIES:
            raise InputError(f"{name!r} is no score: hand over {', '.join(_QUANTITIES)}")
        title, quantity = _QUANTITIES[name]
        charts[name] = position_by_layer(
            values,
            positions=positions,
            quantity=quantity,
            selected=selected,
            title=title,
            theme=theme,
        )
        charts[name].update_xaxes(title_text=f"layer ({counting} of block)")
    return charts
