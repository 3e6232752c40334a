"""Results on the terminal: tables as wide as the terminal, in colour where it has colours."""

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

import refusal_lens as rl

from ..experiment.wording import effects

COLOURS = {"distinct": "bold green", "shared": "bold cyan", "partly shared": "bold magenta"}
PIPE_WIDTH = 120  # columns where the output is no terminal


def show(*parts: "str | Table | Text") -> None:
    """Print text and tables, with a blank line between two of them."""
    console = Console(highlight=False, emoji=False, markup=False)
    if not console.is_terminal:
        console.width = PIPE_WIDTH
    for i, part in enumerate(parts):
        if i:
            console.print()
        console.print(part)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """Return a table; columns of numbers stand to the right and stay on one line."""
    made = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for i, name in enumerate(head):
        number = i > 0 and any(row[i].endswith((*"0123456789]", " %")) for row in rows)
        made.add_column(Text(name), justify="right" if number else "left", no_wrap=number)
    for row in rows:
        made.add_row(*map(Text, row))
    return made


def verdict(results: "rl.Results") -> Text:
    """Return the model, the verdict in colour and what it means."""
    answer = results.verdict.answer
    return Text.assemble(
        (f"{results.model_name}, {results.layer_note}\n", "dim"),
        *("verdict: ", (answer, COLOURS.get(answer, "bold yellow"))),
        f"\n{results.sentence()}",
    )


def findings(results: "rl.Results") -> "list[Table | Text | str]":
    """Return everything about a run: verdict, effects, cosines and their uncertainty."""
    head = ["effect on refusal, in % of refusal's own", "effect [interval]", "a random direction"]
    rows = effects(results.verdict, results.names)
    explained = results.causal and results.verdict.reasons[0].measure != "refused_gap"
    cosines = [(name, f"{value:+z.4f}", rule) for name, value, rule in results.table()]
    return [
        verdict(results),
        table(head, rows) if explained else "\n".join(results.verdict_lines()),
        table(["measure", "cosine", "the published rule would say"], cosines),
        "\n".join(results.uncertainty()),
        *([f"doses:\n{results.causal.doses}"] if results.causal and results.causal.doses else []),
    ]
