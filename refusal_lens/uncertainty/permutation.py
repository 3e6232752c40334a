r"""Null distributions of the plain cosine: relabelled prompts, and random directions.

The hypothesis is that two directions are orthogonal. Relabelling one contrast tests a stronger
hypothesis, that labels and activations are independent: relabelling removes the direction's signal
and the noise that the signal adds to the inner product. The test therefore compares the inner
product over its standard error, computed anew for each relabelling (Chung and Romano 2013,
arXiv:1304.5939). The test is exact under independence and asymptotically valid under orthogonality.
"""

from math import ceil
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from . import gram as grams
from .gram import Gram, Groups
from .intervals import LEAST_SHARE

Labels = Float[Tensor, "resample row"]
# Factor on the relabelled ratios that corrects the test's level for few prompts: the smallest, in
# steps of 0.01, that gives 5 % rejections in the coverage benchmark (seed 1000), 5.9 % without.
WIDENING = 1.05


class PermutationNull(NamedTuple):
    """Two-sided p-values, and the plain cosine's central range if the true cosine is 0."""

    p_value: Float[Tensor, " layer"]
    p_adjusted: Float[Tensor, " layer"]
    lower: Float[Tensor, " layer"]
    upper: Float[Tensor, " layer"]


def permutation_null(
    gram: Gram, *, n_resamples: int, confidence: float, generator: torch.Generator
) -> PermutationNull:
    """Test at every layer that the true cosine is 0, by shuffling the labels of contrast `a`.

    Labels are exchanged within pairs if `a` is paired, else shuffled between its sets, in the same
    way at all layers. The adjusted p-value uses the largest ratio over layers, so it is valid for a
    layer chosen after seeing all. No p-value is below `1 / (n_resamples + 1)`.

    Args:
        gram, n_resamples: Gram matrices of the two contrasts, and number of relabellings.
        confidence: of the central range.
        generator: the only source of randomness, on the CPU.
    """
    labels = _relabellings(gram.groups_a, n_resamples, generator)
    by_layer = [_studentised_inner(ab, gram.groups_a, gram.groups_b, labels) for ab in gram.ab]
    ratio, error = (torch.stack(part) for part in zip(*by_layer, strict=True))
    observed, relabelled = ratio[:, :1].abs() / WIDENING, ratio[:, 1:]
    largest = relabelled.abs().nan_to_num(nan=0.0).amax(0)
    reached = torch.stack([relabelled.abs() >= observed, largest >= observed]).sum(-1)
    p_values = (reached + 1).double() / (n_resamples + 1)
    p_values[:, observed[:, 0].isnan()] = torch.nan
    scale = WIDENING * error / gram.norms
    k = max(1, round((1 - confidence) / 2 * n_resamples))
    ends = (relabelled.kthvalue(i).values.double() * scale for i in (k, n_resamples + 1 - k))
    return PermutationNull(*p_values, *ends)


def random_direction_null(
    gram: Gram, *, n_resamples: int, confidence: float, generator: torch.Generator
) -> tuple[Float[Tensor, " layer"], Float[Tensor, " layer"]]:
    """Central range of the plain cosine between direction `a` and random directions.

    Random directions are normal with the activations' covariance within classes (within pairs, in a
    paired contrast), like mean differences of random prompt sets. Their number is `n_resamples/10`.
    """
    n_directions = ceil(n_resamples / 10)
    groups = (*gram.groups_a, *gram.groups_b)
    with_b = gram.ab.mT @ grams.mean_weights(gram.groups_a)
    parts = (
        grams.leave_one_out(gram.aa, gram.groups_a),
        grams.centred_and_scaled(with_b, gram.groups_b),
    )
    inner = torch.cat(parts, dim=-1)
    upper, lower = torch.cat([gram.aa, gram.ab], dim=-1), torch.cat([gram.ab.mT, gram.bb], dim=-1)
    products = grams.cross_noise_products(torch.cat([upper, lower], dim=-2), groups, groups)
    weights = torch.randn(n_directions, sum(groups), generator=generator).double()
    weights = weights / grams.mean_weights(groups)
    squared = torch.stack([((weights @ block) * weights).sum(-1) for block in products])
    norm = (squared * grams.plain_squared_norm(gram.aa, gram.groups_a)[:, None]).sqrt()
    cosine = inner @ weights.T / norm
    k = max(1, round((1 - confidence) / 2 * n_directions))
    return cosine.kthvalue(k).values, cosine.kthvalue(n_directions + 1 - k).values


def _relabellings(groups: Groups, n: int, generator: torch.Generator) -> Labels:
    """The observed labels, then `n` shuffled ones: signs of pairs, or 1 (target) and 0 (baseline)."""
    rows = sum(groups)
    if len(groups) == 1:
        shuffled = torch.randint(0, 2, (n, rows), generator=generator) * 2.0 - 1
        return torch.cat([torch.ones(1, rows), shuffled])
    order = torch.rand(n, rows, generator=generator).argsort(-1)
    return (torch.cat([torch.arange(rows)[None], order]) < groups[0]).float()


def _studentised_inner(
    gram: Float[Tensor, "row_a row_b"], groups_a: Groups, groups_b: Groups, labels: Labels
) -> tuple[Float[Tensor, " resample"], Float[Tensor, ""]]:
    """Inner product over its standard error under every relabelling, and the observed error."""
    size = gram.abs().max()
    gram = gram / size
    if len(groups_a) == 2:
        # Baseline rows have a reversed sign; a shuffled row gets the sign of its new class.
        gram = torch.cat([gram[: groups_a[0]], -gram[groups_a[0] :]])
    products = (gram @ grams.mean_weights(groups_b)).float()
    spread = grams.centred_and_scaled(gram, groups_b).float()
    summed = labels @ spread
    sums = [(labels, summed), (labels - 1, summed - spread.sum(0))]
    inner = own = bilinear = torch.zeros(len(labels))
    direction = torch.zeros_like(summed)
    for (membership, total), n in zip(sums, groups_a, strict=False):
        mean, centre = membership @ products / n, total / n
        present, scale = membership.abs(), n * (n - 1)
        inner = inner + mean
        direction += centre
        own = own + (present @ products.square() - n * mean.square()) / scale
        squares = present @ spread.square().sum(-1)
        bilinear = bilinear + (squares - n * centre.square().sum(-1)) / scale
    jackknife = own + direction.square().sum(-1)
    error = (jackknife - bilinear).maximum(LEAST_SHARE * jackknife).sqrt()
    return inner / error, error[0].double() * size
