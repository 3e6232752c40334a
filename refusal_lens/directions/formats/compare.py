"""Compare two sets of directions: their cosine at every layer, with warnings."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from ...errors import InputError
from ..similarity import cosine_matrix
from .directions_file import Directions

SIGN_FLIP = -0.5  # a lower cosine of consecutive layers means that the direction changed its sign


@dataclass(frozen=True, eq=False, repr=False)
class Comparison:
    """Cosines of two sets of directions; printing shows a table and the warnings.

    Attributes:
        a, b: the two sets.
        matrix: cosine of every row of `a` with every row of `b`; NaN where either is noise.
        layers: the layers of both sets; None if the layers of either are unknown.
        cosine: cosine at each of `layers`, or row by row if the layers are unknown.
        warnings: reasons why the cosines may mislead, one sentence each.
    """

    a: Directions
    b: Directions
    matrix: Float[Tensor, "layer_a layer_b"]
    layers: tuple[int, ...] | None
    cosine: Float[Tensor, " layer"]
    warnings: tuple[str, ...]

    def __repr__(self) -> str:
        lines = [f"A  {self.a}", f"B  {self.b}", ""]
        layers, cosine = self.layers, self.cosine
        if _same(self.a, self.b):
            lines.append("A and B are the same: from each layer to the next")
            cosine = self.matrix.diagonal(1)
        elif 1 in self.matrix.shape and self.matrix.numel() > len(cosine):
            one, many = ("A", "B") if len(self.a.vectors) == 1 else ("B", "A")
            lines.append(f"{one}'s one direction against every layer of {many}")
            layers, cosine = getattr(self, many.lower()).layers, self.matrix.flatten()
        if len(cosine):
            lines.append(f"{'row' if layers is None else 'layer':>5}   cosine")
        # There is one step less than layers, hence not strict.
        rows = zip(layers or range(len(cosine)), cosine.tolist(), strict=False)
        lines += [f"{layer:>5}  {value:>+7.4f}" for layer, value in rows]
        return "\n".join([*lines, *(f"! {warning}" for warning in self.warnings)])


def compare(a: Directions, b: Directions) -> Comparison:
    """Cosine of two sets of directions at the layers of both, with the warnings that apply.

    If `a` and `b` are the same set, the comparison shows how the direction changes from layer to
    layer. InputError if they differ in d_model.
    """
    if a.vectors.shape[1] != b.vectors.shape[1]:
        widths = f"{a.source} has d_model {a.vectors.shape[1]}, {b.source} {b.vectors.shape[1]}"
        raise InputError(f"{widths}: directions of different spaces can't be compared")
    matrix = cosine_matrix(a.vectors, b.vectors)
    if a.layers is None or b.layers is None:
        layers = None
        cosine = matrix.diagonal() if len(a.vectors) == len(b.vectors) else matrix.new_empty(0)
    else:
        layers = tuple(layer for layer in a.layers if layer in b.layers)
        rows = [a.layers.index(layer) for layer in layers]
        cosine = matrix[rows, [b.layers.index(layer) for layer in layers]]
    warnings = [*_own_warnings("A", a)]
    if not _same(a, b):
        warnings = [*_differences(a, b), *warnings, *_own_warnings("B", b)]
    if not len(cosine):
        counts = f"{len(a.vectors)} and {len(b.vectors)}"
        warnings.append("no layer in common" if layers == () else f"{counts} rows can't be matched")
    return Comparison(a, b, matrix, layers, cosine, tuple(warnings))


def sign_flips(directions: Directions) -> tuple[tuple[int, int, float], ...]:
    """Consecutive layers between which `directions` change their sign, and the cosine of the two.

    A principal component, for example, has an arbitrary sign. Rows of unknown layers count from 0.
    """
    layers = directions.layers or range(len(directions.vectors))
    cosines = cosine_matrix(directions.vectors, directions.vectors).diagonal(1).tolist()
    steps = zip(layers, layers[1:], cosines, strict=False)
    return tuple(step for step in steps if step[1] == step[0] + 1 and step[2] < SIGN_FLIP)


def _own_warnings(name: str, directions: Directions) -> Iterator[str]:
    itself = cosine_matrix(directions.vectors, directions.vectors).diagonal()
    for row in itself.isnan().nonzero().flatten().tolist():
        layer = directions.layers[row] if directions.layers else row
        yield f"{name} is rounding noise at layer {layer}: no cosine there (nan)"
    for here, after, cosine in sign_flips(directions):
        turn = f"turns round from layer {here} to {after} (cosine {cosine:.3f} with itself)"
        yield f"{name} {turn}: its sign is arbitrary, compare the size of cosines, not the sign"


def _differences(a: Directions, b: Directions) -> Iterator[str]:
    """Warnings about metadata that differ or are unknown, and about models of different depth."""
    depths = [len(x.vectors) for x in (a, b) if x.layers is None or x.layers[0] <= 0]
    if len(set(depths)) == 2 and min(depths) > 1 and None in (a.model, b.model):
        depth = f"A has {depths[0]} layers, B {depths[1]}"
        yield f"{depth}: they are of different models, unless layers were left out"
    consequences = {
        "model": "directions of two models have no common space, even where d_model agrees",
        "position": "part of a difference may be the token's, not the direction's",
        "layers": "rows are compared in order; say hook= to read_directions",
    }
    for fact, consequence in consequences.items():
        values = {"A": getattr(a, fact), "B": getattr(b, fact)}
        unknown = " and ".join(name for name, value in values.items() if value is None)
        if unknown:
            yield f"{fact} of {unknown} not recorded: {consequence}"
        elif fact != "layers" and values["A"] != values["B"]:
            yield f"different {fact}s ({values['A']}, {values['B']}): {consequence}"


def _same(a: Directions, b: Directions) -> bool:
    return a.source == b.source and torch.equal(a.vectors, b.vectors)
