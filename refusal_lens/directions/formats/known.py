"""Directions, together with what is known of where they come from."""

import html
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import pairwise

from jaxtyping import Float
from torch import Tensor

from ...errors import InputError

ROWS = "row l is blocks.{l}.hook_resid_post"
"""How our own files say that their rows are layers in this package's counting, from 0."""

MOST_LAYERS = 10_000
"""Layer numbers from here on are damage, not depth."""


@dataclass(frozen=True, eq=False, repr=False)
class Directions:
    """One direction a layer, and what its file said about them.

    Attributes:
        vectors: `[layer d_model]`, in the file's own dtype and norm, finite.
        layers: which layer each row is: `l` for `blocks.{l}.hook_resid_post`, -1 for the
            embedding's output (`blocks.0.hook_resid_pre`). None where the file doesn't say.
        position: token position they were read at, from the end of the prompt; None if unknown.
        model: the model they belong to; None if unknown.
        contrast: what they point from and to; None if unknown.
        normalisation: what their norms mean; None if unknown.
        source: the file they were read from.
        notes: every translation that was applied on reading, in words.
    """

    vectors: Float[Tensor, "layer d_model"]
    layers: tuple[int, ...] | None
    source: str
    position: int | str | None = None
    model: str | None = None
    contrast: str | None = None
    normalisation: str | None = None
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.vectors.numel() == 0:
            raise InputError(f"{self.source} holds no numbers: shape {list(self.vectors.shape)}")
        finite = self.vectors.isfinite().all(-1)
        if not finite.all():
            row = int((~finite).nonzero()[0])
            raise InputError(
                f"{self.source} holds a value that is not finite in row {row}: a direction must be "
                "finite, leave that layer out"
            )
        if self.layers is None:
            return
        if len(self.layers) != len(self.vectors):
            raise InputError(
                f"{self.source} names {len(self.layers)} layers for {len(self.vectors)} rows"
            )
        ascending = sorted(set(self.layers)) == list(self.layers)
        if not ascending or not -1 <= self.layers[0] <= self.layers[-1] < MOST_LAYERS:
            raise InputError(
                f"{self.source} numbers its layers {_short(self.layers)}: they must ascend, from "
                f"-1 (the embedding's output) or above, to less than {MOST_LAYERS}"
            )

    @property
    def d_model(self) -> int:
        """Width of the residual stream."""
        return self.vectors.shape[1]

    def at(self, *layers: int) -> "Directions":
        """The directions of these layers alone.

        Raises:
            InputError: if one of them isn't there.
        """
        known = self.layers or ()
        absent = [layer for layer in layers if layer not in known]
        if absent:
            raise InputError(f"{self.source} has no layer {absent[0]}: {self._describe_layers()}")
        rows = [known.index(layer) for layer in layers]
        return replace(self, vectors=self.vectors[rows], layers=tuple(layers))

    def metadata(self) -> dict[str, str]:
        """All that is known, as text: what goes into a file beside the numbers."""
        said = {
            "layer": None if self.layers is None else ROWS,
            "layers": None if self.layers is None else json.dumps(self.layers),
            "position": None if self.position is None else str(self.position),
            "model": self.model,
            "contrast": self.contrast,
            "normalisation": self.normalisation,
            "notes": json.dumps(self.notes) if self.notes else None,
        }
        return {name: value for name, value in said.items() if value is not None}

    def __str__(self) -> str:
        facts = [
            self._describe_layers(),
            f"d_model {self.d_model}",
            f"position {'unknown' if self.position is None else self.position}",
            f"model {self.model or 'unknown'}",
            f"contrast {self.contrast or 'unknown'}",
            f"normalisation {self.normalisation or 'unknown'}",
        ]
        return "\n  ".join([f"{self.source}", ", ".join(facts), *self.notes])

    def _repr_html_(self) -> str:
        return f"<pre>{html.escape(str(self))}</pre>"

    def __repr__(self) -> str:
        return f"Directions({self.source}: {self._describe_layers()}, d_model {self.d_model})"

    def _describe_layers(self) -> str:
        if self.layers is None:
            return f"{len(self.vectors)} rows of unknown layers"
        if len(self.layers) == 1:
            return f"layer {self.layers[0]}"
        return f"layers {_short(self.layers)}"


@dataclass(frozen=True)
class FileMetadata:
    """What a file says of its rows, still in its own counting.

    Attributes:
        layers: numbers of the rows; None where the file gives none.
        hook: which hook of block `l` the number `l` names; None where the file doesn't say.
    """

    layers: tuple[int, ...] | None = None
    hook: str | None = None
    position: int | str | None = None
    model: str | None = None
    contrast: str | None = None
    normalisation: str | None = None
    notes: tuple[str, ...] = ()

    @classmethod
    def in_metadata(cls, metadata: Mapping[str, object], source: str) -> "FileMetadata":
        """Undo `Directions.metadata`; entries of other names say nothing we understand.

        Raises:
            InputError: if an entry of ours does not hold what we would have written.
        """
        ours: dict[str, str] = {}
        for name in ("layer", "layers", "position", "model", "contrast", "normalisation", "notes"):
            value = metadata.get(name)
            if isinstance(value, str):
                ours[name] = value
            elif value is not None:
                raise _damaged(name, source)
        layers = _listed("layers", ours, int, source)
        position = ours.get("position")
        numbered = position is not None and re.fullmatch(r"-?\d{1,9}", position)
        return cls(
            layers=None if "layers" not in ours else layers,
            hook="resid_post" if ours.get("layer") == ROWS else None,
            position=int(position) if position is not None and numbered else position,
            model=ours.get("model"),
            contrast=ours.get("contrast"),
            normalisation=ours.get("normalisation"),
            notes=_listed("notes", ours, str, source),
        )


def _listed(name: str, metadata: Mapping[str, str], kind: type, source: str) -> tuple:
    """A JSON list of one kind of thing, or nothing."""
    try:
        items = json.loads(metadata.get(name, "[]"))
    except (ValueError, RecursionError):
        raise _damaged(name, source) from None
    if not isinstance(items, list) or any(type(item) is not kind for item in items):
        raise _damaged(name, source)
    return tuple(items)


def _damaged(name: str, source: str) -> InputError:
    return InputError(f"{source}: its metadata entry {name!r} is damaged, write it anew")


def _short(layers: tuple[int, ...]) -> str:
    if all(after == here + 1 for here, after in pairwise(layers)):
        return f"{layers[0]} to {layers[-1]}"
    listed = ", ".join(str(layer)[:9] for layer in layers[:8])
    return listed + (", ..." if len(layers) > 8 else "")
