"""What the figures across depth are drawn with: curves, bands, marked layers, labels."""

from collections.abc import Mapping, Sequence
from typing import Any, cast

import plotly.graph_objects as go
from jaxtyping import Float
from torch import Tensor

from ..errors import InputError, check_tensors
from .look import Style, Theme, escaped, look, numbers, styles, tint, wrapped, written

Curve = Float[Tensor, " _layer"]
Curves = Curve | Mapping[str, Curve]
Band = tuple[Curve, Curve]
Bands = Band | Mapping[str, Band]

PLOT_SIZE = (610, 300)
"""About what title, axes and legend leave of a figure of 700 x `look.HEIGHT` pixels."""


def curves_by_name(curves: Curves) -> dict[str, Tensor]:
    """Several curves as they are, one under the empty name."""
    named = dict(curves) if isinstance(curves, Mapping) else {"": curves}
    for name, curve in named.items():
        check_tensors(**{f"curve {name!r}": (curve, "layer")})
    return named


def bands_by_name(bands: Bands | None, curves: Mapping[str, Tensor]) -> dict[str, Band]:
    """Several bands as they are, one under the first curve's name; each as long as its curve."""
    if bands is None:
        return {}
    named = dict(bands) if isinstance(bands, Mapping) else {next(iter(curves), ""): bands}
    for name, ends in named.items():
        if name not in curves:
            raise InputError(f"a band is named {name!r}, the curves {sorted(curves)}")
        if len(ends) != 2:
            raise InputError(f"the band of {name!r} has {len(ends)} ends: give lower and upper")
        for end in ends:
            check_same_length(f"the band of {name!r}", end, curves[name])
    return named


def why_empty(curves: Mapping[str, Tensor], what: str) -> str | None:
    """What to say instead of a figure where there is nothing to draw."""
    if not any(len(curve) for curve in curves.values()):
        return f"No layers: no {what} was handed over."
    if not any(curve.isfinite().any() for curve in curves.values()):
        return f"Nothing to draw: the {what} is undefined (NaN) at every layer."
    return None


def curve_styles(curves: Mapping[str, Tensor], theme: Theme) -> dict[str, Style]:
    """Styles by name; the nameless curve is drawn as the one the package is about."""
    nameless = {"": look(theme).concepts["negativity"]} if "" in curves else {}
    return styles(curves, theme) | nameless


def check_layer(name: str, layer: int | None) -> None:
    """Refuse a negative layer."""
    if layer is not None and layer < 0:
        raise InputError(f"{name}={layer}: layers count from 0, at the first block's output")


def check_same_length(what: str, values: Sequence | Tensor, curve: Sequence | Tensor) -> None:
    """Refuse data whose layers are not those of the curve it belongs to."""
    if len(values) != len(curve):
        raise InputError(
            f"{what} has {len(values)} layers and its curve {len(curve)}: hand over one value each"
        )


def line(
    chart: go.Figure,
    name: str,
    curve: Tensor,
    style: Style,
    *,
    width: float = 2.4,
    ranges: Sequence[tuple[str, Band]] = (),
    form: str = ".3f",
    rank: int = 800,
    row: int | None = None,
    col: int | None = None,
) -> None:
    """A curve; hovering over a layer also tells the ranges that go with it. NaN is a gap.

    Its layers carry symbols where those have room.
    """
    values = numbers(curve)
    told = [f"<b>{written(value, form)}</b>" for value in values]
    for what, (low, high) in ranges:
        for i, ends in enumerate(zip(numbers(low), numbers(high), strict=True)):
            told[i] += f"<br>  {what}: " + " to ".join(written(end, form) for end in ends)
    chart.add_scatter(
        x=list(range(len(curve))),
        y=values,
        mode="lines+markers" if len(curve) <= 40 else "lines",
        name=wrapped(name, width=40, lines=2),
        line={"color": style.colour, "dash": style.dash, "width": width},
        marker={
            "color": style.colour,
            "symbol": style.symbol,
            "size": 5.5,
            "line": {"color": style.colour, "width": 1.2},
        },
        text=told,
        hovertemplate="%{fullData.name}: %{text}<extra></extra>",
        legendrank=rank,
        row=row,
        col=col,
    )


def fill(
    chart: go.Figure,
    ends: Band,
    colour: str,
    opacity: float,
    label: str,
    *,
    in_legend: bool = True,
) -> None:
    """A band, as one polygon for each run of layers where both its ends are known."""
    low, high = (numbers(end) for end in ends)
    runs: list[list[int]] = [[]]
    for i, pair in enumerate(zip(low, high, strict=True)):
        if None in pair:
            runs.append([])
        else:
            runs[-1].append(i)
    x: list[float | None] = []
    y: list[float | None] = []
    for run in filter(None, runs):
        there = (
            [(i, i) for i in run] if len(run) > 1 else [(run[0] + s, run[0]) for s in (-0.15, 0.15)]
        )
        x += [place for place, _ in there + there[::-1]] + [None]
        y += [low[i] for _, i in there] + [high[i] for _, i in there[::-1]] + [None]
    chart.add_scatter(
        x=x[:-1],
        y=y[:-1],
        mode="lines",
        fill="toself",
        fillcolor=tint(colour, opacity),
        line={"color": tint(colour, min(1.0, 2 * opacity)), "width": 1},
        name=wrapped(label, width=60, lines=2),
        hoverinfo="skip",
        showlegend=in_legend,
    )


def traces(chart: go.Figure) -> list[Any]:
    """The figure's traces, of whatever kind."""
    return list(cast(Any, chart.data))


def mark_layer(
    chart: go.Figure, layer: int, label: str, depth: int, theme: Theme, *, at_top: bool
) -> None:
    """A light vertical line, its label above the plot or at the plot's foot."""
    page = look(theme)
    chart.add_vline(
        x=layer,
        line={"color": tint(page.muted, 0.6), "width": 1.2, "dash": "solid" if at_top else "dot"},
        layer="below",
    )
    along = (layer + 0.5) / depth
    chart.add_annotation(
        text=label,
        x=layer,
        xref="x",
        y=1 if at_top else 0,
        yref="y domain",
        yanchor="bottom",
        xanchor="center" if at_top or 0.2 < along < 0.8 else "left" if along <= 0.2 else "right",
        yshift=0 if at_top else 3,
        showarrow=False,
        font_color=page.muted,
        bgcolor=page.background,
        borderpad=1,
    )


def mark_highlight(
    chart: go.Figure,
    curves: Mapping[str, Tensor],
    drawn: Mapping[str, Style],
    layer: int | None,
    limits: tuple[float, float],
    theme: Theme,
    *,
    form: str = ".3f",
) -> None:
    """The highlighted layer: a line, and on each curve a marked point with its value."""
    depth = max(map(len, curves.values()))
    if layer is None or layer >= depth:
        return
    mark_layer(chart, layer, f"layer {layer}", depth, theme, at_top=True)
    at = {name: numbers(c)[layer] for name, c in curves.items() if layer < len(c)}
    known = {name: value for name, value in at.items() if value is not None}
    if not known:
        chart.add_annotation(
            text="undefined here",
            x=layer,
            y=0.5,
            yref="y domain",
            showarrow=False,
            bgcolor=look(theme).background,
        )
    right = layer < 0.85 * depth
    offsets = _clear_offsets(known, list(curves.values()), layer, limits, right=right)
    for name, value in known.items():
        mark_point(chart, layer, value, theme, f"{name} at layer {layer}")
        chart.add_annotation(
            text=f"<b>{written(value, form)}</b>",
            x=layer,
            y=value,
            ax=34 if right else -34,
            ay=-offsets[name],
            xanchor="left" if right else "right",
            standoff=7,
            bgcolor=look(theme).background,
            bordercolor=drawn[name].colour,
            borderpad=2,
        )


def mark_point(
    chart: go.Figure,
    layer: int,
    value: float,
    theme: Theme,
    name: str,
    *,
    row: int | None = None,
    col: int | None = None,
) -> None:
    """A ring around one point of a curve."""
    chart.add_scatter(
        x=[layer],
        y=[value],
        mode="markers",
        showlegend=False,
        hoverinfo="skip",
        name=escaped(name.strip()),
        marker={
            "color": look(theme).ink,
            "symbol": "circle-open",
            "size": 13,
            "line": {"color": look(theme).ink, "width": 2},
        },
        row=row,
        col=col,
    )


def _clear_offsets(
    known: Mapping[str, float],
    curves: Sequence[Tensor],
    layer: int,
    limits: tuple[float, float],
    *,
    right: bool,
) -> dict[str, int]:
    """Pixels to lift each value's label by: off the curves, near its own, in their order."""
    pixel = (limits[1] - limits[0]) / PLOT_SIZE[1]
    depth = max(map(len, curves))
    reach = 1 + round(80 * depth / PLOT_SIZE[0])
    beside = slice(layer + 1, layer + 1 + reach) if right else slice(max(0, layer - reach), layer)
    drawn = [v / pixel for curve in curves for v in numbers(curve)[beside] if v is not None]
    ceiling = limits[1] / pixel + 8
    offsets: dict[str, int] = {}
    for name, value in sorted(known.items(), key=lambda item: -item[1]):
        at = value / pixel
        below = [
            lift
            for lift in (
                24,
                -24,
                0,
                *(sign * far for far in range(40, 260, 20) for sign in (1, -1)),
            )
            if limits[0] / pixel + 12 < at + lift <= ceiling - 20
        ]
        score = {
            lift: min([19.0, *(abs(at + lift - y) for y in drawn)]) - abs(lift) / 5
            for lift in below
        }
        offsets[name] = max(score, key=score.__getitem__, default=0)
        ceiling = at + offsets[name]
    return offsets
