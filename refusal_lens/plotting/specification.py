"""The specification curve: one number in many readings, and below it what each reading chose."""

from collections.abc import Iterable, Mapping, Sequence

import plotly.graph_objects as go
from jaxtyping import Float
from plotly.subplots import make_subplots
from torch import Tensor

from ..errors import InputError, check_tensors
from .look import (
    Theme,
    escaped,
    headed,
    look,
    nothing_to_show,
    numbers,
    styles,
    template,
    tint,
    wrapped,
    written,
)

ROW = 19
"""Pixels of one row of choices."""


def specification_curve(
    values: Float[Tensor, " specification"],
    *,
    names: Sequence[str],
    choices: Mapping[str, Sequence[str]],
    outcomes: Mapping[str, Sequence[str]] | None = None,
    interval: tuple[Float[Tensor, " specification"], Float[Tensor, " specification"]] | None = None,
    families: Sequence[str] | None = None,
    reference: int | None = None,
    quantity: str = "cosine similarity",
    title: str | None = None,
    subtitle: str | None = None,
    theme: Theme = "light",
) -> go.Figure:
    """One number under many specifications, in its own order, above the choices that make each.

    Args:
        values: `[specification]`; NaN ones come last and are not drawn above.
        names: what each specification is called.
        choices: for every choice, the option that each specification takes; a choice in which all
            agree is left out.
        outcomes: what else came of each, shown above the choices in the same way, also where all
            agree.
        interval: lower and upper ends; NaN: unknown.
        families: the group of each, told by colour and symbol.
        reference: the specification whose value is drawn as a line through the others.
        quantity: what the values are.
        title: replaces the standard one.
        subtitle: what is said below it.
        theme: "light" or "dark".

    Raises:
        InputError: unless there is one name, family and option for each value.
    """
    check_tensors(values=(values, "specification"))
    n = len(values)
    families = [""] * n if families is None else families
    outcomes = outcomes or {}
    told = {"names": names, "families": families, **choices, **outcomes}
    for what, each in told.items():
        if len(each) != n:
            raise InputError(f"{len(each)} of {what!r} for {n} values: hand over one for each")
    for end in interval or ():
        if len(end) != n:
            raise InputError(f"an interval has {len(end)} ends for {n} values: give one for each")
    page = look(theme)
    heading = headed(title or f"{quantity} in {n} specifications", subtitle, theme=theme)
    top = 28 + 19 * (heading.count("<br>") + 1)
    varied = {name: options for name, options in choices.items() if len(set(options)) > 1}
    shown = {**outcomes, **varied}
    rows = [(name, option) for name, options in shown.items() for option in _in_order(options)]
    below = ROW * max(len(rows), 1)
    chart = make_subplots(
        rows=2,
        cols=1,
        shared_xaxes=True,
        vertical_spacing=0.03,
        row_heights=[260, below],
    )
    chart.update_layout(
        template=template(theme),
        title={"text": heading},
        height=top + 260 + below + 90,
        margin={"t": top},
    )
    if not n or not values.isfinite().any():
        return nothing_to_show(chart, f"Nothing to draw: the {quantity} is undefined throughout.")
    known = numbers(values)
    order = sorted(range(n), key=lambda i: (known[i] is None, known[i] or 0.0))
    place = {i: x for x, i in enumerate(order)}
    lower, upper = (numbers(end) for end in interval) if interval else ([None] * n, [None] * n)
    drawn = styles(dict.fromkeys(families), theme)
    for family, style in drawn.items():
        members = [i for i in order if families[i] == family and known[i] is not None]
        ends = [
            (upper[i] - known[i], known[i] - lower[i])
            if lower[i] is not None and upper[i] is not None
            else (0.0, 0.0)
            for i in members
        ]
        chart.add_scatter(
            x=[place[i] for i in members],
            y=[known[i] for i in members],
            error_y={
                "type": "data",
                "array": [up for up, _ in ends],
                "arrayminus": [down for _, down in ends],
                "color": tint(style.colour, 0.55),
                "thickness": 1.4,
                "width": 0,
            },
            mode="markers",
            name=wrapped(family, width=40, lines=2),
            marker={"color": style.colour, "symbol": style.symbol, "size": 7},
            showlegend=bool(family),
            text=[_told(names[i], known[i], lower[i], upper[i], shown, i) for i in members],
            hovertemplate="%{text}<extra></extra>",
            row=1,
            col=1,
        )
    for position, (choice, option) in enumerate(rows):
        taken = [i for i in order if shown[choice][i] == option]
        chart.add_scatter(
            x=[place[i] for i in taken],
            y=[position] * len(taken),
            mode="markers",
            marker={
                "color": [drawn[families[i]].colour for i in taken],
                "symbol": "square" if choice in outcomes else "line-ns-open",
                "size": 8 if choice in outcomes else 11,
                "line": {"width": 0 if choice in outcomes else 2.4},
            },
            showlegend=False,
            text=[escaped(names[i]) for i in taken],
            hovertemplate=f"%{{text}}<br>{escaped(choice)}: {escaped(option)}<extra></extra>",
            row=2,
            col=1,
        )
    if reference is not None and known[reference] is not None:
        chart.add_hline(
            y=known[reference], line={"color": page.muted, "width": 1, "dash": "dot"}, row=1, col=1
        )
        chart.add_annotation(
            text=f"{wrapped(names[reference], width=24)} <b>{written(known[reference])}</b>",
            x=place[reference],
            y=known[reference],
            ax=0,
            ay=-46,
            xref="x",
            yref="y",
            bgcolor=page.background,
            bordercolor=page.muted,
            borderpad=2,
        )
    chart.update_xaxes(showticklabels=False, ticks="", range=[-0.7, n - 0.3], showgrid=False)
    chart.update_yaxes(title_text=wrapped(quantity, width=34), row=1, col=1)
    chart.update_yaxes(
        tickvals=list(range(len(rows))),
        ticktext=[f"{wrapped(choice)}: {wrapped(option, width=34)}" for choice, option in rows],
        tickfont={"size": 11},
        range=[max(len(rows), 1) - 0.4, -0.6],
        row=2,
        col=1,
    )
    # Below the choices, not on them.
    chart.update_layout(legend={"y": -0.04, "yanchor": "top"})
    return chart


def _told(
    name: str,
    value: float | None,
    lower: float | None,
    upper: float | None,
    choices: Mapping[str, Sequence[str]],
    i: int,
) -> str:
    text = f"<b>{escaped(name)}</b><br>{written(value)}"
    if lower is not None and upper is not None:
        text += f", interval {written(lower)} to {written(upper)}"
    return text + "".join(
        f"<br>{escaped(choice)}: {escaped(options[i])}" for choice, options in choices.items()
    )


def _in_order(options: Iterable[str]) -> list[str]:
    """Each option once: as they come, or by size where all are whole numbers."""
    found = list(dict.fromkeys(options))
    return sorted(found, key=int) if all(option.isdecimal() for option in found) else found
