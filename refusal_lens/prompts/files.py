"""Files -> tables: named columns of cells that know where in the file they stand.

A table is read whole and judged little: what a column ought to hold is its user's business. What
can't be read as its suffix says is an `InputError` that names the place as the file counts it.
"""

import csv
import difflib
import io
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import InputError

_WORDS_FOR_MISSING = frozenset({"", "nan", "null", "none", "n/a", "<na>"})


class Column(NamedTuple):
    """Cells that ought to be text, and each one's place in the words of an error message.

    A missing cell is `None`.
    """

    name: str
    cells: Sequence[Any]
    place: Callable[[int], str]

    def check_strings(self, what: str) -> None:
        """Raise an `InputError` that names the first cell that is missing, blank or no string."""
        for row, cell in enumerate(self.cells):
            if cell is None or (isinstance(cell, str) and not cell.strip()):
                raise InputError(f"{self.place(row)} is empty: write a {what} there or drop it")
            if not isinstance(cell, str):
                raise InputError(
                    f"{self.place(row)} is {quoted(cell)}, {type(cell).__name__}, not a string: "
                    f"write a {what} there or drop it"
                )
            if any("\ud800" <= character <= "\udfff" for character in cell):
                raise InputError(
                    f"{self.place(row)} holds half a surrogate pair, which is no character: repair "
                    "it or drop it"
                )


class Table(NamedTuple):
    """Columns by name, and each row's place in the words of an error message.

    Columns may differ in length where the file keeps each by itself (an object of lists, in JSON).
    """

    source: str
    columns: Mapping[str, Iterable[Any]]
    place: Callable[[int], str]

    def column(self, name: str, *, may_end_early: bool = False) -> Column:
        """One column: its cells, null, NaN, blank or a word for these being missing ones.

        With `may_end_early` missing cells at the end are left out.

        Raises:
            InputError: if there is no such column; lists those there are.
        """
        if name not in self.columns:
            near = difflib.get_close_matches(name, self.columns, n=1)
            raise InputError(
                f"{self.source} has no column {name!r}: "
                + (f"did you mean {near[0]!r}? " if near else "")
                + f"its columns are {listed(self.columns)}"
            )
        cells = [None if _is_missing(cell) else cell for cell in self.columns[name]]
        while may_end_early and cells and cells[-1] is None:
            cells.pop()
        return Column(name, cells, lambda row: f"{name!r} in {self.place(row)}")


def read_table(path: Path) -> Table:
    """The table in a .csv, .tsv, .json, .jsonl or .txt file, in UTF-8, with or without a BOM.

    JSON is a list of records or an object of lists; JSONL a record a line. A plain list of strings,
    and .txt with one a line, is a table of one column, "prompt". Passed over are blank lines, rows
    of blank cells (errors still give the line as an editor does), and spaces that follow a comma.

    Raises:
        InputError: if it is not there or not what its suffix says.
    """
    suffix = path.suffix.lower()
    text = _read_text(path)
    if suffix not in (".csv", ".tsv", ".json", ".jsonl", ".txt"):
        raise InputError(f"{path} is no .csv, .tsv, .json, .jsonl or .txt file: save it as one")
    if not text.strip():
        raise InputError(f"{path} is empty: put prompts into it")
    if suffix in (".csv", ".tsv"):
        return _table_of_cells(path.name, text, "," if suffix == ".csv" else "\t")
    if suffix == ".json":
        content = _parse_json(path.name, text)
        if isinstance(content, dict):
            return _table_of_columns(path.name, content)
        if not isinstance(content, list):
            raise InputError(
                f"{path.name} holds {quoted(content)}: give a list of records, or an object with "
                "a list for each key"
            )
        return _table_of_records(path.name, content, lambda row: f"row {row + 1} of {path.name}")
    # Not str.splitlines, which would also cut at characters that a prompt may hold.
    numbered = enumerate(re.split(r"\r\n|\r|\n", text), 1)
    lines = [(number, line) for number, line in numbered if line.strip()]
    if suffix == ".jsonl":
        records = [_parse_json(path.name, line, number) for number, line in lines]
    else:
        records = [line for _, line in lines]
    return _table_of_records(path.name, records, lambda row: f"line {lines[row][0]} of {path.name}")


def _read_text(path: Path) -> str:
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise InputError(f"there is no file {path}: check its name and folder") from None
    except IsADirectoryError:
        raise InputError(f"{path} is a directory: name a file in it") from None
    except OSError as error:
        raise InputError(f"{brief(str(path))} can't be read: {error.strerror}") from error
    except ValueError as error:
        raise InputError(f"{brief(repr(str(path)))} can't be read: {error}") from error
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        byte = error.object[error.start]
        raise InputError(
            f"{path.name} is not UTF-8 text: byte 0x{byte:02x} on line {line}; save it as UTF-8"
        ) from error


def _table_of_cells(source: str, text: str, delimiter: str) -> Table:
    reader = csv.reader(
        io.StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=True, strict=True
    )
    rows: list[tuple[int, list[str]]] = []  # each with the line it begins on
    line = 1
    try:
        for cells in reader:
            if any(cell.strip() for cell in cells):
                rows.append((line, cells))
            line = reader.line_num + 1
    except csv.Error as error:
        raise InputError(
            f"{source}, the row that begins on line {line}: {error}; is a quotation mark left open "
            "or not doubled?"
        ) from error
    if len(rows) < 2:
        raise InputError(f"{source} has a header but no rows: put prompts under it")
    names = [name.strip() for name in rows.pop(0)[1]]
    for name in names:
        if name and names.count(name) > 1:
            raise InputError(f"{source} has two columns named {name!r}: rename one")
    for row, (line, cells) in enumerate(rows, 1):
        if any(cell.strip() for cell in cells[len(names) :]):
            raise InputError(
                f"row {row} (line {line} of {source}) has {len(cells)} cells, the header "
                f"{len(names)}: put cells that contain {delimiter!r} into quotation marks"
            )
    columns = {
        name: [cells[i] if i < len(cells) else None for _, cells in rows]
        for i, name in enumerate(names)
        if name
    }
    return Table(source, columns, lambda row: f"row {row + 1} (line {rows[row][0]} of {source})")


def _table_of_records(source: str, records: list[Any], place: Callable[[int], str]) -> Table:
    if not records:
        raise InputError(f"{source} holds an empty list: put prompts into it")
    kind = str if isinstance(records[0], str) else dict
    for row, record in enumerate(records):
        if not isinstance(record, kind):
            wanted = "a string, as the first is" if kind is str else 'a record, {"column": ...}'
            raise InputError(f"{place(row)} is {quoted(record)}: make it {wanted}")
    if kind is str:
        return Table(source, {"prompt": records}, place)
    names = dict.fromkeys(name for record in records for name in record)
    columns = {name: [record.get(name) for record in records] for name in names}
    return Table(source, columns, place)


def _table_of_columns(source: str, columns: dict[str, Any]) -> Table:
    for name, cells in columns.items():
        if not isinstance(cells, list):
            raise InputError(f"{source}: {name!r} is {quoted(cells)}: make it a list of prompts")
    return Table(source, columns, lambda row: f"row {row + 1} of {source}")


def _parse_json(source: str, text: str, line: int = 1) -> Any:
    def without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names = [name for name, _ in pairs]
        for name in names:
            if names.count(name) > 1:
                raise InputError(f"{source} names {name!r} twice in one object: rename one")
        return dict(pairs)

    try:
        return json.loads(text, object_pairs_hook=without_repeats)
    except json.JSONDecodeError as error:
        raise InputError(
            f"{source}, line {line + error.lineno - 1} column {error.colno}: {error.msg}; repair "
            "the JSON there"
        ) from error
    except InputError:
        raise
    except ValueError:  # Python reads no whole number of more than 4,300 digits
        raise InputError(f"{source} holds a number of thousands of digits: drop it") from None
    except RecursionError:
        raise InputError(f"{source} nests too deeply to be a list of prompts") from None


def _is_missing(cell: object) -> bool:
    if isinstance(cell, str):
        return cell.strip().lower() in _WORDS_FOR_MISSING
    return cell is None or (isinstance(cell, float) and cell != cell)


def brief(text: str) -> str:
    """The text on one line of at most 80 characters."""
    line = " ".join(text.split())
    return line if len(line) <= 80 else line[:77] + "..."


def quoted(value: object) -> str:
    """The value as an error message shows it: on one line, a text in quotation marks."""
    return f'"{brief(value)}"' if isinstance(value, str) else brief(repr(value))


def listed(names: Iterable[object]) -> str:
    """The names as an error message lists them, the first dozen if there are many."""
    shown = [quoted(name) for name in names]
    if len(shown) > 12:
        shown[12:] = [f"and {len(shown) - 12} more"]
    return ", ".join(shown) or "none"
