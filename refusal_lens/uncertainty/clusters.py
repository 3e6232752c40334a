"""Clusters of prompts: prompts of one cluster share errors, prompts of two clusters do not.

Labels say which prompts form a cluster. A label is a value such as a topic. A pair of labels, such as
a topic and a sentence frame, says that prompts are clustered in two crossed ways.
"""

from collections import Counter
from collections.abc import Hashable, Sequence
from itertools import chain
from math import log

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..errors import InputError

Clusters = Sequence[Hashable] | Tensor | None
Codes = Int[Tensor, " _prompt"]  # number of each prompt's cluster, from 0
Ways = list[tuple[Codes, ...]]  # by each way of clustering, the codes of each group
# Most rows of a group. Grouping n independent rows into m costs a share of about 1 / m of the
# information, and time and memory are quadratic in m.
MOST_ROWS = 256
SIMILAR = 0.6  # similarity from which two prompts are near-duplicates


def ways(
    contrast: str, clusters: Clusters, sizes: tuple[int, ...], *, most: int = MOST_ROWS
) -> Ways:
    """The cluster of each prompt in each group of a contrast, by every way of clustering.

    One way, or three for pairs of labels: by the first label, by the second, by both at once. Of
    more than `most` clusters, neighbours are merged. A paired contrast has a label for each pair; an
    unpaired one, the target's labels and the baseline's, which share no cluster. Without labels all
    prompts are independent. InputError if labels don't fit the `sizes` of the groups.
    """
    if clusters is None or len(clusters) == 0:
        return [tuple(_merged(torch.arange(n), most) for n in sizes)]
    groups = [clusters] if len(sizes) == 1 else [*clusters]
    if (counts := tuple(map(len, groups))) != sizes:
        problem = f"{contrast}_clusters holds {counts} labels for {sizes} prompts"
        advice = "give one label a pair, or without pairs the target's labels and the baseline's"
        raise InputError(f"{problem}: {advice}")
    found = [_by_each_label(contrast, group, most) for group in groups]
    return [*zip(*found, strict=len({*map(len, found)}) == 1)]


def two_way(variances: Sequence[Tensor]) -> Tensor:
    """Variance by one way of clustering or, of two crossed ways and both at once, by both ways.

    The first plus the second minus the third, and no less than either. Reference: Cameron, Gelbach
    and Miller 2011, doi:10.1198/jbes.2010.07136.
    """
    if len(variances) == 1:
        return variances[0]
    first, second, both = variances
    return torch.stack([first, second, first + second - both]).amax(0)


def cluster_weights(groups: tuple[Codes, ...]) -> tuple[Float[Tensor, " _row"], ...]:
    """Share of each cluster in its group's prompts, in float64."""
    counts = [codes.bincount().double() for codes in groups]
    return tuple(count / count.sum() for count in counts)


def cluster_means(
    rows: Float[Tensor, "row d_model"], groups: tuple[Codes, ...]
) -> Float[Tensor, "cluster d_model"]:
    """Mean row of every cluster, one group after the other."""
    sizes = [int(group.amax()) + 1 for group in groups]
    if sum(sizes) == len(rows):
        return rows
    code = torch.cat([group + sum(sizes[:i]) for i, group in enumerate(groups)]).to(rows.device)
    summed = rows.new_zeros(sum(sizes), rows.shape[1]).index_add_(0, code, rows)
    return summed / code.bincount()[:, None]


def near_duplicates(tokens: Sequence[Sequence[Hashable]]) -> tuple[int, ...]:
    """A cluster label for each prompt; near-duplicates, found by their tokens, share a label.

    Similarity is the weight of the tokens that both have over that of those that either has (Jaccard).
    A token weighs the less the more prompts have it, so a common sentence frame counts little.
    """
    from scipy.sparse.csgraph import connected_components

    own = [{*prompt} for prompt in tokens]
    frequency = Counter(chain.from_iterable(own))
    weight = torch.tensor([log((len(own) + 1) / n) for n in frequency.values()])
    present = torch.tensor([[token in prompt for token in frequency] for prompt in own]).float()
    shared = present * weight @ present.T
    total = shared.diagonal()
    linked = shared >= SIMILAR * (total[:, None] + total - shared)
    return tuple(connected_components(linked.numpy())[1].tolist())


def _by_each_label(contrast: str, clusters: Sequence[Hashable] | Tensor, most: int) -> list[Codes]:
    labels = clusters.tolist() if isinstance(clusters, Tensor) else clusters
    rows = [tuple(x) if isinstance(x, (tuple, list)) else (x,) for x in labels]
    if {len(row) for row in rows} not in ({1}, {2}):
        problem = f"{contrast}_clusters has labels of several or more than two parts"
        raise InputError(f"{problem}: give every prompt one label, or two such as (topic, frame)")
    columns = [_merged(_numbered(column), most) for column in zip(*rows, strict=True)]
    # Merged cells must not lie together: neighbours may share a cluster.
    return columns if len(columns) == 1 else [*columns, _numbered(rows) % most]


def _numbered(labels: Sequence[Hashable]) -> Codes:
    """Numbers of the labels, in the order in which they first occur."""
    known = {label: i for i, label in enumerate(dict.fromkeys(labels))}
    return torch.tensor([known[label] for label in labels])


def _merged(codes: Codes, most: int) -> Codes:
    """Codes with neighbouring clusters merged into at most `most`."""
    n = int(codes.amax()) + 1
    return codes if n <= most else codes * most // n
