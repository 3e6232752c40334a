"""The selection rule of Arditi et al. (2024, arXiv:2406.11717, section C) for directions."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ..errors import InputError

RECORD = ("position", "layer", "refusal_score", "steering_score", "kl_div_score")


@dataclass(frozen=True)
class SelectionFilters:
    """Conditions on a candidate.

    Attributes:
        max_kl: highest `CandidateScores.kl`, in nats.
        min_addition: lowest `CandidateScores.addition`.
        last_layers: share of the layers, at the end, that are excluded.
    """

    max_kl: float = 0.1
    min_addition: float = 0.0
    last_layers: float = 0.2

    def __post_init__(self) -> None:
        if not 0 <= self.last_layers < 1:
            raise InputError(f"last_layers is {self.last_layers}: a share, 0 or more and below 1")


@dataclass(frozen=True)
class CandidateScores:
    """The scores of every candidate; a refusal score is a mean of refusal log-odds.

    Layers are numbered as in the protocol: for Arditi et al., `l` is the input of block `l`. NaN
    where a candidate was not measured.

    Attributes:
        positions: the position of each row, from the end of the formatted prompt.
        ablation, addition: refusal score of harmful prompts under ablation, of harmless ones under
            addition.
        kl: mean next-token KL(unmodified || ablated) of harmless prompts, in nats.
    """

    positions: tuple[int, ...]
    ablation: Float[Tensor, "pos layer"]
    addition: Float[Tensor, "pos layer"]
    kl: Float[Tensor, "pos layer"]

    @classmethod
    def from_records(cls, records: Iterable[Mapping[str, Any]]) -> "CandidateScores":
        """Scores as Arditi et al. publish them (`direction_evaluations.json`).

        Args:
            records: one for each candidate, in any order, with the keys `RECORD`. A score may be
                None. InputError if a record lacks a key, or if there are no records.
        """
        rows = []
        for i, record in enumerate(records):
            if missing := [name for name in RECORD if name not in record]:
                raise InputError(f"record {i} of the scores lacks {missing[0]!r} of {RECORD}")
            rows.append([math.nan if record[name] is None else record[name] for name in RECORD])
        if not rows:
            raise InputError("there are no scores: hand over at least one record")
        table = torch.tensor(rows, dtype=torch.float64)
        positions, row = table[:, 0].long().unique(return_inverse=True)
        layers = table[:, 1].long()
        maps = table.new_full((3, len(positions), 1 + int(layers.max())), math.nan)
        maps[:, row, layers] = table[:, 2:].T
        return cls(tuple(positions.tolist()), *maps)


class Choice(NamedTuple):
    """The chosen candidate's position and layer, numbered as in `CandidateScores`."""

    position: int
    layer: int


def choose(scores: CandidateScores, filters: SelectionFilters | None = None) -> Choice | None:
    """The candidate with the lowest refusal score under ablation that passes the `filters`.

    A candidate with a NaN in `scores` does not pass. The first of equal candidates wins. None if no
    candidate passes. The default filters are the published ones.
    """
    passing = torch.stack(list(passes(scores, filters).values())).all(0)
    if not passing.any():
        return None
    refusal = scores.ablation.masked_fill(~passing, torch.inf)
    row, layer = divmod(int(refusal.argmin()), refusal.shape[1])
    return Choice(scores.positions[row], layer)


def passes(
    scores: CandidateScores, filters: SelectionFilters | None = None
) -> dict[str, Bool[Tensor, "pos layer"]]:
    """Which candidates pass each filter, by the filter's name; None is the published filters."""
    f = filters or SelectionFilters()
    n_layers = scores.ablation.shape[1]
    early = torch.arange(n_layers) < int(n_layers * (1 - f.last_layers))
    return {
        "measured": scores.ablation.isfinite(),
        f"KL at most {f.max_kl:g}": scores.kl <= f.max_kl,
        f"refusal of at least {f.min_addition:g} once added": scores.addition >= f.min_addition,
        f"not in the last {f.last_layers:.0%} of layers": early.expand_as(scores.ablation),
    }
