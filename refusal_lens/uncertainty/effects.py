"""Intervals over prompts for what is measured prompt by prompt: means, their ratios, AUROC.

Prompts are the sample: an interval says where the number would lie with other prompts of the same
kinds, the directions and the model being what they are.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from ..errors import InputError
from .student import student_quantile


class Interval(NamedTuple):
    """A number with the ends of its confidence interval; NaN where it can't be measured."""

    value: Float[Tensor, "*axes"]
    lower: Float[Tensor, "*axes"]
    upper: Float[Tensor, "*axes"]


class Group(NamedTuple):
    """Prompts that are independent of every other group's, and what each adds to a ratio.

    The ratio's numerator is the sum over groups of the mean of `numerator`, its denominator
    likewise. A pair of prompts counts as one.
    """

    numerator: Float[Tensor, "*axes prompt"]
    denominator: Float[Tensor, "*axes prompt"]


def mean_interval(values: Float[Tensor, "*axes prompt"], *, confidence: float = 0.95) -> Interval:
    """Mean over the last axis and Student's interval. NaN where there is one prompt, or a NaN.

    Raises:
        InputError: unless `confidence` lies between 0 and 1.
    """
    return total_interval([values], confidence=confidence)


def total_interval(
    groups: Sequence[Float[Tensor, "*axes _prompt"]], *, confidence: float = 0.95
) -> Interval:
    """Sum of the means of independent groups: `[a, -b]` for a difference. Student's interval.

    The degrees of freedom are those of the smallest group, which is conservative.

    Raises:
        InputError: as `mean_interval`.
    """
    quantile = _quantile(groups, confidence)
    total = torch.stack([group.double().mean(-1) for group in groups]).sum(0)
    error = torch.stack([_variance(group, group) for group in groups]).sum(0).sqrt()
    return Interval(total, total - quantile * error, total + quantile * error)


def ratio_interval(groups: Sequence[Group], *, confidence: float = 0.95) -> Interval:
    """Ratio of two totals that may rest on the same prompts, with Fieller's interval.

    Fieller's interval never divides by a denominator that might be 0: where it might be, the
    interval is the whole line, -inf to inf.

    Raises:
        InputError: as `mean_interval`.

    Reference: Fieller 1954, doi:10.1111/j.2517-6161.1954.tb00159.x.
    """
    squared = _quantile([group.numerator for group in groups], confidence) ** 2
    top = torch.stack([group.numerator.double().mean(-1) for group in groups]).sum(0)
    bottom = torch.stack([group.denominator.double().mean(-1) for group in groups]).sum(0)
    var_top, both, var_bottom = (
        torch.stack([_variance(group[i], group[j]) for group in groups]).sum(0)
        for i, j in ((0, 0), (0, 1), (1, 1))
    )
    square = bottom.square() - squared * var_bottom
    middle = top * bottom - squared * both
    root = (middle.square() - square * (top.square() - squared * var_top)).clamp_min(0).sqrt()
    bounded = square > 0
    ratio = top / bottom
    unknown = ratio.isnan() | square.isnan()
    lower = torch.where(bounded, (middle - root) / square, -torch.inf)
    upper = torch.where(bounded, (middle + root) / square, torch.inf)
    nan = torch.full_like(ratio, torch.nan)
    return Interval(
        torch.where(unknown, nan, ratio),
        torch.where(unknown, nan, lower),
        torch.where(unknown, nan, upper),
    )


def auroc_interval(
    target: Float[Tensor, "*axes target"],
    baseline: Float[Tensor, "*axes baseline"],
    *,
    confidence: float = 0.95,
) -> Interval:
    """Area under the ROC curve of scores, in [0, 1]: 1/2 is chance, 1 tells every pair apart.

    DeLong's interval, cut off at 0 and 1. Where the scores separate perfectly it has no width of
    its own: then it reaches as far as that many prompts can show, a share of
    `((1 - confidence) / 2) ** (1 / n)` with `n` the smaller number of prompts.

    Raises:
        InputError: as `mean_interval`.

    Reference: DeLong, DeLong and Clarke-Pearson 1988, doi:10.2307/2531595.
    """
    quantile = _quantile([target, baseline], confidence)
    one = rearrange(target.double(), "... target -> ... target 1")
    other = rearrange(baseline.double(), "... baseline -> ... 1 baseline")
    wins = (one > other).double() + (one == other).double() / 2
    wins = torch.where((one + other).isnan(), torch.nan, wins)
    per_target, per_baseline = wins.mean(-1), wins.mean(-2)
    area = per_target.mean(-1)
    error = (_variance(per_target, per_target) + _variance(per_baseline, per_baseline)).sqrt()
    n = min(target.shape[-1], baseline.shape[-1])
    reach = ((1 - confidence) / 2) ** (1 / n)
    perfect, inverted = area == 1, area == 0
    lower = torch.where(perfect, reach, (area - quantile * error).clamp_min(0))
    upper = torch.where(inverted, 1 - reach, (area + quantile * error).clamp_max(1))
    return Interval(area, lower, upper)


def _variance(
    a: Float[Tensor, "*axes prompt"], b: Float[Tensor, "*axes prompt"]
) -> Float[Tensor, "*axes"]:
    """Covariance of the two means; NaN with one prompt."""
    n = a.shape[-1]
    if n < 2:
        return torch.full(a.shape[:-1], torch.nan, dtype=torch.float64)
    a, b = a.double(), b.double()
    centred = (a - a.mean(-1, keepdim=True)) * (b - b.mean(-1, keepdim=True))
    return centred.sum(-1) / (n * (n - 1))


def _quantile(groups: Sequence[Tensor], confidence: float) -> float:
    if not 0 < confidence < 1:
        raise InputError(f"confidence = {confidence}: a probability between 0 and 1, such as 0.95")
    fewest = min(group.shape[-1] for group in groups)
    if fewest == 0:
        raise InputError("there are no prompts to take a mean of: give at least two")
    return student_quantile((1 + confidence) / 2, max(1, fewest - 1))
