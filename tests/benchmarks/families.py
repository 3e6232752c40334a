"""Write the table of model families: which TransformerLens runs each, and how exactly.

    python tests/benchmarks/families.py --other /venv/of/the/other/generation/bin/python

Each family is a tiny random model. `parity` is the largest difference from Hugging Face over layers
and logits, `left` the largest component along a direction that its ablation leaves in the residual
stream; both are relative to the norm of the vectors. The table goes to `results/families.md`, and
its short form between two marks of the README.
"""

import argparse
import json
import subprocess
import sys
import warnings
from importlib.metadata import version
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(TESTS))

from families import FAMILIES, measure  # noqa: E402

from refusal_lens.errors import InputError  # noqa: E402

README = TESTS.parent / "README.md"
BEGIN, END = "<!-- families -->\n", "<!-- end of families -->\n"


def measure_all() -> dict[str, list[float] | str]:
    """For each family `[parity, left]`, or why it is refused."""
    found: dict[str, list[float] | str] = {}
    for family in FAMILIES:
        try:
            measured = measure(family)
            found[family] = [measured.parity, measured.left]
        except InputError as error:
            found[family] = str(error)
    return found


def measure_elsewhere(python: str) -> tuple[str, dict[str, list[float] | str]]:
    command = [python, __file__, "--as-json"]
    lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    return tuple(json.loads(lines[-1]))


def table(columns: dict[str, dict[str, list[float] | str]]) -> str:
    """All numbers, a row for each family."""
    head = [f"{measured}, {release}" for release in columns for measured in ("parity", "left")]
    lines = [f"| family | {' | '.join(head)} |", "|---" * (1 + len(head)) + "|"]
    reasons = []
    for family in FAMILIES:
        cells = []
        for release, results in columns.items():
            result = results[family]
            if isinstance(result, str):
                cells += ["refused", ""]
                reasons.append(f"- {family}, {release}: {result.rsplit(': ', 1)[0]}")
            else:
                cells += [f"{number:.0e}" for number in result]
        lines.append(f"| {family} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", "Refused, and why:", "", *reasons, ""])


def short_table(columns: dict[str, dict[str, list[float] | str]]) -> str:
    """The names of the families, by the generations that run them."""
    groups: dict[tuple[str, ...], list[str]] = {}
    for family in FAMILIES:
        runs = tuple(r for r, results in columns.items() if not isinstance(results[family], str))
        groups.setdefault(runs, []).append(family)
    lines = ["| runs with TransformerLens | families |", "|---|---|"]
    for runs in sorted(groups, key=len, reverse=True):
        lines.append(f"| {' and '.join(runs) or 'neither'} | {'; '.join(groups[runs])} |")
    return "\n".join([*lines, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--other", help="a Python with the other generation of TransformerLens")
    parser.add_argument("--as-json", action="store_true", help="print the numbers, write nothing")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    mine = (version("transformer_lens"), measure_all())
    if options.as_json:
        print(json.dumps(mine))
        return
    columns = dict(sorted([mine, *([measure_elsewhere(options.other)] if options.other else [])]))
    title = "# Families of models\n\n`python tests/benchmarks/families.py`"
    title += f", transformers {version('transformers')}.\n"
    text = "\n".join([title, __doc__.split("\n\n")[2] + "\n", table(columns)])
    (TESTS / "benchmarks" / "results" / "families.md").write_text(text)
    before, _, rest = README.read_text().partition(BEGIN)
    README.write_text(before + BEGIN + short_table(columns) + END + rest.partition(END)[2])


if __name__ == "__main__":
    main()
