"""The specification curve: one number under many specifications, above their choices."""

from collections.abc import Mapping, Sequence
from typing import Any

import plotly.graph_objects as go
import torch
from jaxtyping import Float
from plotly.subplots import make_subplots
from torch import Tensor

from ..errors import check_tensors
from .text import escaped, numbers, with_minus, wrapped, written
from .theme import Style, Theme, check_count, empty, figure, palette, styles, tint

Values = Float[Tensor, " specification"]
Rows = Mapping[str, Sequence[str]]


def specification_curve(
    values: Values,
    *,
    names: Sequence[str],
    choices: Rows,
    outcomes: Rows | None = None,
    interval: tuple[Values, Values] | None = None,
    families: Sequence[str] | None = None,
    reference: int | None = None,
    quantity: str = "cosine similarity",
    title: str | None = None,
    subtitle: str = "",
    theme: Theme = "light",
) -> go.Figure:
    """One number under many specifications, sorted by size, above the choices of each.

    Args:
        values: `[specification]`. NaN values come last and are not drawn.
        names: the name of each specification.
        choices: the option of each specification, by choice. Choices without variation are hidden.
        outcomes: other results of each specification, shown above the choices.
        interval: lower and upper ends. NaN: unknown.
        families: the group of each specification, shown by colour and symbol.
        reference: the index of the specification whose value is drawn as a line.
        quantity: name of the values.
        title, subtitle, theme: the figure's title and the line below; "light" or "dark".
    """
    families, outcomes = families or [""] * len(values), outcomes or {}
    ends = [values, *(interval or ())]
    for what, row in {"names": names, "families": families, **outcomes, **choices}.items():
        check_count(f"of {what!r}", row, len(values))
    check_tensors(**{f"end {i}": (e, "specification") for i, e in enumerate(ends)})
    shown = {**outcomes, **{k: row for k, row in choices.items() if len(set(row)) > 1}}
    options = [(choice, option) for choice, row in shown.items() for option in _in_order(row)]
    heights = [260, 19 * max(len(options), 1)]
    title = title or f"{quantity} in {len(values)} specifications"
    chart = figure(title, with_minus(subtitle), theme=theme, height=sum(heights) + 160)
    make_subplots(2, 1, figure=chart, row_heights=heights, vertical_spacing=0.03)
    if empty(chart, [values], quantity):
        return chart
    drawn = styles(dict.fromkeys(families), theme)
    order = values.nan_to_num(nan=torch.inf).argsort(stable=True).tolist()
    rows = torch.stack(ends)[:, order]
    names, families = [names[i] for i in order], [families[i] for i in order]
    taken = {choice: [row[i] for i in order] for choice, row in shown.items()}
    texts = _hover_texts(names, rows, taken)
    _add_values(chart, rows, families, drawn, texts)
    colours = [drawn[family].colour for family in families]
    _add_options(chart, options, taken, outcomes, texts, colours)
    if reference is not None and values[reference].isfinite():
        value = float(values[reference])
        text = f"{wrapped(names[order.index(reference)])} <b>{written(value)}</b>"
        line = {"color": palette(theme).muted, "width": 1, "dash": "dot"}
        note = {"annotation_text": text, "annotation_position": "top left"}
        chart.add_hline(value, line=line, row=1, col=1, **note)
    chart.update_traces(mode="markers", hovertemplate="%{text}<extra></extra>")
    chart.update_xaxes(showticklabels=False, ticks="", range=[-0.7, len(order) - 0.3], matches="x")
    return chart.update_yaxes(title_text=wrapped(quantity, width=34), row=1, col=1)


def _hover_texts(names: list[str], ends: Tensor, shown: Rows) -> list[str]:
    texts = []
    for i, name in enumerate(names):
        value, *interval = map(written, ends[:, i].tolist())
        number = value + (f", interval {' to '.join(interval)}" if interval else "")
        chosen = [with_minus(f"{escaped(a)}: {escaped(row[i])}") for a, row in shown.items()]
        texts.append("<br>".join([f"<b>{escaped(name)}</b>", number, *chosen]))
    return texts


def _add_values(
    chart: go.Figure, ends: Tensor, families: list[str], drawn: dict[str, Style], texts: list[str]
) -> None:
    """Draw the values of each family, the first row of `ends`, with their intervals."""
    for family, style in drawn.items():
        at = [i for i, value in enumerate(ends[0]) if value.isfinite() and families[i] == family]
        bars: dict[str, Any] = {"color": tint(style.colour, 0.55), "thickness": 1.4, "width": 0}
        if len(ends) > 1:
            value, low, high = ends[:, at]
            bars |= {"arrayminus": numbers(value - low), "array": numbers(high - value)}
        label = {"name": wrapped(family, width=40, lines=2), "showlegend": bool(family)}
        points = {"x": at, "y": numbers(ends[0, at]), "text": [texts[i] for i in at]}
        chart.add_scatter(**points, **label, error_y=bars, marker=style.marker(7.0), row=1, col=1)


def _add_options(
    chart: go.Figure,
    options: list[tuple[str, str]],
    taken: Rows,
    outcomes: Rows,
    texts: list[str],
    colours: list[str],
) -> None:
    """Mark, in a row for each option, the specifications that take it. Outcomes are squares."""
    for y, (choice, option) in enumerate(options):
        at = [i for i, other in enumerate(taken[choice]) if other == option]
        marker: dict[str, Any] = {"symbol": "line-ns-open", "size": 11, "line": {"width": 2.4}}
        if choice in outcomes:
            marker = {"symbol": "square", "size": 8}
        marker["color"] = [colours[i] for i in at]
        points = {"x": at, "y": [y] * len(at), "text": [texts[i] for i in at]}
        chart.add_scatter(**points, marker=marker, showlegend=False, row=2, col=1)
    labels = [with_minus(f"{wrapped(a)}: {wrapped(b, width=34)}") for a, b in options]
    ticks = {"tickvals": list(range(len(labels))), "ticktext": labels, "tickfont": {"size": 11}}
    chart.update_yaxes(ticks, range=[max(len(labels), 1) - 0.4, -0.6], row=2, col=1)
    chart.update_layout(legend={"yref": "paper", "y": -0.04, "yanchor": "top"})


def _in_order(options: Sequence[str]) -> list[str]:
    """The distinct options in order of appearance, or by size if all are whole numbers."""
    found = list(dict.fromkeys(options))
    return sorted(found, key=int) if all(option.isdecimal() for option in found) else found
