"""How far one choice moves a cosine: the difference of two, measured on the same prompts."""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from ..errors import InputError
from .gram import Gram, mean_weights
from .student import student_quantile


class CosineDifference(NamedTuple):
    """The second plain cosine less the first at each layer, and its interval; float64."""

    value: Float[Tensor, " layer"]
    lower: Float[Tensor, " layer"]
    upper: Float[Tensor, " layer"]


def cosine_difference(first: Gram, second: Gram, *, confidence: float = 0.95) -> CosineDifference:
    """The plain cosine of `second` less that of `first`, where both hold the same prompts.

    Row `i` of the one must belong to the same prompt, or pair, as row `i` of the other: what a prompt
    does to both cosines then cancels, and the interval is as narrow as the change is common to all
    prompts. Jackknife over the rows of both contrasts, with Student's t. NaN with fewer than two rows
    in a group.

    Raises:
        InputError: if the two have different rows.

    Reference: Efron and Stein 1981, doi:10.1214/aos/1176345462.
    """
    if (first.groups_a, first.groups_b) != (second.groups_a, second.groups_b):
        raise InputError(
            f"the two have rows {first.groups_a} and {first.groups_b}, {second.groups_a} and "
            f"{second.groups_b}: a difference needs the same prompts in both"
        )
    value = second.plain - first.plain
    smallest = min(*first.groups_a, *first.groups_b)
    if smallest < 2:
        unknown = torch.full_like(value, torch.nan)
        return CosineDifference(value, unknown, unknown.clone())
    left_out = [
        after - before
        for before, after in zip(_left_out_cosines(first), _left_out_cosines(second), strict=True)
    ]
    variance = torch.stack(
        [
            (part - part.mean(-1, keepdim=True)).square().mean(-1) * (part.shape[-1] - 1)
            for part in left_out
        ]
    ).sum(0)
    half = student_quantile((1 + confidence) / 2, smallest - 1) * variance.sqrt()
    return CosineDifference(value, value - half, value + half)


def _left_out_cosines(gram: Gram) -> list[Float[Tensor, "layer row"]]:
    """The plain cosine without each row, one tensor per group of either contrast."""
    found = []
    sides = (
        (gram.aa, gram.ab, gram.groups_a, gram.bb, gram.groups_b),
        (gram.bb, gram.ab.mT, gram.groups_b, gram.aa, gram.groups_a),
    )
    for own, cross, groups, other, other_groups in sides:
        weights, other_weights = mean_weights(groups), mean_weights(other_groups)
        with_own, with_other = own @ weights, cross @ other_weights
        norm = (with_own @ weights)[:, None]
        inner = (with_other @ weights)[:, None]
        other_norm = (other @ other_weights @ other_weights)[:, None]
        start = 0
        for n in groups:
            rows = slice(start, start + n)
            start += n
            block = own[:, rows, rows]
            # The direction without row i is the direction plus (group's mean - row) / (n - 1).
            moved_inner = _less_rows(with_other[:, rows]) / (n - 1)
            moved = block.mean((-2, -1))[:, None] - 2 * block.mean(-1)
            moved = moved + block.diagonal(dim1=-2, dim2=-1)
            squared = norm + 2 * _less_rows(with_own[:, rows]) / (n - 1) + moved / (n - 1) ** 2
            found.append((inner + moved_inner) / (squared * other_norm).sqrt())
    return found


def _less_rows(products: Float[Tensor, "layer row"]) -> Float[Tensor, "layer row"]:
    return products.mean(-1, keepdim=True) - products
