"""The tokens of formatted prompts as a table that shows itself, in a notebook or on a console."""

import html
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple

COLOURS = {"pad": "#eeeeee", "special": "#f3d9fa", "template": "#d0ebff", "system": "#d3f9d8"}
"""Background of a role's rows in HTML; the prompt's own have none."""


class TokenRow(NamedTuple):
    """One token: `position` counts from the end of the formatted prompt, -1 the last.

    `role` is `pad`, `special`, `template`, `system` or `prompt`; `read` says whether
    the activations are read here.
    """

    prompt: int
    position: int
    id: int
    role: str
    text: str
    read: bool


@dataclass(frozen=True)
class TokenTable(Sequence[TokenRow]):
    """Every token of a batch, in order; shows itself as HTML in Jupyter, as text when printed."""

    rows: tuple[TokenRow, ...]

    def __getitem__(self, index):
        return self.rows[index]

    def __len__(self) -> int:
        return len(self.rows)

    def __str__(self) -> str:
        lines: list[str] = []
        for prompt, rows in self._by_prompt():
            if lines:
                lines.append("")
            real = sum(row.role != "pad" for row in rows)
            lines.append(f"prompt {prompt}: {real} tokens")
            lines.append(f"{'position':>8}  {'id':>6}  {'role':<8}  token")
            for row in rows:
                line = f"{row.position:>8}  {row.id:>6}  {row.role:<8}  {row.text!r}"
                lines.append(line + "  <- read" * row.read)
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        tables = []
        for prompt, rows in self._by_prompt():
            cells = "".join(
                f'<tr style="background: {COLOURS.get(row.role, "none")}">'
                f"<td>{row.position}</td><td>{row.id}</td><td>{row.role}</td>"
                f'<td style="text-align: left"><code>{html.escape(repr(row.text))}</code></td>'
                f"<td>{'<b>read</b>' * row.read}</td></tr>"
                for row in rows
            )
            tables.append(
                f"<table><caption>prompt {prompt}</caption><thead><tr><th>position</th><th>id</th>"
                f"<th>role</th><th>token</th><th></th></tr></thead><tbody>{cells}</tbody></table>"
            )
        return "\n".join(tables)

    def _by_prompt(self) -> Iterator[tuple[int, list[TokenRow]]]:
        for prompt, rows in groupby(self.rows, key=lambda row: row.prompt):
            yield prompt, list(rows)
