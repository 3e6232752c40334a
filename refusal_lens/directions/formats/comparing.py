"""Two sets of directions -> how alike they are at every layer, and what to hold against that."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from ...errors import InputError
from ..similarity import cosine_matrix
from .known import Directions

SIGN_FLIP = -0.5
"""Cosine of consecutive layers below which a direction has turned round rather than moved."""


@dataclass(frozen=True, eq=False, repr=False)
class Comparison:
    """How alike two sets of directions are; printed, a table and what to hold against it.

    Attributes:
        a: the one set.
        b: the other.
        matrix: cosine of every row of `a` with every row of `b`; NaN where either is noise.
        layers: the layers that both have; None where a file doesn't say which its rows are, and
            rows are compared in their order.
        cosine: cosine at each of those layers (rows).
        warnings: why the cosines may not mean what they seem to, one sentence each.
    """

    a: Directions
    b: Directions
    matrix: Float[Tensor, "layer_a layer_b"]
    layers: tuple[int, ...] | None
    cosine: Float[Tensor, " layer"]
    warnings: tuple[str, ...]

    def __str__(self) -> str:
        lines = [f"A  {self.a}", f"B  {self.b}", ""]
        one, other, names = self.a, self.b, ("A", "B")
        if len(other.vectors) == 1:
            one, other, names = self.b, self.a, ("B", "A")
        if _same(self.a, self.b):
            lines.append("A and B are the same: from each layer to the next")
            lines += _table(self.layers, self.matrix.diagonal(1))
        elif len(one.vectors) == 1 and (len(other.vectors) > 1 or not len(self.cosine)):
            lines.append("{}'s one direction against every layer of {}".format(*names))
            lines += _table(other.layers, self.matrix.flatten())
        elif len(self.cosine):
            lines += _table(self.layers, self.cosine)
        return "\n".join([*lines, *(f"! {warning}" for warning in self.warnings)])

    def __repr__(self) -> str:
        return f"Comparison({self.a!r}, {self.b!r}: {len(self.warnings)} warnings)"


def compare(a: Directions, b: Directions) -> Comparison:
    """Cosine of two sets of directions at the layers they share, with the warnings that apply.

    A set compared with itself shows how a direction moves through depth (`matrix`). The noise
    floor is `cosine_similarity`'s, against each file's own largest norm.

    Raises:
        InputError: if the two differ in d_model.
    """
    if a.d_model != b.d_model:
        raise InputError(
            f"{a.source} has d_model {a.d_model}, {b.source} {b.d_model}: directions of different "
            "models live in different spaces and can't be compared"
        )
    matrix = cosine_matrix(a.vectors, b.vectors)
    if a.layers is None or b.layers is None:
        layers = None
        n = len(a.vectors) if len(a.vectors) == len(b.vectors) else 0
        cosine = matrix.diagonal()[:n]
    else:
        layers = tuple(layer for layer in a.layers if layer in b.layers)
        rows = [a.layers.index(layer) for layer in layers]
        columns = [b.layers.index(layer) for layer in layers]
        cosine = matrix[rows, columns]
    return Comparison(a, b, matrix, layers, cosine, _warnings(a, b))


def sign_flips(directions: Directions) -> tuple[tuple[int, int, float], ...]:
    """Where a direction turns round from one layer to the next: both layers and their cosine.

    Methods that fix an axis and not which way it points (a principal component, a learned
    subspace) may answer either sign at each layer. Rows are numbered where layers are unknown.
    """
    layers = directions.layers or range(len(directions.vectors))
    steps = cosine_matrix(directions.vectors, directions.vectors).diagonal(1).tolist()
    return tuple(
        (here, after, cosine)
        for here, after, cosine in zip(layers, layers[1:], steps, strict=False)
        if after == here + 1 and cosine < SIGN_FLIP
    )


def _warnings(a: Directions, b: Directions) -> tuple[str, ...]:
    found = []
    if not _same(a, b):
        found += _differences(a, b)
    for name, directions in (("A", a), ("B", b))[: 1 if _same(a, b) else 2]:
        noise = cosine_matrix(directions.vectors, directions.vectors).diagonal().isnan()
        for row in noise.nonzero().flatten().tolist():
            where = row if directions.layers is None else directions.layers[row]
            found.append(f"{name} is rounding noise at layer {where}: no cosine there (nan)")
        found += [
            f"{name} turns round from layer {here} to {after} (cosine {cosine:.3f} with itself): "
            "its sign is arbitrary from layer to layer, compare the size of cosines, not the sign"
            for here, after, cosine in sign_flips(directions)
        ]
    return tuple(found)


def _differences(a: Directions, b: Directions) -> list[str]:
    """What lies between two sets besides their directions."""
    found = []
    if a.model is None or b.model is None:
        found.append(
            f"the model of {_lacking('model', a, b)} isn't recorded: equal d_model does not make "
            "one model, and directions of two models have no common space"
        )
    elif a.model != b.model:
        found.append(
            f"different models ({a.model}, {b.model}): their d_model agrees, their spaces need "
            "not, so a cosine says nothing unless one was made from the other"
        )
    if a.position is None or b.position is None:
        found.append(f"the position of {_lacking('position', a, b)} isn't recorded")
    elif a.position != b.position:
        found.append(
            f"different positions ({a.position}, {b.position}): part of the difference is the "
            "token's, not the direction's"
        )
    if a.layers is None or b.layers is None:
        found.append(
            f"the layers of {_lacking('layers', a, b)} aren't recorded, or not whether before or "
            "after the block: at best rows go with rows in their order; say hook= when reading"
        )
        if len(a.vectors) != len(b.vectors):
            found.append(f"{len(a.vectors)} and {len(b.vectors)} rows don't go with one another")
    elif not set(a.layers) & set(b.layers):
        found.append("no layer in common")
    return found


def _lacking(what: str, a: Directions, b: Directions) -> str:
    return " and ".join(name for name, d in (("A", a), ("B", b)) if getattr(d, what) is None)


def _same(a: Directions, b: Directions) -> bool:
    return a.source == b.source and torch.equal(a.vectors, b.vectors)


def _table(layers: tuple[int, ...] | None, cosine: Tensor) -> list[str]:
    name, numbers = ("row", range(len(cosine))) if layers is None else ("layer", layers)
    pairs = zip(numbers, cosine.tolist(), strict=False)  # steps are one fewer than layers
    rows = [f"{number:>5}  {value:>+7.4f}" for number, value in pairs]
    return [f"{name:>5}   cosine", *rows]
