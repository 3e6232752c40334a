"""The cosine of two directions at every layer, and how sure it is: all of it from four activation sets.

`cosine_statistics` is the whole; what it is made of stands in the modules beside this one.
"""

from dataclasses import dataclass
from math import ceil
from statistics import NormalDist
from typing import Any

import torch
from einops import einsum
from jaxtyping import Bool, Float
from torch import Tensor

from ..errors import InputError
from .gram import Gram
from .intervals import CosineIntervals, cosine_intervals
from .noise import Noise
from .permutation import permutation_null, random_direction_null
from .reliability import reliability_ceiling, split_half_reliability

FEWEST_ROWS = 4
"""Rows per group (pairs, or prompts of one set) without which the noise can't be estimated."""


@dataclass(frozen=True)
class CosineStatistics:
    """How similar two directions are at each layer, and how sure that is. Tensors `[layer]`, float64.

    Attributes:
        plain: cosine of the two sampled directions; noise pulls it towards 0.
        unbiased: estimate of the cosine of the true directions. May leave [-1, 1].
        lower: lower end of its interval.
        upper: upper end of its interval.
        band_lower: lower edge of the band that holds all layers' true cosines at once.
        band_upper: its upper edge.
        reliability_a: cosine to expect between direction `a` and itself from as many new prompts.
        reliability_b: the same of `b`.
        ceiling: the plain cosine to expect were the true one 1.
        p_value: permutation test that the true cosine is 0, two-sided.
        p_adjusted: the same, valid for any layer picked after looking at all.
        null_lower: lower end of the plain cosine's central range were the true cosine 0.
        null_upper: its upper end.
        random_lower: lower end of the plain cosine's central range between direction `a` and
            directions without a meaning, of the activations' own covariance.
        random_upper: its upper end.
        reasons: per layer, why its estimate is NaN; empty where it isn't.
        n_resamples: resamples behind the intervals, and relabellings behind the p-values.
        confidence: of the intervals, the band and the ranges.
    """

    plain: Float[Tensor, " layer"]
    unbiased: Float[Tensor, " layer"]
    lower: Float[Tensor, " layer"]
    upper: Float[Tensor, " layer"]
    band_lower: Float[Tensor, " layer"]
    band_upper: Float[Tensor, " layer"]
    reliability_a: Float[Tensor, " layer"]
    reliability_b: Float[Tensor, " layer"]
    ceiling: Float[Tensor, " layer"]
    p_value: Float[Tensor, " layer"]
    p_adjusted: Float[Tensor, " layer"]
    null_lower: Float[Tensor, " layer"]
    null_upper: Float[Tensor, " layer"]
    random_lower: Float[Tensor, " layer"]
    random_upper: Float[Tensor, " layer"]
    reasons: tuple[str, ...]
    n_resamples: int
    confidence: float


def cosine_statistics(
    a_target: Float[Tensor, "a_target layer d_model"],
    a_baseline: Float[Tensor, "a_baseline layer d_model"],
    b_target: Float[Tensor, "b_target layer d_model"],
    b_baseline: Float[Tensor, "b_baseline layer d_model"],
    *,
    a_paired: bool,
    b_paired: bool,
    n_resamples: int = 10_000,
    confidence: float = 0.95,
    generator: torch.Generator,
) -> CosineStatistics:
    """Estimate, interval, band, reliability and nulls of the cosine between two mean differences.

    The two contrasts must have no prompt in common: shared prompts share their noise, which reads as
    similarity. Rows are exchangeable within a set, or pairs within a paired contrast, and
    independent of one another.

    NaN, with its reason, at layers where the activations of a class are all equal, a direction's
    squared norm can't be told from 0 or the interval has no end; at all layers with fewer than 4
    prompts a set (or pairs).

    Args:
        a_target: activations of the first contrast's target, of any floating dtype and device.
        a_baseline: of its baseline.
        b_target: of the second contrast's target.
        b_baseline: of its baseline.
        a_paired: whether the rows of `a_target` and `a_baseline` belong together one by one.
        b_paired: the same of `b`.
        n_resamples: how many resamples, and relabellings, to draw.
        confidence: of every interval.
        generator: the only source of randomness, on the CPU.

    Raises:
        InputError: as `Gram.of`, and where `n_resamples` is too small for `confidence`.
    """
    gram = Gram.of(a_target, a_baseline, b_target, b_baseline, a_paired=a_paired, b_paired=b_paired)
    return cosine_statistics_from_gram(
        gram, n_resamples=n_resamples, confidence=confidence, generator=generator
    )


def cosine_statistics_from_gram(
    gram: Gram,
    *,
    n_resamples: int = 10_000,
    confidence: float = 0.95,
    generator: torch.Generator,
) -> CosineStatistics:
    """`cosine_statistics` of activations whose Gram matrices are known already."""
    fewest = fewest_resamples(confidence)
    if n_resamples < fewest:
        raise InputError(
            f"n_resamples = {n_resamples} leaves too few beyond the ends of a {confidence:.0%} "
            f"interval: at least {fewest}"
        )
    reliability_a = split_half_reliability(gram.aa, gram.groups_a, generator=generator)
    reliability_b = split_half_reliability(gram.bb, gram.groups_b, generator=generator)
    options: dict[str, Any] = {
        "n_resamples": n_resamples,
        "confidence": confidence,
        "generator": generator,
    }
    estimate = estimate_cosine(gram, **options)

    nulls = torch.full((6, len(gram.aa)), torch.nan, dtype=torch.float64)
    sound = torch.tensor([reason == "" for reason in _nothing_to_estimate(gram)])
    if sound.any():
        null = permutation_null(gram.at(sound), **options)
        random = random_direction_null(gram.at(sound), **options)
        nulls[:, sound] = torch.stack([*vars(null).values(), *random])
    p_value, p_adjusted, null_lower, null_upper, random_lower, random_upper = nulls
    return CosineStatistics(
        plain=gram.plain,
        unbiased=estimate.unbiased,
        **vars(estimate.intervals),
        reliability_a=reliability_a,
        reliability_b=reliability_b,
        ceiling=reliability_ceiling(reliability_a, reliability_b),
        p_value=p_value,
        p_adjusted=p_adjusted,
        null_lower=null_lower,
        null_upper=null_upper,
        random_lower=random_lower,
        random_upper=random_upper,
        reasons=estimate.reasons,
        n_resamples=n_resamples,
        confidence=confidence,
    )


@dataclass(frozen=True)
class CosineEstimate:
    """The estimate of the true cosine per layer, its intervals, and why it is NaN where it is."""

    unbiased: Float[Tensor, " layer"]
    intervals: CosineIntervals
    reasons: tuple[str, ...]


def estimate_cosine(
    gram: Gram, *, n_resamples: int, confidence: float, generator: torch.Generator
) -> CosineEstimate:
    """The part of `cosine_statistics` that says where the true cosine lies.

    NaN, all of it, at layers with a reason. The band alone can be NaN without one: unbounded.
    """
    reasons = _nothing_to_estimate(gram)
    sound = torch.tensor([reason == "" for reason in reasons])
    if sound.any():
        weak = _weak_directions(Noise.of(gram.at(sound)), confidence)
        for layer, reason in zip(sound.nonzero()[:, 0].tolist(), weak, strict=True):
            reasons[layer] = reason
    values = torch.full((5, len(gram.aa)), torch.nan, dtype=torch.float64)
    clear = torch.tensor([reason == "" for reason in reasons])
    if clear.any():
        noise = Noise.of(gram.at(clear))
        intervals = cosine_intervals(
            noise,
            n_resamples=n_resamples,
            confidence=confidence,
            freedom=min(*gram.groups_a, *gram.groups_b) - 1,
            generator=generator,
        )
        bounded = ~(intervals.lower.isnan() | intervals.upper.isnan())
        found = torch.stack([unbiased_cosine(noise), *vars(intervals).values()])
        values[:, clear] = torch.where(bounded, found, torch.nan)
        for layer in clear.nonzero()[~bounded, 0].tolist():
            reasons[layer] = (
                "the interval has no end: the directions' norms are too uncertain; add prompts"
            )
    unbiased, *ends = values
    return CosineEstimate(unbiased, CosineIntervals(*ends), tuple(reasons))


def fewest_resamples(confidence: float) -> int:
    """Resamples that leave ten beyond each end of an interval.

    Raises:
        InputError: unless `confidence` lies between 0 and 1.
    """
    if not 0 < confidence < 1:
        raise InputError(f"confidence = {confidence}: a probability between 0 and 1, such as 0.95")
    return ceil(20 / (1 - confidence))


def unbiased_cosine(noise: Noise) -> Float[Tensor, " layer"]:
    """Unbiased inner product over unbiased norms, less what the ratio itself adds.

    The three products have no bias, their ratio has one of the order of the norms' squared relative
    error; it is taken off to first order. May leave [-1, 1]. NaN where a squared norm isn't positive.
    """
    noise = noise.in_units_of_size()
    spread_a = _squared_norm_variance(noise.linear_aa, noise.noise_aa)
    spread_b = _squared_norm_variance(noise.linear_bb, noise.noise_bb)
    covariance = 2 * (
        einsum(noise.linear_ab, noise.linear_aa, "layer row, layer row -> layer")
        + einsum(noise.linear_ba, noise.linear_bb, "layer row, layer row -> layer")
    )
    return (noise.inner + covariance / 2) / (1 + 3 / 8 * (spread_a + spread_b))


def _squared_norm_variance(
    linear: Float[Tensor, "layer row"], noise: Float[Tensor, "layer row row"]
) -> Float[Tensor, " layer"]:
    jackknife = 4 * linear.square().sum(-1)
    return (jackknife - 2 * noise.square().sum((-2, -1))).maximum(jackknife / 2)


def _nothing_to_estimate(gram: Gram) -> list[str]:
    """Per layer, why nothing can be said of it before anything is estimated."""
    smallest = min(*gram.groups_a, *gram.groups_b)
    if smallest < FEWEST_ROWS:
        reason = (
            f"{smallest} prompts in a set (or pairs) are too few to estimate the noise from: at "
            f"least {FEWEST_ROWS}, better 64"
        )
        return [reason] * len(gram.aa)
    reasons = []
    for constant_a, constant_b in zip(
        gram.constant_a.tolist(), gram.constant_b.tolist(), strict=True
    ):
        names = [name for name, constant in (("a", constant_a), ("b", constant_b)) if constant]
        reasons.append(
            f"a class of contrast {' and one of '.join(names)} has the same activation for every "
            "prompt: at this layer the position has seen nothing of the prompt"
            if names
            else ""
        )
    return reasons


def _weak_directions(noise: Noise, confidence: float) -> list[str]:
    reasons = []
    weak_a = norm_undetected(noise.norm_a, noise.noise_aa, confidence)
    weak_b = norm_undetected(noise.norm_b, noise.noise_bb, confidence)
    for a, b in zip(weak_a.tolist(), weak_b.tolist(), strict=True):
        names = [name for name, weak in (("a", a), ("b", b)) if weak]
        reasons.append(
            f"the norm of direction {' and '.join(names)} can't be told from 0: add prompts"
            if names
            else ""
        )
    return reasons


def norm_undetected(
    squared_norm: Float[Tensor, " layer"],
    noise: Float[Tensor, "layer row row"],
    confidence: float,
) -> Bool[Tensor, " layer"]:
    """Where the unbiased squared norm is no larger than noise alone would often make it.

    Compared with the upper quantile, outside which `(1 - confidence) / 2` lies, of a chi-squared
    distribution with the noise's variance and skewness, by Wilson and Hilferty's cube root.

    Reference: Wilson and Hilferty 1931, doi:10.1073/pnas.17.12.684.
    """
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    deviation = (2 * noise.square().sum((-2, -1))).sqrt()
    third = 8 * ((noise @ noise) * noise).sum((-2, -1))
    skewness = (third / deviation**3).clamp(1e-3, 8**0.5)
    quantile = 2 / skewness * ((1 + skewness * z / 6 - skewness.square() / 36) ** 3 - 1)
    return ~(squared_norm > quantile * deviation)
