"""The cosine of two directions at every layer, and its uncertainty."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from math import ceil
from typing import Any

import torch
from einops import einsum
from jaxtyping import Bool, Float
from torch import Tensor

from ..errors import InputError
from .cautions import Caution, cautions
from .clusters import Clusters
from .gram import ROUNDING, Gram, Groups, RowProducts, noise_products, unbiased_squared_norm
from .intervals import Noise, cosine_intervals
from .permutation import permutation_null

FEWEST_ROWS = 4  # rows per group (pairs, or prompts of one set) that the noise estimate needs
FEWEST_CLUSTERS = 6  # effective clusters per group (`Gram.n_clusters`) that hold their coverage


class Cause(StrEnum):
    """Why the cosine can't be estimated at a layer."""

    TOO_FEW_PROMPTS = "too_few_prompts"
    TOO_FEW_CLUSTERS = "too_few_clusters"
    CONSTANT = "constant"
    WEAK = "weak"
    UNBOUNDED = "unbounded"


@dataclass(frozen=True)
class Unmeasured:
    """Why a layer has no estimate; `directions` names the cause: "a", "b", both or neither alone.

    `CONSTANT`: a class has the same activation for every prompt. `WEAK`: the direction's squared
    norm is not significantly above 0. `UNBOUNDED`: the interval is unbounded.
    """

    cause: Cause
    directions: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class CosineEstimate:
    """The true cosine of two directions at each layer; float64.

    Attributes:
        unbiased, lower, upper: cosine of the true directions and its interval; may leave [-1, 1].
        band_lower, band_upper: edges of the band that holds the true cosines of all layers at once.
        reasons: per layer, why the estimate is NaN; None where there is an estimate.
        cautions: per layer, why the interval may cover less than it says.
    """

    unbiased: Float[Tensor, " layer"]
    lower: Float[Tensor, " layer"]
    upper: Float[Tensor, " layer"]
    band_lower: Float[Tensor, " layer"]
    band_upper: Float[Tensor, " layer"]
    reasons: tuple[Unmeasured | None, ...]
    cautions: tuple[tuple[Caution, ...], ...] = ()


@dataclass(frozen=True, kw_only=True)
class CosineStatistics(CosineEstimate):
    """Similarity of two directions at each layer, and its uncertainty; float64.

    Attributes:
        plain: cosine of the two sampled directions; noise biases `plain` towards 0.
        unbiased, lower, upper, band_lower, band_upper, reasons, cautions: see `CosineEstimate`.
        reliability_a, reliability_b: expected cosine with the direction from as many new prompts.
        ceiling: expected plain cosine if the true cosine is 1; 0 where a reliability is negative.
        p_value, p_adjusted: two-sided permutation test that the true cosine is 0; the adjusted
            p-value stays valid for a layer picked after seeing all layers.
        null_lower, null_upper: central range of the plain cosine if the true cosine is 0.
        confidence: the setting of `cosine_statistics`.
    >>> low, high = results.statistics["negativity"].lower, results.statistics["negativity"].upper
    """

    plain: Float[Tensor, " layer"]
    reliability_a: Float[Tensor, " layer"]
    reliability_b: Float[Tensor, " layer"]
    ceiling: Float[Tensor, " layer"]
    p_value: Float[Tensor, " layer"]
    p_adjusted: Float[Tensor, " layer"]
    null_lower: Float[Tensor, " layer"]
    null_upper: Float[Tensor, " layer"]
    confidence: float


def cosine_statistics(
    a_target: Float[Tensor, "a_target layer d_model"],
    a_baseline: Float[Tensor, "a_baseline layer d_model"],
    b_target: Float[Tensor, "b_target layer d_model"],
    b_baseline: Float[Tensor, "b_baseline layer d_model"],
    *,
    a_paired: bool,
    b_paired: bool,
    a_clusters: Clusters = None,
    b_clusters: Clusters = None,
    n_resamples: int = 10_000,
    confidence: float = 0.95,
    generator: torch.Generator,
) -> CosineStatistics:
    """Estimate, interval, band, reliability and nulls of the cosine between two mean differences.

    The two contrasts must have no prompt in common: shared prompts add their noise to the cosine.
    Prompts of different clusters must be independent; without clusters, all prompts. Rows (pairs
    in a paired contrast) must be exchangeable within a set.

    Args:
        a_target, a_baseline, b_target, b_baseline: activations of any floating dtype.
        a_paired, b_paired: whether row i of the target belongs to row i of the baseline.
        a_clusters, b_clusters: labels of the prompts, see `clusters.ways`.
        n_resamples: resamples and relabellings; InputError below `fewest_resamples(confidence)`.
        confidence: of every interval, between 0 and 1.
        generator: the only source of randomness, on the CPU.
    >>> sure = cosine_statistics(harmful, harmless, negative, neutral, a_paired=True, b_paired=True)
    """
    if n_resamples < (fewest := fewest_resamples(confidence)):
        few = f"{n_resamples} leaves too few beyond the ends of a {confidence:.0%} interval"
        raise InputError(f"n_resamples = {few}: set it to at least {fewest}")
    kinds: dict[str, Any] = {"a_paired": a_paired, "b_paired": b_paired}
    kinds |= {"a_clusters": a_clusters, "b_clusters": b_clusters}
    gram = Gram.of(a_target, a_baseline, b_target, b_baseline, **kinds)
    settings: dict[str, Any] = {"n_resamples": n_resamples, "confidence": confidence}
    settings |= {"generator": generator}
    reliable = [
        torch.stack([split_half_reliability(*side, generator=generator) for side in way.sides])
        for way in gram.one_way
    ]
    reliability_a, reliability_b = torch.stack(reliable).amin(0)  # of crossed ways the lower one
    estimate = estimate_cosine(gram, **settings)
    names = ("p_value", "p_adjusted", "null_lower", "null_upper")
    nulls = torch.full((len(names), len(gram.aa)), torch.nan, dtype=torch.float64)
    varies = ~(gram.constant_a | gram.constant_b)
    if varies.any() and _enough(gram):
        nulls[:, varies] = torch.stack(permutation_null(gram.at(varies), **settings))
    return CosineStatistics(
        plain=gram.plain,
        reliability_a=reliability_a,
        reliability_b=reliability_b,
        ceiling=(reliability_a.clamp_min(0) * reliability_b.clamp_min(0)).sqrt(),
        **vars(estimate),
        **dict(zip(names, nulls, strict=True)),
        confidence=confidence,
    )


def estimate_cosine(
    gram: Gram, *, n_resamples: int, confidence: float, generator: torch.Generator
) -> CosineEstimate:
    """The true cosine at each layer, with its interval and band; NaN where there is a reason."""
    reasons = _obstacles(gram, confidence)
    names = ("unbiased", "lower", "upper", "band_lower", "band_upper")
    values = torch.full((len(names), len(gram.aa)), torch.nan, dtype=torch.float64)
    warned: list[tuple[Caution, ...]] = [()] * len(gram.aa)
    clear = torch.tensor([reason is None for reason in reasons])
    if clear.any():
        shown = gram.at(clear)
        squared = shown.unbiased_squared_norms
        noises = [Noise.of(way, squared) for way in (shown, *shown.crossed)]
        ends = cosine_intervals(noises, n_resamples, confidence, generator)
        bounded = ~(ends[0].isnan() | ends[1].isnan())
        found = torch.stack([unbiased_cosine(noises), *ends])
        values[:, clear] = torch.where(bounded, found, torch.nan)
        layers = clear.nonzero()[:, 0].tolist()
        each = zip(layers, bounded, cautions(shown, noises[-1]), strict=True)
        for layer, is_bounded, caution in each:
            warned[layer] = caution
            reasons[layer] = None if is_bounded else Unmeasured(Cause.UNBOUNDED)
    curves = dict(zip(names, values, strict=True))
    return CosineEstimate(**curves, reasons=tuple(reasons), cautions=tuple(warned))


def split_half_reliability(
    gram: RowProducts, groups: Groups, *, n_splits: int = 200, generator: torch.Generator
) -> Float[Tensor, " layer"]:
    """Expected cosine between this direction and the same direction from as many new prompts.

    The mean cosine between the directions of two random halves, extrapolated to all prompts by the
    formula of Spearman (1910, doi:10.1111/j.2044-8295.1910.tb00206.x) and Brown (1910,
    doi:10.1111/j.2044-8295.1910.tb00207.x): 1 without noise, about 0 and possibly negative without
    signal. NaN where a group has one row or all activations are equal.
    """
    if min(map(len, groups)) < 2:
        return torch.full(gram.shape[:1], torch.nan, dtype=torch.float64)
    parts = []
    for weights in groups:
        n = len(weights)
        first = torch.rand(n_splits, n, generator=generator).argsort(-1) < n // 2
        halves = torch.stack([first, ~first]) * weights
        parts.append(halves / halves.sum(-1, keepdim=True))
    halves = torch.cat(parts, -1).to(gram)
    products = einsum(halves, gram, halves, "h split p, layer p q, k split q -> layer split h k")
    norms = (products[..., 0, 0] * products[..., 1, 1]).sqrt()
    half = (products[..., 0, 1] / norms).mean(-1)
    return 2 * half / (1 + half)


def fewest_resamples(confidence: float) -> int:
    """Number of resamples that leaves ten beyond each end of an interval of this `confidence`."""
    if not 0 < confidence < 1:
        raise InputError(f"confidence = {confidence}: a probability between 0 and 1, such as 0.95")
    return ceil(20 / (1 - confidence))


def unbiased_cosine(noises: Sequence[Noise]) -> Float[Tensor, " layer"]:
    """Unbiased inner product over unbiased norms, minus the ratio's bias to first order."""
    spread, covariance = torch.zeros(2, len(noises[0].inner), dtype=torch.float64)
    for sign, noise in zip((1, 1, -1), noises, strict=False):
        for half, block in zip(noise.split(noise.linear_norm), (noise.aa, noise.bb), strict=True):
            jackknife = 4 * half.square().sum(-1)
            spread += sign * (jackknife - 2 * block.square().sum((-2, -1))).maximum(jackknife / 2)
        covariance += sign * 2 * (noise.linear * noise.linear_norm).sum(-1)
    return (noises[0].inner + covariance / 2) / (1 + 3 / 8 * spread.clamp_min(0))


def norm_undetected(gram: RowProducts, groups: Groups, confidence: float) -> Bool[Tensor, " layer"]:
    """Layers at which a direction's unbiased squared norm is not significantly above 0.

    The bound is a quantile of Pearson's type III distribution with the noise's variance and skewness.
    """
    from scipy.stats import pearson3

    noise = noise_products(gram, groups)
    deviation = (2 * noise.square().sum((-2, -1))).sqrt()
    third = 8 * ((noise @ noise) * noise).sum((-2, -1))
    skewness = (third / deviation**3).clamp(0, 8**0.5)
    bound = torch.as_tensor(pearson3.isf((1 - confidence) / 2, skewness.numpy())) * deviation
    return ~(unbiased_squared_norm(gram, groups) > bound)


def _obstacles(gram: Gram, confidence: float) -> list[Unmeasured | None]:
    """Per layer, the reason that rules an estimate out; None where there is no such reason."""
    if not _enough(gram):
        cause = Cause.TOO_FEW_CLUSTERS if gram.clustered else Cause.TOO_FEW_PROMPTS
        return [Unmeasured(cause)] * len(gram.aa)
    reasons: list[Unmeasured | None] = [None] * len(gram.aa)
    by_way = [[norm_undetected(*s, confidence) for s in way.sides] for way in gram.one_way]
    weak = [torch.stack(ways).any(0) for ways in zip(*by_way, strict=True)]
    for cause, found in ((Cause.WEAK, weak), (Cause.CONSTANT, [gram.constant_a, gram.constant_b])):
        for layer in (found[0] | found[1]).nonzero()[:, 0].tolist():
            names = tuple(name for name, at in zip("ab", found, strict=True) if at[layer])
            reasons[layer] = Unmeasured(cause, names)
    return reasons


def _enough(gram: Gram) -> bool:
    """Whether every group has rows enough for the noise estimate."""
    return gram.n_clusters > (FEWEST_CLUSTERS if gram.clustered else FEWEST_ROWS) - ROUNDING
