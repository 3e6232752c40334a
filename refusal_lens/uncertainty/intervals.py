r"""Confidence intervals for the cosine of two directions: per layer, and over all layers at once.

Model. A sampled direction is `a = mu_a + e_a`. The errors of the unbiased products have a linear
part and a quadratic part (Hoeffding's decomposition):

    inner product    e_a' mu_b + mu_a' e_b      +  e_a' e_b
    |a|^2            2 e_a' mu_a                +  |e_a|^2 - E|e_a|^2

In units of the unbiased norms, Fieller's residual of a candidate cosine `theta` is `inner - theta`.
Its error is `g' c + g' M g / 2`. Here `g` are independent multipliers of the rows, with mean 0 and
variance 1; the vector `c` and the matrix `M` are linear in `theta`. The jackknife treats the
sampled directions as the true ones. Its variance `J = |c|^2` therefore counts the linear part once
and the quadratic part, `Q = |M|^2 / 2`, twice. The variance of the residual is `J - Q`.

Second order. The product of the norms is concave: it falls short by an eighth of the square of `d`,
the difference of the two squared norms' errors. The residual adds `theta (d^2 - E d^2) / 8`. This
term decides where the signal's strength differs by prompt, for then the linear parts cancel.

Interval. A bootstrap-t with normal multipliers: the interval contains each `theta` whose residual,
divided by its standard error, lies between the quantiles of the same ratio among resamples, drawn
under the hypothesis that `theta` is the cosine. For this, `c` moves one Newton step to where the
residual is 0 and is scaled to the variance of the linear part. Without the step, the resamples
inherit the skewness of the observed error, and the interval is too short on one side.

References: Fieller 1954, doi:10.1111/j.2517-6161.1954.tb00159.x; Hall 1992, The Bootstrap and
Edgeworth Expansion, section 3.10; Davidson and MacKinnon 1999, doi:10.1017/S0266466699153027.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor
from torch.linalg import vecdot

from . import gram as grams
from .clusters import two_way

Curve = Float[Tensor, " layer"]
# Bounds that offset the error of the estimated quadratic part, chosen on seeds 1000 and 1001 of
# tests/benchmarks/statistics_coverage.py, where 1/2 and 0 cover 1 to 2 % less.
LEAST_SHARE = 0.6  # least share of the jackknife's variance in the residual's; truly at least 1/2
LEAST_LINEAR = 0.25  # least share of the jackknife's variance in the linear part of resamples
# The degrees of freedom of the band's far tail are divided by up to this, from a cosine of 0.5 on;
# chosen on seed 1000 of tests/benchmarks/statistics_designs.py, where the band else holds in 91 %.
MOST_DIVIDED = 3
SIGNS = ((1, 1), (1, -1), (-1, 1), (-1, -1))  # equally likely signs of the multipliers of a and b


@dataclass(frozen=True)
class Noise:
    """Unbiased inner product of two directions of unbiased norm 1, and its noise; float64.

    Attributes:
        inner, freedom: unbiased inner product; degrees of freedom (`n_clusters` minus 1).
        linear: coefficients of the rows in the linear part of `inner`'s error; `a`, then `b`.
        linear_norm: half the rows' coefficients in the linear parts of `|a|^2` and `|b|^2`.
        aa, bb, ab: `noise_products` of `a` and of `b`, and their `cross_noise_products`.
    """

    inner: Curve
    freedom: float
    linear: Float[Tensor, "layer row"]
    linear_norm: Float[Tensor, "layer row"]
    aa: Float[Tensor, "layer row_a row_a"]
    bb: Float[Tensor, "layer row_b row_b"]
    ab: Float[Tensor, "layer row_a row_b"]

    @classmethod
    def of(cls, gram: grams.Gram, squared: tuple[Curve, Curve]) -> "Noise":
        """The noise of a Gram matrix, by its first way of clustering, in units of `squared` norms."""
        a, b = gram.groups_a, gram.groups_b
        norm_a, norm_b = (norm[:, None, None].sqrt() for norm in squared)
        aa, bb, ab = gram.aa / norm_a**2, gram.bb / norm_b**2, gram.ab / (norm_a * norm_b)
        linear_a = grams.centred_and_scaled(ab @ grams.mean_weights(b), a)
        linear_b = grams.centred_and_scaled(ab.mT @ grams.mean_weights(a), b)
        return cls(
            inner=gram.inner / (norm_a * norm_b)[:, 0, 0],
            freedom=gram.n_clusters - 1,
            linear=torch.cat([linear_a, linear_b], dim=-1),
            linear_norm=torch.cat([grams.leave_one_out(aa, a), grams.leave_one_out(bb, b)], dim=-1),
            aa=grams.noise_products(aa, a),
            bb=grams.noise_products(bb, b),
            ab=grams.cross_noise_products(ab, a, b),
        )

    def split(self, rows: Float[Tensor, "*axes row"]) -> tuple[Tensor, ...]:
        """A tensor over all rows, divided into the rows of `a` and of `b`."""
        return rows.split(self.ab.shape[1:], dim=-1)

    def variances(self) -> tuple[Float[Tensor, "3 layer"], Float[Tensor, "3 layer"]]:
        """Coefficients of 1, theta and theta squared in `J` and in `Q`."""
        one, two = self.linear, self.linear_norm
        aa, bb, ab = (block.square().sum((-2, -1)) for block in (self.aa, self.bb, self.ab))
        jackknife = torch.stack([v.sum(-1) for v in (one.square(), -2 * one * two, two.square())])
        return jackknife, torch.stack([ab, torch.zeros_like(ab), (aa + bb) / 2])

    def variance(self, theta: Curve) -> Curve:
        """Variance of the residual if `theta` is the cosine."""
        jackknife, quadratic = (v[0] + v[1] * theta + v[2] * theta**2 for v in self.variances())
        return (jackknife - quadratic).maximum(LEAST_SHARE * jackknife)

    def under_hypothesis(self, theta: Curve) -> tuple[Float[Tensor, "layer row"], Curve]:
        """`c` and `Q` if `theta` is the cosine."""
        jackknife, quadratic = (v[0] + v[1] * theta + v[2] * theta**2 for v in self.variances())
        shift = theta[:, None]
        c = self.linear - shift * self.linear_norm
        c_a, c_b = (part[..., None] for part in self.split(c))
        within = torch.cat([self.aa @ c_a, self.bb @ c_b], dim=1)[..., 0]
        across = torch.cat([self.ab @ c_b, self.ab.mT @ c_a], dim=1)[..., 0]
        residual = self.inner - theta * (1 + self.bias)
        c = c - (residual / jackknife)[:, None] * (across - shift * within)
        linear = (jackknife - 2 * quadratic).maximum(LEAST_LINEAR * jackknife)
        return c * (linear / c.square().sum(-1)).sqrt()[:, None], quadratic

    def linear_norm_alone(self) -> Float[Tensor, "layer row"]:
        """`linear_norm`, scaled to the variance of the linear part alone."""
        parts = []
        for half, block in zip(self.split(self.linear_norm), (self.aa, self.bb), strict=True):
            jackknife = half.square().sum(-1)
            linear = (jackknife - block.square().sum((-2, -1))).maximum(LEAST_LINEAR * jackknife)
            parts.append(half * (linear / jackknife).sqrt()[:, None])
        return torch.cat(parts, -1)

    @property
    def bias(self) -> Curve:
        """Mean of the residual's second-order term over `theta`: an eighth of the norms' variance."""
        quadratic = self.aa.square().sum((-2, -1)) + self.bb.square().sum((-2, -1))
        return self.linear_norm_alone().square().sum(-1) / 2 + quadratic / 4


def cosine_intervals(
    noises: Sequence[Noise], n_resamples: int, confidence: float, generator: torch.Generator
) -> tuple[Curve, ...]:
    """Ends of the interval at each layer, and of the band that holds the curve over all layers.

    Each of two crossed ways gives ends, stretched to the two-way variance; the outermost count.
    """
    variances = [noise.variance(noise.inner) for noise in noises]
    ends = []
    for noise, own in zip(noises[:2], variances, strict=False):
        stretch = (two_way(variances) / own).sqrt()
        ends.append(_one_way_intervals(noise, stretch, n_resamples, confidence, generator))
    lower, upper, band_lower, band_upper = (torch.stack(way) for way in zip(*ends, strict=True))
    return lower.amin(0), upper.amax(0), band_lower.amin(0), band_upper.amax(0)


def _one_way_intervals(
    noise: Noise, stretch: Curve, n_resamples: int, confidence: float, generator: torch.Generator
) -> tuple[Curve, ...]:
    """The ends of `cosine_intervals` by one way of clustering, with quantiles `stretch` times out.

    Quantiles at the ends of Student's interval are multiplied by Student's over the normal quantile,
    and for the band by a factor that keeps a share `confidence` of resamples inside at all layers.
    """
    from scipy import stats

    tail = (1 - confidence) / 2
    student = float(stats.t.isf(tail, noise.freedom))
    normal = float(stats.norm.isf(tail))
    widen = student / normal
    start = torch.full_like(noise.inner, student)
    lowest, highest = _end(noise, start, side=-1), _end(noise, start, side=1)
    n_drawn = ceil(n_resamples / len(SIGNS))
    draws = [torch.randn(n_drawn, n, generator=generator) for n in noise.ab.shape[1:]]
    thetas = torch.stack([lowest.nan_to_num(-1), highest.nan_to_num(1)]).clamp(-1, 1)
    ratios = resampled_ratios(noise, thetas, *draws)
    n = ratios.shape[-1]
    k = max(1, round(tail * n))
    low = ratios.kthvalue(k, dim=-1).values
    high = ratios.kthvalue(n + 1 - k, dim=-1).values
    most, least = stretch * widen * high[0].double(), stretch * widen * low[1].double()
    ends = [(most, -1), (least, 1)]
    fewer = noise.freedom / (1 + 4 * noise.inner.abs()).clamp_max(MOST_DIVIDED)
    for (edge, side), ratio, quantile in zip(tuple(ends), ratios, (high[0], low[1]), strict=True):
        largest = (ratio / quantile[:, None]).amax(0).clamp_min(1)
        far = normal * float(largest.kthvalue(n + 1 - k).values)
        # Farther out, Student's quantile exceeds the normal one by more, at high cosines most.
        farther, own = (stats.t.isf(p, fewer.numpy()) for p in (stats.norm.sf(far), tail))
        ends.append((edge * torch.as_tensor(farther / own), side))
    return tuple(_end(noise, quantile, side=side) for quantile, side in ends)


def resampled_ratios(
    noise: Noise,
    thetas: Float[Tensor, "theta layer"],
    g_a: Float[Tensor, "draw row_a"],
    g_b: Float[Tensor, "draw row_b"],
) -> Float[Tensor, "theta layer resample"]:
    """The residual over its standard error in every resample, if each `theta` is the cosine.

    With the derivative `u = c + M g` by the rows' errors, the residual is `g' (c + u) / 2` and the
    jackknife's variance is `|u|^2`. Both get the norms' second-order term. All `theta` and all four
    signs use the same products `M g`.
    """
    under_hypothesis = [noise.under_hypothesis(theta) for theta in thetas]
    norms = noise.split(noise.linear_norm_alone().float())
    bias = noise.bias.tolist()
    found = []
    for layer in range(len(noise.inner)):
        aa, bb, ab = (block[layer].float() for block in (noise.aa, noise.bb, noise.ab))
        n_a, n_b = (part[layer] for part in norms)
        within_a, within_b = g_a @ aa, g_b @ bb
        across_a, across_b = g_b @ ab.T, g_a @ ab
        linear_a, linear_b = 2 * g_a @ n_a, 2 * g_b @ n_b
        quadratic_ab = vecdot(g_a, within_a) - vecdot(g_b, within_b)
        for i, (linear, quadratic) in enumerate(under_hypothesis):
            theta = float(thetas[i, layer])
            c_a, c_b = noise.split(linear[layer].float())
            for a, b in SIGNS:
                u_a = (c_a + b * across_a).sub_(within_a, alpha=a * theta)
                u_b = (c_b + a * across_b).sub_(within_b, alpha=b * theta)
                residual = (a * vecdot(g_a, c_a + u_a) + b * vecdot(g_b, c_b + u_b)) / 2
                apart = a * linear_a - b * linear_b + quadratic_ab
                residual += theta * (apart.square() / 8 - bias[layer])
                slope = (theta / 2 * apart)[:, None]
                u_a += slope * (n_a + a * within_a)
                u_b -= slope * (n_b + b * within_b)
                jackknife = vecdot(u_a, u_a) + vecdot(u_b, u_b)
                variance = (jackknife - float(quadratic[layer])).maximum(LEAST_SHARE * jackknife)
                found.append(residual / variance.sqrt())
    layout = "(layer theta sign) draw -> theta layer (sign draw)"
    return rearrange(found, layout, theta=len(thetas), sign=len(SIGNS))


def _end(noise: Noise, quantile: Curve, *, side: int) -> Curve:
    """The lower (side -1) or upper (1) `theta` whose ratio equals the quantile; NaN if none does."""
    jackknife, quadratic = noise.variances()
    scale = 1 + noise.bias
    ends, bounded = [], torch.ones_like(quantile, dtype=torch.bool)
    for variance in (jackknife - quadratic, LEAST_SHARE * jackknife):
        v0, v1, v2 = quantile.square() * variance
        p0, p1, p2 = noise.inner.square() - v0, -2 * noise.inner * scale - v1, scale**2 - v2
        # A variance that is negative for every theta has no root; the other variance decides.
        ends.append(side * (-p1 + side * (p1.square() - 4 * p0 * p2).sqrt()) / (2 * p2))
        bounded &= p2 > 0
    return torch.where(bounded, side * torch.fmax(*ends), torch.nan)
