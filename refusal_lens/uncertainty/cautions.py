"""Activations for which simulated intervals covered less than they say, recognised by themselves."""

from enum import StrEnum

import torch
from torch import Tensor

from .gram import Gram, centred_and_scaled, cross_noise_products, slices
from .intervals import Noise

# Bounds between layers that behave and layers that don't, chosen on seed 2000 of
# tests/benchmarks/statistics_designs.py, where fewer than 2 % of independent normal draws pass one.
FARTHEST = 25  # largest squared distance of a row from its group's mean, over the median one
LEAST_EVEN = 1 / 3  # variance along the directions over what noise alone would make of it
LEAST_DIMENSIONS = 8  # effective number of dimensions of the noise that both contrasts share


class Caution(StrEnum):
    """Why an interval may cover less than its confidence.

    `OUTLIERS`: a prompt (pair, cluster) lies five times farther from the mean than the median one.
    `UNEVEN_STRENGTH`: the signal is much stronger in some prompts than in others. `SHARED_NOISE`:
    few dimensions hold most of the noise, the same ones in both contrasts.
    """

    OUTLIERS = "outliers"
    UNEVEN_STRENGTH = "uneven_strength"
    SHARED_NOISE = "shared_noise"


def cautions(gram: Gram, noise: Noise) -> list[tuple[Caution, ...]]:
    """The cautions at each layer; `noise` is that of `gram`, by both ways if clusters cross."""
    finest = (gram, *gram.crossed)[-1]
    farthest, totals = torch.zeros_like(noise.inner), []
    for products, groups in finest.sides:
        centred = centred_and_scaled(centred_and_scaled(products, groups).mT, groups)
        squares = centred.diagonal(dim1=-2, dim2=-1)
        totals.append(squares.sum(-1))
        for rows, weights in slices(groups):
            distance = squares[:, rows] / weights**2
            farthest = farthest.maximum(distance.amax(-1) / distance.median(-1).values)
    theta = noise.inner.clamp(-0.98, 0.98)
    linear, norm = noise.linear.square().sum(-1), noise.linear_norm.square().sum(-1)
    left = linear - 2 * theta * (noise.linear * noise.linear_norm).sum(-1) + theta**2 * norm
    even = left / (linear + theta**2 * norm) * (1 + theta**2) / (1 - theta**2)
    shared = cross_noise_products(finest.ab, finest.groups_a, finest.groups_b)
    dimensions = totals[0] * totals[1] / shared.square().sum((-2, -1))
    found: list[tuple[Caution, Tensor]] = [
        (Caution.OUTLIERS, farthest > FARTHEST),
        (Caution.UNEVEN_STRENGTH, even < LEAST_EVEN),
        (Caution.SHARED_NOISE, dimensions < LEAST_DIMENSIONS),
    ]
    return [tuple(name for name, at in found if at[layer]) for layer in range(len(theta))]
