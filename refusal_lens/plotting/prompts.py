"""Single prompts: in a plane, and projected on a direction, with a slider over layers."""

from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

import plotly.graph_objects as go
from jaxtyping import Float
from torch import Tensor

from ..errors import InputError, check_tensors
from .text import numbers, wrapped, written
from .theme import Theme, check_count, empty, figure, headed, is_layer, padded, styles, tint

Step = tuple[dict[str, Any], dict[str, Any]]  # coordinates by axis, and the layout
Sets = Mapping[str, Tensor]
Prompts = Mapping[str, Sequence[str]]


def prompts_in_plane(
    coordinates: Mapping[str, Float[Tensor, "_prompt layer 2"]],
    prompts: Prompts | None = None,
    *,
    axes: tuple[str, str] = ("along unit refusal direction", "along unit negativity direction"),
    highlight: int = 20,
    title: str = "Prompts in the plane of two directions",
    theme: Theme = "light",
) -> go.Figure:
    """Every prompt as a point in a plane (two directions or principal components), by layer.

    The axes rescale with the layer, since the residual stream grows with depth.

    Args:
        coordinates: `[prompt layer 2]` by set ("harmful", ...). A NaN prompt is not drawn.
        prompts: the text of each prompt, shown shortened on hover.
        axes: names of the two coordinates.
        highlight: the layer shown first; the last layer if the model has fewer.
        title, theme: the figure's title; "light" or "dark".
    """
    subtitle = "residual-stream units; the axes rescale with each layer"
    chart = figure(title, subtitle, theme=theme, height=460)
    texts = _check_sets(coordinates, "prompt_{i} layer two", prompts)
    if any(each.shape[2] != 2 for each in coordinates.values()):
        raise InputError("coordinates have another shape: hand over [prompt layer 2]")
    if empty(chart, coordinates.values(), "set of coordinates"):
        return chart
    steps: list[Step] = []
    for layer in range(next(iter(coordinates.values())).shape[1]):
        x, y = ([numbers(each[:, layer, axis]) for each in coordinates.values()] for axis in (0, 1))
        ranges = {"xaxis.range": padded(chain(*x), 0.06), "yaxis.range": padded(chain(*y), 0.06)}
        steps.append(({"x": x, "y": y}, ranges))
    for name, style in styles(coordinates, theme).items():
        points = {"name": wrapped(name, width=40, lines=1), "text": texts[name], "mode": "markers"}
        points["hovertemplate"] = "%{fullData.name}<br>%{text}<br>(%{x}, %{y})<extra></extra>"
        chart.add_scatter(**points, marker=style.marker(8.0) | {"opacity": 0.8})
    chart.update_xaxes(title_text=wrapped(axes[0]), zeroline=True, showgrid=True)
    chart.update_yaxes(title_text=wrapped(axes[1]), zeroline=True)
    add_slider(chart, steps, highlight)
    return chart


def projections_by_layer(
    projections: Mapping[str, Float[Tensor, "_prompt layer"]],
    prompts: Prompts | None = None,
    *,
    auroc: Mapping[str, Float[Tensor, " layer"]] | None = None,
    direction: str = "refusal",
    highlight: int = 20,
    title: str | None = None,
    theme: Theme = "light",
) -> go.Figure:
    """Projections of the prompts of every set on a direction, one layer at a time.

    Every prompt is a point below its set's distribution, plotly's kernel density.

    Args:
        projections: `[prompt layer]` by set, in the units of the residual stream.
        prompts: the text of each prompt, shown shortened on hover.
        auroc: separation of two sets by the projection, `[layer]` by comparison, for the line below
            the title. 0.5 is chance.
        direction: the direction's name.
        highlight: the layer shown first; the last layer if the model has fewer.
        title, theme: the figure's title; "light" or "dark".
    """
    title, auroc = title or f"Projections on the {direction} direction", auroc or {}
    chart = figure(title, "residual-stream units", theme=theme, height=440)
    texts = _check_sets(projections, "prompt_{i} layer", prompts, auroc)
    if empty(chart, projections.values(), "set of projections"):
        return chart
    steps: list[Step] = []
    for layer in range(next(iter(projections.values())).shape[1]):
        x = [numbers(each[:, layer]) for each in projections.values()]
        areas = [f"{name} {written(float(curve[layer]), '.2f')}" for name, curve in auroc.items()]
        small = f"layer {layer}" + (f"; AUROC {', '.join(areas)}" if areas else "")
        layout = {"title.text": headed(title, small, theme), "xaxis.range": padded(chain(*x), 0.06)}
        steps.append(({"x": x}, layout))
    # A horizontal distribution for each set, the first on top.
    for name, style in styles(texts, theme).items():
        label = wrapped(name, width=22, lines=2)
        fill, line = tint(style.colour, 0.25), {"color": style.colour, "width": 1.6}
        dots = {"color": style.colour, "symbol": style.symbol, "size": 4.5}
        template = "%{text}<br>%{x}<extra>%{fullData.name}</extra>"
        points = {"y": [label] * len(texts[name]), "text": texts[name], "hovertemplate": template}
        chart.add_violin(**points, name=label, fillcolor=fill, line=line, marker=dots)
    order = [trace.name for trace in chart.data][::-1]
    chart.update_yaxes(categoryorder="array", categoryarray=order, showgrid=False)
    chart.update_yaxes(range=[-0.45, len(order) - 0.2], ticks="", ticklabelstandoff=6)
    chart.update_xaxes(title_text=f"projection on the {wrapped(direction)} direction")
    chart.update_xaxes(zeroline=True, showgrid=True)
    add_slider(chart, steps, highlight)
    return chart


def add_slider(chart: go.Figure, steps: list[Step], highlight: int) -> None:
    """Add a slider over layers; animation frames would start to play when the page opens."""
    shown = highlight if is_layer(highlight, len(steps)) else len(steps) - 1
    data, layout = steps[shown]
    moved = list(range(max(map(len, data.values()))))
    for name, values in data.items():
        for i, value in enumerate(values):
            if value is not None:
                chart.data[i][name] = value
    chart.update_layout(layout)
    moves = [
        {"method": "update", "label": str(layer), "args": [*step, moved]}
        for layer, step in enumerate(steps)
    ]
    above = {"yref": "paper", "y": 1.01, "yanchor": "bottom"}
    chart.update_layout(legend=above, margin={"t": chart.layout.margin.t + 26, "b": 110})
    chart.update_layout(sliders=[{"active": shown, "steps": moves}])


def _check_sets(
    sets: Sets, axes: str, prompts: Prompts | None, auroc: Sets | None = None
) -> dict[str, list[str]]:
    """Check that all have the same layers, and return the hover text of every prompt."""
    named = {f"set {name!r}": (v, axes.format(i=i)) for i, (name, v) in enumerate(sets.items())}
    named |= {f"AUROC of {name!r}": (curve, "layer") for name, curve in (auroc or {}).items()}
    check_tensors(**named)
    if prompts is None:
        return {name: [f"prompt {i}" for i in range(len(v))] for name, v in sets.items()}
    for name, values in sets.items():
        check_count(f"prompts of {name!r}", prompts.get(name, ()), len(values))
    return {name: [wrapped(prompt, lines=3) for prompt in prompts[name]] for name in sets}
