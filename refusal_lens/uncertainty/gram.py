r"""Gram matrices of two contrasts at each layer, which suffice for all statistics of directions.

A direction is a weighted sum of activations. The inner product of two directions, or of resampled
versions of them, is `w' G v`, where `G` holds the inner products of the activations.

Signed rows. A paired contrast has one group of rows, target minus baseline of each pair. An
unpaired contrast has two groups: activations minus the midpoint of the class means, with the sign
reversed in the baseline group. The direction is the sum over groups of the mean of the rows.

Diagonal. A row is `mu + e`. In thousands of dimensions, the noise in the products `e_i' e_i` can
exceed the signal in the squared norm of a mean of rows. Unbiased estimates omit the diagonal.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from einops import einsum
from jaxtyping import Bool, Float
from torch import Tensor

from ..errors import InputError, check_tensors

RowProducts = Float[Tensor, "layer row row"]  # inner products of signed rows of one contrast
CrossProducts = Float[Tensor, "layer row_a row_b"]  # of two contrasts
Groups = Sequence[int]  # sizes of a contrast's groups: `(pairs,)` or `(target, baseline)`
ROUNDING = 1e-6  # a class is constant if its rows differ by at most this share of their norm


@dataclass(frozen=True)
class Gram:
    """Inner products of the signed rows of two contrasts, `a` and `b`, at every layer, in float64.

    Attributes:
        aa, bb, ab: rows of `a` with rows of `a`, `b` with `b`, `a` with `b`.
        groups_a, groups_b: sizes of the groups of each contrast.
        constant_a, constant_b: layers at which a class does not vary (see `ROUNDING`).
    """

    aa: Float[Tensor, "layer row_a row_a"]
    bb: Float[Tensor, "layer row_b row_b"]
    ab: CrossProducts
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
        """Gram matrices of two contrasts' activations, computed layer by layer in float64.

        InputError if a set is empty or not finite, if the sets of a paired contrast differ in
        length, or if sets differ in layers, `d_model` or device.

        Args:
            a_target, a_baseline, b_target, b_baseline: activations of any floating dtype.
            a_paired, b_paired: whether row i of the target belongs to row i of the baseline.
        """
        named = {"a_target": a_target, "a_baseline": a_baseline}
        named |= {"b_target": b_target, "b_baseline": b_baseline}
        check_tensors(**{n: (rows, f"{n} layer d_model") for n, rows in named.items()})
        if a_target.shape[1] == 0:
            raise InputError("a_target has no layer: pass activations of at least one")
        groups_a, constant_a = _check("a", a_target, a_baseline, paired=a_paired)
        groups_b, constant_b = _check("b", b_target, b_baseline, paired=b_paired)
        layers = []
        for layer in range(a_target.shape[1]):
            a = _signed_rows(a_target[:, layer], a_baseline[:, layer], paired=a_paired)
            b = _signed_rows(b_target[:, layer], b_baseline[:, layer], paired=b_paired)
            layers.append((a @ a.T, b @ b.T, a @ b.T))
        aa, bb, ab = (torch.stack(blocks).cpu() for blocks in zip(*layers, strict=True))
        return cls(aa, bb, ab, groups_a, groups_b, constant_a, constant_b)

    def at(self, layers: Bool[Tensor, " layer"]) -> "Gram":
        """The Gram matrices of the layers where `layers` is true."""
        names = ("aa", "bb", "ab", "constant_a", "constant_b")
        return replace(self, **{name: getattr(self, name)[layers] for name in names})

    @property
    def inner(self) -> Float[Tensor, " layer"]:
        """Inner product of the two directions; unbiased if no prompt is in both contrasts."""
        weights_a, weights_b = mean_weights(self.groups_a), mean_weights(self.groups_b)
        return einsum(weights_a, self.ab, weights_b, "a, layer a b, b -> layer")

    @property
    def plain(self) -> Float[Tensor, " layer"]:
        """Cosine of the two sampled directions, in [-1, 1]. Noise biases it towards 0."""
        return (self.inner / self.norms).clamp(-1, 1)

    @property
    def norms(self) -> Float[Tensor, " layer"]:
        """Product of the norms of the two sampled directions."""
        squared_a = plain_squared_norm(self.aa, self.groups_a)
        return (squared_a * plain_squared_norm(self.bb, self.groups_b)).sqrt()


def mean_weights(groups: Groups) -> Float[Tensor, " row"]:
    """Weights that turn signed rows into the direction: one over the size of the row's group."""
    return torch.cat([torch.full((n,), 1 / n, dtype=torch.float64) for n in groups])


def slices(groups: Groups) -> Iterator[tuple[slice, int]]:
    """The rows of each group, and their number."""
    start = 0
    for n in groups:
        yield slice(start, start + n), n
        start += n


def plain_squared_norm(gram: RowProducts, groups: Groups) -> Float[Tensor, " layer"]:
    """Squared norm of the sampled direction, its noise included."""
    weights = mean_weights(groups)
    return einsum(weights, gram, weights, "p, layer p q, q -> layer")


def unbiased_squared_norm(gram: RowProducts, groups: Groups) -> Float[Tensor, " layer"]:
    """Unbiased squared norm of the true direction; may be negative. NaN if a group has one row."""
    squared = plain_squared_norm(gram, groups)
    for rows, n in slices(groups):
        block = gram[:, rows, rows]
        different = _without_diagonal(block).sum((-2, -1)) / (n * (n - 1) or torch.nan)
        squared = squared + different - block.mean((-2, -1))
    return squared


def centred_and_scaled(
    products: Float[Tensor, "*axes row"], groups: Groups
) -> Float[Tensor, "*axes row"]:
    """Products minus their group's mean, scaled so that squares sum to the variance of the mean."""
    parts = []
    for rows, n in slices(groups):
        part = products[..., rows]
        parts.append((part - part.mean(-1, keepdim=True)) / (n * (n - 1)) ** 0.5)
    return torch.cat(parts, dim=-1)


def leave_one_out(gram: RowProducts, groups: Groups) -> Float[Tensor, "layer row"]:
    """Product of each row with the direction from all other rows, centred and scaled."""
    off_diagonal = _without_diagonal(gram)
    products = off_diagonal @ mean_weights(groups)
    for rows, n in slices(groups):
        own = off_diagonal[:, rows, rows].mean(-1)
        # A row shifts the mean of the other rows' products by -1 / (n - 1): undo the shift.
        products[:, rows] += own * (n / (n - 2) - 1)
    return centred_and_scaled(products, groups)


def cross_noise_products(gram: CrossProducts, groups_a: Groups, groups_b: Groups) -> CrossProducts:
    """Products of two contrasts' noise, scaled so that squares sum to the variance of `e_a' e_b`."""
    return centred_and_scaled(centred_and_scaled(gram.mT, groups_a).mT, groups_b)


def noise_products(gram: RowProducts, groups: Groups) -> RowProducts:
    """Products of the rows' noise within a contrast: centred, scaled, with a zero diagonal.

    Twice the sum of squares is an unbiased estimate of the variance of the unbiased squared norm's
    quadratic part. U-centring within a group (Szekely and Rizzo 2014, arXiv:1310.2926, section 3)
    removes the diagonal, which would dominate with fewer rows than effective dimensions. A group
    needs 4 rows.
    """
    noise = cross_noise_products(gram, groups, groups)
    for rows, n in slices(groups):
        block = _without_diagonal(gram[:, rows, rows])
        mean = block.sum(-1) / (n - 2)
        overall = (mean.sum(-1) / (n - 1))[:, None, None]
        block = _without_diagonal(block - mean[:, :, None] - mean[:, None, :] + overall)
        noise[:, rows, rows] = block / (n * (n - 1) * n * (n - 3)) ** 0.5
    return noise


def _without_diagonal(gram: RowProducts) -> RowProducts:
    return gram - torch.diag_embed(gram.diagonal(dim1=-2, dim2=-1))


def _signed_rows(target: Tensor, baseline: Tensor, *, paired: bool) -> Float[Tensor, "row d_model"]:
    target, baseline = target.double(), baseline.double()
    if paired:
        return target - baseline
    # Subtracting the massive activations that all rows share keeps digits for the difference.
    middle = (target.mean(0) + baseline.mean(0)) / 2
    return torch.cat([target - middle, middle - baseline])


def _check(
    contrast: str, target: Tensor, baseline: Tensor, *, paired: bool
) -> tuple[tuple[int, ...], Bool[Tensor, " layer"]]:
    """Check a contrast; return its groups and the layers at which a class is constant."""
    constant = torch.zeros(target.shape[1], dtype=torch.bool)
    for name, rows in (("target", target), ("baseline", baseline)):
        where = f"the {name} set of contrast {contrast}"
        if len(rows) == 0:
            raise InputError(f"{where} is empty: a direction needs at least one prompt a side")
        # A non-finite entry makes the sum non-finite; entries tell an overflow of the sum apart.
        for row, layer in (~rows.sum(-1).isfinite()).nonzero().tolist():
            if not rows[row, layer].isfinite().all():
                found = f"row {row} of {where} holds a NaN or an infinity at layer {layer}"
                raise InputError(f"{found}: drop that prompt or recompute it in a wider dtype")
        first = rows[0].double()
        spread = torch.stack([(row.double() - first).norm(dim=-1) for row in rows]).amax(0)
        constant |= (spread <= ROUNDING * first.norm(dim=-1)).cpu()
    sizes = (len(target), len(baseline))
    if paired and sizes[0] != sizes[1]:
        counts = f"{sizes[0]} target and {sizes[1]} baseline rows"
        advice = f"pass {contrast}_paired=False or complete the pairs"
        raise InputError(f"contrast {contrast} is paired but has {counts}: {advice}")
    return sizes[:1] if paired else sizes, constant
