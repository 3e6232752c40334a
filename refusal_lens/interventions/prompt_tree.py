"""Prompts as a tree of their openings: tokens that several prompts open with stand in it once.

A node is one token after one opening, so whatever a causal model computes at a position it computes
once for every node. Only attention looks back along a prompt: a query at a node reads the keys of
the nodes before it on its path. Prompts whose queries are about as many are grouped, so that their
attention is one product.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

LEAST_OF_LARGEST = 0.6
"""A prompt joins a group if it has at least this share of the queries of the group's first."""


class Group(NamedTuple):
    """The last nodes of some prompts as queries, and all of their nodes as keys.

    `seen` is 1 where a key stands at or before its query on the path, 0 elsewhere. `kept` are the
    queries (of `prompt query`, flat) that no prompt before has asked; None where all are.
    """

    queries: Int[Tensor, "prompt query"]
    keys: Int[Tensor, "prompt key"]
    seen: Float[Tensor, "prompt query key"]
    kept: Int[Tensor, " kept"] | None


@dataclass(frozen=True)
class PromptTree:
    """Nodes in the order in which the groups' kept queries name them.

    Attributes:
        tokens: of each node.
        positions: how many tokens stand before it.
        ends: each prompt's last node, in the order in which the prompts were given.
        groups: every node is a kept query of one of them.
        paths: each prompt's nodes.
    """

    tokens: Int[Tensor, " node"]
    positions: Int[Tensor, " node"]
    ends: Int[Tensor, " prompt"]
    groups: list[Group]
    paths: list[list[int]]

    @classmethod
    def of(cls, prompts: Sequence[Sequence[int]]) -> "PromptTree":
        """The tree of these token ids, none of them empty."""
        order = sorted(range(len(prompts)), key=lambda i: list(prompts[i]))
        new = dict(zip(order, new_tokens([prompts[i] for i in order]), strict=True))
        grouped = _grouped(sorted((i for i in order if new[i]), key=lambda i: -new[i]), new)
        # Named in the order of the groups, which is not the order in which paths go on.
        names = iter(range(sum(new.values())))
        own = {i: [next(names) for _ in range(new[i])] for group in grouped for i in group}
        paths: list[list[int]] = [[]] * len(prompts)
        before: list[int] = []
        for i in order:
            before = paths[i] = before[: len(prompts[i]) - new[i]] + own.get(i, [])
        tokens = torch.empty(sum(new.values()), dtype=torch.long)
        positions = torch.empty_like(tokens)
        for path, ids in zip(paths, prompts, strict=True):
            tokens[path] = torch.tensor(list(ids))
            positions[path] = torch.arange(len(path))
        groups = [_group([paths[i] for i in group], [new[i] for i in group]) for group in grouped]
        return cls(tokens, positions, torch.tensor([path[-1] for path in paths]), groups, paths)

    def ends_only(self) -> Group:
        """Every prompt's last node as its one query."""
        return _group(self.paths, [1] * len(self.paths))


def new_tokens(prompts: Sequence[Sequence[int]]) -> list[int]:
    """How many tokens of each are left when the opening it shares with the one before is taken off.

    Of sorted prompts that is the number of nodes each adds to the tree.
    """
    left = []
    before: Sequence[int] = ()
    for ids in prompts:
        shared = 0
        while shared < min(len(ids), len(before)) and ids[shared] == before[shared]:
            shared += 1
        left.append(len(ids) - shared)
        before = ids
    return left


def _grouped(prompts: Sequence[int], new: dict[int, int]) -> list[list[int]]:
    groups: list[list[int]] = []
    for i in prompts:
        if groups and new[i] >= LEAST_OF_LARGEST * new[groups[-1][0]]:
            groups[-1].append(i)
        else:
            groups.append([i])
    return groups


def _group(paths: Sequence[Sequence[int]], asked: Sequence[int]) -> Group:
    """The last `asked` nodes of each path as kept queries; shorter ones are filled up in front."""
    n_queries, n_keys = max(asked), max(map(len, paths))
    at = torch.tensor([[max(0, len(p) - n_queries + q) for q in range(n_queries)] for p in paths])
    keys = torch.tensor([list(path) + [path[-1]] * (n_keys - len(path)) for path in paths])
    kept = torch.arange(n_queries) >= n_queries - torch.tensor(asked)[:, None]
    return Group(
        queries=keys.gather(1, at),
        keys=keys,
        seen=(torch.arange(n_keys) <= at[..., None]).float(),
        kept=None if bool(kept.all()) else kept.flatten().nonzero()[:, 0],
    )
