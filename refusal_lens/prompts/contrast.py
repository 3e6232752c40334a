"""Contrasts: a target and a baseline prompt set; the bundled ones, and the user's own files.

Everything here is text in, `Contrast` out: no model, no tokenizer, no tensor.
"""

import difflib
import hashlib
import html
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from os import PathLike
from os.path import isfile
from pathlib import Path
from typing import Any

from ..errors import InputError
from .files import Column, Table, brief, listed, quoted, read_table

_BUNDLED_SIDES = {
    "refusal": ("harmful", "harmless"),
    "negativity": ("negative", "neutral"),
    "positivity": ("positive", "neutral"),
    "alarm": ("alarming", "calm"),
}
BUNDLED: tuple[str, ...] = tuple(_BUNDLED_SIDES)


@dataclass(frozen=True, repr=False)
class Contrast:
    """Two prompt sets whose difference in activations is a direction: target minus baseline.

    Any iterables of strings will do for `target`, `baseline` and `topics`; they are kept as tuples.
    `paired` says that row `i` of the one side belongs to row `i` of the other (the same sentence
    frame, say, with the concept swapped); `topics` then may name what each pair is about.

    Raises:
        InputError: for an empty set, a prompt that is blank or no string, a prompt that occurs
            twice (white space aside) on one side or on both, sides of unequal length where paired,
            topics that do not fit the rows. The message names the row.
    """

    name: str
    target: tuple[str, ...]
    baseline: tuple[str, ...]
    target_name: str = "target"
    baseline_name: str = "baseline"
    paired: bool = False
    topics: tuple[str, ...] = ()

    def __post_init__(self):
        for field in ("target", "baseline", "topics"):
            rows = getattr(self, field)
            if isinstance(rows, str) or not isinstance(rows, Iterable):
                raise InputError(f"`{field}` is {quoted(rows)}: give a list of strings instead")
            object.__setattr__(self, field, tuple(rows))
        for field in ("name", "target_name", "baseline_name"):
            if not isinstance(label := getattr(self, field), str) or not label.strip():
                raise InputError(f"`{field}` is {quoted(label)}: give a name that can be read")
        if self.target_name == self.baseline_name:
            raise InputError(f"both sides are named {self.target_name!r}: give each its own name")
        target = Column("target", self.target, lambda row: f"target[{row}]")
        baseline = Column("baseline", self.baseline, lambda row: f"baseline[{row}]")
        _check_sides(target, baseline, paired=self.paired)
        if self.topics and not self.paired:
            raise InputError("topics belong to the rows of a paired contrast: set paired=True")
        if self.topics and len(self.topics) != len(self.target):
            raise InputError(
                f"topics and rows differ in number, {len(self.topics)} and {len(self.target)}: "
                "give each row its topic"
            )
        Column("topics", self.topics, lambda row: f"topics[{row}]").check_strings("topic")

    @property
    def sha256(self) -> str:
        """Hash of the prompts, in order, whatever the names: equal hashes mean equal prompts.

        The SHA-256, in hexadecimal, of the UTF-8 text `[[target...],[baseline...]]`: JSON without
        spaces and with non-ASCII characters as they are.
        """
        sides = [self.target, self.baseline]
        text = json.dumps(sides, ensure_ascii=False, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    def __repr__(self) -> str:
        return f"<Contrast {self.name!r}: {self._summary()}>"

    def _repr_html_(self) -> str:
        """A small table for Jupyter: how large the sides are, and their first few prompts."""

        def row(tag: str, *cells: str) -> str:
            shown = (html.escape(brief(cell)) for cell in cells)
            return "".join(f'<{tag} style="text-align:left">{cell}</{tag}>' for cell in shown)

        first = range(min(4, max(len(self.target), len(self.baseline))))
        pairs = (("".join(side[i : i + 1]) for side in (self.target, self.baseline)) for i in first)
        return (
            f"<table><caption>{html.escape(brief(self.name))}: {html.escape(self._summary())}"
            f"</caption><tr>{row('th', self.target_name, self.baseline_name)}</tr>"
            + "".join(f"<tr>{row('td', *pair)}</tr>" for pair in pairs)
            + "</table>"
        )

    def _summary(self) -> str:
        target, baseline = brief(self.target_name), brief(self.baseline_name)
        return (
            f"{len(self.target)} {target} / {len(self.baseline)} {baseline}"
            + (", paired" if self.paired else "")
            + (f", {len(set(self.topics))} topics" if self.topics else "")
        )


def load_contrast(name: str) -> Contrast:
    """One of the bundled contrasts, written for this package: `BUNDLED` lists their names.

    Every one is paired, each pair the same sentence frame with the concept swapped. `refusal`
    (harmful / harmless requests) and `negativity` (negative / neutral statements) are the
    experiment's; `positivity` (positive / neutral statements) and `alarm` (harmless requests that
    sound dangerous / that do not) are its controls. No prompt occurs in two of the eight sets.

    Raises:
        InputError: if there is none of that name.
    """
    if name not in _BUNDLED_SIDES:
        near = difflib.get_close_matches(name.lower(), BUNDLED, n=1)
        raise InputError(
            f"there is no bundled contrast {name!r}: "
            + (f"did you mean {near[0]!r}? " if near else "")
            + f"there are {', '.join(BUNDLED)}; for prompts of your own use `contrast_from_file`"
        )
    target, baseline = _BUNDLED_SIDES[name]
    path = Path(__file__).with_name("data") / f"{name}.csv"
    return contrast_from_file(path, target=target, baseline=baseline, topics="topic", paired=True)


def contrast_from_file(
    path: str | PathLike[str],
    *,
    target: str,
    baseline: str,
    prompt: str | None = None,
    label: str | None = None,
    topics: str | None = None,
    name: str | None = None,
    paired: bool = False,
) -> Contrast:
    """A contrast from a file of the user's: .csv, .tsv, .json or .jsonl, in UTF-8.

    Two layouts. A column (a key, in JSON) for each side, named by `target` and `baseline`:

    >>> contrast_from_file("mine.csv", target="harmful", baseline="harmless")

    or one column of prompts and one of labels, `target` and `baseline` then being two of the labels
    (rows with another are left out):

    >>> contrast_from_file(
    ...     "mine.jsonl", prompt="text", label="kind", target="unsafe", baseline="safe"
    ... )

    JSON is a list of records, `[{"harmful": ..., "harmless": ...}, ...]`, or an object of lists,
    `{"harmful": [...], "harmless": [...]}`; JSONL a record a line. Where the contrast isn't paired,
    one column may end before the other. `topics` names a column of topics, for paired contrasts.
    The contrast is named after the file unless `name` is given.

    Raises:
        InputError: if the file can't be read as what its suffix says, lacks a column (lists those
            it has), or holds prompts that `Contrast` would refuse (names the row, and the line).
    """
    table = read_table(Path(path))
    name = name or Path(path).stem
    return _contrast_from_table(table, target, baseline, prompt, label, topics, name, paired)


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
    """A contrast from a Hugging Face dataset: the object itself, or its name on the hub.

    Columns, labels and pairing are told as to `contrast_from_file`; a label is a class's name where
    the dataset knows its classes' names, else the value as text. `split` may be left out where
    there is but one; `subset` (the hub's word for a configuration) and `revision` are for a
    dataset given by name.

    Raises:
        InputError: if `datasets` is not installed, the dataset can't be loaded, the split isn't
            there, and as `contrast_from_file`.
    """
    source = dataset if isinstance(dataset, str) else "dataset"
    if isinstance(dataset, str):
        dataset = _load_dataset(dataset, subset, revision)
    if not hasattr(dataset, "column_names"):
        raise InputError(f"{quoted(dataset)} is no Hugging Face dataset: give one, or its name")
    if isinstance(dataset, Mapping):
        if split is None and len(dataset) == 1:
            (split,) = dataset
        if split not in dataset:
            what = "several splits" if split is None else f"no split {split!r}"
            raise InputError(f"{source} has {what}: give one of {listed(dataset)} as `split`")
        dataset = dataset[split]
    columns = {column: dataset[column] for column in dataset.column_names}
    classes = getattr((dataset.features or {}).get(label), "names", None)
    if label in columns and classes is not None:
        columns[label] = [classes[i] if i is not None and i >= 0 else None for i in columns[label]]
    table = Table(source, columns, lambda row: f"row {row} of {source} (its first is row 0)")
    name = name or source
    return _contrast_from_table(table, target, baseline, prompt, label, topics, name, paired)


def contrast_from_prompts(
    target: str | PathLike[str],
    baseline: str | PathLike[str],
    *,
    name: str | None = None,
    paired: bool = False,
) -> Contrast:
    """A contrast of two sources, each as `load_prompts` takes it: "mine.csv:harmful", say.

    Its sides are named after their columns where these differ, and itself after the target's file
    unless `name` is given.

    Raises:
        InputError: as `load_prompts`, and for prompts that `Contrast` would refuse.
    """
    sides = _column_of(target), _column_of(baseline)
    _check_sides(*sides, paired=paired)
    same = sides[0].name == sides[1].name
    return Contrast(
        name or _split_source(target)[0].stem,
        target=tuple(sides[0].cells),
        baseline=tuple(sides[1].cells),
        target_name="target" if same else sides[0].name,
        baseline_name="baseline" if same else sides[1].name,
        paired=paired,
    )


def load_prompts(source: str | PathLike[str]) -> tuple[str, ...]:
    """The prompts of one column of a file: "mine.csv:harmful".

    The column may be left out where the file has but one, and where it is a plain list: .txt with a
    prompt a line (blank lines are passed over), or JSON or JSONL of strings.

    Raises:
        InputError: as `contrast_from_file`, for the one column.
    """
    column = _column_of(source)
    _check_side(column)
    return tuple(column.cells)


def _check_sides(target: Column, baseline: Column, *, paired: bool) -> None:
    in_target, in_baseline = _check_side(target), _check_side(baseline)
    for prompt, row in in_baseline.items():
        if prompt in in_target:
            raise InputError(
                f"{baseline.place(row)} is also {target.place(in_target[prompt])}: drop it from "
                f"one side, {quoted(prompt)} can't stand on both"
            )
    sizes = len(target.cells), len(baseline.cells)
    if paired and sizes[0] != sizes[1]:
        longer = target if sizes[0] > sizes[1] else baseline
        raise InputError(
            f"{longer.place(min(sizes))} has no partner: a paired contrast needs as many "
            f"{target.name} as {baseline.name} prompts, not {sizes[0]} and {sizes[1]}; add the "
            "missing ones or set paired=False"
        )


def _check_side(side: Column) -> dict[str, int]:
    """Row of each prompt, white space aside, if all are prompts and none is there twice."""
    if not side.cells:
        raise InputError(f"the {side.name} set is empty: give at least one prompt")
    side.check_strings("prompt")
    rows: dict[str, int] = {}
    for row, prompt in enumerate(side.cells):
        first = rows.setdefault(" ".join(prompt.split()), row)
        if first != row:
            raise InputError(
                f"{side.place(row)} repeats {side.place(first)}: drop one of the two, "
                f"{quoted(prompt)} counts once"
            )
    return rows


def _contrast_from_table(
    table: Table,
    target: str,
    baseline: str,
    prompt: str | None,
    label: str | None,
    topics: str | None,
    name: str,
    paired: bool,
) -> Contrast:
    if (prompt is None) != (label is None):
        raise InputError("`prompt` and `label` go together: give both columns or neither")
    if target == baseline:
        raise InputError(f"`target` and `baseline` are both {target!r}: name two different ones")
    if prompt is None or label is None:
        sides = [table.column(side, may_end_early=not paired) for side in (target, baseline)]
    elif topics is not None:
        raise InputError("`topics` goes with a column for each side, not with a column of labels")
    else:
        sides = [_rows_labelled(table, prompt, label, side) for side in (target, baseline)]
    _check_sides(*sides, paired=paired)
    about = table.column(topics) if topics is not None else Column("topics", (), str)
    about.check_strings("topic")
    return Contrast(
        name,
        target=tuple(sides[0].cells),
        baseline=tuple(sides[1].cells),
        target_name=target,
        baseline_name=baseline,
        paired=paired,
        topics=tuple(about.cells),
    )


def _rows_labelled(table: Table, prompt: str, label: str, wanted: str) -> Column:
    prompts, labels = table.column(prompt), table.column(label)
    if len(prompts.cells) != len(labels.cells):
        raise InputError(
            f"{table.source} has {len(prompts.cells)} cells in {prompt!r} and {len(labels.cells)} "
            f"in {label!r}: give each prompt one label"
        )
    # As JSON writes them, so that a label may be 1 or true.
    texts = [
        cell.strip() if isinstance(cell, str) else json.dumps(cell, default=str)
        for cell in labels.cells
    ]
    rows = [row for row, text in enumerate(texts) if text == wanted]
    if not rows:
        raise InputError(
            f"{table.source} has no row whose {label!r} is {wanted!r}: its labels are "
            + listed(sorted(set(texts)))
        )
    return Column(wanted, [prompts.cells[row] for row in rows], lambda i: prompts.place(rows[i]))


def _load_dataset(name: str, subset: str | None, revision: str | None) -> Any:
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise InputError(
            "the package `datasets` is missing: pip install 'refusal_lens[datasets]'"
        ) from error
    try:
        return load_dataset(name, subset, revision=revision)
    except (OSError, ValueError) as error:
        raise InputError(
            f"the dataset {name!r} can't be loaded ({brief(str(error))}): check its name, "
            "its subset and your access to it"
        ) from error


def _column_of(source: str | PathLike[str]) -> Column:
    path, name = _split_source(source)
    table = read_table(path)
    if name is None:
        if len(table.columns) != 1:
            raise InputError(
                f"{path.name} has several columns, {listed(table.columns)}: say which one, as in "
                f"{path.name}:{next(iter(table.columns))}"
            )
        (name,) = table.columns
    return table.column(name, may_end_early=True)


def _split_source(source: str | PathLike[str]) -> tuple[Path, str | None]:
    path, colon, column = str(source).rpartition(":")
    if isfile(source) or not colon:
        return Path(source), None
    if not isfile(path) and ("/" in column or "\\" in column):  # the colon of C:\ or https://
        return Path(source), None
    return Path(path), column
