"""Arditi et al.'s rule: which of many candidate directions, by what ablating and adding each does.

Reference: Arditi et al. 2024, arXiv:2406.11717, section C.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ..errors import InputError


@dataclass(frozen=True)
class Thresholds:
    """What a candidate must meet.

    Attributes:
        max_kl: most that ablating it may move harmless prompts' next-token distribution, in nats.
        min_addition: least refusal score of harmless prompts once it is added.
        last_layers: share of the layers, at the end, that are not considered.
    """

    max_kl: float = 0.1
    min_addition: float = 0.0
    last_layers: float = 0.2

    def __post_init__(self) -> None:
        if not 0 <= self.last_layers < 1:
            raise InputError(f"last_layers is {self.last_layers}: a share, 0 or more and below 1")


@dataclass(frozen=True)
class CandidateScores:
    """What is known of every candidate; a refusal score is a mean of refusal log-odds.

    Attributes:
        positions: the position of each row, from the end of the formatted prompt.
        ablation: refusal score of harmful prompts with the direction ablated everywhere.
        addition: refusal score of harmless prompts with the direction added at its layer.
        kl: mean KL(unchanged || ablated) of harmless prompts' next-token distributions, in nats.

    Layer `l` is counted as in the protocol that the candidates were read by: for Arditi et al.'s, the
    input of block `l`. NaN where a candidate was not measured.
    """

    positions: tuple[int, ...]
    ablation: Float[Tensor, "pos layer"]
    addition: Float[Tensor, "pos layer"]
    kl: Float[Tensor, "pos layer"]

    @classmethod
    def from_records(cls, records: Iterable[Mapping[str, Any]]) -> "CandidateScores":
        """Scores as Arditi et al. publish them (`direction_evaluations.json`), in any order.

        Raises:
            InputError: if a record lacks one of `position`, `layer`, `refusal_score`,
                `steering_score` and `kl_div_score`, or there are none.
        """
        rows = list(records)
        names = ("position", "layer", "refusal_score", "steering_score", "kl_div_score")
        for i, row in enumerate(rows):
            if missing := [name for name in names if name not in row]:
                raise InputError(f"record {i} of the scores lacks {missing[0]!r}: it needs {names}")
        if not rows:
            raise InputError("there are no scores: hand over at least one record")
        positions = tuple(sorted({int(row["position"]) for row in rows}))
        shape = (len(positions), 1 + max(int(row["layer"]) for row in rows))
        maps = [torch.full(shape, torch.nan, dtype=torch.float64) for _ in range(3)]
        for row in rows:
            where = positions.index(int(row["position"])), int(row["layer"])
            for scores, name in zip(maps, names[2:], strict=True):
                scores[where] = math.nan if row[name] is None else float(row[name])
        return cls(positions, *maps)


@dataclass(frozen=True)
class Choice:
    """The candidate that was chosen: its position and its layer, as `CandidateScores` counts it."""

    position: int
    layer: int


def choose(scores: CandidateScores, thresholds: Thresholds | None = None) -> Choice | None:
    """The candidate whose ablation leaves the least refusal, of those that pass the filters.

    A candidate passes with `kl <= max_kl`, `addition >= min_addition` and a layer before the last
    `last_layers`; one with a NaN does not. Of equal ones the first position and layer wins. None
    where none passes.

    Reference: Arditi et al. 2024, arXiv:2406.11717, section C.
    """
    passing = torch.stack(list(passes(scores, thresholds).values())).all(0)
    if not passing.any():
        return None
    refusal = scores.ablation.masked_fill(~passing, torch.inf)
    row, layer = divmod(int(refusal.argmin()), refusal.shape[1])
    return Choice(scores.positions[row], layer)


def passes(
    scores: CandidateScores, thresholds: Thresholds | None = None
) -> dict[str, Bool[Tensor, "pos layer"]]:
    """Which candidates pass each filter, by the filter's name."""
    t = thresholds or Thresholds()
    n_layers = scores.ablation.shape[1]
    early = torch.arange(n_layers) < int(n_layers * (1 - t.last_layers))
    return {
        "measured": scores.ablation.isfinite(),
        f"KL at most {t.max_kl:g}": scores.kl <= t.max_kl,
        f"refusal of at least {t.min_addition:g} once added": scores.addition >= t.min_addition,
        f"not in the last {t.last_layers:.0%} of layers": early.expand_as(scores.ablation),
    }
