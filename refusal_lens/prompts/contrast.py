"""Contrasts of a target and a baseline prompt set, and the bundled contrasts."""

import csv
import hashlib
import html
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

from ..errors import READERS, InputError, did_you_mean, lenient

_DATA = Path(__file__).with_name("data")
BUNDLED = tuple((_DATA / "names.txt").read_text("utf-8").split())


@lenient
@dataclass(frozen=True, repr=False)
class Contrast:
    """Two prompt sets; the difference of their activations, target minus baseline, is a direction.

    >>> Contrast("politeness", ["Please sit down."], ["Sit down."], paired=True)
    <Contrast 'politeness': 1 target / 1 baseline, paired>
    >>> load_contrast("refusal").subset(range(8), range(8)).sha256[:8]
    'f6049e19'

    InputError, which names the row, if a set is empty; if a prompt or cluster is blank or no string;
    if a prompt is repeated up to white space; if paired sets or clusters differ in length or form.

    Args:
        name: name of the concept.
        target, baseline: prompts with and without the concept; iterables, stored as tuples.
        target_name, baseline_name: names of the two sets, "harmful" and "harmless" for instance.
        paired: whether row `i` of `target` belongs to row `i` of `baseline`.
        clusters: labels of prompts that are not independent of others with the same label. A label
            each pair, or a tuple of labels where pairs are clustered in several ways; if unpaired,
            two lists, the labels of the targets and those of the baselines. Empty if unknown.
        keep_duplicates: whether a prompt may be repeated within its side.
    """

    name: str
    target: tuple[str, ...]
    baseline: tuple[str, ...]
    target_name: str = "target"
    baseline_name: str = "baseline"
    paired: bool = False
    clusters: tuple[Any, ...] = ()
    keep_duplicates: bool = False

    def __post_init__(self):
        for field in ("target", "baseline", "clusters"):
            rows = getattr(self, field)
            if isinstance(rows, str) or not isinstance(rows, Iterable):
                raise InputError(f"`{field}` is {quoted(rows)}: give a list of strings instead")
            object.__setattr__(self, field, tuple(rows))
        for field in ("name", "target_name", "baseline_name"):
            if not isinstance(label := getattr(self, field), str) or not label.strip():
                raise InputError(f"`{field}` is {quoted(label)}: give a name that can be read")
        if self.target_name == self.baseline_name:
            raise InputError(f"both sides are named {self.target_name!r}: give each its own name")
        target = [(f"target[{row}]", prompt) for row, prompt in enumerate(self.target)]
        baseline = [(f"baseline[{row}]", prompt) for row, prompt in enumerate(self.baseline)]
        sides = {"target": target, "baseline": baseline}
        checked_sides(sides, paired=self.paired, keep_duplicates=self.keep_duplicates)
        object.__setattr__(self, "clusters", self._checked_clusters())

    def _checked_clusters(self) -> tuple[Any, ...]:
        sides = [self.clusters] if self.paired else [*self.clusters]
        if any(isinstance(side, str) or not isinstance(side, Iterable) for side in sides):
            raise InputError("`clusters` is one list: give two, the targets' and the baselines'")
        labels = [tuple(tuple(x) if isinstance(x, list) else x for x in side) for side in sides]
        sizes = [len(self.target), len(self.baseline)][: 2 - self.paired]
        if self.clusters and [*map(len, labels)] != sizes:
            form = "give a label a pair" if self.paired else "give two lists, a label a prompt"
            raise InputError(f"`clusters` are not as many as the prompts: {form}")
        ways = set()
        for number, side in enumerate(labels):
            for row, label in enumerate(side):
                ways.add(len(label) if isinstance(label, tuple) else 0)
                place = f"clusters[{row}]" if self.paired else f"clusters[{number}][{row}]"
                for part in (label or ("",)) if isinstance(label, tuple) else (label,):
                    check_filled(place, part)
        if len(ways) > 1:
            raise InputError("`clusters` differ in form: give every row one label, or as many each")
        return labels[0] if self.paired else tuple(labels)

    def subset(self, target_rows: Iterable[int], baseline_rows: Iterable[int]) -> "Contrast":
        """Return the contrast of these rows, counted from 0, in the order given, with clusters.

        InputError if the rows of a paired contrast differ, or if a side has none.
        """
        rows = [*target_rows], [*baseline_rows]
        if self.paired and rows[0] != rows[1]:
            raise InputError(f"{self.name!r} is paired: give the rows of whole pairs")

        def some(cells: tuple[Any, ...], which: list[int]) -> tuple[Any, ...]:
            try:
                return tuple(cells[row] for row in which) if cells else ()
            except (IndexError, TypeError):
                end = len(cells) - 1
                raise InputError(f"rows are {which!s:.60}: give numbers from 0 to {end}") from None

        target, baseline = some(self.target, rows[0]), some(self.baseline, rows[1])
        paired = self.paired
        clusters = some(self.clusters, rows[0]) if paired else tuple(map(some, self.clusters, rows))
        return replace(self, target=target, baseline=baseline, clusters=clusters)

    @property
    def sha256(self) -> str:
        """SHA-256 of `[[target...],[baseline...]]` as UTF-8 JSON without spaces or escapes, in hex."""
        text = json.dumps([self.target, self.baseline], ensure_ascii=False, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    def __repr__(self) -> str:
        target = f"{len(self.target)} {brief(self.target_name)}"
        baseline = f"{len(self.baseline)} {brief(self.baseline_name)}" + ", paired" * self.paired
        return f"<Contrast {brief(repr(self.name))}: {target} / {baseline}>"

    def _repr_html_(self) -> str:
        table = f"<caption>{html.escape(repr(self).strip('<>'))}</caption>"
        first = zip_longest(self.target[:4], self.baseline[:4], fillvalue="")
        for cells in [(self.target_name, self.baseline_name), *first]:
            table += "<tr>" + "".join(f"<td>{html.escape(brief(x))}</td>" for x in cells) + "</tr>"
        return f'<table style="text-align: left">{table}</table>'


def load_contrast(name: str) -> Contrast:
    """Return a contrast written for this package: 96 or more pairs, each in one sentence frame.

    >>> load_contrast("refusal")
    <Contrast 'refusal': 108 harmful / 108 harmless, paired>

    No prompt occurs in two sets. An unknown name raises InputError.

    Args:
        name: "refusal" (harmful / harmless requests) or "negativity" (negative / neutral
            statements); their controls "alarm" (harmless requests that sound dangerous / calm)
            and "positivity" (positive / neutral statements); or another concept of `BUNDLED`.
            See `data/README.md`.
    """
    if name not in BUNDLED:
        problem = f"there is no bundled contrast {name!r}: {did_you_mean(name.lower(), BUNDLED)}"
        raise InputError(f"{problem}there are {', '.join(BUNDLED)}; or use `contrast_from_file`")
    with (_DATA / f"{name}.csv").open(encoding="utf-8", newline="") as file:
        (_, _, *sides), *rows = csv.reader(file)  # topic, frame, and the two sides by name
    topics, frames, target, baseline = zip(*rows, strict=True)
    clusters = tuple(zip(topics, frames, strict=True))
    return Contrast(name, target, baseline, sides[0], sides[1], paired=True, clusters=clusters)


def bundled_contrasts() -> tuple[str, ...]:
    """The names that `load_contrast` takes.

    >>> bundled_contrasts()[:2]
    ('refusal', 'negativity')
    """
    return BUNDLED


def as_contrast(value: Any) -> Any:
    """A contrast, or several, from bundled names, mappings of fields, or tables of two columns."""
    if isinstance(value, str):
        return load_contrast(value)
    if isinstance(value, Mapping) and "target" in value:
        return Contrast(**{"name": "contrast"} | dict(value))
    if isinstance(value, Mapping):
        return {key: as_contrast(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(map(as_contrast, value))
    if hasattr(value, "columns") and hasattr(value, "dropna"):
        if len(value.columns) != 2:
            names = ", ".join(map(quoted, value.columns))
            raise InputError(f"a contrast has two columns, not {names}: give table[[A, B]]")
        sides = {str(column): tuple(value[column].dropna()) for column in value.columns}
        return Contrast("contrast", *sides.values(), *sides)  # type: ignore[arg-type]
    if isinstance(value, Contrast):
        return value
    raise InputError(f"{quoted(value)} is no contrast: give a bundled one's name, or a Contrast")


READERS["Contrast"] = as_contrast

Cells = list[tuple[str, Any]]  # place and value; messages name the place, "target[3]" for instance


def check_text(place: str, value: object) -> None:
    """Raise an InputError if the value is not a string or can't be encoded as UTF-8."""
    if not isinstance(value, str):
        kind = type(value).__name__
        raise InputError(f"{place} is {quoted(value)}, {kind}, not a string: write text or drop it")
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise InputError(f"{place} holds half a surrogate pair: repair the character or drop it")


def check_filled(place: str, value: object) -> None:
    """Raise an InputError if the value is missing, blank or not text."""
    if value is None or (isinstance(value, str) and not value.strip()):
        raise InputError(f"{place} is empty: write text there or drop it")
    check_text(place, value)


def checked_sides(
    sides: Mapping[str, Cells], *, paired: bool = False, keep_duplicates: bool = False
) -> list[tuple[str, ...]]:
    """Return the prompts of each named set; raise InputError for sets that `Contrast` refuses."""
    for name, side in sides.items():
        if not side:
            raise InputError(f"the {name} set is empty: give at least one prompt")
    places: dict[str, tuple[str, str]] = {}
    for name, (place, prompt) in ((name, cell) for name, side in sides.items() for cell in side):
        check_filled(place, prompt)
        owner, first = places.setdefault(" ".join(prompt.split()), (name, place))
        if (owner, first) != (name, place) and not (keep_duplicates and owner == name):
            raise InputError(f"{place} repeats {first}: drop one, {quoted(prompt)} can stand once")
    longest, fewest = max(sides.values(), key=len), min(map(len, sides.values()))
    if paired and fewest < len(longest):
        counts = " and ".join(f"{len(side)} {name}" for name, side in sides.items())
        advice = "add the missing ones or set paired=False"
        raise InputError(f"{longest[fewest][0]} has no partner ({counts} prompts): {advice}")
    return [tuple(prompt for _, prompt in side) for side in sides.values()]


def brief(text: str) -> str:
    """Return the text on one line of at most 80 characters."""
    line = " ".join(text.split())
    return line if len(line) <= 80 else line[:77] + "..."


def quoted(value: object) -> str:
    """Return the value as a message shows it: on one line, a string in quotation marks."""
    return f'"{brief(value)}"' if isinstance(value, str) else brief(repr(value))
