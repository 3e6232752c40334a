"""Split-half reliability of a direction."""

import torch
from einops import einsum
from jaxtyping import Float
from torch import Tensor

from .gram import Groups, RowProducts


def split_half_reliability(
    gram: RowProducts, groups: Groups, *, n_splits: int = 200, generator: torch.Generator
) -> Float[Tensor, " layer"]:
    """Expected cosine between this direction and the same direction from as many new prompts.

    The mean cosine between the directions of two random halves, extrapolated to all prompts by the
    formula of Spearman (1910, doi:10.1111/j.2044-8295.1910.tb00206.x) and Brown (1910,
    doi:10.1111/j.2044-8295.1910.tb00207.x): 1 without noise, about 0 and possibly negative without
    signal. NaN where a group has one row or all activations are equal.

    Args:
        gram, groups: inner products of a contrast's signed rows (see `Gram`), and their weights.
        n_splits: number of random splits, of each group's rows (prompts, or clusters) separately.
        generator: the only source of randomness, on the CPU.
    """
    if min(map(len, groups)) < 2:
        return torch.full(gram.shape[:1], torch.nan, dtype=torch.float64)
    parts = []
    for weights in groups:
        n = len(weights)
        first = torch.rand(n_splits, n, generator=generator).argsort(-1) < n // 2
        halves = torch.stack([first, ~first]) * weights
        parts.append(halves / halves.sum(-1, keepdim=True))
    halves = torch.cat(parts, -1).to(gram)
    products = einsum(halves, gram, halves, "h split p, layer p q, k split q -> layer split h k")
    norms = (products[..., 0, 0] * products[..., 1, 1]).sqrt()
    half = (products[..., 0, 1] / norms).mean(-1)
    return 2 * half / (1 + half)
