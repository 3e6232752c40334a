"""The theme of every figure: colours, line styles, plotly template, title and axes."""

import itertools
import json
import math
import re
from collections.abc import Iterable, Sized
from importlib.resources import files
from string import Template
from typing import Any, Literal, NamedTuple, TypeGuard

import plotly.graph_objects as go
from plotly.colors import hex_to_rgb
from torch import Tensor

from ..errors import InputError
from .text import wrapped

Theme = Literal["light", "dark"]


def _read(name: str) -> str:
    return files(__package__).joinpath(name).read_text("utf-8")


_COLOURS = json.loads(_read("palette.json"))
# Turns light figures of this package, known by their background, dark on dark Jupyter pages.
DARK_JUPYTER = _read("dark_jupyter.html").rstrip()

# Both heatmap scales grow lighter from end to end, so they survive grey print.
SIGNED, UNSIGNED = _COLOURS["signed"], _COLOURS["unsigned"]


class Style(NamedTuple):
    """The style of one curve or set of points; dash and symbol identify it without colour."""

    colour: str
    dash: str
    symbol: str

    def marker(self, size: float) -> dict[str, Any]:
        """The marker of a scatter trace. Its outline keeps open symbols visible."""
        outline = {"color": self.colour, "width": 1.2}
        return {"color": self.colour, "symbol": self.symbol, "size": size, "line": outline}


class Palette(NamedTuple):
    """The colours of one theme. Targets are dark and filled; baselines are lighter and open."""

    background: str
    ink: str
    muted: str
    grid: str
    concepts: dict[str, Style]
    series: tuple[Style, ...]


def palette(theme: Theme) -> Palette:
    """The colours of a theme, light or dark."""
    if theme not in _COLOURS["pages"]:
        raise InputError(f"theme {theme!r}: choose 'light' or 'dark'")

    def style(row: dict[str, str]) -> Style:
        return Style(row[theme], row["dash"], row["symbol"])

    concepts = {name: style(row) for name, row in _COLOURS["concepts"].items()}
    series = tuple(map(style, _COLOURS["series"]))
    return Palette(**_COLOURS["pages"][theme], concepts=concepts, series=series)


def styles(names: Iterable[str], theme: Theme) -> dict[str, Style]:
    """A style for each name: the style of the concept in the name, else the next of the series.

    "refusal vs alarm" is drawn as alarm. The first name with a concept gets its style.
    """
    concepts, series = palette(theme).concepts, itertools.cycle(palette(theme).series)
    chosen: dict[str, Style] = {}
    for name in names:
        words = [word for word in re.findall(r"[^\W_]+", name.casefold()) if word in concepts]
        words.sort(key=lambda word: word == "refusal")
        style = concepts[words[0]] if words else None
        chosen[name] = next(series) if style is None or style in chosen.values() else style
    return chosen


def tint(colour: str, opacity: float) -> str:
    """Return a hex colour with an opacity."""
    red, green, blue = hex_to_rgb(colour)
    return f"rgba({red},{green},{blue},{opacity:g})"


def figure(title: str, subtitle: str, *, theme: Theme, height: int = 400) -> go.Figure:
    """An empty figure of a height in pixels, as wide as its page, with title and subtitle."""
    heading = headed(title, subtitle, theme)
    # Each figure carries its template; plotly's registry stays untouched.
    template = json.loads(Template(_read("template.json")).substitute(palette(theme)._asdict()))
    layout = {"template": template, "title": {"text": heading}, "height": height}
    return go.Figure(layout=layout | {"margin": {"t": 28 + 19 * (heading.count("<br>") + 1)}})


def headed(title: str, subtitle: str, theme: Theme) -> str:
    """A figure's title above its subtitle in small print, both escaped and wrapped."""
    small = f"font-size:12.5px;color:{palette(theme).muted}"
    rows = wrapped(subtitle, width=104, lines=2).split("<br>") if subtitle else []
    below = [f'<br><span style="{small}">{row}</span>' for row in rows]
    return "".join([wrapped(title, width=74, lines=2), *below])


def page(chart: go.Figure) -> str:
    """Return a page that holds one figure, fills the window's width and loads nothing.

    A figure of usual height fills the window; title and subtitle stand above it, where they wrap.
    """
    look, title = chart.layout.template.layout, chart.layout.title.text
    height = chart.layout.height if chart.layout.height > 600 else None
    drawn = go.Figure(chart).update_layout(title=None, margin_t=28, height=height)
    options = {"responsive": True, "displaylogo": False}
    narrow = json.dumps((drawn.layout.meta or {}).get("narrow", [{}]))  # changes for a phone
    script = f"if (innerWidth < 700) Plotly.update('{{plot_id}}', ...{narrow})"
    written: Any = {"full_html": False, "post_script": script}
    body = drawn.to_html(options, default_height="calc(100vh - 80px)", **written)
    colours = {"background": look.paper_bgcolor, "ink": look.font.color}
    heading = title.split("<br>")[0]
    return Template(_read("page.html")).substitute(colours, heading=heading, title=title, body=body)


def empty(chart: go.Figure, values: Iterable[Tensor], what: str) -> bool:
    """Whether there is nothing to draw; if so, write the reason into the figure."""
    values = list(values)
    if any(each.isfinite().any() for each in values):
        return False
    reason = f"No {what} given: the tensors are empty."
    if any(each.numel() for each in values):
        reason = f"Nothing to draw: {what} is undefined (NaN) throughout."
    chart.update_xaxes(visible=False).update_yaxes(visible=False)
    text = {"text": wrapped(reason, width=70, lines=3), "font_size": 14, "showarrow": False}
    chart.add_annotation(text, xref="paper", yref="paper", x=0.5, y=0.5)
    return True


def is_layer(layer: int | None, depth: int, name: str = "highlight") -> TypeGuard[int]:
    """Whether a layer to be marked exists; InputError for a negative layer."""
    if layer is not None and layer < 0:
        raise InputError(f"{name}={layer}: layers count from 0, at the first block's output")
    return layer is not None and layer < depth


def check_count(what: str, given: Sized, n: int) -> None:
    """Raise InputError unless there is one name, label or text for each of `n` values."""
    if len(given) != n:
        raise InputError(f"{len(given)} {what} for {n} values: hand over one for each")


def layer_axis(n_layers: int) -> dict[str, Any]:
    """The x axis of every figure across depth: whole layers, at most 8 of them labelled."""
    return {
        "title": {"text": "layer (output of block)"},
        "unifiedhovertitle": {"text": "<b>layer %{x}</b>"},
        "range": [-0.6, max(n_layers, 1) - 0.4],
        "dtick": 2 ** max(0, math.ceil(math.log2(max(n_layers, 1) / 8))),
        "tickangle": 0,  # so that the labels fit a phone
    }


def padded(values: Iterable[float | None], share: float) -> tuple[float, float]:
    """A range around the values and 0, extended at both ends by a share of its width."""
    known = [0.0, *(value for value in values if value is not None)]
    room = share * (max(known) - min(known) or 1.0)
    return float(f"{min(known) - room:.4g}"), float(f"{max(known) + room:.4g}")
