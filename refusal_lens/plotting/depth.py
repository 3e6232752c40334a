"""Similarity, causal effect and size across depth."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots
from torch import Tensor

from ..errors import InputError
from .curves import (
    Band,
    Bands,
    Curve,
    Curves,
    bands_by_name,
    check_layer,
    check_same_length,
    curve_styles,
    curves_by_name,
    fill,
    line,
    mark_highlight,
    mark_layer,
    mark_point,
    traces,
    why_empty,
)
from .look import (
    Style,
    Theme,
    escaped,
    figure,
    layer_axis,
    look,
    nothing_to_show,
    numbers,
    wrapped,
    written,
)


def cosine_by_layer(
    cosine: Curves,
    *,
    highlight: int | None = 20,
    interval: Bands | None = None,
    band: Bands | None = None,
    null: Band | None = None,
    ceiling: Curve | None = None,
    unbiased: Curve | None = None,
    strongest: int | None = None,
    confidence: float = 0.95,
    title: str | None = None,
    theme: Theme = "light",
) -> go.Figure:
    """Cosine similarity across depth, with what is needed to judge it.

    One curve, or several by name (controls, models, protocols; they may differ in depth). Names
    that hold one of the package's concepts ("refusal vs alarm") get that concept's colour. NaN is
    a gap.

    Args:
        cosine: `[layer]`, or a mapping from names to such.
        highlight: the layer marked on every curve and labelled with its value; left out on curves
            that end before it.
        interval: lower and upper end of the pointwise interval, by curve name; a bare pair belongs
            to the first curve.
        band: likewise, the band that covers all layers at once.
        null: range of the cosine under permuted labels.
        ceiling: the largest cosine that the directions' reliabilities let one observe.
        unbiased: the first curve's estimate corrected for noise.
        strongest: the layer where intervening acts most, marked on the first curve.
        confidence: the level the bands are labelled with.
        title: replaces the standard one.
        theme: "light" or "dark".

    Raises:
        InputError: for bands of another length or name than the curves, or a negative layer.
    """
    curves = curves_by_name(cosine)
    intervals, bands = bands_by_name(interval, curves), bands_by_name(band, curves)
    level = f"{100 * confidence:g} %"
    chart = figure(
        title or "Cosine similarity of the two directions across depth",
        theme=theme,
        subtitle="1 same direction, 0 orthogonal, \N{MINUS SIGN}1 opposite"
        + (f"; shaded: {level} intervals" if len(intervals) > 1 else ""),
    )
    check_layer("highlight", highlight)
    check_layer("strongest", strongest)
    if reason := why_empty(curves, "cosine similarity"):
        return nothing_to_show(chart, reason)
    depth = max(map(len, curves.values()))
    drawn = curve_styles(curves, theme)
    name, curve = next(iter(curves.items()))
    told: dict[str, list[tuple[str, Band]]] = {name: [] for name in curves}
    shown: list[Tensor] = list(curves.values())

    if null is not None:
        for end in null:
            check_same_length("null", end, curve)
        what = f"permutation null, {level}"
        fill(chart, null, look(theme).concepts["null"].colour, 0.22, what)
        told[name].append((what, null))
        shown += null
    for what, ranges, opacity in (
        (f"{level} simultaneous band", bands, 0.14),
        (f"{level} interval", intervals, 0.28),
    ):
        for whose, ends in ranges.items():
            label = f"{whose}: {what}" if len(curves) > 1 else what
            alone = len(ranges) == 1
            fill(chart, ends, drawn[whose].colour, opacity, label, in_legend=alone)
            told[whose].append((what, ends))
            shown += ends
    for what, extra, style in (
        ("noise ceiling", ceiling, look(theme).concepts["ceiling"]),
        ("unbiased estimate", unbiased, Style(drawn[name].colour, "dot", "circle-open")),
    ):
        if extra is not None:
            check_same_length(what, extra, curve)
            line(chart, what, extra, style, width=1.6, rank=850)
            shown.append(extra)
    for whose, values in curves.items():
        line(chart, whose or "cosine similarity", values, drawn[whose], ranges=told[whose])

    limits = cosine_limits(shown)
    _across_depth(chart, depth, "cosine similarity", range=limits, zeroline=True)
    if strongest is not None and strongest < len(curve):
        label = f"largest causal effect: layer {strongest}"
        mark_layer(chart, strongest, label, depth, theme, at_top=False)
        if (value := numbers(curve)[strongest]) is not None:
            mark_point(chart, strongest, value, theme, label)
    mark_highlight(chart, curves, drawn, highlight, limits, theme)
    return chart


def log_odds_by_ablated_layer(
    log_odds: Curves,
    *,
    without: float | Mapping[str, float] | None = None,
    interval: Bands | None = None,
    highlight: int | None = 20,
    confidence: float = 0.95,
    title: str | None = None,
    theme: Theme = "light",
) -> go.Figure:
    """Refusal log-odds while the direction of one layer is ablated, against that layer.

    Args:
        log_odds: `[layer]` in nats, or a mapping from prompt sets' names to such; 0 is even odds.
        without: the log-odds with nothing ablated, by name; a bare number belongs to the first.
        interval: lower and upper end of the pointwise interval, likewise.
        highlight: the layer marked on every curve and labelled with its value.
        confidence: the level the interval is labelled with.
        title: replaces the standard one.
        theme: "light" or "dark".

    Raises:
        InputError: for intervals of another length or name than the curves, or a negative layer.
    """
    curves = curves_by_name(log_odds)
    intervals = bands_by_name(interval, curves)
    what = f"{100 * confidence:g} % interval"
    levels = dict(without) if isinstance(without, Mapping) else {}
    if without is not None and not isinstance(without, Mapping):
        levels[next(iter(curves), "")] = without
    if unknown := set(levels) - set(curves):
        raise InputError(f"without names {sorted(unknown)}, log_odds only {sorted(curves)}")
    chart = figure(
        title or "Refusal log-odds while one layer's direction is ablated",
        theme=theme,
        subtitle="above 0 the refusal tokens are likelier than all others together"
        + ("; dotted: nothing ablated" if levels else "")
        + (f"; shaded: {what}" if intervals else ""),
    )
    check_layer("highlight", highlight)
    if reason := why_empty(curves, "refusal log-odds"):
        return nothing_to_show(chart, reason)
    depth = max(map(len, curves.values()))
    drawn = curve_styles(curves, theme)
    for whose, ends in intervals.items():
        fill(chart, ends, drawn[whose].colour, 0.22, what, in_legend=False)
    for whose, values in curves.items():
        ranges = [(what, intervals[whose])] if whose in intervals else []
        line(chart, whose or "refusal log-odds", values, drawn[whose], ranges=ranges, form=".2f")
    for whose, level in levels.items():
        chart.add_scatter(
            x=[-0.5, depth - 0.5],
            y=[level, level],
            mode="lines",
            line={"color": drawn[whose].colour, "dash": "1px,3px", "width": 2},
            name=f"{escaped(whose)}, nothing ablated".removeprefix(", "),
            showlegend=False,
            hoverinfo="skip",
        )

    tensors = [*curves.values(), *(end for pair in intervals.values() for end in pair)]
    known = [0.0, *levels.values(), *(v for t in tensors for v in numbers(t) if v is not None)]
    room = 0.08 * (max(known) - min(known) or 1.0)
    limits = (min(known) - room, max(known) + room)
    _across_depth(chart, depth, "refusal log-odds (nats)", range=limits, zeroline=True)
    chart.update_xaxes(title_text="layer whose direction is ablated")
    mark_highlight(chart, curves, drawn, highlight, limits, theme, form=".2f")
    return chart


def norms_by_layer(
    norms: Curves,
    *,
    highlight: int | None = 20,
    title: str | None = None,
    theme: Theme = "light",
) -> go.Figure:
    """Norms of directions, and of the residual stream they live in, across depth, on a log axis.

    `norms` maps names ("refusal", "negativity", "residual stream") to `[layer]` in the units of the
    residual stream. A norm of 0, like NaN, is a gap: a log axis has no place for it.

    Raises:
        InputError: for a negative norm or layer.
    """
    curves = curves_by_name(norms)
    for name, values in curves.items():
        if (values < 0).any():
            raise InputError(
                f"the norms {name!r} go below 0: hand over norms, not their logarithms"
            )
    chart = figure(
        title or "Norms of the directions and of the residual stream across depth",
        theme=theme,
        subtitle="in the units of the residual stream",
    )
    check_layer("highlight", highlight)
    if reason := why_empty(curves, "norm"):
        return nothing_to_show(chart, reason)
    depth = max(map(len, curves.values()))
    drawn = curve_styles(curves, theme)
    known = []
    for name, values in curves.items():
        positive = values.double().where(values > 0, float("nan"))
        line(chart, name or "norm", positive, drawn[name], form=".3g")
        known += [v for v in numbers(positive) if v is not None]
    _across_depth(chart, depth, "Euclidean norm (log scale)", type="log", **_log_ticks(known))
    if highlight is not None and highlight < depth:
        mark_layer(chart, highlight, f"layer {highlight}", depth, theme, at_top=True)
    return chart


def metric_panel(
    metrics: Mapping[str, Curve],
    *,
    highlight: int | None = 20,
    title: str | None = None,
    theme: Theme = "light",
) -> go.Figure:
    """One similarity under several metrics, side by side: does the answer depend on the metric?

    `metrics` maps names ("plain", "whitened", "without massive activations") to `[layer]`, all in
    [-1, 1]. Each panel also shows the others, thin, on the same scale, and says its own value at
    the highlighted layer.

    Raises:
        InputError: for metrics of different depth, or a negative layer.
    """
    curves = curves_by_name(metrics)
    names = list(curves)
    columns = 2 if len(names) in (2, 4) else max(1, min(3, len(names)))
    rows = max(1, -(-len(names) // columns))
    chart = figure(
        title or "Similarity of the two directions across depth, by metric",
        theme=theme,
        subtitle="thin: the other metrics, on the same scale",
        height=150 + 205 * rows,
    )
    check_layer("highlight", highlight)
    if reason := why_empty(curves, "similarity"):
        return nothing_to_show(chart, reason)
    depth = max(map(len, curves.values()))
    for name, values in curves.items():
        check_same_length(f"the metric {name!r}", values, curves[names[0]])
    make_subplots(
        rows,
        columns,
        figure=chart,
        shared_xaxes=True,
        shared_yaxes=True,
        horizontal_spacing=0.04,
        vertical_spacing=0.34 / rows,
    )
    for i, name in enumerate(names):
        row, col = i // columns + 1, i % columns + 1
        others = [numbers(curve) for other, curve in curves.items() if other != name]
        chart.add_scatter(
            x=[*range(depth), None] * len(others),
            y=[y for other in others for y in (*other, None)],
            mode="lines",
            line={"color": look(theme).concepts["null"].colour, "width": 1},
            opacity=0.6,
            hoverinfo="skip",
            row=row,
            col=col,
        )
        line(chart, name, curves[name], look(theme).concepts["negativity"], row=row, col=col)
        label = f"<b>{wrapped(name, width=21, lines=2)}</b>"
        if highlight is not None and highlight < depth:
            value = numbers(curves[name])[highlight]
            label += f"<br>{written(value)} at layer {highlight}"
            if value is not None:
                mark_point(
                    chart, highlight, value, theme, f"{name} at layer {highlight}", row=row, col=col
                )
        chart.add_annotation(
            text=label,
            x=0,
            xref="x domain",
            xanchor="left",
            y=1,
            yref="y domain",
            yanchor="bottom",
            align="left",
            showarrow=False,
            row=row,
            col=col,
        )
    if depth > 1:
        chart.update_traces(mode="lines", selector={"mode": "lines+markers"})
    chart.update_xaxes(**layer_axis(depth))
    chart.update_xaxes(title_text=None, dtick=2 * chart.layout.xaxis.dtick)
    chart.update_xaxes(title_text="layer", row=rows)
    for column in range((len(names) - 1) % columns + 2, columns + 1):  # nothing stands below these
        chart.update_xaxes(showticklabels=True, row=rows - 1, col=column)
    chart.update_yaxes(range=cosine_limits(list(curves.values())), zeroline=True)
    chart.update_yaxes(title_text="similarity", col=1)
    chart.update_layout(showlegend=False, margin_t=chart.layout.margin.t + 40)
    return chart


def cosine_limits(curves: list[Tensor]) -> tuple[float, float]:
    """Whole quarters around everything drawn, so that figures of different runs compare by eye."""
    values = [v for curve in curves for v in numbers(curve) if v is not None]
    low = min([-0.25, *((v - 0.02) // 0.25 / 4 for v in values)])
    high = max([0.5, *(-((-v - 0.02) // 0.25) / 4 for v in values)])
    return max(-1.0, low) - 0.04, min(1.0, high) + 0.04


def _log_ticks(values: Sequence[float]) -> dict[str, Any]:
    """Ticks of a log axis, each written out in full: plotly's own write the 2 of 20 as "2"."""
    low, high = (math.log10(end(values, default=1.0)) for end in (min, max))
    first, last = math.floor(low - 0.1), math.ceil(high + 0.1)
    leading = (1, 2, 5) if high - low < 2.5 else (1,)
    step = max(1, (last - first) // 8)
    ticks = [(lead, power) for power in range(first, last + 1, step) for lead in leading]
    return {
        "tickvals": [float(f"{lead}e{power}") for lead, power in ticks],
        "ticktext": [
            f"{float(f'{lead}e{power}'):g}"
            if -4 < power < 5
            else f"10<sup>{power}</sup>".replace("-", "\N{MINUS SIGN}").replace(
                "10<", "10<" if lead == 1 else f"{lead}\N{MULTIPLICATION SIGN}10<"
            )
            for lead, power in ticks
        ],
    }


def _across_depth(chart: go.Figure, depth: int, quantity: str, **y_axis: Any) -> None:
    chart.update_xaxes(**layer_axis(depth))
    chart.update_yaxes(title_text=quantity, **y_axis)
    named = sum(trace.showlegend is not False for trace in traces(chart))
    chart.update_layout(hovermode="x unified", showlegend=named > 1)
