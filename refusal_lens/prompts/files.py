"""Files and Hugging Face datasets of prompts, read into tables of named columns."""

import io
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import InputError
from .contrast import Cells, Contrast, brief, check_filled, checked_sides, did_you_mean, quoted

FilePath = str | os.PathLike[str]
_WORDS_FOR_MISSING = frozenset({"", "nan", "null", "none", "n/a", "<na>"})


class Table(NamedTuple):
    """Columns by name, and the words for row `i` in error messages: "row 3" or "line 7"."""

    source: str
    columns: Mapping[str, Iterable[Any]]
    place: Callable[[int], str] = lambda row: f"row {row + 1}"


def contrast_from_file(
    path: FilePath,
    *,
    target: str,
    baseline: str,
    prompt: str | None = None,
    label: str | None = None,
    topics: str | None = None,
    name: str | None = None,
    paired: bool = False,
) -> Contrast:
    """Read a contrast from a file with a column for each side, or with prompts and labels.

    >>> contrast_from_file("mine.csv", target="harmful", baseline="harmless")
    >>> contrast_from_file("my.csv", prompt="text", label="kind", target="unsafe", baseline="safe")

    Args:
        path: a .csv, .tsv, .json, .jsonl (in UTF-8) or .parquet file, or a folder written by
            `save_to_disk`. JSON is a list of records or an object of lists.
        target, baseline: columns of the prompts, or their labels. Lengths may differ if unpaired.
        prompt, label: columns of prompts and labels (1 matches "1"); other labels are ignored.
        topics: column of the topics, for a paired contrast without `label`.
        name: name of the contrast; the file's name without its suffix if None.
        paired: whether the two prompts of a row belong together.

    Raises:
        InputError: if the file can't be read as its suffix says, lacks a column, or holds prompts
            that `Contrast` refuses. The message names file, row and column.
    """
    table, name = _read_table(Path(path)), name or Path(path).stem
    return _contrast(table, name, (target, baseline), (prompt, label, topics), paired)


def contrast_from_dataset(
    dataset: Any,
    *,
    target: str,
    baseline: str,
    prompt: str | None = None,
    label: str | None = None,
    topics: str | None = None,
    name: str | None = None,
    paired: bool = False,
    split: str | None = None,
    subset: str | None = None,
    revision: str | None = None,
) -> Contrast:
    """Take a contrast from a Hugging Face dataset.

    >>> contrast_from_dataset("owner/name", split="train", target="harmful", baseline="harmless")

    Args:
        dataset: a `Dataset`, a `DatasetDict`, or a name for `datasets.load_dataset`.
        target, baseline: columns of the prompts, or their labels. Lengths may differ if unpaired.
        prompt, label: columns of prompts and labels (`ClassLabel` names); others are ignored.
        topics: column of the topics, for a paired contrast without `label`.
        name: name of the contrast; the dataset's name if None.
        paired: whether the two prompts of a row belong together.
        split: split to use; may be None if there is only one.
        subset, revision: configuration, and commit, tag or branch, of a dataset given by name.

    Raises:
        InputError: if the dataset can't be loaded, lacks the split or a column, or holds prompts
            that `Contrast` refuses. The message names row (the first is row 0) and column.
    """
    source = dataset if isinstance(dataset, str) else "dataset"
    if isinstance(dataset, str):
        from datasets import load_dataset

        try:
            dataset = load_dataset(dataset, subset, revision=revision)
        except (OSError, ValueError) as error:
            problem = f"the dataset {source!r} can't be loaded ({brief(str(error))})"
            raise InputError(f"{problem}: check name, subset and access") from None
    table = _table_of_dataset(source, dataset, split)
    return _contrast(table, name or source, (target, baseline), (prompt, label, topics), paired)


def contrast_from_prompts(
    target: FilePath, baseline: FilePath, *, name: str | None = None, paired: bool = False
) -> Contrast:
    """Read a contrast from two sources, which `load_prompts` reads or refuses.

    >>> contrast_from_prompts("mine.csv:harmful", "other.txt")

    Args:
        target, baseline: sources of the prompts. Columns of different names name the sides.
        name: name of the contrast; the name of the target's file without its suffix if None.
        paired: whether row `i` of one source belongs to row `i` of the other.
    """
    (target_name, in_target), (baseline_name, in_baseline) = map(_read_column, (target, baseline))
    if target_name == baseline_name:
        target_name, baseline_name = "target", "baseline"
    sides = checked_sides({target_name: in_target, baseline_name: in_baseline}, paired=paired)
    name = name or _split_source(target)[0].stem
    return Contrast(name, sides[0], sides[1], target_name, baseline_name, paired)


def load_prompts(source: FilePath) -> tuple[str, ...]:
    """Read the prompts in one column of a file.

    >>> load_prompts("mine.csv:harmful")

    Args:
        source: file and column, separated by a colon; the file alone if it has only one column or
            is a list: .txt with one prompt a line, JSON of strings. See also `contrast_from_file`.

    Raises:
        InputError: if the file can't be read, lacks the column, or has blank or repeated prompts.
    """
    [prompts] = checked_sides(dict([_read_column(source)]))
    return prompts


def _contrast(
    table: Table, name: str, names: tuple[str, str], columns: tuple[str | None, ...], paired: bool
) -> Contrast:
    prompt, label, topics = columns
    if (prompt is None) != (label is None):
        raise InputError("`prompt` and `label` go together: give both columns or neither")
    if names[0] == names[1]:
        raise InputError(f"`target` and `baseline` are both {names[0]!r}: name two different ones")
    if prompt is None or label is None:
        sides = {side: _column(table, side, may_end_early=not paired) for side in names}
    elif topics is not None:
        raise InputError("`topics` goes with a column for each side, not with a column of labels")
    else:
        sides = {side: _rows_labelled(table, prompt, label, side) for side in names}
    target, baseline = checked_sides(sides, paired=paired)
    about = [] if topics is None else _column(table, topics)
    for place, topic in about:
        check_filled(place, topic)
    return Contrast(name, target, baseline, *names, paired, tuple(topic for _, topic in about))


def _column(table: Table, name: str, *, may_end_early: bool = False) -> Cells:
    """The cells of a column with their places; missing cells are None, or dropped at the end."""
    if name not in table.columns:
        problem = f"{table.source} has no column {name!r}: {did_you_mean(name, table.columns)}"
        raise InputError(f"{problem}its columns are {_listed(table.columns)}")
    cells = [
        (f"{name!r} in {table.place(row)} of {table.source}", None if missing else cell)
        for row, cell in enumerate(table.columns[name])
        for missing in [str(cell).strip().lower() in _WORDS_FOR_MISSING]
    ]
    while may_end_early and cells and cells[-1][1] is None:
        cells.pop()
    return cells


def _rows_labelled(table: Table, prompt: str, label: str, wanted: str) -> Cells:
    prompts, labels = _column(table, prompt), [cell for _, cell in _column(table, label)]
    if len(prompts) != len(labels):
        sizes = f"{len(prompts)} cells in {prompt!r} and {len(labels)} in {label!r}"
        raise InputError(f"{table.source} has {sizes}: give each prompt one label")
    texts = [x.strip() if isinstance(x, str) else json.dumps(x, default=str) for x in labels]
    if wanted not in texts:
        problem = f"{table.source} has no row whose {label!r} is {wanted!r}"
        raise InputError(f"{problem}: its labels are {_listed(sorted(set(texts)))}")
    return [cell for cell, text in zip(prompts, texts, strict=True) if text == wanted]


def _read_column(source: FilePath) -> tuple[str, Cells]:
    path, name = _split_source(source)
    table = _read_table(path)
    if name is None:
        name, *others = table.columns
        if others:
            problem = f"{path.name} has several columns, {_listed(table.columns)}"
            raise InputError(f"{problem}: say which one, as in {path.name}:{name}")
    return name, _column(table, name, may_end_early=True)


def _split_source(source: FilePath) -> tuple[Path, str | None]:
    path, colon, column = str(source).rpartition(":")
    is_path = not os.path.exists(path) and ("/" in column or "\\" in column)  # C:\ or https://
    if os.path.exists(source) or not colon or is_path:
        return Path(source), None
    return Path(path), column


def _read_table(path: Path) -> Table:
    """Read a file or a folder written by `save_to_disk`. Text that resembles numbers stays text."""
    try:
        if os.path.isdir(path):
            from datasets import load_from_disk

            return _table_of_dataset(path.name, load_from_disk(path), None)
        return _parse(path.name, path.suffix.lower(), path.read_bytes())
    except UnicodeDecodeError as error:
        raise InputError(f"{path.name} is not UTF-8 text ({error}): save it as UTF-8") from None
    except (OSError, ValueError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{brief(str(path))} can't be read: {reason}") from None


def _parse(source: str, suffix: str, content: bytes) -> Table:
    if suffix not in (".csv", ".tsv", ".json", ".jsonl", ".txt", ".parquet"):
        raise ValueError("save it as a .csv, .tsv, .json, .jsonl, .txt or .parquet file")
    if suffix == ".parquet":
        import pandas

        frame = pandas.read_parquet(io.BytesIO(content), dtype_backend="numpy_nullable")
        return Table(source, frame.astype(object).where(frame.notna(), None).to_dict("list"))
    text = content.decode("utf-8-sig")
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


def _parse_csv(text: str, separator: str) -> dict[str, Any]:
    import pandas

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
    names = [name.strip() for name in header]
    columns = zip(names, zip(*rows, strict=True), strict=True)
    return _by_name([(name, cells) for name, cells in columns if name])


def _by_name(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    for name, times in Counter(name for name, _ in pairs).items():
        if times > 1:
            raise ValueError(f"it has two columns named {name!r}; rename one")
    return dict(pairs)


def _columns_of_json(content: Any) -> dict[str, Any]:
    """The columns of a list of records, of an object of lists, or of a list of strings."""
    if isinstance(content, dict) and all(isinstance(cells, list) for cells in content.values()):
        return content
    if not isinstance(content, list) or not content:
        raise ValueError(f"it holds {quoted(content)}; give a list of records")
    kind = str if isinstance(content[0], str) else dict
    for row, record in enumerate(content, 1):
        if not isinstance(record, kind):
            wanted = "a string" if kind is str else 'a record, {"column": ...}'
            raise ValueError(f"record {row} is {quoted(record)}; make it {wanted}")
    if kind is str:
        return {"prompt": content}
    names = dict.fromkeys(name for record in content for name in record)
    return {name: [record.get(name) for record in content] for name in names}


def _table_of_dataset(source: str, dataset: Any, split: str | None) -> Table:
    if not hasattr(dataset, "column_names"):
        raise InputError(f"{quoted(dataset)} is no Hugging Face dataset: give one, or its name")
    if isinstance(dataset, Mapping):
        if split is None and len(dataset) == 1:
            (split,) = dataset
        if split not in dataset:
            problem = "several splits" if split is None else f"no split {split!r}"
            raise InputError(f"{source} has {problem}: choose one of {_listed(dataset)}")
        dataset = dataset[split]
    columns = {name: dataset[name] for name in dataset.column_names}
    for name, feature in (dataset.features or {}).items():
        if classes := getattr(feature, "names", None):
            columns[name] = [None if i in (None, -1) else classes[i] for i in columns[name]]
    return Table(source, columns, "row {}".format)


def _listed(names: Iterable[object]) -> str:
    shown = [quoted(name) for name in names]
    more = [f"and {len(shown) - 12} more"] if len(shown) > 12 else []
    return ", ".join(shown[:12] + more) or "none"
