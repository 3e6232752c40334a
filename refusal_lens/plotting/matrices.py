"""Heatmaps: layer by layer, position by layer, intervention by outcome."""

from collections.abc import Sequence

import plotly.graph_objects as go
from jaxtyping import Float
from torch import Tensor

from ..errors import InputError, check_tensors
from .curves import check_layer
from .look import (
    NO_TICKS,
    Theme,
    escaped,
    figure,
    layer_axis,
    look,
    mixed,
    nothing_to_show,
    numbers,
    readable_on,
    wrapped,
    written,
)


def cosine_matrix(
    matrix: Float[Tensor, "layer_a layer_b"],
    *,
    names: tuple[str, str] = ("first", "second"),
    highlight: int | None = 20,
    title: str | None = None,
    theme: Theme = "light",
) -> go.Figure:
    """Cosine of every layer of one direction with every layer of another, or of itself.

    Args:
        matrix: `[layer_a layer_b]`; NaN cells stay empty.
        names: of the directions along the rows and the columns.
        highlight: the layer whose cell with itself is outlined, where the matrix reaches it.
        title: replaces the standard one.
        theme: "light" or "dark".

    Raises:
        InputError: for a negative layer.
    """
    check_tensors(matrix=(matrix, "layer_a layer_b"))
    rows, columns = names
    both = f"{rows} direction" if rows == columns else f"{rows} and {columns} directions"
    chart = figure(
        title or f"Cosine similarity between layers: {both}",
        theme=theme,
        subtitle="1 same direction, 0 orthogonal, \N{MINUS SIGN}1 opposite; empty: undefined",
        height=600,
    )
    check_layer("highlight", highlight)
    if reason := _why_empty(matrix, "No layers: the cosine matrix handed over is empty."):
        return nothing_to_show(chart, reason)
    n_rows, n_columns = matrix.shape
    _heatmap(
        chart,
        matrix,
        limits=(-1.0, 1.0),
        quantity="cosine",
        hover=f"{escaped(rows)} at layer %{{y}}<br>{escaped(columns)} at layer %{{x}}"
        "<br>cosine <b>%{z:.3f}</b>",
        theme=theme,
    )
    chart.update_xaxes(
        **layer_axis(n_columns), title_text=f"layer of the {wrapped(columns)} direction"
    )
    chart.update_yaxes(**layer_axis(n_rows), title_text=f"layer of the {wrapped(rows)} direction")
    for update, length in ((chart.update_xaxes, n_columns), (chart.update_yaxes, n_rows)):
        update(range=[-0.5, length - 0.5], constrain="domain")
    chart.update_yaxes(scaleanchor="x")
    if highlight is not None and highlight < min(matrix.shape):
        _outline(chart, highlight, highlight)
        chart.add_annotation(
            text=f"layer {highlight}: <b>{written(float(matrix[highlight, highlight]))}</b>",
            x=highlight,
            y=highlight,
            ax=-44 if highlight > n_columns / 2 else 44,
            ay=-30,
            bgcolor=look(theme).background,
            bordercolor=look(theme).ink,
            borderpad=2,
            arrowcolor=look(theme).ink,
        )
    return chart


def position_by_layer(
    values: Float[Tensor, "pos layer"],
    *,
    positions: Sequence[int | str] | None = None,
    quantity: str = "cosine similarity",
    limits: tuple[float, float] | None = None,
    selected: tuple[int, int] | None = None,
    title: str | None = None,
    theme: Theme = "light",
) -> go.Figure:
    """Some quantity at every position and layer, as a heatmap.

    Args:
        values: `[pos layer]`; NaN cells stay empty.
        positions: the positions' names, numbers from the end or tokens; standard is -n to -1.
        quantity: what the values are, with its unit.
        limits: the ends of the colour scale. Standard: the values' own, around 0 where they have
            both signs.
        selected: the (row, layer) outlined.
        title: replaces the standard one.
        theme: "light" or "dark".

    Raises:
        InputError: unless there is one name per position and the outlined cell exists.
    """
    check_tensors(values=(values, "pos layer"))
    n_positions, n_layers = values.shape
    positions = range(-n_positions, 0) if positions is None else positions
    if len(positions) != n_positions:
        raise InputError(f"{len(positions)} positions named, {n_positions} in the values")
    chart = figure(
        title or f"{quantity[:1].upper()}{quantity[1:]} by position and layer",
        theme=theme,
        subtitle="positions count from the end of the formatted prompt, \N{MINUS SIGN}1 the last",
        height=max(300, min(620, 190 + 34 * n_positions)),
    )
    if reason := _why_empty(values, "No positions or no layers: nothing was handed over."):
        return nothing_to_show(chart, reason)
    if selected and not (0 <= selected[0] < n_positions and 0 <= selected[1] < n_layers):
        raise InputError(f"selected={selected} lies outside {n_positions} rows x {n_layers} layers")
    names = [_position(position) for position in positions]
    _heatmap(
        chart,
        values,
        limits=limits or _limits(values),
        quantity=quantity,
        hover="position %{text}, layer %{x}<br><b>%{z:.4~g}</b>",
        theme=theme,
        text=[[name] * n_layers for name in names],
    )
    chart.update_xaxes(**layer_axis(n_layers))
    chart.update_xaxes(range=[-0.5, n_layers - 0.5])
    chart.update_yaxes(
        title_text="position",
        tickvals=list(range(n_positions)),
        ticktext=names,
        range=[n_positions - 0.5, -0.5],
    )
    if selected:
        _outline(chart, *selected)
    return chart


def cross_effects(
    effects: Float[Tensor, "intervention outcome"],
    *,
    interventions: Sequence[str],
    outcomes: Sequence[str],
    interval: tuple[Float[Tensor, "intervention outcome"], Float[Tensor, "intervention outcome"]]
    | None = None,
    quantity: str = "change in log-odds (nats)",
    form: str = ".1f",
    title: str | None = None,
    theme: Theme = "light",
) -> go.Figure:
    """What each intervention does to each outcome, as a heatmap that carries its numbers.

    A row is an intervention ("ablate refusal"), a column what was read ("refusal of harmful
    prompts"); `interval` holds the lower and upper ends, written below each effect. NaN: not
    measured.

    Raises:
        InputError: unless there is one name per row and column.
    """
    check_tensors(effects=(effects, "intervention outcome"))
    for end in interval or ():
        check_tensors(effects=(effects, "row column"), interval=(end, "row column"))
    if (len(interventions), len(outcomes)) != tuple(effects.shape):
        raise InputError(
            f"{len(interventions)} interventions and {len(outcomes)} outcomes are named, "
            f"the effects are {' x '.join(map(str, effects.shape))}"
        )
    chart = figure(
        title or "What each intervention does to each outcome",
        theme=theme,
        subtitle=quantity + (", with its interval" if interval else ""),
        height=190 + 56 * max(len(interventions), 2),
    )
    if reason := _why_empty(effects, "No intervention was made, or no outcome read."):
        return nothing_to_show(chart, reason)
    limits = _limits(effects, signed=True)
    _heatmap(
        chart,
        effects,
        limits=limits,
        quantity=quantity,
        hover="%{text}<br><b>%{z:.3f}</b>",
        theme=theme,
        text=[
            [f"{wrapped(row)}<br>on {wrapped(column)}" for column in outcomes]
            for row in interventions
        ],
    )
    ends = [numbers(end) for end in interval] if interval else None
    cells = []
    for i, row in enumerate(numbers(effects)):
        for j, value in enumerate(row):
            text = "not measured" if value is None else f"<b>{written(value, form)}</b>"
            if ends and value is not None:
                low, high = (written(end[i][j], form) for end in ends)
                text += f'<br><span style="font-size:11px">{low} to {high}</span>'
            share = 0.5 if value is None else (value - limits[0]) / (limits[1] - limits[0])
            on_cell = readable_on(mixed(look(theme).signed, share))
            colour = look(theme).muted if value is None else on_cell
            cells.append(
                {"text": text, "x": j, "y": i, "showarrow": False, "font": {"color": colour}}
            )
    chart.update_layout(annotations=cells)
    for update, names, width in (
        (chart.update_xaxes, outcomes, max(11, 56 // len(outcomes))),
        (chart.update_yaxes, interventions, 22),
    ):
        update(
            tickvals=list(range(len(names))),
            ticktext=[wrapped(name, width=width, lines=3) for name in names],
            showline=False,
            **NO_TICKS,
        )
    chart.update_xaxes(side="bottom", range=[-0.5, len(outcomes) - 0.5], tickangle=0)
    chart.update_yaxes(range=[len(interventions) - 0.5, -0.5])
    return chart


def _heatmap(
    chart: go.Figure,
    values: Tensor,
    *,
    limits: tuple[float, float],
    quantity: str,
    hover: str,
    theme: Theme,
    text: list[list[str]] | None = None,
) -> None:
    page = look(theme)
    colours = page.signed if limits[0] < 0 < limits[1] else page.unsigned
    chart.add_heatmap(
        z=numbers(values, digits=3),
        zmin=limits[0],
        zmax=limits[1],
        colorscale=[[i / (len(colours) - 1), colour] for i, colour in enumerate(colours)],
        text=text,
        hovertemplate=hover + "<extra></extra>",
        hoverongaps=False,
        colorbar={
            "title": {
                "text": wrapped(quantity, width=34, lines=2),
                "side": "right",
                "font": {"size": 12},
            },
            "thickness": 12,
            "outlinewidth": 0,
            "ticks": "outside",
            "tickcolor": page.muted,
        },
    )
    chart.update_xaxes(showgrid=False)
    chart.update_yaxes(showgrid=False)


def _why_empty(values: Tensor, none: str) -> str | None:
    if values.numel() == 0:
        return none
    return None if values.isfinite().any() else "Nothing to draw: every value is undefined (NaN)."


def _limits(values: Tensor, *, signed: bool = False) -> tuple[float, float]:
    known: list[float] = [v for row in numbers(values) for v in row if v is not None]
    low, high = min(known, default=0.0), max(known, default=1.0)
    if signed or low < 0 < high:
        largest = max(-low, high) or 1.0
        return -largest, largest
    return (low, high) if low < high else (low, low + 1.0)


def _outline(chart: go.Figure, row: int, column: int) -> None:
    """A cell's outline, dark within light so that it shows on any colour."""
    for colour, width in (("#ffffff", 4), ("#000000", 1.8)):
        chart.add_shape(
            type="rect",
            x0=column - 0.5,
            x1=column + 0.5,
            y0=row - 0.5,
            y1=row + 0.5,
            line={"color": colour, "width": width},
        )


def _position(position: int | str) -> str:
    return (
        str(position).replace("-", "\N{MINUS SIGN}")
        if isinstance(position, int)
        else wrapped(position, width=20)
    )
