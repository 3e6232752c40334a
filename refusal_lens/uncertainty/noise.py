r"""What the noise of two directions' Gram matrices does to their cosine: the variance, in parts.

Write `a = mu_a + eps_a` for a sampled direction. The errors of the three unbiased products

    inner      eps_a' mu_b + mu_a' eps_b          +  eps_a' eps_b
    |a|^2      2 eps_a' mu_a                      +  |eps_a|^2 - E|eps_a|^2
    |b|^2      2 eps_b' mu_b                      +  |eps_b|^2 - E|eps_b|^2

have a linear part and a quadratic one (Hoeffding's decomposition). Resampling or the jackknife put
the *sampled* direction where `mu` stands, and so count the quadratic part again: the jackknife's
variance holds it twice, the ordinary bootstrap's three times. With many dimensions and few prompts
the quadratic part is most of the variance, so here it is estimated by itself and taken off once.

Everything is about the residual `inner - theta sqrt(|a|^2 |b|^2)`, which is centred on 0 where
`theta` is the true cosine, and whose linear and quadratic parts are polynomials in `theta`.
"""

from collections.abc import Iterator
from dataclasses import dataclass, fields

import torch
from jaxtyping import Float
from torch import Tensor

from .gram import (
    Gram,
    centred_and_scaled,
    cross_noise_products,
    leave_one_out,
    mean_weights,
    noise_products,
    unbiased_squared_norm,
)


@dataclass(frozen=True)
class Noise:
    """The unbiased products of two directions and their noise, layer by layer, in float64.

    Attributes:
        inner: unbiased inner product.
        norm_a: unbiased squared norm of `a`.
        norm_b: unbiased squared norm of `b`.
        linear_ab: product of each row of `a`, centred and scaled, with the direction `b`.
        linear_aa: with the direction `a` that leaves the row out.
        linear_ba: product of each row of `b` with the direction `a`.
        linear_bb: with the direction `b` that leaves the row out.
        noise_aa: `noise_products` of `a`.
        noise_bb: `noise_products` of `b`.
        noise_ab: `cross_noise_products`.
    """

    inner: Float[Tensor, " layer"]
    norm_a: Float[Tensor, " layer"]
    norm_b: Float[Tensor, " layer"]
    linear_ab: Float[Tensor, "layer row_a"]
    linear_aa: Float[Tensor, "layer row_a"]
    linear_ba: Float[Tensor, "layer row_b"]
    linear_bb: Float[Tensor, "layer row_b"]
    noise_aa: Float[Tensor, "layer row_a row_a"]
    noise_bb: Float[Tensor, "layer row_b row_b"]
    noise_ab: Float[Tensor, "layer row_a row_b"]

    @classmethod
    def of(cls, gram: Gram) -> "Noise":
        """The noise of a Gram matrix whose groups all have at least 4 rows."""
        a, b = gram.groups_a, gram.groups_b
        return cls(
            inner=gram.inner,
            norm_a=unbiased_squared_norm(gram.aa, a),
            norm_b=unbiased_squared_norm(gram.bb, b),
            linear_ab=centred_and_scaled(gram.ab @ mean_weights(b), a),
            linear_aa=leave_one_out(gram.aa, a),
            linear_ba=centred_and_scaled(gram.ab.mT @ mean_weights(a), b),
            linear_bb=leave_one_out(gram.bb, b),
            noise_aa=noise_products(gram.aa, a),
            noise_bb=noise_products(gram.bb, b),
            noise_ab=cross_noise_products(gram.ab, a, b),
        )

    @property
    def size(self) -> Float[Tensor, " layer"]:
        """`|a| |b|` from the unbiased squared norms; NaN where one isn't positive."""
        return torch.where(
            (self.norm_a > 0) & (self.norm_b > 0), (self.norm_a * self.norm_b).sqrt(), torch.nan
        )

    def in_units_of_size(self) -> "Noise":
        """The same with `a` and `b` each divided by its unbiased norm.

        The residual is then `inner - theta (|a|^2 + |b|^2) / 2` to first order, and every number of
        order 1. NaN where a squared norm isn't positive.
        """
        a = torch.where(self.norm_a > 0, self.norm_a, torch.nan).rsqrt()
        b = torch.where(self.norm_b > 0, self.norm_b, torch.nan).rsqrt()
        row = (slice(None), None)
        matrix = (slice(None), None, None)
        return Noise(
            inner=self.inner * a * b,
            norm_a=self.norm_a * a * a,
            norm_b=self.norm_b * b * b,
            linear_ab=self.linear_ab * (a * b)[row],
            linear_aa=self.linear_aa * (a * a)[row],
            linear_ba=self.linear_ba * (a * b)[row],
            linear_bb=self.linear_bb * (b * b)[row],
            noise_aa=self.noise_aa * (a * a)[matrix],
            noise_bb=self.noise_bb * (b * b)[matrix],
            noise_ab=self.noise_ab * (a * b)[matrix],
        )

    def chunks(self, layers: int) -> Iterator["Noise"]:
        """The same, so many layers at a time."""
        values = [getattr(self, field.name) for field in fields(self)]
        for start in range(0, len(self.inner), layers):
            yield Noise(*(value[start : start + layers] for value in values))

    def jackknife(self) -> tuple[Float[Tensor, " layer"], ...]:
        """Jackknife variance of the residual: coefficients of 1, theta and theta squared.

        Of noise `in_units_of_size`. Holds the linear part once and the quadratic part twice.
        """
        ab, aa, ba, bb = self.linear_ab, self.linear_aa, self.linear_ba, self.linear_bb
        return (
            ab.square().sum(-1) + ba.square().sum(-1),
            -2 * ((ab * aa).sum(-1) + (ba * bb).sum(-1)),
            aa.square().sum(-1) + bb.square().sum(-1),
        )

    def quadratic(self) -> tuple[Float[Tensor, " layer"], ...]:
        """Variance of the residual's quadratic part: coefficients of 1, theta and theta squared."""
        constant = self.noise_ab.square().sum((-2, -1))
        square = (self.noise_aa.square().sum((-2, -1)) + self.noise_bb.square().sum((-2, -1))) / 2
        return constant, torch.zeros_like(constant), square


def polynomial(
    coefficients: tuple[Float[Tensor, " *axes"], ...], theta: Float[Tensor, " *axes"]
) -> Float[Tensor, " *axes"]:
    """Value at `theta`, coefficients in order of rising power."""
    value = torch.zeros_like(theta)
    for coefficient in reversed(coefficients):
        value = value * theta + coefficient
    return value
