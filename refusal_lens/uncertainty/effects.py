"""Intervals over prompts: means, ratios, AUROC, and the difference of two cosines.

Prompts are the random sample, and `confidence` is the coverage of an interval. InputError unless
`confidence` lies between 0 and 1 and each set has a prompt.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from ..errors import InputError
from .gram import Gram, mean_weights, plain_squared_norm, slices


class Interval(NamedTuple):
    """An estimate with the ends of its confidence interval; NaN where there is no estimate."""

    value: Float[Tensor, "*axes"]
    lower: Float[Tensor, "*axes"]
    upper: Float[Tensor, "*axes"]


class IndependentSample(NamedTuple):
    """Each prompt's (or pair's) contribution to the numerator and the denominator of a ratio."""

    numerator: Float[Tensor, "*axes prompt"]
    denominator: Float[Tensor, "*axes prompt"]


def mean_interval(values: Float[Tensor, "*axes prompt"], *, confidence: float = 0.95) -> Interval:
    """Mean of `values` over the last axis, with Student's interval; NaN for one prompt or a NaN."""
    return total_interval([values], confidence=confidence)


def total_interval(
    samples: Sequence[Float[Tensor, "*axes _prompt"]], *, confidence: float = 0.95
) -> Interval:
    """Sum of the means of independent `samples`, with Student's interval.

    `[a, -b]` gives a difference of means. The smallest sample sets the degrees of freedom.
    """
    quantile = _student_quantile([sample.shape[-1] for sample in samples], confidence)
    total = torch.stack([sample.double().mean(-1) for sample in samples]).sum(0)
    error = _covariance([(sample, sample) for sample in samples]).sqrt()
    return Interval(total, total - quantile * error, total + quantile * error)


def ratio_interval(samples: Sequence[IndependentSample], *, confidence: float = 0.95) -> Interval:
    """Ratio of two sums of the means of `samples`, with Fieller's interval.

    The interval is -inf to inf where the denominator may be 0. Reference: Fieller 1954,
    doi:10.1111/j.2517-6161.1954.tb00159.x.
    """
    sizes = [sample.numerator.shape[-1] for sample in samples]
    squared = _student_quantile(sizes, confidence) ** 2
    top = torch.stack([sample.numerator.double().mean(-1) for sample in samples]).sum(0)
    bottom = torch.stack([sample.denominator.double().mean(-1) for sample in samples]).sum(0)
    var_top = _covariance([(sample.numerator, sample.numerator) for sample in samples])
    both = _covariance([(sample.numerator, sample.denominator) for sample in samples])
    var_bottom = _covariance([(sample.denominator, sample.denominator) for sample in samples])
    square = bottom.square() - squared * var_bottom
    middle = top * bottom - squared * both
    root = (middle.square() - square * (top.square() - squared * var_top)).clamp_min(0).sqrt()
    ratio = top / bottom
    unknown = ratio.isnan() | square.isnan()
    lower = torch.where(square > 0, (middle - root) / square, -torch.inf)
    upper = torch.where(square > 0, (middle + root) / square, torch.inf)
    return Interval(*(end.masked_fill(unknown, torch.nan) for end in (ratio, lower, upper)))


def auroc_interval(
    target: Float[Tensor, "*axes target"],
    baseline: Float[Tensor, "*axes baseline"],
    *,
    confidence: float = 0.95,
) -> Interval:
    """Area under the ROC curve of scores with DeLong's interval, both in [0, 1]; 1/2 is chance.

    `target` are scores of prompts that should score high, `baseline` low. DeLong's interval has no
    width where the scores separate perfectly; the interval then extends to `((1 - confidence) / 2)
    ** (1 / n)`, with `n` the smaller number of prompts. Reference: DeLong, DeLong and
    Clarke-Pearson 1988, doi:10.2307/2531595.
    """
    sizes = (target.shape[-1], baseline.shape[-1])
    quantile = _student_quantile(sizes, confidence)
    one, other = target.double()[..., :, None], baseline.double()[..., None, :]
    wins = (one > other).double() + (one == other).double() / 2
    wins = wins.masked_fill((one + other).isnan(), torch.nan)
    area = wins.mean((-2, -1))
    by_target, by_baseline = wins.mean(-1), wins.mean(-2)
    error = _covariance([(by_target, by_target), (by_baseline, by_baseline)]).sqrt()
    reach = ((1 - confidence) / 2) ** (1 / min(sizes))
    lower = torch.where(area == 1, reach, (area - quantile * error).clamp_min(0))
    upper = torch.where(area == 0, 1 - reach, (area + quantile * error).clamp_max(1))
    return Interval(area, lower, upper)


def cosine_difference(first: Gram, second: Gram, *, confidence: float = 0.95) -> Interval:
    """The plain cosine of `second` minus that of `first`, per layer, on the same prompts.

    `first` and `second` are Gram matrices under two specifications; row i must belong to the same
    prompt or pair. A jackknife over the rows of both contrasts, with Student's t, cancels a
    prompt's common influence on the two cosines (Efron and Stein 1981, doi:10.1214/aos/1176345462).
    The ends are NaN with fewer than two rows in a group. InputError if the groups differ.
    """
    one, other = ((gram.groups_a, gram.groups_b) for gram in (first, second))
    if one != other:
        raise InputError(f"the rows are {one} and {other}: a difference needs the same prompts")
    value = second.plain - first.plain
    variance = torch.zeros_like(value)
    for before, after in zip(left_out_cosines(first), left_out_cosines(second), strict=True):
        change = after - before
        variance += change.var(-1, correction=0) * (change.shape[-1] - 1)
    half = _student_quantile((*first.groups_a, *first.groups_b), confidence) * variance.sqrt()
    return Interval(value, value - half, value + half)


def left_out_cosines(gram: Gram) -> list[Float[Tensor, "layer row"]]:
    """The plain cosine without each row in turn, one tensor per group of each contrast."""
    found = []
    sides = ((gram.aa, gram.ab, gram.groups_a), (gram.bb, gram.ab.mT, gram.groups_b))
    for (own, cross, groups), (other, _, other_groups) in (sides, sides[::-1]):
        with_other = cross @ mean_weights(other_groups)
        other_norm = plain_squared_norm(other, other_groups)[:, None]
        for rows, n in slices(groups):
            weights = mean_weights(groups).repeat(n, 1)
            weights[:, rows] = (1 - torch.eye(n)).double() / (n - 1)
            norm = ((weights @ own) * weights).sum(-1)
            found.append(with_other @ weights.T / (norm * other_norm).sqrt())
    return found


def _covariance(samples: Sequence[tuple[Tensor, Tensor]]) -> Float[Tensor, "*axes"]:
    """Covariance of two sums of means over prompts; NaN where a sample has one prompt."""
    parts = []
    for one, other in samples:
        one, other = one.double(), other.double()
        products = (one - one.mean(-1, keepdim=True)) * (other - other.mean(-1, keepdim=True))
        n = one.shape[-1]
        parts.append(products.sum(-1) / (n * (n - 1) or torch.nan))
    return torch.stack(parts).sum(0)


def _student_quantile(sizes: Sequence[int], confidence: float) -> float:
    from scipy.stats import t

    if not 0 < confidence < 1:
        raise InputError(f"confidence = {confidence}: a probability between 0 and 1, such as 0.95")
    if min(sizes) == 0:
        raise InputError("there are no prompts to take a mean of: pass at least two")
    return float(t.ppf((1 + confidence) / 2, max(1, min(sizes) - 1)))
