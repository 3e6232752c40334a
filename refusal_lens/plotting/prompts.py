"""Single prompts: in a plane, and projected on a direction, with a slider over layers."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import plotly.graph_objects as go
from jaxtyping import Float
from torch import Tensor

from ..errors import InputError, check_tensors
from .curves import check_layer, check_same_length
from .look import (
    NO_TICKS,
    Theme,
    figure,
    headed,
    layer_axis,
    look,
    nothing_to_show,
    numbers,
    styles,
    tint,
    wrapped,
    written,
)

LEGEND_ABOVE = {"y": 1.01, "yanchor": "bottom"}
"""A slider has the place below the plot."""


def prompts_in_plane(
    coordinates: Mapping[str, Float[Tensor, "_prompt layer 2"]],
    prompts: Mapping[str, Sequence[str]] | None = None,
    *,
    axes: tuple[str, str] = ("along unit refusal direction", "along unit negativity direction"),
    highlight: int = 20,
    title: str | None = None,
    theme: Theme = "light",
) -> go.Figure:
    """Every prompt as a point in a plane, one layer at a time.

    The plane is whatever two numbers a prompt has at a layer: projections on two unit directions,
    or on the first two principal components (then name the `axes` so). Axes rescale with the
    layer, since the residual stream grows with depth.

    Args:
        coordinates: `[prompt layer 2]` by set ("harmful", "harmless", ...), in the units of the
            residual stream. A prompt with a NaN at a layer isn't drawn there.
        prompts: the prompts themselves, shown shortened on hover.
        axes: what the two coordinates are.
        highlight: the layer shown first; the last one where there are fewer.
        title: replaces the standard one.
        theme: "light" or "dark".

    Raises:
        InputError: for sets of different depth, prompts that don't match, or a negative layer.
    """
    title = title or "Prompts in the plane of two directions"
    small = "residual-stream units; the axes rescale with each layer"
    chart = figure(title, theme=theme, subtitle=small, height=560)
    check_layer("highlight", highlight)
    n_layers = _depth(coordinates, in_plane=True)
    if reason := _why_empty(coordinates, "coordinates"):
        return nothing_to_show(chart, reason)
    shown = min(highlight, n_layers - 1)
    drawn = styles(coordinates, theme)
    texts = _hover_texts(coordinates, prompts)
    layers = [
        [_rounded(points[:, layer]) for points in coordinates.values()] for layer in range(n_layers)
    ]
    for name, points in zip(coordinates, layers[shown], strict=True):
        chart.add_scatter(
            x=[x for x, _ in points],
            y=[y for _, y in points],
            mode="markers",
            name=wrapped(name, width=40, lines=1),
            text=texts[name],
            marker={
                "color": drawn[name].colour,
                "symbol": drawn[name].symbol,
                "size": 8,
                "opacity": 0.8,
                "line": {"color": drawn[name].colour, "width": 1.5},
            },
            hovertemplate="%{fullData.name}<br>%{text}<br>(%{x}, %{y})<extra></extra>",
        )
    steps = []
    for sets in layers:
        everything = [point for points in sets for point in points]
        ranges = [_padded([point[axis] for point in everything]) for axis in (0, 1)]
        steps.append(
            (
                {"x": [[x for x, _ in s] for s in sets], "y": [[y for _, y in s] for s in sets]},
                {"xaxis.range": ranges[0], "yaxis.range": ranges[1]},
            )
        )
    chart.update_xaxes(title_text=wrapped(axes[0]), range=steps[shown][1]["xaxis.range"])
    chart.update_yaxes(title_text=wrapped(axes[1]), range=steps[shown][1]["yaxis.range"])
    chart.update_xaxes(zeroline=True, showgrid=True).update_yaxes(zeroline=True)
    chart.update_layout(showlegend=True, legend=LEGEND_ABOVE)
    chart.update_layout(margin_t=chart.layout.margin.t + 26)
    _slider(chart, steps, shown, theme)
    return chart


def projections_by_layer(
    projections: Mapping[str, Float[Tensor, "_prompt layer"]],
    prompts: Mapping[str, Sequence[str]] | None = None,
    *,
    auroc: Mapping[str, Float[Tensor, " layer"]] | None = None,
    direction: str = "refusal",
    highlight: int = 20,
    title: str | None = None,
    theme: Theme = "light",
) -> go.Figure:
    """How far along a direction the prompts of every set lie, one layer at a time.

    Every prompt is a point beside its set's distribution (a kernel density, drawn by plotly). With
    `auroc`, its course across depth stands above and its value at the layer shown in the title.

    Args:
        projections: `[prompt layer]` by set, in the units of the residual stream.
        prompts: the prompts themselves, shown shortened on hover.
        auroc: how well the projection tells two sets apart, 0.5 to 1, by what it compares.
        direction: what is projected on.
        highlight: the layer shown first; the last one where there are fewer.
        title: replaces the standard one.
        theme: "light" or "dark".

    Raises:
        InputError: for sets of different depth, prompts that don't match, or a negative layer.
    """
    title = title or f"Projections on the {direction} direction"
    chart = figure(title, theme=theme, subtitle="residual-stream units", height=600)
    check_layer("highlight", highlight)
    n_layers = _depth(projections)
    if reason := _why_empty(projections, "projections"):
        return nothing_to_show(chart, reason)
    auroc = auroc or {}
    for name, curve in auroc.items():
        check_same_length(f"the AUROC of {name!r}", curve, projections[next(iter(projections))][0])
    shown = min(highlight, n_layers - 1)
    drawn = styles(projections, theme)
    texts = _hover_texts(projections, prompts)
    layers = [
        [_rounded(values[:, layer]) for values in projections.values()] for layer in range(n_layers)
    ]
    for name, values in zip(projections, layers[shown], strict=True):
        chart.add_violin(
            x=values,
            y=[wrapped(name, width=22, lines=2)] * len(values),
            orientation="h",
            side="positive",
            width=1.1,
            points="all",
            pointpos=-0.25,
            jitter=0.25,
            spanmode="hard",
            name=wrapped(name, width=22, lines=2),
            text=texts[name],
            hoveron="points",
            hovertemplate="%{text}<br>%{x}<extra>%{fullData.name}</extra>",
            fillcolor=tint(drawn[name].colour, 0.25),
            line={"color": drawn[name].colour, "width": 1.6},
            meanline={"visible": True},
            marker={"color": drawn[name].colour, "symbol": drawn[name].symbol, "size": 4.5},
            scalemode="width",
            showlegend=False,
        )
    chart.update_xaxes(title_text=f"projection on the {wrapped(direction)} direction")
    chart.update_xaxes(zeroline=True, showgrid=True)
    order = [wrapped(name, width=22, lines=2) for name in projections]
    chart.update_yaxes(categoryorder="array", categoryarray=order[::-1], showgrid=False)
    chart.update_yaxes(**NO_TICKS)
    chart.update_yaxes(range=[-0.45, len(order) - 0.2])
    if auroc:
        _auroc_panel(chart, auroc, n_layers, shown, theme)

    steps = []
    for layer, sets in enumerate(layers):
        known = {name: numbers(curve)[layer] for name, curve in auroc.items()}
        told = ", ".join(f"{name} {written(value, '.2f')}" for name, value in known.items())
        small = f"layer {layer}" + (f"; AUROC {told}" if told else "")
        update: dict[str, Any] = {
            "title.text": headed(title, small, theme=theme),
            "xaxis.range": _padded([value for values in sets for value in values]),
        }
        if auroc:
            update |= {"shapes[0].x0": layer, "shapes[0].x1": layer}
        steps.append(({"x": sets}, update))
    chart.update_layout(title_text=steps[shown][1]["title.text"])
    chart.update_xaxes(range=steps[shown][1]["xaxis.range"], selector={"anchor": "y"})
    _slider(chart, steps, shown, theme)
    return chart


def _auroc_panel(
    chart: go.Figure, auroc: Mapping[str, Tensor], n_layers: int, shown: int, theme: Theme
) -> None:
    """AUROC across depth above the distributions, with a line at the layer they are of."""
    page = look(theme)
    for name, style in styles(auroc, theme).items():
        chart.add_scatter(
            x=list(range(n_layers)),
            y=numbers(auroc[name]),
            mode="lines+markers" if n_layers <= 40 else "lines",
            name=wrapped(name, width=40, lines=1),
            line={"color": style.colour, "dash": style.dash, "width": 2},
            marker={"color": style.colour, "symbol": style.symbol, "size": 4.5},
            hovertemplate="%{fullData.name}, layer %{x}: <b>%{y:.3f}</b><extra></extra>",
            xaxis="x2",
            yaxis="y2",
        )
    chart.add_shape(
        type="line",
        x0=shown,
        x1=shown,
        xref="x2",
        y0=0,
        y1=1,
        yref="y2 domain",
        line={"color": page.muted, "width": 1.2},
    )
    lowest = min([0.5, *(v for c in auroc.values() for v in numbers(c) if v is not None)])
    chart.update_layout(
        xaxis={"anchor": "y"},
        yaxis={"domain": [0, 0.6]},
        xaxis2=layer_axis(n_layers) | {"anchor": "y2"},
        yaxis2={
            "anchor": "x2",
            "domain": [0.78, 1],
            "range": [lowest - 0.05, 1.05],
            "title": {"text": "AUROC"},
        },
        showlegend=True,
        legend=LEGEND_ABOVE,
        margin_t=chart.layout.margin.t + 26,
    )


def _slider(chart: go.Figure, steps: Sequence[tuple[dict, dict]], shown: int, theme: Theme) -> None:
    """A slider over layers, each step new coordinates for the traces and new ranges for the axes.

    Steps rather than animation frames: frames would start to play as the page opens.
    """
    page = look(theme)
    moved = list(range(len(next(iter(steps[0][0].values())))))
    chart.update_layout(
        margin_b=110,
        sliders=[
            {
                "active": shown,
                "steps": [
                    {"method": "update", "label": str(layer), "args": [*step, moved]}
                    for layer, step in enumerate(steps)
                ],
                "currentvalue": {"prefix": "layer ", "font": {"size": 13, "color": page.ink}},
                "font": {"size": 11, "color": page.muted},
                "bgcolor": page.grid,
                "activebgcolor": page.muted,
                "bordercolor": page.muted,
                "tickcolor": page.muted,
                "ticklen": 4,
                "minorticklen": 0,
                "pad": {"t": 44, "b": 4},
                "x": 0,
                "len": 1,
            }
        ],
    )


def _padded(values: Sequence[float | None]) -> list[float]:
    """A range around the values and 0, with room for the symbols at its ends."""
    known = [0.0, *(value for value in values if value is not None)]
    room = 0.06 * (max(known) - min(known) or 1.0)
    return [float(f"{end:.4g}") for end in (min(known) - room, max(known) + room)]


def _rounded(values: Tensor) -> list[Any]:
    """Nested lists, to a thousandth of the largest: all an eye can tell, in half the size."""
    finite = values[values.isfinite()].abs()
    largest = float(finite.max()) if len(finite) else 0.0
    decimals = 3 - math.floor(math.log10(largest)) if largest > 0 else 0

    def rounded(value: Any) -> Any:
        if isinstance(value, list):
            return [rounded(v) for v in value]
        return round(value, decimals) if math.isfinite(value) else None

    return rounded(values.detach().double().cpu().tolist())


def _why_empty(sets: Mapping[str, Tensor], what: str) -> str | None:
    if not any(values.numel() for values in sets.values()):
        return f"No prompts or no layers: no {what} were handed over."
    if not any(values.isfinite().any() for values in sets.values()):
        return f"Nothing to draw: all {what} are undefined (NaN)."
    return None


def _depth(sets: Mapping[str, Tensor], *, in_plane: bool = False) -> int:
    axes = "prompt layer 2" if in_plane else "prompt layer"
    for name, values in sets.items():
        check_tensors(**{f"the set {name!r}": (values, axes)})
        if in_plane and values.shape[2] != 2:
            raise InputError(f"the set {name!r} has shape {list(values.shape)}: give [{axes}]")
    depths = {name: values.shape[1] for name, values in sets.items()}
    if len(set(depths.values())) > 1:
        raise InputError(f"the sets differ in their number of layers: {depths}")
    return next(iter(depths.values()), 0)


def _hover_texts(
    sets: Mapping[str, Tensor], prompts: Mapping[str, Sequence[str]] | None
) -> dict[str, list[str]]:
    if prompts is None:
        return {name: [f"prompt {i}" for i in range(len(v))] for name, v in sets.items()}
    for name, values in sets.items():
        if len(prompts.get(name, ())) != len(values):
            raise InputError(
                f"{len(values)} points but {len(prompts.get(name, ()))} prompts of {name!r}: "
                "hand over each set's prompts in the order of its points"
            )
    return {name: [wrapped(prompt, lines=3) for prompt in prompts[name]] for name in sets}
