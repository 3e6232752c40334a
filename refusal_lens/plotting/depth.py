"""Figures across depth, and the builders they share: curves, shaded bands, marked layers."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import Any, TypeVar, cast

import plotly.graph_objects as go
from jaxtyping import Float
from torch import Tensor

from ..errors import InputError, check_tensors
from .text import numbers, wrapped, written
from .theme import Style, Theme, empty, figure, is_layer, layer_axis, padded, palette, styles, tint

Values = Float[Tensor, " _layer"]
Curves = Values | Mapping[str, Values]
Band = tuple[Values, Values]
Bands = Band | Mapping[str, Band]
T = TypeVar("T")

PLOT_HEIGHT = 220  # pixels of the plot area at the default height; 160 on a phone


@dataclass(frozen=True)
class Curve:
    """A curve across depth with its style, number format, and the bands shown on hover."""

    name: str
    values: Tensor
    style: Style
    form: str = ".3f"
    bands: dict[str, Band] = field(default_factory=dict)


def cosine_by_layer(
    cosine: Curves,
    *,
    highlight: int | None = 20,
    interval: Bands | None = None,
    band: Bands | None = None,
    null: Bands | None = None,
    ceiling: Values | None = None,
    unbiased: Values | None = None,
    strongest: int | None = None,
    confidence: float = 0.95,
    title: str = "Cosine similarity of the two directions across depth",
    theme: Theme = "light",
) -> go.Figure:
    """Cosine similarity across depth, with its uncertainty.

    Curves may differ in depth. A name that holds a concept ("refusal vs alarm") gets the concept's
    colour. NaN is a gap.

    Args:
        cosine: `[layer]`, or a mapping from names to such curves.
        highlight: the layer marked on every curve that reaches it, with the curve's value.
        interval, band: lower and upper ends, pointwise and for all layers at once, by curve name.
            A bare pair belongs to the first curve. Ends beyond +-1, which a cosine can't be, are cut.
        null: range of the first curve under permuted labels.
        ceiling: the largest cosine that the reliability of the first curve's directions permits.
        unbiased: the first curve's estimate corrected for noise.
        strongest: the layer with the largest causal effect, marked with a line.
        confidence: the level in the labels of the ranges.
        title, theme: the figure's title; "light" or "dark".
    """
    curves = named_curves(cosine, "cosine similarity", theme)
    level = f"{100 * confidence:g} %"
    shades = {f"shaded: {level} intervals": interval, "lighter: for all layers at once": band}
    shades["grey: permuted labels"] = null
    meant = "".join(f"; {meaning}" for meaning, ends in shades.items() if ends)
    subtitle = f"1 same direction, 0 orthogonal, \N{MINUS SIGN}1 opposite{meant}"
    chart = figure(title, subtitle, theme=theme)
    if empty(chart, [curve.values for curve in curves], "cosine similarity"):
        return chart
    first, concepts = curves[0], palette(theme).concepts
    grey, dotted = concepts["null"].colour, Style(first.style.colour, "dot", "circle-open")
    add_bands(chart, f"permutation null, {level}", null, curves, 0.22, grey, largest=1.0)
    add_bands(chart, f"{level} simultaneous band", band, curves, 0.14, largest=1.0)
    add_bands(chart, f"{level} interval", interval, curves, 0.28, largest=1.0)
    estimates = {"noise ceiling": (ceiling, concepts["ceiling"])}
    for label, (values, style) in (estimates | {"corrected for noise": (unbiased, dotted)}).items():
        if values is not None:
            whose = {f"curve {first.name!r}": (first.values, "layer")}
            check_tensors(**whose, **{label: (values, "layer")})
            options = {"legendrank": 950, "showlegend": values is ceiling or len(curves) < 4}
            add_curve(chart, Curve(label, values.clamp(-1, 1), style), width=1.6, **options)
    drawn = draw_curves(chart, curves, "cosine similarity")
    chart.update_yaxes(range=cosine_limits(drawn))
    if is_layer(strongest, len(first.values), "strongest"):
        label = f"largest causal effect: layer {strongest}"
        foot = "bottom right" if strongest < len(first.values) / 2 else "bottom left"
        mark_layer(chart, strongest, label, theme, line_dash="dot", annotation_position=foot)
    mark_highlight(chart, curves, highlight, theme)
    return chart


def log_odds_by_ablated_layer(
    log_odds: Curves,
    *,
    without: float | Mapping[str, float] | None = None,
    interval: Bands | None = None,
    highlight: int | None = 20,
    confidence: float = 0.95,
    title: str = "Refusal log-odds while one layer's direction is ablated",
    theme: Theme = "light",
) -> go.Figure:
    """Refusal log-odds while the direction of one layer is ablated, against that layer.

    Args:
        log_odds: `[layer]` in nats, or a mapping from names to such curves. 0 is even odds.
        without: log-odds of the unmodified model by curve name. A number is the first curve's.
        interval: lower and upper pointwise ends by curve name. A bare pair is the first curve's.
        highlight: the layer marked on every curve, with the curve's value.
        confidence: the level in the label of the interval.
        title, theme: the figure's title; "light" or "dark".
    """
    curves = named_curves(log_odds, "refusal log-odds", theme, ".2f")
    label = f"{100 * confidence:g} % interval"
    subtitle = "above 0 the refusal tokens are likelier than all others together"
    subtitle += "; dotted: nothing ablated" if without is not None else ""
    subtitle += f"; shaded: {label}" if interval else ""
    chart = figure(title, subtitle, theme=theme)
    if empty(chart, [curve.values for curve in curves], "refusal log-odds"):
        return chart
    add_bands(chart, label, interval, curves, 0.22)
    drawn = draw_curves(chart, curves, "refusal log-odds (nats)")
    levels = by_curve("without", {} if without is None else without, curves)
    for curve in [curve for curve in curves if curve.name in levels]:
        line = {"color": curve.style.colour, "dash": "1px,3px", "width": 2}
        chart.add_hline(y=levels[curve.name], line=line)
    chart.update_xaxes(title_text="layer whose direction is ablated")
    chart.update_yaxes(range=padded([*drawn, *levels.values()], 0.08))
    mark_highlight(chart, curves, highlight, theme)
    return chart


def norms_by_layer(
    norms: Curves,
    *,
    highlight: int | None = 20,
    title: str = "Norms of the directions and of the residual stream across depth",
    theme: Theme = "light",
) -> go.Figure:
    """Norms of directions and of the residual stream across depth, on a log axis.

    Args:
        norms: `[layer]`, or a mapping from names to such curves. 0 and NaN are gaps.
        highlight: the layer marked with a line.
        title, theme: the figure's title; "light" or "dark".
    """
    curves = named_curves(norms, "norm", theme, ".3g")
    for curve in curves:
        if (curve.values < 0).any():
            raise InputError(f"the norms {curve.name!r} go below 0: give norms, not logarithms")
    chart = figure(title, "in the units of the residual stream", theme=theme)
    if empty(chart, [curve.values for curve in curves], "norm"):
        return chart
    positive = [replace(c, values=c.values.where(c.values > 0, math.nan)) for c in curves]
    drawn = draw_curves(chart, positive, "Euclidean norm (log scale)")
    powers = [math.log10(value) for value in drawn] or [0.0]
    low, high = math.floor(min(powers)), math.ceil(max(powers))
    axis = {"type": "log", "dtick": max(1, (high - low) // 8), "exponentformat": "power"}
    chart.update_yaxes(axis, zeroline=False, range=(low - 0.1, max(high, low + 1) + 0.1))
    if is_layer(highlight, max(len(curve.values) for curve in curves)):
        mark_layer(chart, highlight, f"layer {highlight}", theme)
    return chart


def dose_response(
    shares: Mapping[str, Values],
    kl: Mapping[str, Values],
    *,
    interval: Bands | None = None,
    title: str = "Share of prompts refused with growing doses of a direction",
    theme: Theme = "light",
) -> go.Figure:
    """The share of prompts refused over the next-token KL on harmless prompts, on a log axis.

    Args:
        shares, kl: `[dose]` by direction; KL in nats.
        interval, title, theme: as for `cosine_by_layer`.
    """
    curves = named_curves(shares, "share refused", theme, ".2f")
    for name, values in shares.items():
        check_tensors(**{f"curve {name!r}": (values, "dose"), "its KL": (kl.get(name), "dose")})
    chart = figure(title, "shaded: 95 % intervals, and 95 % of random directions", theme=theme)
    if empty(chart, [curve.values for curve in curves], "share refused"):
        return chart
    add_bands(chart, "95 %", interval, curves, 0.2)
    draw_curves(chart, curves, "share of prompts refused")
    shaded = [curve for curve in curves if curve.bands]
    for trace, curve in zip(cast(Any, chart.data), [*shaded, *curves], strict=True):
        costs = numbers(kl[curve.name])
        trace.x = [None if i is None else costs[i] for i in trace.x]
    axis = {"type": "log", "range": (-3, 1.3), "dtick": 1, "unifiedhovertitle": None}
    chart.update_xaxes(axis, title_text="next-token KL on harmless prompts (nats)")
    return chart.update_layout(hovermode="closest", yaxis_range=(-0.04, 1.04))


def cosine_limits(values: list[float]) -> tuple[float, float]:
    """Axis limits in whole quarters, so that figures of different runs compare by eye."""
    low = min([-0.25, *((v - 0.02) // 0.25 / 4 for v in values)])
    high = max([0.5, *(-((-v - 0.02) // 0.25) / 4 for v in values)])
    return max(-1.0, low) - 0.04, min(1.0, high) + 0.04


def named_curves(curves: Curves, quantity: str, theme: Theme, form: str = ".3f") -> list[Curve]:
    """Check curves and give each a style. A bare curve is named after its quantity."""
    named = dict(curves) if isinstance(curves, Mapping) else {quantity: curves}
    for name, values in named.items():
        check_tensors(**{f"curve {name!r}": (values, "layer")})
    drawn = styles(named, theme)
    return [Curve(name, values.detach(), drawn[name], form) for name, values in named.items()]


def by_curve(what: str, values: T | Mapping[str, T], curves: Sequence[Curve]) -> dict[str, T]:
    """Values by curve name. A bare value belongs to the first curve."""
    named = dict(values) if isinstance(values, Mapping) else {curves[0].name: values}
    if unknown := set(named) - {curve.name for curve in curves}:
        raise InputError(f"{what} names no curve: {sorted(unknown)}")
    return named


def add_bands(
    chart: go.Figure,
    label: str,
    bands: Bands | None,
    curves: Sequence[Curve],
    opacity: float,
    colour: str | None = None,
    largest: float = math.inf,
) -> None:
    """Shade from lower to upper ends, cut at +-`largest`. The subtitle explains bands, no legend."""
    named = by_curve(f"the {label}", bands or {}, curves)
    for curve in [curve for curve in curves if curve.name in named]:
        ends = named[curve.name]
        whose = {f"curve {curve.name!r}": (curve.values, "layer")}
        for end in ends:
            check_tensors(**whose, **{f"its {label}": (end, "layer")})
        lower, upper = (end.clamp(-largest, largest) for end in ends)
        curve.bands[label] = lower, upper
        low, high = numbers(lower), numbers(upper)
        known = [None not in pair for pair in zip(low, high, strict=True)]
        x: list[int | None] = []
        y: list[float | None] = []
        for is_known, run in groupby(range(len(known)), key=known.__getitem__):
            if is_known:  # one polygon for each run of layers at which both ends are known
                at = list(run)
                x += [*at, *at[::-1], None]
                y += [*(low[i] for i in at), *(high[i] for i in at[::-1]), None]
        shade = colour or curve.style.colour
        name = wrapped(f"{curve.name}: {label}" if len(curves) > 1 else label, lines=2)
        area = {"fill": "toself", "fillcolor": tint(shade, opacity), "mode": "lines"}
        line = {"color": tint(shade, 2 * opacity), "width": 1}
        silent = {"hoverinfo": "skip", "showlegend": False}
        chart.add_scatter(x=x[:-1], y=y[:-1], name=name, line=line, **area, **silent)


def add_curve(chart: go.Figure, curve: Curve, *, width: float = 2.4, **trace: Any) -> None:
    """Draw a curve with gaps at NaN. Hovering over a layer shows its value and bands."""
    text = [f"<b>{written(value, curve.form)}</b>" for value in numbers(curve.values)]
    for label, ends in curve.bands.items():
        for i, pair in enumerate(zip(*map(numbers, ends), strict=True)):
            low, high = (written(end, curve.form) for end in pair)
            text[i] += f"<br>  {label}: {low} to {high}"
    shown = {"legendrank": 900, "mode": "lines+markers" if len(text) <= 40 else "lines"} | trace
    hover = {"text": text, "hovertemplate": "%{fullData.name}: %{text}<extra></extra>"}
    line = {"color": curve.style.colour, "dash": curve.style.dash, "width": width}
    name, marker = wrapped(curve.name, width=40, lines=2), curve.style.marker(5.5)
    x, y = list(range(len(text))), numbers(curve.values)
    chart.add_scatter(x=x, y=y, name=name, line=line, marker=marker, **hover, **shown)


def draw_curves(chart: go.Figure, curves: Sequence[Curve], quantity: str) -> list[float]:
    """Draw curves, set the axes, and return every y value of the figure."""
    for curve in curves:
        add_curve(chart, curve)
    chart.update_xaxes(layer_axis(max(len(curve.values) for curve in curves)))
    chart.update_yaxes(title_text=quantity, zeroline=True)
    chart.update_layout(hovermode="x unified")  # one box lists all curves at a layer
    return [y for trace in cast(Any, chart.data) for y in trace.y if y is not None]


def mark_layer(chart: go.Figure, layer: int, label: str, theme: Theme, **line: Any) -> None:
    """Draw a vertical line at a layer, with a label above the plot."""
    page = palette(theme)
    note = {"text": label, "font_color": page.muted, "bgcolor": page.background}
    options = {"layer": "below", "annotation": note, "annotation_position": "top"} | line
    chart.add_vline(layer, line={"color": tint(page.muted, 0.6), "width": 1.2}, **options)


def mark_highlight(
    chart: go.Figure, curves: Sequence[Curve], layer: int | None, theme: Theme
) -> None:
    """Mark a layer with a line, and every curve with a dot and its value, in their order."""
    depth, page = max(len(curve.values) for curve in curves), palette(theme)
    if not is_layer(layer, depth):
        return
    at_layer = [(float(c.values[layer]), c) for c in curves if layer < len(c.values)]
    known = sorted([at for at in at_layer if math.isfinite(at[0])], key=lambda at: -at[0])
    mark_layer(chart, layer, f"layer {layer}" + ("" if known else ": undefined"), theme)
    low, high = chart.layout.yaxis.range
    ceiling, floor = PLOT_HEIGHT - 14, 28 * len(known) - 14
    for value, curve in known:
        at_curve = PLOT_HEIGHT * (value - low) / (high - low)
        height = max(floor, min(at_curve + 24, ceiling))
        ceiling, floor = height - 28, floor - 28
        # In the units of the axis labels keep their order at any size of the figure.
        text, ax = f"<b>{written(value, curve.form)}</b>", 34 if layer < 0.85 * depth else -34
        end = {"ax": ax, "ayref": "y", "ay": low + height * (high - low) / PLOT_HEIGHT}
        box = {"bgcolor": page.background, "bordercolor": curve.style.colour, "borderpad": 2}
        chart.add_annotation(x=layer, y=value, text=text, **end, **box)
