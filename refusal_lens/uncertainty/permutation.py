r"""Null distribution of the plain cosine, from relabelled prompts.

The hypothesis is that two directions are orthogonal. Relabelling one contrast tests a stronger
hypothesis, that labels and activations are independent: relabelling removes the direction's signal
and the noise that the signal adds to the inner product. The test therefore compares the inner
product over its standard error, computed anew for each relabelling (Chung and Romano 2013,
arXiv:1304.5939). The test is exact under independence and asymptotically valid under orthogonality.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from . import gram as grams
from .clusters import two_way
from .gram import Gram, Groups
from .intervals import LEAST_SHARE

Labels = Float[Tensor, "resample row"]
# Factor on the relabelled ratios that corrects the test's level for few prompts: the smallest, in
# steps of 0.01, that gives 5 % rejections in the coverage benchmark (seed 1000), 5.9 % without.
WIDENING = 1.05


class PermutationNull(NamedTuple):
    """Two-sided p-values, and a central range of the plain cosine, if the true cosine is 0."""

    p_value: Float[Tensor, " layer"]
    p_adjusted: Float[Tensor, " layer"]
    lower: Float[Tensor, " layer"]
    upper: Float[Tensor, " layer"]


def permutation_null(
    gram: Gram, *, n_resamples: int, confidence: float, generator: torch.Generator
) -> PermutationNull:
    """Test at every layer that the true cosine is 0, by shuffling the labels of contrast `a`.

    Labels are exchanged within pairs if `a` is paired, else shuffled between its sets; in the same
    way at all layers, and for prompts of a cluster together. Of crossed ways of clustering, with the
    two-way standard error in the ratios, the larger p-value counts. The adjusted one uses the largest
    ratio over layers, so it is valid for a layer chosen after seeing all.
    """
    found = [_ratios_by_layer(way, n_resamples, generator) for way in gram.one_way]
    variances = [error.square() for _, error in found]
    if gram.crossed:
        variances.append(_ratios_by_layer(gram.crossed[1], 0, generator)[1].square())
    stretch = [(two_way(variances) / own).sqrt() for own in variances]
    nulls = []
    for (ratio, error), by in zip(found, stretch, strict=False):
        widening = WIDENING * by
        observed, relabelled = ratio[:, :1].abs() / widening[:, None], ratio[:, 1:]
        largest = relabelled.abs().nan_to_num(nan=0.0).amax(0)
        reached = torch.stack([relabelled.abs() >= observed, largest >= observed]).sum(-1)
        p_values = (reached + 1).double() / (n_resamples + 1)
        p_values[:, observed[:, 0].isnan()] = torch.nan
        scale = widening * error / gram.norms
        k = max(1, round((1 - confidence) / 2 * n_resamples))
        ends = (relabelled.kthvalue(i).values.double() * scale for i in (k, n_resamples + 1 - k))
        nulls.append(torch.stack([*p_values, *ends]))
    p_value, p_adjusted, _, upper = torch.stack(nulls).amax(0)
    return PermutationNull(p_value, p_adjusted, torch.stack(nulls)[:, 2].amin(0), upper)


def _relabellings(groups: Groups, n: int, generator: torch.Generator) -> Labels:
    """The observed labels, then `n` shuffled ones: signs of pairs, or 1 (target) and 0 (baseline)."""
    rows = sum(map(len, groups))
    if len(groups) == 1:
        shuffled = torch.randint(0, 2, (n, rows), generator=generator) * 2.0 - 1
        return torch.cat([torch.ones(1, rows), shuffled])
    order = torch.rand(n, rows, generator=generator).argsort(-1)
    return (torch.cat([torch.arange(rows)[None], order]) < len(groups[0])).float()


def _ratios_by_layer(
    gram: Gram, n_resamples: int, generator: torch.Generator
) -> tuple[Float[Tensor, "layer resample"], Float[Tensor, " layer"]]:
    """`_studentised_inner` at every layer, with the same labels; the observed ones come first."""
    labels = _relabellings(gram.groups_a, n_resamples, generator)
    by_layer = [_studentised_inner(ab, gram.groups_a, gram.groups_b, labels) for ab in gram.ab]
    ratio, error = (torch.stack(part) for part in zip(*by_layer, strict=True))
    return ratio, error


def _studentised_inner(
    gram: Float[Tensor, "row_a row_b"], groups_a: Groups, groups_b: Groups, labels: Labels
) -> tuple[Float[Tensor, " resample"], Float[Tensor, ""]]:
    """Inner product over its standard error under every relabelling, and the observed error."""
    size = gram.abs().max()
    gram = gram / size
    if len(groups_a) == 2:
        # Baseline rows have a reversed sign; a shuffled row gets the sign of its new class.
        gram = torch.cat([gram[: len(groups_a[0])], -gram[len(groups_a[0]) :]])
    # A row weighs as much as its cluster has prompts, in whichever class.
    gram = gram * torch.cat([weights * len(weights) for weights in groups_a])[:, None]
    products = (gram @ grams.mean_weights(groups_b)).float()
    spread = grams.centred_and_scaled(gram, groups_b).float()
    summed = labels @ spread
    sums = [(labels, summed), (labels - 1, summed - spread.sum(0))]
    inner = own = bilinear = torch.zeros(len(labels))
    direction = torch.zeros_like(summed)
    for (membership, total), weights in zip(sums, groups_a, strict=False):
        n = len(weights)
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
