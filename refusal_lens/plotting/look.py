"""The one look of every figure: colours, template, text and axes."""

import html
import math
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import plotly.graph_objects as go
from torch import Tensor

from ..errors import InputError

Theme = Literal["light", "dark"]

HEIGHT = 470
"""Pixels; the width is the page's."""

MODEBAR_WITHOUT = [
    "pan",
    "zoom",
    "zoomIn",
    "zoomOut",
    "autoScale",
    "select",
    "lasso",
    "sendChartToCloud",
]
"""What plotly's buttons leave out, so that they leave room for the title beside them."""


@dataclass(frozen=True)
class Style:
    """How one named thing is drawn; dash and symbol tell it apart where colour can't."""

    colour: str
    dash: str
    symbol: str


@dataclass(frozen=True)
class Look:
    """The colours of one theme: a `Style` for each concept, and more for everything else."""

    background: str
    ink: str
    muted: str
    grid: str
    concepts: Mapping[str, Style]
    series: tuple[Style, ...]
    signed: tuple[str, ...]
    unsigned: tuple[str, ...]


_CONCEPTS = {
    "refusal": ("solid", "circle"),
    "negativity": ("solid", "square"),
    "positivity": ("dash", "triangle-up"),
    "alarm": ("dashdot", "diamond"),
    "harmful": ("solid", "x"),
    "harmless": ("dash", "circle-open"),
    "negative": ("longdash", "triangle-down"),
    "neutral": ("dot", "square-open"),
    "null": ("longdashdot", "cross-thin-open"),
    "ceiling": ("longdash", "line-ew-open"),
    "residual": ("2px,4px", "diamond-open"),
}
_SERIES = (
    ("solid", "circle"),
    ("dash", "square"),
    ("dot", "diamond"),
    ("dashdot", "triangle-up"),
    ("longdash", "x"),
    ("longdashdot", "triangle-down"),
)


def _look(
    page: tuple[str, str, str, str],
    concepts: Iterable[str],
    series: Iterable[str],
    signed: tuple[str, ...],
    unsigned: tuple[str, ...],
) -> Look:
    return Look(
        *page,
        concepts={
            name: Style(colour, *_CONCEPTS[name])
            for name, colour in zip(_CONCEPTS, concepts, strict=True)
        },
        series=tuple(Style(colour, *shape) for colour, shape in zip(series, _SERIES, strict=True)),
        signed=signed,
        unsigned=unsigned,
    )


# A contrast has one hue; within it, the target is dark and filled, the baseline light and open.
# Both scales of the heatmaps grow lighter from end to end, so that they survive grey printing.
LOOKS: Mapping[Theme, Look] = {
    "light": _look(
        ("#ffffff", "#1f2328", "#57606a", "#e4e7eb"),
        [
            "#dd6400",
            "#005b98",
            "#009e73",
            "#b0568f",
            "#651d00",
            "#f0a45d",
            "#00335a",
            "#58a5dc",
            "#8c8c8c",
            "#4a4a4a",
            "#6a6a6a",
        ],
        ["#5b3a9e", "#00797a", "#b07d00", "#a61e5a", "#5d7a1f", "#5f6b7a"],
        ("#0b3a8f", "#3f7ac6", "#a2a29e", "#e3b63c", "#fff27a"),
        ("#2b1a4d", "#7a2f6b", "#c9514f", "#f39b4a", "#fde9a9"),
    ),
    "dark": _look(
        ("#14171c", "#e6e8eb", "#a3abb5", "#2c3138"),
        [
            "#ffb080",
            "#4c9fe6",
            "#1fae80",
            "#d58bc0",
            "#e24d26",
            "#ffd3a8",
            "#3f70e0",
            "#a9d8f5",
            "#8c8c8c",
            "#c8c8c8",
            "#b0b0b0",
        ],
        ["#b39cf0", "#35c4c4", "#e0b040", "#f078a8", "#a8c860", "#9fb0c4"],
        ("#0b3a8f", "#3f7ac6", "#a2a29e", "#e3b63c", "#fff27a"),
        ("#2b1a4d", "#7a2f6b", "#c9514f", "#f39b4a", "#fde9a9"),
    ),
}


def look(theme: Theme) -> Look:
    """The colours of a theme.

    Raises:
        InputError: unless it is "light" or "dark".
    """
    if theme not in LOOKS:
        raise InputError(f"theme {theme!r}: choose 'light' or 'dark'")
    return LOOKS[theme]


def styles(names: Iterable[str], theme: Theme) -> dict[str, Style]:
    """A style for each name: its concept's where it names one, else the next free of the series.

    Refusal is what everything here is compared with, so the first concept beside it counts:
    "refusal vs alarm" is drawn as alarm. Where two names ask for one concept, the first has it.
    Beyond six names without a concept the series starts again.
    """
    chosen: dict[str, Style] = {}
    spare = 0
    for name in names:
        words = "".join(c if c.isalnum() else " " for c in name.casefold()).split()
        named = [word for word in words if word in look(theme).concepts]
        concept = next((word for word in named if word != "refusal"), next(iter(named), None))
        style = look(theme).concepts[concept] if concept else None
        if style is None or style in chosen.values():
            style = look(theme).series[spare % len(_SERIES)]
            spare += 1
        chosen[name] = style
    return chosen


def tint(colour: str, opacity: float) -> str:
    """A hex colour as a see-through one."""
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red},{green},{blue},{opacity:g})"


def mixed(colours: Sequence[str], share: float) -> str:
    """The colour that far along a colour scale, 0 to 1."""
    place = min(max(share, 0.0), 1.0) * (len(colours) - 1)
    i = min(int(place), len(colours) - 2)
    ends = [[int(c[k : k + 2], 16) for k in (1, 3, 5)] for c in colours[i : i + 2]]
    return "#" + "".join(
        f"{round(a + (b - a) * (place - i)):02x}" for a, b in zip(*ends, strict=True)
    )


def readable_on(colour: str) -> str:
    """Black or white, whichever stands out more from a hex colour (WCAG contrast)."""
    channels = (int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return "#000000" if (luminance + 0.05) / 0.05 > 1.05 / (luminance + 0.05) else "#ffffff"


def template(theme: Theme) -> go.layout.Template:
    """Our template; handed to each figure, never registered with plotly."""
    page = look(theme)
    axis = {
        "gridcolor": page.grid,
        "linecolor": page.muted,
        "zerolinecolor": page.muted,
        "zerolinewidth": 1.2,
        "showline": True,
        "zeroline": False,
        "ticks": "outside",
        "tickcolor": page.muted,
        "tickfont": {"size": 12, "color": page.ink},
        "title": {"font": {"size": 13, "color": page.ink}, "standoff": 8},
        "automargin": True,
    }
    return go.layout.Template(
        layout={
            "font": {"family": "Helvetica, Arial, sans-serif", "size": 13, "color": page.ink},
            "paper_bgcolor": page.background,
            "plot_bgcolor": page.background,
            "colorway": [style.colour for style in page.series],
            "margin": {"l": 64, "r": 24, "t": 64, "b": 48},
            "title": {
                "font": {"size": 16, "color": page.ink},
                "x": 0.012,
                "xanchor": "left",
                "y": 1,
                "pad": {"t": 18},
                "yanchor": "top",
                "yref": "container",
            },
            "legend": {
                "orientation": "h",
                "x": 0,
                "xanchor": "left",
                "y": -0.2,
                "yanchor": "top",
                "font": {"size": 12, "color": page.ink},
                "bgcolor": "rgba(0,0,0,0)",
                "itemwidth": 40,
            },
            "modebar": {
                "remove": MODEBAR_WITHOUT,
                "bgcolor": "rgba(0,0,0,0)",
                "color": page.muted,
                "activecolor": page.ink,
            },
            "hoverlabel": {
                "align": "left",
                "bgcolor": page.background,
                "bordercolor": page.muted,
                "font": {"size": 12, "color": page.ink},
            },
            "annotationdefaults": {
                "font": {"size": 12, "color": page.ink},
                "arrowcolor": page.muted,
                "arrowwidth": 1,
                "arrowhead": 0,
            },
            "xaxis": axis | {"showgrid": False},
            "yaxis": axis,
        }
    )


def figure(
    title: str, *, theme: Theme, subtitle: str | None = None, height: int = HEIGHT
) -> go.Figure:
    """An empty figure in our look; title and subtitle are escaped and wrapped."""
    heading = headed(title, subtitle, theme=theme)
    return go.Figure(
        layout={
            "template": template(theme),
            "title": {"text": heading},
            "height": height,
            "margin": {"t": 28 + 19 * (heading.count("<br>") + 1)},
        }
    )


def headed(title: str, subtitle: str | None, *, theme: Theme) -> str:
    """A figure's title with what is said below it in small print."""
    text = wrapped(title, width=74, lines=2)
    if subtitle:
        small = f"font-size:12.5px;color:{look(theme).muted}"
        rows = wrapped(subtitle, width=104, lines=2).split("<br>")
        text += "".join(f'<br><span style="{small}">{row}</span>' for row in rows)
    return text


def nothing_to_show(figure: go.Figure, reason: str) -> go.Figure:
    """Say in an empty figure why it is empty."""
    axis = {"showticklabels": False, "ticks": "", "showgrid": False, "showline": False}
    figure.update_xaxes(**axis).update_yaxes(**axis)
    figure.add_annotation(
        text=wrapped(reason, width=70, lines=3),
        xref="paper",
        yref="paper",
        x=0.5,
        y=0.5,
        showarrow=False,
        font_size=14,
    )
    return figure


def escaped(text: str) -> str:
    """Text from outside as plotly shows it verbatim: no markup, no formula, no template field."""
    text = text.encode("utf-8", "replace").decode()
    text = html.escape(text, quote=False)
    return text.replace("$", "&#36;").replace("%{", "&#37;{")


def wrapped(text: str, *, width: int = 60, lines: int = 4) -> str:
    """Escaped text in at most so many lines, cut short with an ellipsis."""
    rows = textwrap.wrap(" ".join(text.split()), width, max_lines=lines, placeholder=" …")
    return "<br>".join(escaped(row) for row in rows)


def numbers(values: Tensor, *, digits: int = 4) -> list[Any]:
    """A tensor as nested lists of a few significant digits each; None where it isn't finite."""

    def rounded(value: Any) -> Any:
        if isinstance(value, list):
            return [rounded(v) for v in value]
        return float(f"{value:.{digits}g}") if math.isfinite(value) else None

    return rounded(values.detach().double().cpu().tolist())


def written(value: float | None, form: str = ".3f") -> str:
    """A number as text: with a true minus sign, "undefined" where there is none."""
    if value is None or not math.isfinite(value):
        return "undefined"
    text = f"{value:{form}}"
    return (text if float(text) else text.lstrip("-")).replace("-", "\N{MINUS SIGN}")


NO_TICKS = {"ticks": "outside", "ticklen": 6, "tickcolor": "rgba(0,0,0,0)"}
"""Of an axis of names: no ticks, but their room between name and plot."""


def layer_axis(n_layers: int) -> dict[str, Any]:
    """The x axis of every figure across depth: whole layers, at most about 16 of them labelled."""
    step = next(s for s in (1, 2, 4, 8, 16, 32, 64, 128, n_layers) if n_layers <= 16 * s)
    return {
        "title": {"text": "layer (output of block)"},
        "unifiedhovertitle": {"text": "<b>layer %{x}</b>"},
        "range": [-0.6, max(n_layers, 1) - 0.4],
        "tick0": 0,
        "dtick": step,
        "tickformat": "d",
    }
