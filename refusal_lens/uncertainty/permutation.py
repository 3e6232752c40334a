r"""What the cosine looks like when there is nothing to see: relabelled prompts, random directions.

The hypothesis of the permutation test is that two *real* directions are orthogonal. Relabelling one
contrast alone tests something stronger, that its labels mean nothing: it takes that direction's
signal away, and with it the share of the inner product's noise that the other contrast's sampling
error takes from this signal. So it is not the inner product that is compared but its ratio to its
own standard error, computed afresh for every relabelling. That test is exact where the labels mean
nothing and holds its level, with enough prompts, wherever the true cosine is 0. With those that one
has, it rejected 6 % where 5 % was meant: so relabelled ratios count as `WIDENING` times as large,
which errs on the other side where the labels mean nothing.

Reference: Chung and Romano 2013, arXiv:1304.5939 (studentised permutation tests).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil

import torch
from einops import einsum, rearrange
from jaxtyping import Float
from torch import Tensor

from .gram import Gram, centred_and_scaled, leave_one_out, mean_weights, plain_squared_norm
from .intervals import LEAST_SHARE, PRODUCTS, WIDENING


@dataclass(frozen=True)
class PermutationNull:
    """Two-sided p-values and the null's central range, per layer.

    `lower` and `upper` are on the scale of the plain cosine: where it would lie were the true
    cosine 0, as far out as the test counts.
    """

    p_value: Float[Tensor, " layer"]
    p_adjusted: Float[Tensor, " layer"]
    lower: Float[Tensor, " layer"]
    upper: Float[Tensor, " layer"]


def permutation_null(
    gram: Gram, *, n_resamples: int, confidence: float, generator: torch.Generator
) -> PermutationNull:
    """Test at every layer that the true cosine is 0, the labels of contrast `a` being shuffled.

    Labels are exchanged within pairs where `a` is paired, shuffled between its sets where not; the
    same way at all layers. The adjusted p-value compares with the largest statistic over layers and
    so holds for any choice of layer made after looking. The observed labels count as one of the
    relabellings: no p-value is below `1 / (n_resamples + 1)`.
    """
    labels = _relabellings(gram.groups_a, n_resamples, generator)
    chunk = max(1, PRODUCTS // (len(labels) * gram.ab.shape[-1]))
    parts = [
        _studentised_inner(ab, gram.groups_a, gram.groups_b, labels) for ab in gram.ab.split(chunk)
    ]
    ratio, error = (torch.cat(part) for part in zip(*parts, strict=True))
    observed, resampled = ratio[:, :1].abs(), ratio[:, 1:].abs()
    largest = resampled.nan_to_num(nan=0.0).amax(0)
    # Less by more than rounding: relabellings that mirror each other are equal.
    reach = observed / WIDENING
    scale = (
        error
        / (
            plain_squared_norm(gram.aa, gram.groups_a) * plain_squared_norm(gram.bb, gram.groups_b)
        ).sqrt()
        * WIDENING
    )
    k = max(1, round((1 - confidence) / 2 * n_resamples))
    unknown = torch.where(observed.isnan(), torch.nan, 0.0)[:, 0].double()
    return PermutationNull(
        p_value=((resampled >= reach).sum(-1) + 1) / (n_resamples + 1) + unknown,
        p_adjusted=((largest >= reach).sum(-1) + 1) / (n_resamples + 1) + unknown,
        lower=ratio[:, 1:].kthvalue(k, dim=-1).values.double() * scale,
        upper=ratio[:, 1:].kthvalue(n_resamples + 1 - k, dim=-1).values.double() * scale,
    )


def random_direction_null(
    gram: Gram, *, n_resamples: int, confidence: float, generator: torch.Generator
) -> tuple[Float[Tensor, " layer"], Float[Tensor, " layer"]]:
    """Central range of the plain cosine between direction `a` and directions without a meaning.

    These are normal with the covariance that the activations have within their classes (within
    pairs, where a contrast is paired): what mean differences between random sets of prompts look
    like. They share the anisotropy of the activations, which makes larger cosines ordinary than
    uniformly random directions would. Each row meets the direction that leaves it out. A tenth as
    many directions as resamples are drawn: nothing but the range is read off them.
    """
    n_directions = ceil(n_resamples / 10)
    groups = (*gram.groups_a, *gram.groups_b)
    unscale = torch.cat([torch.full((n,), float(n)) for n in groups]).double()
    inner = torch.cat(
        [
            leave_one_out(gram.aa, gram.groups_a),
            centred_and_scaled(gram.ab.mT @ mean_weights(gram.groups_a), gram.groups_b),
        ],
        dim=-1,
    )
    full = torch.cat(
        [torch.cat([gram.aa, gram.ab], dim=-1), torch.cat([gram.ab.mT, gram.bb], dim=-1)], dim=-2
    )
    full = centred_and_scaled(centred_and_scaled(full, groups).mT, groups)
    weights = torch.randn(n_directions, len(unscale), generator=generator).double() * unscale
    along = einsum(inner, weights, "layer row, resample row -> layer resample")
    squared = torch.stack([((weights @ block) * weights).sum(-1) for block in full])
    norm = plain_squared_norm(gram.aa, gram.groups_a)
    cosine = along / (squared * rearrange(norm, "layer -> layer 1")).sqrt()
    k = max(1, round((1 - confidence) / 2 * n_directions))
    return (
        cosine.kthvalue(k, dim=-1).values,
        cosine.kthvalue(n_directions + 1 - k, dim=-1).values,
    )


def _relabellings(
    groups: Sequence[int], n: int, generator: torch.Generator
) -> Float[Tensor, "resample row"]:
    """The observed labels and `n` shuffled ones: signs of the pairs, or 1 in the target and 0 not."""
    rows = sum(groups)
    if len(groups) == 1:
        shuffled = torch.randint(0, 2, (n, rows), generator=generator) * 2.0 - 1
        return torch.cat([torch.ones(1, rows), shuffled])
    order = torch.rand(n, rows, generator=generator).argsort(-1)
    return (torch.cat([torch.arange(rows)[None], order]) < groups[0]).float()


def _studentised_inner(
    gram: Float[Tensor, "layer row_a row_b"],
    groups_a: Sequence[int],
    groups_b: Sequence[int],
    labels: Float[Tensor, "resample row_a"],
) -> tuple[Float[Tensor, "layer resample"], Float[Tensor, " layer"]]:
    """The inner product over its standard error under every relabelling, and the first's error.

    The variance is that of `intervals` at a cosine of 0: the jackknife's, less the bilinear part
    that it counts twice.
    """
    size = rearrange(gram.abs().amax((-2, -1)), "layer -> layer 1 1")
    gram = gram / size
    if len(groups_a) == 2:
        # Rows of the baseline carry a reversed sign; a shuffled row takes that of its new class.
        gram = torch.cat([gram[:, : groups_a[0]], -gram[:, groups_a[0] :]], dim=1)
    products = (gram @ mean_weights(groups_b)).float()
    spread = centred_and_scaled(gram, groups_b).float()
    squares = spread.square().sum(-1)
    summed = labels @ spread
    memberships = [labels] if len(groups_a) == 1 else [labels, labels - 1]

    inner = own = bilinear = torch.zeros(len(gram), len(labels))
    direction = torch.zeros_like(summed)
    for membership, n in zip(memberships, groups_a, strict=True):
        mean = products @ membership.T / n
        centre = (summed if membership is labels else summed - spread.sum(1, keepdim=True)) / n
        inner = inner + mean
        direction += centre
        present, scale = membership.abs().T, n * (n - 1)
        own = own + (products.square() @ present - n * mean.square()) / scale
        bilinear = bilinear + (squares @ present - n * centre.square().sum(-1)) / scale
    jackknife = own + direction.square().sum(-1)
    error = (jackknife - bilinear).maximum(LEAST_SHARE * jackknife).sqrt()
    return inner / error, error[:, 0].double() * size[:, 0, 0]
