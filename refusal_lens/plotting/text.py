"""Text and numbers as figures show them: verbatim, wrapped, rounded."""

import html
import math
import re
import textwrap
from typing import Any

from torch import Tensor


def escaped(text: str) -> str:
    """Text that plotly shows verbatim: no markup, no formula, no template field."""
    text = html.escape(text.encode("utf-8", "replace").decode(), quote=False)
    return text.replace("$", "&#36;").replace("%{", "&#37;{")


def wrapped(text: str, *, width: int = 60, lines: int = 4) -> str:
    """Escaped text in at most `lines` lines, cut short with an ellipsis."""
    rows = textwrap.wrap(" ".join(text.split()), width, max_lines=lines, placeholder=" …")
    return "<br>".join(escaped(row) for row in rows)


def numbers(values: Tensor, *, digits: int = 4) -> list[Any]:
    """A tensor as nested lists of a few significant digits each; None where not finite."""
    if values.ndim > 1:
        return [numbers(row, digits=digits) for row in values]
    plain = values.detach().double().cpu().tolist()
    return [float(f"{v:.{digits}g}") if math.isfinite(v) else None for v in plain]


def written(value: float | None, form: str = ".3f") -> str:
    """A number as text with a true minus sign; "undefined" for None and NaN."""
    if value is None or not math.isfinite(value):
        return "undefined"
    text = f"{value:{form}}"
    return (text if float(text) else text.lstrip("-")).replace("-", "\N{MINUS SIGN}")


def with_minus(text: str) -> str:
    """Return text with a true minus sign before each negative number."""
    return re.sub(r"(?<![\w.,)-])-(?=\d)", "\N{MINUS SIGN}", text)
