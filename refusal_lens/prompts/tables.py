"""Bytes of a file, a saved folder or a Hugging Face dataset -> a table of named columns."""

import codecs
import io
import json
import logging
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import InputError
from .contrast import brief, quoted

logger = logging.getLogger(__name__)
SUFFIXES = (".csv", ".tsv", ".json", ".jsonl", ".txt", ".parquet")
DATASET = re.compile(r"([\w.-]+/[\w.-]+)(?:/([\w.-]+))?")  # owner/name, or owner/name/subset


class Table(NamedTuple):
    """Columns by name."""

    source: str
    columns: Mapping[str, Iterable[Any]]
    place: Callable[[int], str] = lambda row: f"row {row + 1}"  # row `i` in messages; or "line 7"
    classes: Mapping[str, Sequence[str]] = {}  # names of the numbers in columns of class labels


def read_table(place: str, split: str | None = None) -> Table:
    """Read a file, a folder written by `save_to_disk`, or a dataset by its name on the hub.

    `place` is a path, `owner/name` or `owner/name/subset`; `@SPLIT` may follow a folder or dataset,
    several joined by "+". Text that resembles numbers stays text. InputError for anything else.
    """
    if "@" in place and not os.path.exists(place):
        place, _, split = place.rpartition("@")
    path = Path(place)
    known = os.path.exists(path) or path.suffix.lower() in SUFFIXES
    if not known and (name := DATASET.fullmatch(place)):
        return table_of_dataset(place, load_dataset(*name.groups()), split)
    try:
        if os.path.isdir(path):
            from datasets import load_from_disk

            return table_of_dataset(path.name, load_from_disk(path), split)
        return _parse(path.name, path.suffix.lower(), path.read_bytes())
    except InputError:
        raise
    except (OSError, ValueError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{brief(place)} can't be read: {reason}") from None


def load_dataset(name: str, subset: str | None = None, revision: str | None = None) -> Any:
    """Return a dataset of the hub or of a local folder with all its splits."""
    import datasets

    try:
        return datasets.load_dataset(name, subset, revision=revision)
    except (OSError, ValueError) as error:
        why = f"can't be loaded ({brief(str(error))}): check name, subset and access"
        raise InputError(f"the dataset {name!r} {why}") from None


def table_of_dataset(source: str, dataset: Any, split: str | None) -> Table:
    """The columns of a `Dataset`, or of one or more splits of a `DatasetDict`."""
    if not hasattr(dataset, "column_names"):
        raise InputError(f"{quoted(dataset)} is no Hugging Face dataset: give one, or its name")
    if isinstance(dataset, Mapping):
        from datasets import concatenate_datasets

        wanted = [*dataset] if split is None and len(dataset) == 1 else (split or "").split("+")
        if missing := [name for name in wanted if name not in dataset]:
            splits = "several splits" if split is None else f"no split {missing[0]!r}"
            choice = f"choose one of {listed(dataset)}, or several joined by +"
            raise InputError(f"{source} has {splits}: {choice}")
        dataset = concatenate_datasets([dataset[name] for name in wanted])
    columns = {name: dataset[name] for name in dataset.column_names}
    labels = {name: getattr(f, "names", None) for name, f in (dataset.features or {}).items()}
    return Table(source, columns, "row {}".format, {name: n for name, n in labels.items() if n})


def listed(names: Iterable[object]) -> str:
    """The names as a message shows them, a dozen at most."""
    shown = [quoted(name) for name in names]
    more = [f"and {len(shown) - 12} more"] if len(shown) > 12 else []
    return ", ".join(shown[:12] + more) or "none"


def _parse(source: str, suffix: str, content: bytes) -> Table:
    if suffix not in SUFFIXES:
        raise ValueError("save it as a .csv, .tsv, .json, .jsonl, .txt or .parquet file")
    if suffix == ".parquet":
        return _parse_parquet(source, content)
    text = _decode(source, content)
    if not text.strip():
        raise ValueError("it is empty; put prompts into it")
    if suffix in (".csv", ".tsv"):
        return Table(source, _parse_csv(text, "," if suffix == ".csv" else "\t"))
    if suffix == ".json":
        return Table(source, _columns_of_json(json.loads(text, object_pairs_hook=_by_name)))
    # str.splitlines would also split at characters that a prompt may contain.
    lines = enumerate(re.split(r"\r\n|\r|\n", text), 1)
    filled = [(i, line) for i, line in lines if line.strip()]
    numbers, records = map(list, zip(*filled, strict=True))
    for row, line in enumerate(records if suffix == ".jsonl" else []):
        try:
            records[row] = json.loads(line, object_pairs_hook=_by_name)
        except ValueError as error:
            raise ValueError(f"line {numbers[row]}: {error}") from None
    return Table(source, _columns_of_json(records), lambda row: f"line {numbers[row]}")


def _parse_parquet(source: str, content: bytes) -> Table:
    import pyarrow.parquet

    table = pyarrow.parquet.read_table(io.BytesIO(content))
    columns = {name: cells for name, cells in table.to_pydict().items() if "__index_" not in name}
    written_by_datasets = json.loads((table.schema.metadata or {}).get(b"huggingface", b"{}"))
    features = written_by_datasets.get("info", {}).get("features", {}).items()
    classes = {name: f["names"] for name, f in features if isinstance(f, dict) and "names" in f}
    return Table(source, columns, classes=classes)


def _decode(source: str, content: bytes) -> str:
    """The text in UTF-8, or in an encoding that the log names: UTF-16 or Windows-1252."""
    if content[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
        encoding = "UTF-16"
    elif 0 in content[:2]:
        encoding = "UTF-16-BE" if content[0] == 0 else "UTF-16-LE"
    else:
        with suppress(UnicodeDecodeError):
            return content.decode("utf-8-sig")
        encoding = "cp1252"
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError as error:
        raise ValueError(f"it is neither UTF-8 nor {encoding} text ({error})") from None
    logger.warning("%s is not UTF-8, read as %s: save it as UTF-8", source, encoding)
    return text


def _parse_csv(text: str, usual: str) -> dict[str, Any]:
    """Columns separated by `usual`, or by the separator that the header has instead."""
    import pandas

    header = re.sub(r'"[^"]*"', "", re.split(r"[\r\n]", text.lstrip(), maxsplit=1)[0])
    separator = usual if usual in header else max(f"{usual},;\t", key=header.count)
    as_text: Any = {"dtype": object, "keep_default_na": False, "skipinitialspace": True}
    try:
        frame = pandas.read_csv(io.StringIO(text), sep=separator, header=None, **as_text)
    except pandas.errors.ParserError as error:
        problem = str(error).strip().rpartition("error: ")[2]
        raise ValueError(f"{problem}; is a quotation mark missing or not doubled?") from None
    header, *rows = frame.values.tolist()
    rows = [row for row in rows if any(cell.strip() for cell in row)]
    if not rows:
        raise ValueError("it has a header but no rows; put prompts under it")
    columns = zip(map(str.strip, header), zip(*rows, strict=True), strict=True)
    return _by_name([(name, cells) for name, cells in columns if name])


def _by_name(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    for name, times in Counter(name for name, _ in pairs).items():
        if times > 1:
            raise ValueError(f"it has two columns named {name!r}; rename one")
    return dict(pairs)


def _columns_of_json(content: Any) -> dict[str, Any]:
    """The columns of a list of records, of an object of lists, or of a list of strings."""
    if isinstance(content, dict) and (columns := _lists_in(content)):
        return columns
    if not isinstance(content, list) or not content:
        raise ValueError(f"it holds {quoted(content)}; give a list of records")
    kind = str if isinstance(content[0], str) else dict
    wanted = "a string" if kind is str else 'a record, {"column": ...}'
    for row, record in enumerate(content, 1):
        if not isinstance(record, kind):
            raise ValueError(f"record {row} is {quoted(record)}; make it {wanted}")
    if kind is str:
        return {"prompt": content}
    names = dict.fromkeys(name for record in content for name in record)
    return {name: [record.get(name) for record in content] for name in names}


def _lists_in(content: dict[str, Any]) -> dict[str, list[Any]]:
    """The lists in an object, and those in objects inside it by their path, "data.prompts"."""
    columns = {name: part for name, part in content.items() if isinstance(part, list)}
    for name, part in content.items():
        inside = _lists_in(part) if isinstance(part, dict) else {}
        columns |= {f"{name}.{path}": cells for path, cells in inside.items()}
    return columns
