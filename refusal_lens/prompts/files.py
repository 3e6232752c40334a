"""Files and Hugging Face datasets of prompts -> contrasts."""

import json
import logging
import os
import re
from collections.abc import Iterable, Mapping
from functools import reduce
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import InputError, did_you_mean
from .contrast import Cells, Contrast, check_filled, checked_sides
from .tables import Table, listed, load_dataset, read_table, table_of_dataset

logger = logging.getLogger(__name__)
FilePath = str | os.PathLike[str]
CLUSTER = "cluster"  # column of clusters of prompts that are not independent: a label or a list
_WORDS_FOR_MISSING = frozenset({"", "nan", "null", "none", "n/a", "<na>"})


def contrast_from_file(
    path: FilePath,
    *,
    target: str | int,
    baseline: str | int,
    prompt: str | None = None,
    label: str | None = None,
    name: str | None = None,
    paired: bool = False,
    split: str | None = None,
    keep_duplicates: bool = False,
) -> Contrast:
    """Read a contrast from a file with a column for each side, or with prompts and labels.

    >>> contrast_from_file("mine.csv", target="harmful", baseline="harmless")
    <Contrast 'mine': 2 harmful / 2 harmless>
    >>> contrast_from_file("my.csv", prompt="text", label="kind", target="unsafe", baseline="safe")
    <Contrast 'my': 1 unsafe / 1 safe>

    A repeated prompt is used once and a prompt on both sides not at all; the log counts both. In
    a paired contrast the whole pair is dropped. InputError, which names file, row and column, if the
    file can't be read as its suffix says, lacks a column, or holds prompts that `Contrast` refuses.

    Args:
        path: a .csv (commas, semicolons or tabs), .tsv, .json, .jsonl or .parquet file, or a folder
            written by `save_to_disk`. JSON is a list of records or an object of lists. Text that
            is not UTF-8 is read as UTF-16 or Windows-1252, which the log says.
        target, baseline: columns of the prompts, or their labels. Lengths may differ if unpaired.
            A path names prompts inside cells: "messages.0.content".
        prompt, label: columns of prompts and labels (1 matches "1", and the second name of class
            labels); other labels are ignored.
        name: name of the contrast; the file's name without its suffix if None.
        paired: whether the two prompts of a row belong together.
        split: split of a folder, or several, "train+test"; may be None if there is only one.
        keep_duplicates: whether a prompt counts as often as it stands on its side.
    """
    table = read_table(str(path), split)
    sides = _sides(table, (str(target), str(baseline)), prompt, label, paired)
    return _contrast(name or Path(path).stem, sides, paired, keep_duplicates)


def contrast_from_dataset(
    dataset: Any,
    *,
    target: str | int,
    baseline: str | int,
    prompt: str | None = None,
    label: str | None = None,
    name: str | None = None,
    paired: bool = False,
    split: str | None = None,
    subset: str | None = None,
    revision: str | None = None,
    keep_duplicates: bool = False,
) -> Contrast:
    """Take a contrast from a Hugging Face dataset, or raise as `contrast_from_file` does.

    >>> contrast_from_dataset(dataset, target="harmful", baseline="harmless", name="mine")
    <Contrast 'mine': 2 harmful / 2 harmless>

    Args:
        dataset: a `Dataset`, a `DatasetDict`, or a name for `datasets.load_dataset`.
        subset, revision: configuration, and commit, tag or branch, of a dataset given by name.
        target, baseline, prompt, label, name, paired, split, keep_duplicates: as in
            `contrast_from_file`; the name of the contrast is the dataset's if None.
    """
    source = dataset if isinstance(dataset, str) else "dataset"
    loaded = load_dataset(dataset, subset, revision) if isinstance(dataset, str) else dataset
    table = table_of_dataset(source, loaded, split)
    sides = _sides(table, (str(target), str(baseline)), prompt, label, paired)
    return _contrast(name or source, sides, paired, keep_duplicates)


def contrast_from_prompts(
    target: FilePath,
    baseline: FilePath,
    *,
    name: str | None = None,
    paired: bool = False,
    keep_duplicates: bool = False,
) -> Contrast:
    """Read a contrast from two sources, which `load_prompts` reads or refuses.

    >>> contrast_from_prompts("mine.csv:harmful", "other.txt")
    <Contrast 'mine': 2 harmful / 1 prompt>
    >>> contrast_from_prompts("my.csv:text:kind=unsafe", "my.csv:text:kind=safe")
    <Contrast 'my': 1 unsafe / 1 safe>

    Args:
        target, baseline: sources of the prompts. Columns of different names name the sides.
        name: name of the contrast; the name of the target's file without its suffix if None.
        paired: whether row `i` of one source belongs to row `i` of the other.
        keep_duplicates: as in `contrast_from_file`.
    """
    sides = [_read_source(target), _read_source(baseline)]
    if sides[0].name == sides[1].name:
        sides = [sides[0]._replace(name="target"), sides[1]._replace(name="baseline")]
    name = name or Path(_split_source(target)[0].split("@")[0]).stem
    return _contrast(name, sides, paired, keep_duplicates)


def load_prompts(source: FilePath) -> tuple[str, ...]:
    """Read the prompts in one column of a file or dataset, each once; InputError if it can't.

    >>> load_prompts("my.csv:text:kind=safe")
    ('How do I bake bread?',)

    Args:
        source: file and column, separated by a colon; the file alone if it has only one column or
            is a list: .txt with one prompt a line, JSON of strings. Or a folder of `save_to_disk`
            or a dataset of the hub, with its split, and a column. `:LABEL=VALUE` after the column
            takes only the rows with this value. See also `contrast_from_file`.
    """
    [side] = _distinct([_read_source(source)], paired=False, keep=False)
    return checked_sides({side.name: side.prompts})[0]


class _Side(NamedTuple):
    name: str
    prompts: Cells
    clusters: Cells  # one a prompt; empty if the table has no column `cluster`

    def at(self, rows: list[int]) -> "_Side":
        prompts = [self.prompts[row] for row in rows]
        return _Side(self.name, prompts, [self.clusters[row] for row in rows if self.clusters])


def _sides(
    table: Table, names: tuple[str, str], prompt: str | None, label: str | None, paired: bool
) -> list[_Side]:
    if (prompt is None) != (label is None):
        raise InputError("`prompt` and `label` go together: give both columns or neither")
    if names[0] == names[1]:
        raise InputError(f"`target` and `baseline` are both {names[0]!r}: name two different ones")
    if prompt is None or label is None:
        return [_column_side(table, name, may_end_early=not paired) for name in names]
    return [_labelled_side(table, prompt, label, name) for name in names]


def _contrast(name: str, sides: list[_Side], paired: bool, keep: bool) -> Contrast:
    sides = _distinct(sides, paired=paired, keep=keep)
    prompts = {side.name: side.prompts for side in sides}
    target, baseline = checked_sides(prompts, paired=paired, keep_duplicates=keep)
    labels: Any = []
    for side in (side for side in sides if side.clusters):
        for place, label in side.clusters:
            check_filled(place, None if label is None else str(label))
        labels.append([[*map(str, x)] if isinstance(x, list) else str(x) for _, x in side.clusters])
    labels = labels[0] if labels and paired else labels
    names = (sides[0].name, sides[1].name)
    return Contrast(name, target, baseline, *names, paired, labels, keep_duplicates=keep)


def _distinct(sides: list[_Side], *, paired: bool, keep: bool) -> list[_Side]:
    """The sides with the first of equal prompts (all, if `keep`) and none that is on both sides."""
    texts = [  # a missing prompt equals no other
        [" ".join(cell.split()) if isinstance(cell, str) else place for place, cell in side.prompts]
        for side in sides
    ]
    shared = set(texts[0]) & set(texts[1]) if len(sides) > 1 else set()
    first = [dict(zip(reversed(side), reversed(range(len(side))), strict=True)) for side in texts]
    kept = [
        [i for i, text in enumerate(side) if text not in shared and (keep or where[text] == i)]
        for side, where in zip(texts, first, strict=True)
    ]
    if paired:
        kept = [sorted(set(kept[0]) & set(kept[1]))] * 2
    if not all(kept) or (paired and len(texts[0]) != len(texts[1])):
        return sides  # `checked_sides` names a row that repeats another or has no partner
    if (after := sum(map(len, kept))) < (before := sum(map(len, texts))):
        reason = f"{len(shared)} stand on both sides, the rest" if shared else "they"
        dropped = f"dropped {before - after} of {before} prompts: {reason} repeat others"
        logger.warning(f"{dropped}; keep_duplicates keeps the repeats within a side")
    return [side.at(rows) for side, rows in zip(sides, kept, strict=True)]


def _column(table: Table, name: str, *, may_end_early: bool = False) -> Cells:
    """The cells of a column with their places; missing cells are None, or dropped at the end."""
    cells = [
        (f"{name!r} in {table.place(row)} of {table.source}", None if missing else cell)
        for row, cell in enumerate(_cells(table, name))
        for missing in [str(cell).strip().lower() in _WORDS_FOR_MISSING]
    ]
    while may_end_early and cells and cells[-1][1] is None:
        cells.pop()
    return cells


def _cells(table: Table, name: str) -> Iterable[Any]:
    """The cells of a column, or what a path such as "messages.0.content" names inside them."""
    keys = name.split(".")
    for n in range(len(keys), 0, -1):
        if (column := ".".join(keys[:n])) in table.columns:
            found = [reduce(_inside, keys[n:], cell) for cell in table.columns[column]]
            if n == len(keys) or any(cell is not None for cell in found):
                return found
    problem = f"{table.source} has no column {name!r}: {did_you_mean(name, table.columns)}"
    raise InputError(f"{problem}its columns are {listed(table.columns)}")


def _inside(cell: Any, key: str) -> Any:
    if isinstance(cell, list):
        cell = dict(zip(map(str, range(len(cell))), cell, strict=True))
    return cell.get(key) if isinstance(cell, Mapping) else None


def _column_side(table: Table, name: str, *, may_end_early: bool) -> _Side:
    prompts = _column(table, name, may_end_early=may_end_early)
    clusters = _beside(table, CLUSTER, len(prompts)) if CLUSTER in table.columns else []
    return _Side(name, prompts, clusters)


def _beside(table: Table, name: str, n: int) -> Cells:
    """The cells of another column, one for each of `n` prompts."""
    if len(cells := _column(table, name)) < n:
        sizes = f"{n} prompts and {len(cells)} in {name!r}"
        raise InputError(f"{table.source} has {sizes}: give each prompt one")
    return cells[:n]


def _labelled_side(table: Table, prompt: str, label: str, wanted: str) -> _Side:
    """The prompts of the rows with a label, or with the class label of this number."""
    side = _column_side(table, prompt, may_end_early=False)
    labels = [cell for _, cell in _beside(table, label, len(side.prompts))]
    classes = {str(number): name for number, name in enumerate(table.classes.get(label, ()))}
    texts = [x.strip() if isinstance(x, str) else json.dumps(x, default=str) for x in labels]
    texts = [classes.get(text, text) for text in texts]
    name = wanted if wanted in texts else classes.get(wanted, wanted)
    if name not in texts:
        problem = f"{table.source} has no row whose {label!r} is {wanted!r}"
        raise InputError(f"{problem}: its labels are {listed(sorted(set(texts)))}")
    return side._replace(name=name).at([row for row, text in enumerate(texts) if text == name])


def _read_source(source: FilePath) -> _Side:
    place, names = _split_source(source)
    table = read_table(place)
    column, *others = names[:1] or table.columns
    if others:
        problem = f"{table.source} has several columns, {listed(table.columns)}"
        raise InputError(f"{problem}: say which one, as in {table.source}:{column}")
    if len(names) < 2:
        return _column_side(table, column, may_end_early=True)
    label, _, value = names[1].partition("=")
    return _labelled_side(table, column, label, value)


def _split_source(source: FilePath) -> tuple[str, list[str]]:
    """What stands before the colons, the longest path there is, and the one or two names after."""
    parts = re.split(r":(?![\\/])", str(source))  # no colon of C:\ or https://
    cuts = range(len(parts), max(0, len(parts) - 3), -1)
    places = [":".join(parts[:cut]) for cut in cuts]
    there = [cut for cut, place in zip(cuts, places, strict=True) if os.path.exists(place)]
    cut = there[0] if there else max(1, len(parts) - (2 if "=" in parts[-1] else 1))
    return ":".join(parts[:cut]), parts[cut:]
