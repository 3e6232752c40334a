r"""Intervals for the cosine of two directions, layer by layer and over all layers at once.

A bootstrap-t of Fieller's residual. For a candidate cosine `theta` the residual
`D = inner - theta |a| |b|` of the unbiased products is centred on 0 if `theta` is the truth; the
interval holds every `theta` at which `D`, divided by its own standard error, is no more extreme than
such ratios are among resamples. Fieller's form never divides by a weak norm; the ratio to its own
standard error allows for a standard error that is high whenever the residual is; the resampled
quantiles allow for skewness.

Resamples are normal multipliers on the centred Gram matrix, `g' H g` without its diagonal: the
multiplier bootstrap, which has no repeated rows whose diagonal terms would come back in. One set of
multipliers serves in four sign patterns, which are equally likely.

References: Fieller 1954, doi:10.1111/j.2517-6161.1954.tb00159.x; Hall 1992, The Bootstrap and
Edgeworth Expansion, section 3.10.
"""

from dataclasses import dataclass
from math import ceil

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from .noise import Noise, polynomial
from .student import student_inflation

PRODUCTS = 4_000_000
"""How many products one block of resamples may hold (16 MB): what a core's cache takes."""
LEAST_SHARE = 0.6
"""Least share of the jackknife's variance that is taken for the residual's.

Exactly known, the jackknife's is at most twice too large: 0.5. A little more makes up for the
quadratic part's being estimated; so does `LEAST_LINEAR`. Both were set by simulation
(tests/benchmarks/statistics_coverage.py), where 0.5 and 0 covered up to 2 % less."""
LEAST_LINEAR = 0.25
"""Least share of the jackknife's variance that the resamples give to the linear part."""
WIDENING = 1.05
"""How much farther out all quantiles are put, those of the permutation test too.

The residual's standard error is taken along the sampled directions, and how far these are off is
not less with more prompts of the same reliability. Resamples around them don't show it. Without
this, 256 pairs covered 92 % where the cosine is near 0 and the test rejected 6 to 7 %; also set by
simulation."""
ROUNDS = 3
"""Rounds of reading the quantiles at the interval's ends and moving the ends to them."""
SIGNS = ((1, 1), (1, -1), (-1, 1), (-1, -1))


@dataclass(frozen=True)
class CosineIntervals:
    """Ends per layer; NaN where the interval, or the band, is unbounded."""

    lower: Float[Tensor, " layer"]
    upper: Float[Tensor, " layer"]
    band_lower: Float[Tensor, " layer"]
    band_upper: Float[Tensor, " layer"]


def cosine_intervals(
    noise: Noise,
    *,
    n_resamples: int,
    confidence: float,
    freedom: int,
    generator: torch.Generator,
) -> CosineIntervals:
    """Interval for the cosine at each layer, and a band that holds the whole curve.

    `freedom`, the degrees of freedom behind the variances, widens both as Student's t does, and
    `WIDENING` somewhat more. The band is the interval with its quantiles moved out by one factor,
    such that in `confidence` of the resamples no layer leaves it. NaN at layers where a squared norm
    isn't positive; they have no part in the band.
    """
    noise = noise.in_units_of_size()
    ratios = ResampledRatios.draw(noise, n_resamples, generator)
    tail = (1 - confidence) / 2
    widen = WIDENING * student_inflation(1 - tail, freedom)

    lower = upper = noise.inner
    for _ in range(ROUNDS):
        most = ratios.quantiles(lower, tail)[1] * widen
        least = ratios.quantiles(upper, tail)[0] * widen
        lower, upper = _end(noise, most, upper=False), _end(noise, least, upper=True)
    out = ratios.farthest(noise.inner, tail).kthvalue(ceil(confidence * ratios.n)).values
    return CosineIntervals(
        lower,
        upper,
        band_lower=_end(noise, most * out, upper=False),
        band_upper=_end(noise, least * out, upper=True),
    )


@dataclass(frozen=True)
class ResampledRatios:
    """Resampled residuals, to be divided by their own standard errors at any `theta`.

    A resample is a pair of multiplier vectors with a sign each. Attributes are coefficients of
    rising powers of `theta` of what a pair gives, without the signs: `a` and `b` of what changes
    sign with one of the two (first the residual's linear part, then its standard error's), `both` of
    what changes with both, `none` of what doesn't.
    """

    noise: Noise
    linear_a: Float[Tensor, "5 layer resample"]
    linear_b: Float[Tensor, "5 layer resample"]
    residual_both: Float[Tensor, "layer resample"]
    residual_none: Float[Tensor, "layer resample"]
    variance: Float[Tensor, "3 layer resample"]

    @classmethod
    def draw(cls, noise: Noise, n_resamples: int, generator: torch.Generator) -> "ResampledRatios":
        """Draw a quarter as many multiplier vectors as resamples: each serves in four signs."""
        n_drawn = ceil(n_resamples / len(SIGNS))
        rows_a, rows_b = noise.noise_ab.shape[1:]
        g_a = torch.randn(n_drawn, rows_a, generator=generator)
        g_b = torch.randn(n_drawn, rows_b, generator=generator)
        layers = max(1, PRODUCTS // (n_drawn * max(rows_a, rows_b)))
        chunks = [cls._products(chunk, g_a, g_b) for chunk in noise.chunks(layers)]
        return cls(noise, *(torch.cat(parts, dim=-2) for parts in zip(*chunks, strict=True)))

    @staticmethod
    def _products(
        noise: Noise,
        g_a: Float[Tensor, "resample row_a"],
        g_b: Float[Tensor, "resample row_b"],
    ) -> tuple[Tensor, ...]:
        l_ab, l_aa, l_ba, l_bb = (
            rearrange(v, "layer row -> layer row 1")
            for v in (noise.linear_ab, noise.linear_aa, noise.linear_ba, noise.linear_bb)
        )
        h_aa, h_bb, h_ab = noise.noise_aa, noise.noise_bb, noise.noise_ab
        # What is linear in g needs no product with the matrices for every resample.
        on_a = torch.cat(
            [l_ab, -l_aa, h_ab @ l_ba, -(h_aa @ l_ab + h_ab @ l_bb), h_aa @ l_aa], dim=-1
        )
        on_b = torch.cat(
            [l_ba, -l_bb, h_ab.mT @ l_ab, -(h_bb @ l_ba + h_ab.mT @ l_aa), h_bb @ l_bb], dim=-1
        )
        m_ab, m_ba = g_b @ h_ab.mT.float(), g_a @ h_ab.float()
        m_aa, m_bb = g_a @ h_aa.float(), g_b @ h_bb.float()
        return (
            rearrange(g_a @ on_a.float(), "layer resample k -> k layer resample"),
            rearrange(g_b @ on_b.float(), "layer resample k -> k layer resample"),
            (m_ab * g_a).sum(-1),
            ((m_aa * g_a).sum(-1) + (m_bb * g_b).sum(-1)) / -2,
            torch.stack(
                [
                    m_ab.square().sum(-1) + m_ba.square().sum(-1),
                    -2 * ((m_ab * m_aa).sum(-1) + (m_ba * m_bb).sum(-1)),
                    m_aa.square().sum(-1) + m_bb.square().sum(-1),
                ]
            ),
        )

    @property
    def n(self) -> int:
        """How many resamples there are."""
        return len(SIGNS) * self.residual_both.shape[-1]

    def at(self, theta: Float[Tensor, " layer"]) -> Float[Tensor, "layer resample"]:
        """Residual over its standard error in every resample, were `theta` the cosine."""
        jackknife = polynomial(self.noise.jackknife(), theta)
        quadratic = polynomial(self.noise.quadratic(), theta)
        # The sampled direction's share of the linear part is noise, already in the quadratic one.
        linear = (jackknife - 2 * quadratic).maximum(LEAST_LINEAR * jackknife)
        share = rearrange((linear / jackknife).sqrt().float(), "layer -> layer 1")
        constant = rearrange(linear.float(), "layer -> layer 1")
        quadratic = rearrange(quadratic.float(), "layer -> layer 1")
        theta = rearrange(theta.float(), "layer -> layer 1")
        linear_a = share * polynomial(tuple(self.linear_a[:2]), theta.expand_as(self.residual_both))
        linear_b = share * polynomial(tuple(self.linear_b[:2]), theta.expand_as(self.residual_both))
        t = theta.expand_as(self.residual_both)
        cross_a = 2 * share * polynomial(tuple(self.linear_a[2:]), t)
        cross_b = 2 * share * polynomial(tuple(self.linear_b[2:]), t)
        v0, v1, v2 = self.variance
        ratios = []
        for sign_a, sign_b in SIGNS:
            residual = (
                sign_a * linear_a
                + sign_b * linear_b
                + sign_a * sign_b * self.residual_both
                + theta * self.residual_none
            )
            variance = constant + sign_a * cross_a + sign_b * cross_b
            variance += v0 + sign_a * sign_b * theta * v1 + theta**2 * v2
            ratios.append(residual / (variance - quadratic).maximum(LEAST_SHARE * variance).sqrt())
        return torch.cat(ratios, dim=-1)

    def quantiles(
        self, theta: Float[Tensor, " layer"], tail: float
    ) -> tuple[Float[Tensor, " layer"], Float[Tensor, " layer"]]:
        """Quantiles `tail` and `1 - tail` of the ratios, were `theta` (within [-1, 1]) the cosine."""
        ratios = self.at(theta.clamp(-1, 1))
        k = max(1, round(tail * self.n))
        return (
            ratios.kthvalue(k, dim=-1).values.double(),
            ratios.kthvalue(self.n + 1 - k, dim=-1).values.double(),
        )

    def farthest(self, theta: Float[Tensor, " layer"], tail: float) -> Float[Tensor, " resample"]:
        """How far each resample goes at its worst layer, in units of that layer's quantile."""
        ratios = self.at(theta.clamp(-1, 1))
        low, high = (rearrange(q.float(), "layer -> layer 1") for q in self.quantiles(theta, tail))
        return (ratios / high).maximum(ratios / low).nan_to_num(nan=0.0).amax(0).clamp_min(1)


def _end(
    noise: Noise, quantile: Float[Tensor, " layer"], *, upper: bool
) -> Float[Tensor, " layer"]:
    """Where the residual over its standard error equals the quantile; NaN where it never does.

    The variance is the larger of two quadratics in `theta`, the end the outer one of their two.
    """
    jackknife, quadratic = noise.jackknife(), noise.quadratic()
    once = tuple(j - q for j, q in zip(jackknife, quadratic, strict=True))
    half = tuple(LEAST_SHARE * j for j in jackknife)
    ends, unbounded = [], torch.zeros_like(quantile, dtype=torch.bool)
    for v0, v1, v2 in (once, half):
        squared = quantile.square()
        p0, p1, p2 = (
            noise.inner.square() - squared * v0,
            -2 * noise.inner - squared * v1,
            1 - squared * v2,
        )
        # A negative variance everywhere leaves no root: NaN, and the other quadratic decides.
        root = (p1.square() - 4 * p0 * p2).sqrt()
        ends.append((-p1 + root if upper else -p1 - root) / (2 * p2))
        unbounded |= p2 <= 0
    end = torch.fmax(*ends) if upper else torch.fmin(*ends)
    return torch.where(unbounded, torch.nan, end)
