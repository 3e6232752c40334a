"""The specification curve: one number under many specifications, above their choices."""

from collections.abc import Mapping, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any

import plotly.graph_objects as go
import torch
from plotly.subplots import make_subplots

from ..errors import InputError
from .text import escaped, numbers, with_minus, wrapped, written
from .theme import Style, Theme, empty, figure, palette, styles, tint

if TYPE_CHECKING:
    import pandas as pd


def specification_curve(
    table: "pd.DataFrame",
    choices: Sequence[str],
    *,
    outcomes: Sequence[str] = (),
    reference: str | None = None,
    quantity: str = "cosine similarity",
    title: str | None = None,
    subtitle: str = "",
    theme: Theme = "light",
) -> go.Figure:
    """One number under many specifications, sorted by size, above the choices of each.

    Args:
        table: a row for each specification, with the columns "specification" (its name), "family"
            (shown by colour and symbol), "value", "lower" and "upper" (the ends of the value's
            interval; NaN: unknown). Rows whose value is NaN come last and are not drawn.
        choices, outcomes: columns of the table. Outcomes stand above the choices, of which those
            without variation are hidden.
        reference: the specification whose value is drawn as a line.
        quantity: name of the values.
        title, subtitle, theme: the figure's title and the line below; "light" or "dark".
    """
    columns = ("specification", "family", "value", "lower", "upper", *outcomes, *choices)
    if missing := [name for name in columns if name not in table]:
        raise InputError(f"the table has no column {missing[0]!r}: hand over one with {columns}")
    shown = [*outcomes, *(name for name in choices if table[name].nunique() > 1)]
    options = [(name, option) for name in shown for option in _in_order(table[name])]
    heights = [260, 19 * max(len(options), 1)]
    title = title or f"{quantity} in {len(table)} specifications"
    chart = figure(title, with_minus(subtitle), theme=theme, height=sum(heights) + 160)
    make_subplots(2, 1, figure=chart, row_heights=heights, vertical_spacing=0.03)
    if empty(chart, [torch.tensor(table["value"].to_numpy())], quantity):
        return chart
    drawn = styles(table["family"].unique(), theme)
    table = table.sort_values("value", kind="stable", ignore_index=True)
    table["text"] = [_hover_text(row, shown) for row in table.to_dict("records")]
    for family, style in drawn.items():
        rows = table[table["family"] == family].dropna(subset="value")
        _add_values(chart, family, rows, style)
    table["colour"] = [drawn[family].colour for family in table["family"]]
    for y, (name, option) in enumerate(options):
        _add_option(chart, table[table[name] == option], y, is_outcome=name in outcomes)
    labels = [with_minus(f"{wrapped(a)}: {wrapped(b, width=34)}") for a, b in options]
    ticks = {"tickvals": list(range(len(labels))), "ticktext": labels, "tickfont": {"size": 11}}
    chart.update_yaxes(ticks, range=[max(len(labels), 1) - 0.4, -0.6], row=2, col=1)
    chart.update_layout(legend={"yref": "paper", "y": -0.04, "yanchor": "top"})
    for value in table["value"][table["specification"] == reference].dropna():
        text = f"{wrapped(str(reference))} <b>{written(value)}</b>"
        line = {"color": palette(theme).muted, "width": 1, "dash": "dot"}
        note = {"annotation_text": text, "annotation_position": "top left"}
        chart.add_hline(value, line=line, row=1, col=1, **note)
    chart.update_traces(mode="markers", hovertemplate="%{text}<extra></extra>")
    chart.update_xaxes(showticklabels=False, ticks="", range=[-0.7, len(table) - 0.3], matches="x")
    return chart.update_yaxes(title_text=wrapped(quantity, width=34), row=1, col=1)


def _hover_text(row: dict[str, Any], shown: Sequence[str]) -> str:
    value, *interval = (written(row[name]) for name in ("value", "lower", "upper"))
    chosen = [with_minus(f"{escaped(name)}: {escaped(row[name])}") for name in shown]
    number = f"{value}, interval {' to '.join(interval)}"
    return "<br>".join([f"<b>{escaped(row['specification'])}</b>", number, *chosen])


def _add_values(chart: go.Figure, family: str, rows: "pd.DataFrame", style: Style) -> None:
    """Draw the values of one family with their intervals."""
    value, low, high = (torch.tensor(rows[name].to_numpy()) for name in ("value", "lower", "upper"))
    bars: dict[str, Any] = {"color": tint(style.colour, 0.55), "thickness": 1.4, "width": 0}
    bars |= {"arrayminus": numbers(value - low), "array": numbers(high - value)}
    label = {"name": wrapped(family, width=40, lines=2), "showlegend": bool(family)}
    points = {"x": list(rows.index), "y": numbers(value), "text": list(rows["text"])}
    chart.add_scatter(**points, **label, error_y=bars, marker=style.marker(7.0), row=1, col=1)


def _add_option(chart: go.Figure, rows: "pd.DataFrame", y: int, *, is_outcome: bool) -> None:
    """Mark the specifications that take an option, or that have an outcome, by squares."""
    marker: dict[str, Any] = {"symbol": "line-ns-open", "size": 11, "line": {"width": 2.4}}
    if is_outcome:
        marker = {"symbol": "square", "size": 8}
    marker["color"] = list(rows["colour"])
    points = {"x": list(rows.index), "y": [y] * len(rows), "text": list(rows["text"])}
    chart.add_scatter(**points, marker=marker, showlegend=False, row=2, col=1)


def _in_order(options: Any) -> list[str]:
    """The distinct options in order of appearance, or by size if all are whole numbers."""
    found = list(dict.fromkeys(options))
    return sorted(found, key=int) if all(option.isdecimal() for option in found) else found


def intervals_by_name(
    values: Mapping[str, Mapping[str, Sequence[float]]],
    *,
    quantity: str = "true cosine with refusal",
    title: str = "Concepts in several models",
    theme: Theme = "light",
) -> go.Figure:
    """Numbers with their intervals: a row a name (a concept, say), a colour a group (a model, say).

    Args:
        values: by group and name, a number and the ends of its interval; NaN is not drawn.
        quantity, title: name of the numbers, with the unit, and the figure's title.
    """
    names = [*dict.fromkeys(chain(*values.values()))]
    height = 190 + max(30, 12 * len(values)) * len(names)
    chart = figure(title, quantity, theme=theme, height=height)
    cells = {group: torch.tensor([*each.values()]) for group, each in values.items()}
    if wrong := [group for group, each in cells.items() if each.numel() and each.shape[1:] != (3,)]:
        raise InputError(f"values of {wrong[0]} are no intervals: give a number and its two ends")
    if empty(chart, cells.values(), quantity):
        return chart
    for i, (group, style) in enumerate(styles(values, theme).items()):
        (value, lower, upper), here = cells[group].T, values[group]
        ends = {"array": numbers(upper - value), "arrayminus": numbers(value - lower), "width": 0}
        offset = 0.7 * ((i + 0.5) / len(values) - 0.5)
        points: Any = {"x": numbers(value), "y": [names.index(name) + offset for name in here]}
        points |= {"text": [wrapped(name) for name in here], "mode": "markers", "error_x": ends}
        points |= {"name": wrapped(group, width=40, lines=2), "marker": style.marker(8.0)}
        points |= {"customdata": numbers(torch.stack([lower, upper], -1), digits=2)}
        hover = "%{text}<br><b>%{x}</b>, %{customdata[0]} to %{customdata[1]}"
        chart.add_scatter(**points, hovertemplate=hover + "<extra>%{fullData.name}</extra>")
    chart.update_yaxes(ticktext=[wrapped(name, width=22, lines=1) for name in names])
    chart.update_yaxes(tickvals=[*range(len(names))], range=[len(names) - 0.5, -0.5])
    return chart.update_xaxes(title_text=wrapped(quantity), zeroline=True, showgrid=True)
