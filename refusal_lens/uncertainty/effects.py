"""Intervals over prompts: means, ratios, AUROC, and the difference of two cosines.

Prompts are the random sample, and `confidence` is the coverage of an interval. `clusters` holds labels
for the prompts of each sample (see `clusters.ways`), or None where prompts are independent. InputError
unless `confidence` lies between 0 and 1, each set has a prompt, and labels fit the prompts.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..errors import InputError
from .clusters import Clusters, Ways, cluster_weights, ways
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


def mean_interval(
    values: Float[Tensor, "*axes prompt"], *, confidence: float = 0.95, clusters: Clusters = None
) -> Interval:
    """Mean of `values` over the last axis, with Student's interval; NaN for one prompt or a NaN."""
    return total_interval([values], confidence=confidence, clusters=[clusters])


def total_interval(
    samples: Sequence[Float[Tensor, "*axes _prompt"]],
    *,
    confidence: float = 0.95,
    clusters: Sequence[Clusters] | None = None,
) -> Interval:
    """Sum of the means of independent `samples`, with Student's interval.

    `[a, -b]` gives a difference of means. The smallest sample sets the degrees of freedom.
    """
    drawn, quantile = _sampling([sample.shape[-1] for sample in samples], clusters, confidence)
    total = torch.stack([sample.double().mean(-1) for sample in samples]).sum(0)
    error = _covariances(drawn, [(sample, sample) for sample in samples]).amax(0).sqrt()
    return Interval(total, total - quantile * error, total + quantile * error)


def ratio_interval(
    samples: Sequence[IndependentSample],
    *,
    confidence: float = 0.95,
    clusters: Sequence[Clusters] | None = None,
) -> Interval:
    """Ratio of two sums of means, with Fieller's interval: infinite where the denominator may be 0.

    Reference: Fieller 1954, doi:10.1111/j.2517-6161.1954.tb00159.x.
    """
    sizes = [sample.numerator.shape[-1] for sample in samples]
    drawn, quantile = _sampling(sizes, clusters, confidence)
    squared = quantile**2
    top = torch.stack([sample.numerator.double().mean(-1) for sample in samples]).sum(0)
    bottom = torch.stack([sample.denominator.double().mean(-1) for sample in samples]).sum(0)
    var_top = _covariances(drawn, [(sample.numerator, sample.numerator) for sample in samples])
    both = _covariances(drawn, [(sample.numerator, sample.denominator) for sample in samples])
    var_bottom = _covariances(drawn, [(each.denominator, each.denominator) for each in samples])
    square = bottom.square() - squared * var_bottom
    middle = top * bottom - squared * both
    root = (middle.square() - square * (top.square() - squared * var_top)).clamp_min(0).sqrt()
    ratio = top / bottom
    unknown = ratio.isnan() | square.isnan().any(0)
    lower = torch.where(square > 0, (middle - root) / square, -torch.inf).amin(0)
    upper = torch.where(square > 0, (middle + root) / square, torch.inf).amax(0)
    return Interval(*(end.masked_fill(unknown, torch.nan) for end in (ratio, lower, upper)))


def auroc_interval(
    target: Float[Tensor, "*axes target"],
    baseline: Float[Tensor, "*axes baseline"],
    *,
    confidence: float = 0.95,
) -> Interval:
    """Area under the ROC curve of scores with DeLong's interval, both in [0, 1]; 1/2 is chance.

    `target` should score high, `baseline` low. Where scores separate perfectly the interval extends to
    `((1 - confidence) / 2) ** (1 / n)`, with `n` the smaller number of prompts, for DeLong's has no
    width. Reference: DeLong, DeLong and Clarke-Pearson 1988, doi:10.2307/2531595.
    """
    drawn, quantile = _sampling([target.shape[-1], baseline.shape[-1]], None, confidence)
    one, other = target.double()[..., :, None], baseline.double()[..., None, :]
    wins = (one > other).double() + (one == other).double() / 2
    wins = wins.masked_fill((one + other).isnan(), torch.nan)
    area = wins.mean((-2, -1))
    by_target, by_baseline = wins.mean(-1), wins.mean(-2)
    errors = _covariances(drawn, [(by_target, by_target), (by_baseline, by_baseline)])
    half = quantile * errors[0].sqrt()
    reach = ((1 - confidence) / 2) ** (1 / min(target.shape[-1], baseline.shape[-1]))
    lower = torch.where(area == 1, reach, (area - half).clamp_min(0))
    upper = torch.where(area == 0, 1 - reach, (area + half).clamp_max(1))
    return Interval(area, lower, upper)


def cosine_difference(first: Gram, second: Gram, *, confidence: float = 0.95) -> Interval:
    """The plain cosine of `second` minus that of `first`, per layer, on the same prompts in order.

    A jackknife over the rows of both contrasts, with Student's t, cancels a prompt's common
    influence on the two cosines (Efron and Stein 1981, doi:10.1214/aos/1176345462). NaN ends with
    fewer than two rows in a group. Of crossed clusters, the first way counts.
    """
    one, other = ([len(w) for w in (*gram.groups_a, *gram.groups_b)] for gram in (first, second))
    if one != other:
        raise InputError(f"the rows are {one} and {other}: a difference needs the same prompts")
    value = second.plain - first.plain
    variance = torch.zeros_like(value)
    for before, after in zip(left_out_cosines(first), left_out_cosines(second), strict=True):
        variance += (after - before).var(-1, correction=0) * (after.shape[-1] - 1)
    half = _student_quantile(first.n_clusters, confidence) * variance.sqrt()
    return Interval(value, value - half, value + half)


def left_out_cosines(gram: Gram) -> list[Float[Tensor, "layer row"]]:
    """The plain cosine without each row in turn, one tensor per group of each contrast."""
    found = []
    sides = ((gram.aa, gram.ab, gram.groups_a), (gram.bb, gram.ab.mT, gram.groups_b))
    for (own, cross, groups), (other, _, other_groups) in (sides, sides[::-1]):
        with_other = cross @ mean_weights(other_groups)
        other_norm = plain_squared_norm(other, other_groups)[:, None]
        for rows, own_weights in slices(groups):
            n = len(own_weights)
            weights = mean_weights(groups).repeat(n, 1)
            others = own_weights * (1 - torch.eye(n)).double()
            weights[:, rows] = others / others.sum(-1, keepdim=True)
            norm = ((weights @ own) * weights).sum(-1)
            found.append(with_other @ weights.T / (norm * other_norm).sqrt())
    return found


def _sampling(
    sizes: Sequence[int], clusters: Sequence[Clusters] | None, confidence: float
) -> tuple[list[Ways], float]:
    """The clusters of each sample's prompts, and Student's quantile for the fewest clusters."""
    if min(sizes) == 0:
        raise InputError("there are no prompts to take a mean of: pass at least two")
    each = clusters or [None] * len(sizes)
    found = [ways("sample", c, (n,), most=n) for n, c in zip(sizes, each, strict=True)]
    shares = [cluster_weights(way)[0] for sample in found for way in sample[:2]]
    n_clusters = min(1 / float(share.square().sum()) for share in shares)
    return found, _student_quantile(n_clusters, confidence)


def _covariances(
    drawn: Sequence[Ways], samples: Sequence[tuple[Tensor, Tensor]]
) -> Float[Tensor, "way *axes"]:
    """Covariance of two sums of means, by each way of clustering; NaN for samples of one cluster."""
    totals = []
    for i in range(max(map(len, drawn))):
        parts = []
        for pair, sample in zip(samples, drawn, strict=True):
            one, other = (_cluster_errors(values, *sample[i % len(sample)]) for values in pair)
            parts.append((one * other).sum(-1))
        totals.append(torch.stack(parts).sum(0))
    if len(totals) == 3:
        totals[2] = totals[0] + totals[1] - totals[2]
    return torch.stack(totals)


def _cluster_errors(
    values: Float[Tensor, "*axes prompt"], codes: Int[Tensor, " prompt"]
) -> Float[Tensor, "*axes _cluster"]:
    """Errors of the clusters in the mean, scaled so that squares sum to the mean's variance."""
    centred = values.double() - values.double().mean(-1, keepdim=True)
    (share,) = cluster_weights((codes,))
    summed = centred.new_zeros(*centred.shape[:-1], len(share)).index_add_(-1, codes, centred)
    return summed / len(codes) / (1 - share).sqrt()


def _student_quantile(n: float, confidence: float) -> float:
    from scipy.stats import t

    if not 0 < confidence < 1:
        raise InputError(f"confidence = {confidence}: a probability between 0 and 1, such as 0.95")
    return float(t.ppf((1 + confidence) / 2, max(1, n - 1)))
