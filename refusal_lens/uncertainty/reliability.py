"""How well the prompts determine a direction: split halves."""

from collections.abc import Sequence

import torch
from einops import einsum
from jaxtyping import Float
from torch import Tensor


def split_half_reliability(
    gram: Float[Tensor, "layer row row"],
    groups: Sequence[int],
    *,
    n_splits: int = 200,
    generator: torch.Generator,
) -> Float[Tensor, " layer"]:
    """Cosine to expect between this direction and the same one from as many new prompts.

    The mean, over random splits of every group into halves, of the cosine between the directions of
    the two halves, stepped up from half the prompts to all by Spearman and Brown's formula. It is
    also the share of the sampled direction's squared norm that is not noise. 1 without noise, about
    0 with nothing else; slightly negative values happen there. NaN where a group has one row or the
    activations are all equal.

    References: Spearman 1910, doi:10.1111/j.2044-8295.1910.tb00206.x; Brown 1910,
    doi:10.1111/j.2044-8295.1910.tb00207.x.
    """
    if min(groups) < 2:
        return torch.full(gram.shape[:1], torch.nan, dtype=torch.float64)
    one, other = (half.to(gram) for half in _random_halves(groups, n_splits, generator))
    by_one, by_other = one @ gram, other @ gram
    inner = einsum(by_one, other, "layer split row, split row -> layer split")
    norm_one = einsum(by_one, one, "layer split row, split row -> layer split")
    norm_other = einsum(by_other, other, "layer split row, split row -> layer split")
    half = (inner / (norm_one * norm_other).sqrt()).mean(-1)
    return 2 * half / (1 + half)


def reliability_ceiling(
    reliability_a: Float[Tensor, " layer"], reliability_b: Float[Tensor, " layer"]
) -> Float[Tensor, " layer"]:
    """The plain cosine to expect of two directions whose true cosine is 1.

    The geometric mean of the two reliabilities, a negative one counting as 0: noise pulls the plain
    cosine towards 0 by this factor.
    """
    return (reliability_a.clamp_min(0) * reliability_b.clamp_min(0)).sqrt()


def _random_halves(
    groups: Sequence[int], n_splits: int, generator: torch.Generator
) -> tuple[Float[Tensor, "split row"], Float[Tensor, "split row"]]:
    halves = []
    for n in groups:
        first = torch.rand(n_splits, n, generator=generator).argsort(-1) < n // 2
        halves.append((first / (n // 2), ~first / (n - n // 2)))
    one, other = zip(*halves, strict=True)
    return torch.cat(one, dim=-1), torch.cat(other, dim=-1)
