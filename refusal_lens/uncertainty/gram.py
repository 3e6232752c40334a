r"""Activations of two contrasts -> one Gram matrix per layer, and what it says of their directions.

A direction is a weighted sum of activations, so every inner product of directions, and of any
resampled version of them, is `w' G v` with `G` the inner products of the activations. What follows
needs `G` alone; `d_model` never comes back.

Signed rows. A paired contrast has one row per pair, target minus baseline. An unpaired one has one
row per prompt, less the mid-point of the two class means, its sign reversed in the baseline. Either
way the direction is the sum, over the contrast's groups (one if paired, two if not), of the mean of
the group's rows, and nothing below needs to know which it was.

Why the diagonal is left out. A row is `mu + e`, so `|mean|^2 = |mu|^2 + noise^2`: the noise's own
square sits in the diagonal terms `e_i' e_i`. In 4096 dimensions it is easily larger than the
signal. Products of two *different* rows have no such term.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from einops import einsum, rearrange
from jaxtyping import Bool, Float
from torch import Tensor

from ..errors import InputError, check_tensors

ROUNDING = 1e-6
"""A class whose rows differ by less than this share of their norm is constant but for rounding."""


@dataclass(frozen=True)
class Gram:
    """Inner products of the signed rows of two contrasts, `a` and `b`, at every layer, in float64.

    Attributes:
        aa: rows of `a` with rows of `a`.
        bb: rows of `b` with rows of `b`.
        ab: rows of `a` with rows of `b`.
        groups_a: sizes of `a`'s groups: `(pairs,)`, or `(target, baseline)` where it isn't paired.
        groups_b: the same of `b`.
        constant_a: layers at which a class of `a` does not vary (see `ROUNDING`).
        constant_b: the same of `b`.
    """

    aa: Float[Tensor, "layer row_a row_a"]
    bb: Float[Tensor, "layer row_b row_b"]
    ab: Float[Tensor, "layer row_a row_b"]
    groups_a: tuple[int, ...]
    groups_b: tuple[int, ...]
    constant_a: Bool[Tensor, " layer"]
    constant_b: Bool[Tensor, " layer"]

    @classmethod
    def of(
        cls,
        a_target: Float[Tensor, "a_target layer d_model"],
        a_baseline: Float[Tensor, "a_baseline layer d_model"],
        b_target: Float[Tensor, "b_target layer d_model"],
        b_baseline: Float[Tensor, "b_baseline layer d_model"],
        *,
        a_paired: bool,
        b_paired: bool,
    ) -> "Gram":
        """The Gram matrices of two contrasts' activations, computed layer by layer in float64.

        What an unpaired contrast's rows have in common is subtracted first, as massive activations
        would otherwise cost the digits that the difference between the classes is made of.

        Raises:
            InputError: if a set is empty, holds a NaN or an infinity (names set, row and layer), or
                a paired contrast's sets differ in length; if the four are not tensors of one
                [layer d_model] on one device.
        """
        named = {"a_target": a_target, "a_baseline": a_baseline}
        named |= {"b_target": b_target, "b_baseline": b_baseline}
        check_tensors(**{n: (rows, f"{n} layer d_model") for n, rows in named.items()})
        if a_target.shape[1] == 0:
            raise InputError("a_target has no layer: hand over activations of at least one")
        for contrast, sides, paired in (
            ("a", (a_target, a_baseline), a_paired),
            ("b", (b_target, b_baseline), b_paired),
        ):
            for side, rows in zip(("target", "baseline"), sides, strict=True):
                _check_finite(rows, f"the {side} set of contrast {contrast}")
            if paired and len(sides[0]) != len(sides[1]):
                raise InputError(
                    f"contrast {contrast} is paired but has {len(sides[0])} target and "
                    f"{len(sides[1])} baseline rows: pass {contrast}_paired=False or complete the "
                    "pairs"
                )
        layers = []
        for layer in range(a_target.shape[1]):
            a = _signed_rows(a_target[:, layer], a_baseline[:, layer], paired=a_paired)
            b = _signed_rows(b_target[:, layer], b_baseline[:, layer], paired=b_paired)
            layers.append((a @ a.T, b @ b.T, a @ b.T))
        aa, bb, ab = (torch.stack(blocks).cpu() for blocks in zip(*layers, strict=True))
        return cls(
            aa,
            bb,
            ab,
            groups_a=(len(a_target),) if a_paired else (len(a_target), len(a_baseline)),
            groups_b=(len(b_target),) if b_paired else (len(b_target), len(b_baseline)),
            constant_a=_constant(a_target) | _constant(a_baseline),
            constant_b=_constant(b_target) | _constant(b_baseline),
        )

    def at(self, layers: Bool[Tensor, " layer"]) -> "Gram":
        """The same at some layers only."""
        return Gram(
            self.aa[layers],
            self.bb[layers],
            self.ab[layers],
            groups_a=self.groups_a,
            groups_b=self.groups_b,
            constant_a=self.constant_a[layers],
            constant_b=self.constant_b[layers],
        )

    @cached_property
    def inner(self) -> Float[Tensor, " layer"]:
        """Inner product of the two directions: unbiased, the contrasts having no row in common."""
        weights_a, weights_b = mean_weights(self.groups_a), mean_weights(self.groups_b)
        return einsum(weights_a, self.ab, weights_b, "a, layer a b, b -> layer")

    @cached_property
    def plain(self) -> Float[Tensor, " layer"]:
        """Cosine of the two sampled directions, in [-1, 1], pulled towards 0 by their noise."""
        norms = plain_squared_norm(self.aa, self.groups_a) * plain_squared_norm(
            self.bb, self.groups_b
        )
        return (self.inner / norms.sqrt()).clamp(-1, 1)


def mean_weights(groups: Sequence[int]) -> Float[Tensor, " row"]:
    """The weights that turn signed rows into the direction: one over the size of the row's group."""
    return torch.cat([torch.full((n,), 1 / n, dtype=torch.float64) for n in groups])


def plain_squared_norm(
    gram: Float[Tensor, "layer row row"], groups: Sequence[int]
) -> Float[Tensor, " layer"]:
    """Squared norm of the sampled direction, its noise included."""
    weights = mean_weights(groups)
    return einsum(weights, gram, weights, "p, layer p q, q -> layer")


def unbiased_squared_norm(
    gram: Float[Tensor, "layer row row"], groups: Sequence[int]
) -> Float[Tensor, " layer"]:
    """Squared norm of the true direction, without bias; negative values are possible and mean noise.

    The diagonal is left out of each group's mean product of two rows. NaN where a group has one row.
    """
    if min(groups) < 2:
        return torch.full(gram.shape[:1], torch.nan, dtype=gram.dtype)
    return einsum(gram, pair_weights(groups), "layer p q, p q -> layer")


def pair_weights(groups: Sequence[int]) -> Float[Tensor, "row row"]:
    """Weight of each product of two rows in the unbiased squared norm: nothing on the diagonal."""
    weights = mean_weights(groups)
    within = torch.block_diag(*[torch.full((n, n), n / (n - 1)) for n in groups]).double()
    scale = torch.where(within > 0, within, 1.0).fill_diagonal_(0.0)
    return scale * torch.outer(weights, weights)


def leave_one_out(
    gram: Float[Tensor, "layer row row"], groups: Sequence[int]
) -> Float[Tensor, "layer row"]:
    """Each row's product with its own direction, computed without that row.

    Centred within groups and scaled so that the sum of squares estimates the variance that the
    squared norm's linear part takes from the noise, a quarter of it; see `Noise`.
    """
    off_diagonal = gram - torch.diag_embed(gram.diagonal(dim1=-2, dim2=-1))
    products = off_diagonal @ mean_weights(groups)
    for rows, n in _slices(groups):
        own = off_diagonal[:, rows, rows].mean(-1)
        # The row moves the mean of the others' products by -1 / (n - 1): undo that.
        products[:, rows] += own * (n / (n - 2) - 1)
    return centred_and_scaled(products, groups)


def centred_and_scaled(
    products: Float[Tensor, "*axes row"], groups: Sequence[int]
) -> Float[Tensor, "*axes row"]:
    """Products less their group's mean, scaled: the sum of squares is the variance of the mean."""
    parts = []
    for rows, n in _slices(groups):
        part = products[..., rows]
        parts.append((part - part.mean(-1, keepdim=True)) / (n * (n - 1)) ** 0.5)
    return torch.cat(parts, dim=-1)


def noise_products(
    gram: Float[Tensor, "layer row row"], groups: Sequence[int]
) -> Float[Tensor, "layer row row"]:
    r"""Products of the rows' noise within a contrast: centred, diagonal 0, scaled.

    For independent multipliers `g` with mean 0 and variance 1, `g' H g` varies as the quadratic part
    of the unbiased squared norm does: `2 |H|^2` is an unbiased estimate of its variance. Within a
    group the centring is the U-centring of Szekely and Rizzo, which unlike ordinary centring leaves
    no trace of the diagonal; with fewer rows than effective dimensions that trace would dominate.
    Needs groups of 4.

    Reference: Szekely and Rizzo 2014, arXiv:1310.2926, section 3.
    """
    noise = torch.empty_like(gram)
    for rows, n in _slices(groups):
        for columns, m in _slices(groups):
            block = gram[:, rows, columns]
            if rows == columns:
                off_diagonal = block - torch.diag_embed(block.diagonal(dim1=-2, dim2=-1))
                mean = off_diagonal.sum(-1) / (n - 2)
                block = (
                    off_diagonal
                    - rearrange(mean, "layer p -> layer p 1")
                    - rearrange(mean, "layer q -> layer 1 q")
                    + rearrange(mean.sum(-1) / (n - 1), "layer -> layer 1 1")
                )
                block.diagonal(dim1=-2, dim2=-1).zero_()
                noise[:, rows, columns] = block / (n * (n - 1) * n * (n - 3)) ** 0.5
            else:
                noise[:, rows, columns] = _doubly_centred(block) / (
                    (n * (n - 1) * m * (m - 1)) ** 0.5
                )
    return noise


def cross_noise_products(
    gram: Float[Tensor, "layer row_a row_b"], groups_a: Sequence[int], groups_b: Sequence[int]
) -> Float[Tensor, "layer row_a row_b"]:
    """Products of the noise of one contrast's rows with the other's: centred, scaled.

    The sum of squares is an unbiased estimate of the variance of the inner product's bilinear part.
    """
    noise = torch.empty_like(gram)
    for rows, n in _slices(groups_a):
        for columns, m in _slices(groups_b):
            block = _doubly_centred(gram[:, rows, columns])
            noise[:, rows, columns] = block / (n * (n - 1) * m * (m - 1)) ** 0.5
    return noise


def _doubly_centred(
    block: Float[Tensor, "layer row_a row_b"],
) -> Float[Tensor, "layer row_a row_b"]:
    block = block - block.mean(-1, keepdim=True)
    return block - block.mean(-2, keepdim=True)


def _slices(groups: Sequence[int]) -> list[tuple[slice, int]]:
    starts = [sum(groups[:k]) for k in range(len(groups))]
    return [(slice(start, start + n), n) for start, n in zip(starts, groups, strict=True)]


def _signed_rows(
    target: Float[Tensor, "target d_model"],
    baseline: Float[Tensor, "baseline d_model"],
    *,
    paired: bool,
) -> Float[Tensor, "row d_model"]:
    target, baseline = target.double(), baseline.double()
    if paired:
        return target - baseline
    middle = (target.mean(0) + baseline.mean(0)) / 2
    return torch.cat([target - middle, middle - baseline])


def _constant(rows: Float[Tensor, "prompt layer d_model"]) -> Bool[Tensor, " layer"]:
    first = rows[0].double()
    spread = torch.stack([(row.double() - first).norm(dim=-1) for row in rows]).amax(0)
    return (spread <= ROUNDING * first.norm(dim=-1)).cpu()


def _check_finite(rows: Float[Tensor, "prompt layer d_model"], name: str) -> None:
    if len(rows) == 0:
        raise InputError(f"{name} is empty: a direction needs at least one prompt on each side")
    # One sum per vector: not finite where an entry isn't. An overflow can't hide one, only mimic it.
    for row, layer in (~rows.sum(-1).isfinite()).nonzero().tolist():
        if not rows[row, layer].isfinite().all():
            raise InputError(
                f"row {row} of {name} holds a NaN or an infinity at layer {layer}: drop that prompt "
                "or recompute its activations in a wider dtype"
            )
