r"""Gram matrices of two contrasts at each layer, which suffice for all statistics of directions.

A direction is a weighted sum of activations. The inner product of two directions, or of resampled
versions of them, is `w' G v`, where `G` holds the inner products of the activations.

Signed rows. A paired contrast has one group of rows, target minus baseline of each pair. An
unpaired contrast has two groups: activations minus the midpoint of the class means, with the sign
reversed in the baseline group. The direction is the sum over groups of the mean of the rows.

Diagonal. A row is `mu + e`. In thousands of dimensions, the noise in the products `e_i' e_i` can
exceed the signal in the squared norm of a mean of rows. Unbiased estimates omit the diagonal.

Clusters. Where prompts form clusters, a row is the mean of a cluster, weighted by the cluster's share
of the prompts. Omitting the diagonal then leaves out every pair of prompts of one cluster. Two crossed
ways of clustering give three Gram matrices: rows by the first way, by the second, and by both at once.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from einops import einsum
from jaxtyping import Bool, Float
from torch import Tensor

from ..directions.estimators import checked_mean
from ..errors import InputError, check_tensors
from .clusters import Clusters, cluster_means, cluster_weights, ways

RowProducts = Float[Tensor, "layer row row"]  # inner products of signed rows of one contrast
CrossProducts = Float[Tensor, "layer row_a row_b"]  # of two contrasts
Weights = Float[Tensor, " _row"]  # of the rows in their group's mean; their sum is 1
Groups = Sequence[Weights]  # a contrast's groups: `(pairs,)` or `(target, baseline)`
ROUNDING = 1e-6  # a class is constant if its rows differ by at most this share of their norm


@dataclass(frozen=True)
class Gram:
    """Inner products of the signed rows of two contrasts, `a` and `b`, at every layer, in float64.

    Attributes:
        aa, bb, ab: rows of `a` with rows of `a`, `b` with `b`, `a` with `b`.
        groups_a, groups_b: weights of the rows of each group of each contrast, float64.
        constant_a, constant_b: layers at which a class does not vary (see `ROUNDING`).
        clustered: whether labels of clusters were given.
        crossed: the same with rows by the second way of clustering, and by both ways; else empty.
    """

    aa: Float[Tensor, "layer row_a row_a"]
    bb: Float[Tensor, "layer row_b row_b"]
    ab: CrossProducts
    groups_a: tuple[Weights, ...]
    groups_b: tuple[Weights, ...]
    constant_a: Bool[Tensor, " layer"]
    constant_b: Bool[Tensor, " layer"]
    clustered: bool = False
    crossed: tuple["Gram", ...] = ()

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
        a_clusters: Clusters = None,
        b_clusters: Clusters = None,
    ) -> "Gram":
        """Gram matrices of two contrasts' activations, computed layer by layer in float64.

        InputError if a set is empty or not finite, if the sets of a paired contrast differ in
        length, if sets differ in layers, `d_model` or device, or if clusters don't fit the prompts.
        """
        named = {"a_target": a_target, "a_baseline": a_baseline}
        named |= {"b_target": b_target, "b_baseline": b_baseline}
        check_tensors(**{n: (rows, f"{n} layer d_model") for n, rows in named.items()})
        if a_target.shape[1] == 0:
            raise InputError("a_target has no layer: pass activations of at least one")
        sizes_a, constant_a = _check("a", a_target, a_baseline, paired=a_paired)
        sizes_b, constant_b = _check("b", b_target, b_baseline, paired=b_paired)
        ways_a, ways_b = ways("a", a_clusters, sizes_a), ways("b", b_clusters, sizes_b)
        n = max(len(ways_a), len(ways_b))
        both = [(ways_a[i % len(ways_a)], ways_b[i % len(ways_b)]) for i in range(n)]
        layers = []
        for layer in range(a_target.shape[1]):
            a = _signed_rows(a_target[:, layer], a_baseline[:, layer], paired=a_paired)
            b = _signed_rows(b_target[:, layer], b_baseline[:, layer], paired=b_paired)
            means = [(cluster_means(a, one), cluster_means(b, other)) for one, other in both]
            layers.append([(x @ x.T, y @ y.T, x @ y.T) for x, y in means])
        clustered = any(each is not None and len(each) > 0 for each in (a_clusters, b_clusters))
        found = []
        for way, by_layer in zip(both, zip(*layers, strict=True), strict=True):
            aa, bb, ab = (torch.stack(blocks).cpu() for blocks in zip(*by_layer, strict=True))
            groups_a, groups_b = map(cluster_weights, way)
            found.append(cls(aa, bb, ab, groups_a, groups_b, constant_a, constant_b, clustered))
        return replace(found[0], crossed=tuple(found[1:]))

    def at(self, layers: Bool[Tensor, " layer"]) -> "Gram":
        """The Gram matrices of the layers where `layers` is true."""
        names = ("aa", "bb", "ab", "constant_a", "constant_b")
        chosen = {name: getattr(self, name)[layers] for name in names}
        return replace(self, **chosen, crossed=tuple(gram.at(layers) for gram in self.crossed))

    @property
    def one_way(self) -> tuple["Gram", ...]:
        """A Gram without `crossed` for each way in which prompts are clustered: one or two."""
        return (replace(self, crossed=()), *self.crossed[:1])

    @property
    def n_clusters(self) -> float:
        """Effective number of rows in the smallest group: `1 / sum(weights^2)`."""
        groups = [group for way in self.one_way for group in (*way.groups_a, *way.groups_b)]
        return min(1 / float(weights.square().sum()) for weights in groups)

    @property
    def sides(self) -> tuple[tuple[Tensor, Groups], tuple[Tensor, Groups]]:
        """The products of each contrast's rows with one another, and the contrast's groups."""
        return (self.aa, self.groups_a), (self.bb, self.groups_b)

    @property
    def unbiased_squared_norms(self) -> tuple[Float[Tensor, " layer"], Float[Tensor, " layer"]]:
        """Unbiased squared norms of the two true directions; may be negative."""
        by_side = zip(*(way.sides for way in (self, *self.crossed)), strict=True)
        a, b = (unbiased_squared_norm(*own, crossed=crossed) for own, *crossed in by_side)
        return a, b

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
        squared_a, squared_b = (plain_squared_norm(*side) for side in self.sides)
        return (squared_a * squared_b).sqrt()


def mean_weights(groups: Groups) -> Float[Tensor, " row"]:
    """Weights that turn signed rows into the direction."""
    return torch.cat([*groups])


def slices(groups: Groups) -> Iterator[tuple[slice, Weights]]:
    """The rows of each group, and their weights."""
    start = 0
    for weights in groups:
        yield slice(start, start + len(weights)), weights
        start += len(weights)


def plain_squared_norm(gram: RowProducts, groups: Groups) -> Float[Tensor, " layer"]:
    """Squared norm of the sampled direction, its noise included."""
    weights = mean_weights(groups)
    return einsum(weights, gram, weights, "p, layer p q, q -> layer")


def unbiased_squared_norm(
    gram: RowProducts, groups: Groups, *, crossed: Sequence[tuple[Tensor, Groups]] = ()
) -> Float[Tensor, " layer"]:
    """Unbiased squared norm of the true direction; may be negative. NaN if a group has one row.

    `crossed` are the products and groups by the second way of clustering and by both ways.
    """
    squared = plain_squared_norm(gram, groups)
    for i, (rows, weights) in enumerate(slices(groups)):
        within = einsum(weights, gram[:, rows, rows], weights, "p, layer p q, q -> layer")
        same, share = torch.zeros_like(within), 0.0
        for sign, (products, other) in zip((1, 1, -1), ((gram, groups), *crossed), strict=False):
            own, own_weights = [*slices(other)][i]
            share += sign * float(own_weights.square().sum())
            diagonal = products[:, own, own].diagonal(dim1=-2, dim2=-1)
            same += sign * (diagonal @ own_weights.square())
        different = (within - same) / (1 - share if share < 1 - 1e-9 else torch.nan)
        squared = squared + different - within
    return squared


def centred_and_scaled(
    products: Float[Tensor, "*axes row"], groups: Groups
) -> Float[Tensor, "*axes row"]:
    """Products minus their group's mean, scaled so that squares sum to the variance of the mean."""
    parts = []
    for rows, weights in slices(groups):
        part = products[..., rows]
        scale = weights / (1 - weights).sqrt()
        parts.append((part - (part @ weights)[..., None]) * scale)
    return torch.cat(parts, dim=-1)


def leave_one_out(gram: RowProducts, groups: Groups) -> Float[Tensor, "layer row"]:
    """Product of each row with the direction from all other rows, centred and scaled."""
    off_diagonal = _without_diagonal(gram)
    products = off_diagonal @ mean_weights(groups)
    for rows, weights in slices(groups):
        others = weights / (1 - weights)
        own = off_diagonal[:, rows, rows] @ weights
        centred = own / (1 - weights)
        centred = centred - (centred @ weights)[:, None]
        # A row also shifts the mean of the other rows' products, which weakens it: undo that.
        lost = 1 - weights - weights * (others.sum() - others)
        products[:, rows] += centred * (1 - weights) / lost - own
    return centred_and_scaled(products, groups)


def cross_noise_products(gram: CrossProducts, groups_a: Groups, groups_b: Groups) -> CrossProducts:
    """Products of two contrasts' noise, scaled so that squares sum to the variance of `e_a' e_b`."""
    return centred_and_scaled(centred_and_scaled(gram.mT, groups_a).mT, groups_b)


def noise_products(gram: RowProducts, groups: Groups) -> RowProducts:
    """Products of the rows' noise within a contrast: centred, scaled, with a zero diagonal.

    Twice the sum of squares is an unbiased estimate of the variance of the unbiased squared norm's
    quadratic part. U-centring within a group, here with weights, removes the diagonal (Szekely and
    Rizzo 2014, arXiv:1310.2926, section 3). A group needs more than 3 rows, none of half the weight.
    """
    noise = cross_noise_products(gram, groups, groups)
    for rows, weights in slices(groups):
        block = _without_diagonal(gram[:, rows, rows])
        share = weights / (1 - 2 * weights)
        mean = (block @ weights) / (1 - 2 * weights)
        overall = (mean @ weights / (1 + share.sum()))[:, None]
        mean = mean - overall / (1 - 2 * weights)
        block = _without_diagonal(block - mean[:, :, None] - mean[:, None, :])
        square = weights.square().sum()
        scale = ((1 - square) * (1 - 3 * square)).sqrt()
        noise[:, rows, rows] = block * weights[:, None] * weights / scale
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
        checked_mean(f"{name} set of contrast {contrast}", rows)
        first = rows[0].double()
        alike = torch.ones_like(constant, device=rows.device)
        for row in rows:
            alike &= (row.double() - first).norm(dim=-1) <= ROUNDING * first.norm(dim=-1)
            if not alike.any():
                break
        constant |= alike.cpu()
    sizes = (len(target), len(baseline))
    if paired and sizes[0] != sizes[1]:
        counts = f"{sizes[0]} target and {sizes[1]} baseline rows"
        advice = f"pass {contrast}_paired=False or complete the pairs"
        raise InputError(f"contrast {contrast} is paired but has {counts}: {advice}")
    return sizes[:1] if paired else sizes, constant
