"""Heatmaps: layer by layer, position by layer, intervention by outcome."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import plotly.graph_objects as go
from jaxtyping import Float
from torch import Tensor

from ..errors import InputError, check_tensors
from .prompts import Step, add_slider
from .text import escaped, numbers, wrapped, written
from .theme import SIGNED, UNSIGNED, Theme, check_count, empty, figure, is_layer, layer_axis, styles

Cells = Float[Tensor, "intervention outcome"]

DARK_SHARE = 0.22  # share of `SIGNED`, from its lowest end, on which white text is easier to read


def cosine_matrix(
    matrix: Float[Tensor, "layer_a layer_b"],
    *,
    names: tuple[str, str] = ("first", "second"),
    highlight: int | None = 20,
    first: int = 0,
    title: str | None = None,
    theme: Theme = "light",
) -> go.Figure:
    """Cosine of every layer of one direction with every layer of another, or of itself.

    Args:
        matrix: `[layer_a layer_b]`. NaN cells stay empty.
        names: the directions along the rows and the columns.
        highlight: the layer whose diagonal cell is outlined.
        first: the layer of row and column 0; -1 where it is the embedding's output.
        title, theme: the figure's title; "light" or "dark".
    """
    check_tensors(matrix=(matrix, "layer_a layer_b"))
    a, b = names
    title = title or f"Cosine similarity between layers: {a if a == b else f'{a} and {b}'}"
    subtitle = "1 same direction, 0 orthogonal, \N{MINUS SIGN}1 opposite; empty: undefined"
    row = None if highlight is None else highlight - first
    if is_layer(row, min(matrix.shape)):
        subtitle += f"; layer {highlight}: {written(float(matrix[row, row]))}"
    chart = figure(title, subtitle, theme=theme, height=460)
    if empty(chart, [matrix], "cosine matrix"):
        return chart
    hover = f"{escaped(a)} at layer %{{y}}<br>{escaped(b)} at layer %{{x}}<br>cosine %{{z:.3f}}"
    rows, columns = (layer_axis(n) | {"constrain": "domain"} for n in matrix.shape)
    chart.update_xaxes(columns, title_text=f"layer of the {wrapped(b)} direction")
    chart.update_yaxes(rows, title_text=f"layer of the {wrapped(a)} direction", scaleanchor="x")
    _heatmap(chart, matrix, (-1.0, 1.0), "cosine", hover)
    chart.update_traces(x0=first, y0=first)
    for axis in (chart.layout.xaxis, chart.layout.yaxis):
        axis.range = [end + first for end in axis.range]
    if is_layer(row, min(matrix.shape)):
        _outline(chart, row + first, row + first)
    return chart


def concept_map(
    matrix: Float[Tensor, "3 concept concept layer"],
    names: Sequence[str],
    *,
    places: Float[Tensor, "concept layer 2"] | None = None,
    quantity: str = "cosine",
    limits: tuple[float, float] = (-1.0, 1.0),
    highlight: int = 20,
    theme: Theme = "light",
) -> go.Figure:
    """A number for every two concepts, with a slider over layers that begins at `highlight`.

    Args:
        matrix, names: numbers (NaN stay empty), the ends of their intervals; and the concepts.
        places: the concepts in a plane, drawn beside the numbers, or below them on a phone's page.
        quantity, limits: name of the numbers, and the ends of their colour scale.
    """
    check_tensors(matrix=(matrix, "end row column layer"))
    check_count("names", names, matrix.shape[1])
    chart = figure("Concepts", f"{quantity}, direction by row", theme=theme, height=600)
    if empty(chart, matrix[:1], quantity):
        return chart
    labels = [wrapped(name, width=24, lines=1) for name in names]
    text = [[f"{a}, {b}" for b in labels] for a in labels]
    hover = "%{text}<br><b>%{z}</b>, %{customdata[1]} to %{customdata[2]}"
    _heatmap(chart, matrix[0, ..., 0], limits, quantity, hover, text)
    axis = {"tickvals": [*range(len(names))], "ticktext": labels}
    chart.update_xaxes(axis, tickangle=-90, side="top")
    chart.update_yaxes(axis, range=[len(names) - 0.5, -0.5])
    chart.update_layout(margin_t=chart.layout.margin.t + 70)  # for the names above
    if places is not None:
        _beside(chart, places, labels, theme)
    steps: list[Step] = []
    for i, ends in enumerate(numbers(matrix.permute(3, 1, 2, 0), digits=2)):
        steps.append(({"z": [numbers(matrix[0, ..., i], digits=2)], "customdata": [ends]}, {}))
        for xy, along in () if places is None else zip("xy", places[:, i].T, strict=True):
            steps[i][0][xy] = [None, numbers(along)]
    add_slider(chart, steps, highlight)
    return chart


def _beside(chart: go.Figure, places: Tensor, labels: list[str], theme: Theme) -> None:
    """Draw points with names at the right of a heatmap; below it where a page is narrow."""
    reach, style = 1.2 * float(places.abs().max()), styles(["refusal"], theme)["refusal"]
    above = [f"{'top' if i % 2 else 'bottom'} center" for i in range(len(labels))]
    points: Any = {"text": labels, "textposition": above, "textfont_size": 11, "showlegend": False}
    points |= {"marker": style.marker(8.0), "mode": "markers+text", "cliponaxis": False}
    chart.add_scatter(**points, xaxis="x2", yaxis="y2", hovertemplate="%{text}<extra></extra>")
    line = {"range": [-reach, reach], "zeroline": True, "showgrid": True}
    chart.update_layout(xaxis2=line | {"anchor": "y2", "title": {"text": "near: a high cosine"}})
    chart.update_layout(yaxis2=line | {"anchor": "x2", "scaleanchor": "x2", "constrain": "domain"})
    wide = {"xaxis.domain": [0, 0.46], "xaxis2.domain": [0.6, 1], "yaxis2.domain": [0, 1]}
    tall = {"xaxis.domain": [0, 1], "xaxis2.domain": [0, 1], "yaxis2.domain": [0, 0.4]}
    tall |= {"yaxis.domain": [0.5, 1], "height": 900}
    bar = {"colorbar.x": 1.02, "colorbar.y": 0.75, "colorbar.len": 0.5}
    chart.update_layout(wide, meta={"narrow": [bar, tall, [0]]}).data[0].colorbar.x = 0.47


def position_by_layer(
    values: Float[Tensor, "pos layer"],
    *,
    positions: Sequence[int | str] | None = None,
    quantity: str = "cosine similarity",
    selected: tuple[int, int] | None = None,
    title: str | None = None,
    theme: Theme = "light",
) -> go.Figure:
    """A quantity at every position and layer, as a heatmap.

    Args:
        values: `[pos layer]`. NaN cells stay empty.
        positions: the name of each position: an index from the end or a token. Default: -n to -1.
        quantity: name of the values, with the unit.
        selected: the (row, layer) that is outlined.
        title, theme: the figure's title; "light" or "dark".
    """
    check_tensors(values=(values, "pos layer"))
    n_positions, n_layers = values.shape
    positions = range(-n_positions, 0) if positions is None else positions
    check_count("positions", positions, n_positions)
    title = title or f"{quantity[:1].upper()}{quantity[1:]} by position and layer"
    subtitle = "positions count from the end of the formatted prompt, \N{MINUS SIGN}1 the last"
    chart = figure(title, subtitle, theme=theme, height=max(300, min(620, 190 + 34 * n_positions)))
    if empty(chart, [values], quantity):
        return chart
    if selected and not (0 <= selected[0] < n_positions and 0 <= selected[1] < n_layers):
        raise InputError(f"selected={selected} lies outside {n_positions} rows x {n_layers} layers")
    names = [
        written(float(p), ".0f") if isinstance(p, int) else wrapped(p, width=20) for p in positions
    ]
    hover = "position %{text}, layer %{x}<br><b>%{z:.4~g}</b>"
    chart.update_xaxes(layer_axis(n_layers))
    _heatmap(chart, values, _limits(values), quantity, hover, [[name] * n_layers for name in names])
    chart.update_yaxes(title_text="position", tickvals=list(range(n_positions)), ticktext=names)
    chart.update_yaxes(range=[n_positions - 0.5, -0.5])
    if selected:
        _outline(chart, *selected)
    return chart


def selection_scores(
    scores: Mapping[Literal["ablation", "addition", "kl"], Float[Tensor, "pos layer"]],
    *,
    positions: Sequence[int | str] | None = None,
    selected: tuple[int, int] | None = None,
    counting: Literal["input", "output"] = "input",
    theme: Theme = "light",
) -> dict[str, go.Figure]:
    """Return one heatmap of all candidate directions for each selection score.

    Args:
        scores: "ablation", "addition" and "kl", each `[pos layer]`. NaN cells stay empty.
        positions, selected: names of the positions (default: -n to -1); the outlined (row, layer).
        counting: whether layer `l` is the input of block `l`, as in Arditi et al., or its output.
        theme: "light" or "dark".
    """
    log_odds = "mean refusal log-odds (nats)"
    known = {
        "ablation": ("Refusal of harmful prompts once ablated", log_odds),
        "addition": ("Refusal of harmless prompts once added", log_odds),
        "kl": ("What ablation does to harmless prompts", "mean KL of the next token (nats)"),
    }
    if unknown := sorted(set(scores) - set(known)):
        raise InputError(f"{unknown[0]!r} is no score: hand over {', '.join(known)}")
    options: dict[str, Any] = {"positions": positions, "selected": selected, "theme": theme}
    return {
        name: position_by_layer(
            values, title=known[name][0], quantity=known[name][1], **options
        ).update_xaxes(title_text=f"layer ({counting} of block)")
        for name, values in scores.items()
    }


def cross_effects(
    effects: Cells,
    *,
    interventions: Sequence[str],
    outcomes: Sequence[str],
    interval: tuple[Cells, Cells] | None = None,
    quantity: str = "change in log-odds (nats)",
    title: str = "What each intervention does to each outcome",
    theme: Theme = "light",
) -> go.Figure:
    """Effects of interventions on outcomes, as a heatmap with numbers in its cells.

    Args:
        effects: `[intervention outcome]`. NaN: not measured.
        interventions, outcomes: names of the rows ("ablate refusal") and of the columns.
        interval: lower and upper ends, written below each effect.
        quantity: name of the effects, with the unit.
        title, theme: the figure's title; "light" or "dark".
    """
    for end in (effects, *(interval or ())):
        check_tensors(effects=(effects, "row column"), interval=(end, "row column"))
    check_count("interventions", interventions, len(effects))
    check_count("outcomes", outcomes, effects.shape[1])
    subtitle = quantity + (", with its interval" if interval else "")
    chart = figure(title, subtitle, theme=theme, height=160 + 27 * max(len(interventions), 2))
    if empty(chart, [effects], quantity):
        return chart
    largest = max(map(abs, _limits(effects)))
    text = [[f"{wrapped(a)}<br>on {wrapped(b)}" for b in outcomes] for a in interventions]
    _heatmap(chart, effects, (-largest, largest), quantity, "%{text}<br><b>%{z:.3f}</b>", text)
    ends = [numbers(end) for end in interval or ()]
    for i, row in enumerate(numbers(effects)):
        for j, value in enumerate(row):
            note: dict[str, Any] = {"text": "not<br>measured", "font_size": 11}
            if value is not None:
                dark = value <= (2 * DARK_SHARE - 1) * largest
                between = " to ".join(written(end[i][j], ".1f") for end in ends)
                small = f'<br><span style="font-size:11px">{between}</span>' if ends else ""
                note["text"] = f"<b>{written(value, '.1f')}</b>{small}"
                note |= {"font_size": 12, "font_color": "#ffffff" if dark else "#000000"}
            chart.add_annotation(note, x=j, y=i, showarrow=False)
    columns = [wrapped(name, width=max(11, 56 // len(outcomes)), lines=3) for name in outcomes]
    rows = [wrapped(name, width=22, lines=3) for name in interventions]
    plain = {"ticks": "", "ticklabelstandoff": 6, "showline": False}
    chart.update_xaxes(plain, tickvals=list(range(len(columns))), ticktext=columns, tickangle=0)
    chart.update_yaxes(plain, tickvals=list(range(len(rows))), ticktext=rows)
    return chart.update_yaxes(range=[len(rows) - 0.5, -0.5])


def _heatmap(
    chart: go.Figure,
    values: Tensor,
    limits: tuple[float, float],
    quantity: str,
    hover: str,
    text: list[list[str]] | None = None,
) -> None:
    (low, high), title = limits, wrapped(quantity, width=34, lines=2)
    scale = {"zmin": low, "zmax": high, "colorscale": SIGNED if low < 0 < high else UNSIGNED}
    hidden = {"text": text, "hovertemplate": hover + "<extra></extra>"}
    chart.add_heatmap(z=numbers(values, digits=3), colorbar_title_text=title, **scale, **hidden)
    n_rows, n_columns = values.shape
    chart.update_xaxes(showgrid=False, range=[-0.5, n_columns - 0.5])
    chart.update_yaxes(showgrid=False, range=[-0.5, n_rows - 0.5])


def _limits(values: Tensor) -> tuple[float, float]:
    """The range of the values, symmetric around 0 where they have both signs."""
    known = values[values.isfinite()]
    low, high = float(known.min()), float(known.max())
    if low < 0 < high:
        low, high = min(low, -high), max(high, -low)
    return (low, high) if low < high else (low, low + 1.0)


def _outline(chart: go.Figure, row: int, column: int) -> None:
    """Outline a cell in dark on light, which shows on any colour."""
    cell = {"x0": column - 0.5, "x1": column + 0.5, "y0": row - 0.5, "y1": row + 0.5}
    for colour, width in (("#ffffff", 4), ("#000000", 1.8)):
        chart.add_shape(cell, type="rect", line={"color": colour, "width": width})
