"""Choosing one direction of many as Arditi et al. do: by what ablating and adding it does.

Every position and layer gives a candidate. Three numbers are measured of each, none by generating:
the refusal of harmful prompts once it is ablated, the refusal of harmless prompts once it is added,
and how far ablating it moves the next-token distribution of harmless prompts. Filters on the last
two, the lowest of the first wins.

Reference: Arditi et al. 2024, arXiv:2406.11717, sections 2.3 and C.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from ..activations import disk as artifacts
from ..activations.extract import get_prompt_activations
from ..directions.estimators import mean_difference
from ..directions.similarity import NOISE_FLOOR
from ..errors import InputError
from ..models.load import LensModel, model_provenance
from ..prompts.contrast import Contrast
from ..prompts.protocol import Protocol
from ..prompts.tokenize import arditi
from . import RefusalTokens, ablation_effects, addition_effects, find_refusal_tokens
from .selection_rule import CandidateScores, Choice, Thresholds, choose, passes

if TYPE_CHECKING:
    import plotly.graph_objects as go

FILE = "candidates.json"
HELD_OUT = 4
"""Without validation prompts of its own, every so many-th prompt of the contrast is held out."""


@dataclass(frozen=True)
class Selection:
    """What `select_direction` found; `chosen` is None where no candidate passes.

    Attributes:
        chosen: position and layer, counted as the protocol counts.
        scores: of every candidate.
        directions: the candidates, mean differences, not normalised.
        protocol: how they were read, and how layers are counted.
        refusal_tokens: what was taken for a refusal's first tokens.
        unchanged: refusal score of the harmful and of the harmless prompts without intervention.
        thresholds: of the filters.
    """

    chosen: Choice | None
    scores: CandidateScores
    directions: Float[Tensor, "pos layer d_model"]
    protocol: Protocol
    refusal_tokens: RefusalTokens
    unchanged: tuple[float, float]
    thresholds: Thresholds

    @property
    def direction(self) -> Float[Tensor, " d_model"]:
        """The chosen direction.

        Raises:
            InputError: if no candidate passes.
        """
        if self.chosen is None:
            raise InputError(f"no direction was chosen: {self.reason()}")
        row = self.scores.positions.index(self.chosen.position)
        return self.directions[row, self.chosen.layer]

    @property
    def layer(self) -> int:
        """The chosen direction's layer as this package counts it, -1 the embedding's output.

        Raises:
            InputError: if no candidate passes.
        """
        if self.chosen is None:
            raise InputError(f"no direction was chosen: {self.reason()}")
        return self.chosen.layer - (self.protocol.hook == "resid_pre")

    def reason(self) -> str:
        """One sentence: what was chosen and why, or why nothing was."""
        filters = passes(self.scores, self.thresholds)
        n = self.scores.ablation.numel()
        each = ", ".join(f"{int(ok.sum())} {name}" for name, ok in filters.items())
        if self.chosen is None:
            return f"none of {n} candidates passes every filter ({each})"
        passing = int(torch.stack(list(filters.values())).all(0).sum())
        row = self.scores.positions.index(self.chosen.position)
        where = (row, self.chosen.layer)
        return (
            f"position {self.chosen.position}, {self.protocol.hook}[{self.chosen.layer}]: of the "
            f"{passing} among {n} candidates that pass, its ablation leaves the lowest refusal "
            f"score, {self.scores.ablation[where]:.2f} (without {self.unchanged[0]:.2f}; added to "
            f"harmless prompts it gives {self.scores.addition[where]:.2f}, without "
            f"{self.unchanged[1]:.2f}; KL {self.scores.kl[where]:.3f})"
        )

    def figures(self) -> "dict[str, go.Figure]":
        """The three score maps over positions and layers, the chosen candidate outlined."""
        from .. import plotting

        selected = None
        if self.chosen is not None:
            selected = (self.scores.positions.index(self.chosen.position), self.chosen.layer)
        return plotting.selection_scores(
            {
                "ablation": self.scores.ablation,
                "addition": self.scores.addition,
                "kl": self.scores.kl,
            },
            positions=self.scores.positions,
            selected=selected,
            counting="input" if self.protocol.hook == "resid_pre" else "output",
        )

    def __str__(self) -> str:
        return self.reason()


def select_direction(
    model: LensModel,
    contrast: Contrast,
    validation: Contrast | None = None,
    *,
    refusal_tokens: RefusalTokens | None = None,
    protocol: Protocol | None = None,
    thresholds: Thresholds | None = None,
    folder: str | Path | None = None,
    batch_size: int | None = None,
    progress: bool = True,
) -> Selection:
    """Choose a direction of a contrast as Arditi et al. do, over positions and layers.

    The candidates are the mean differences of `contrast` at the protocol's positions. Each is
    ablated everywhere, and added, as it is, where it was read. A candidate that is rounding noise
    (as at the first block's input, where the template's tokens have seen no prompt yet) has no
    direction: it changes nothing, and its scores are those of the model as it is.

    Args:
        model: the model.
        contrast: harmful (target) and harmless (baseline) prompts to take the directions from.
        validation: others to score them on; None holds every fourth of `contrast` out.
        refusal_tokens: the first tokens of a refusal; None finds them (`find_refusal_tokens`).
        protocol: how prompts are read; None is Arditi et al.'s for the model's chat template.
        thresholds: of the filters.
        folder: keeps the candidates finished so far, so that a run that was stopped goes on from
            there.
        batch_size: as `ablation_effects`.
        progress: show a bar over the candidates.

    Raises:
        InputError: as `get_prompt_activations` and `ablation_effects`; if the protocol's positions
            are not all numbers; if `folder` holds the candidates of another run.

    Reference: Arditi et al. 2024, arXiv:2406.11717, sections 2.3, 2.4 and C.
    """
    protocol = protocol or arditi(model.tokenizer)
    positions = tuple(p for p in protocol.positions if isinstance(p, int))
    if len(positions) < len(protocol.positions):
        raise InputError(
            f"candidates are at numbered positions, not {protocol.positions}: count them from the "
            "end, -1 the last"
        )
    train, held_out = (contrast, validation) if validation else _split(contrast)
    tokens = refusal_tokens or find_refusal_tokens(
        model, held_out.target, held_out.baseline, protocol=protocol, progress=progress
    )
    directions = candidate_directions(
        model, train, protocol=protocol, batch_size=batch_size, progress=progress
    )
    identity = {
        "model": model_provenance(model),
        "prompts": {"directions": train.sha256, "scores": held_out.sha256},
        "protocol": protocol.to_dict(),
        "refusal_tokens": list(tokens.ids),
    }
    finished = _Finished(Path(folder) if folder is not None else None, artifacts.plain(identity))
    measured = _measure(
        model,
        directions,
        positions,
        held_out,
        tokens,
        protocol=protocol,
        finished=finished,
        batch_size=batch_size,
        progress=progress,
    )
    scores = CandidateScores.from_records(measured.records)
    order = [scores.positions.index(position) for position in positions]
    scores = CandidateScores(
        positions, scores.ablation[order], scores.addition[order], scores.kl[order]
    )
    return Selection(
        chosen=choose(scores, thresholds),
        scores=scores,
        directions=directions,
        protocol=protocol,
        refusal_tokens=tokens,
        unchanged=measured.unchanged,
        thresholds=thresholds or Thresholds(),
    )


def candidate_directions(
    model: LensModel,
    contrast: Contrast,
    *,
    protocol: Protocol,
    batch_size: int | None = None,
    progress: bool = True,
) -> Float[Tensor, "pos layer d_model"]:
    """Mean differences of a contrast at every position and layer; zero where they are rounding.

    Raises:
        InputError: as `get_prompt_activations`.
    """
    prompts = [*contrast.target, *contrast.baseline]
    activations = get_prompt_activations(
        model, prompts, protocol=protocol, batch_size=batch_size, progress=progress
    )
    n_positions = activations.shape[1]
    flat = rearrange(activations, "prompt pos layer d -> prompt (pos layer) d")
    target, baseline = flat.split([len(contrast.target), len(contrast.baseline)])
    rows = rearrange(
        mean_difference(target, baseline), "(pos layer) d -> pos layer d", pos=n_positions
    )
    norms = rows.norm(dim=-1, keepdim=True)
    return torch.where(norms > NOISE_FLOOR * norms.amax(1, keepdim=True), rows, 0.0)


@dataclass
class _Finished:
    """The candidates scored so far, kept in a file where there is a folder."""

    folder: Path | None
    identity: Mapping[str, Any]

    def __post_init__(self) -> None:
        self.records: list[dict[str, Any]] = []
        self.unchanged: tuple[float, float] = (math.nan, math.nan)
        if self.folder is None:
            return
        artifacts.check_writable(self.folder)
        if not (self.folder / FILE).exists():
            return
        saved = artifacts.read_json(self.folder / FILE)
        if not isinstance(saved, dict) or saved.get("identity") != self.identity:
            raise InputError(
                f"{self.folder / FILE} holds the candidates of another model, other prompts or "
                "another protocol: choose another folder, or delete the file"
            )
        self.records = list(saved["candidates"])
        if None not in saved["unchanged"]:
            self.unchanged = (saved["unchanged"][0], saved["unchanged"][1])

    def add(self, records: Sequence[dict[str, Any]], unchanged: tuple[float, float]) -> None:
        self.records += records
        self.unchanged = unchanged
        if self.folder is None:
            return
        with artifacts.whole_directory(self.folder) as staging:
            artifacts.write_json(
                staging / FILE,
                artifacts.plain(
                    {
                        "identity": self.identity,
                        "unchanged": self.unchanged,
                        "candidates": self.records,
                    }
                ),
            )


def _measure(
    model: LensModel,
    directions: Float[Tensor, "pos layer d_model"],
    positions: tuple[int, ...],
    prompts: Contrast,
    tokens: RefusalTokens,
    *,
    protocol: Protocol,
    finished: _Finished,
    batch_size: int | None,
    progress: bool,
) -> _Finished:
    """Score the candidates that are not finished, a few layers at a time."""
    from tqdm.auto import tqdm

    n_layers = directions.shape[1]
    done = {(record["position"], record["layer"]) for record in finished.records}
    options: dict[str, Any] = {
        "refusal_tokens": tokens,
        "protocol": protocol,
        "batch_size": batch_size,
        "progress": False,
    }
    shift = int(protocol.hook == "resid_pre")
    harmful, harmless = list(prompts.target), list(prompts.baseline)
    total = directions.shape[0] * n_layers
    with tqdm(total=total, initial=len(done), unit="candidate", disable=not progress) as bar:
        for start in range(0, n_layers, LAYERS_AT_ONCE):
            pending = [
                (row, layer)
                for layer in range(start, min(start + LAYERS_AT_ONCE, n_layers))
                for row, position in enumerate(positions)
                if (position, layer) not in done
            ]
            if not pending:
                continue
            rows = torch.stack([directions[where] for where in pending])
            layers = torch.tensor([layer - shift for _, layer in pending])
            ablated = ablation_effects(model, harmful + harmless, rows, **options)
            added = addition_effects(model, harmless, rows, layers, **options)
            n = len(harmful)
            records = [
                {
                    "position": positions[row],
                    "layer": layer,
                    "refusal_score": ablated.log_odds[i, :n].double().mean().item(),
                    "steering_score": added.log_odds[i].double().mean().item(),
                    "kl_div_score": ablated.kl[i, n:].double().mean().item(),
                }
                for i, (row, layer) in enumerate(pending)
            ]
            unchanged = ablated.unchanged.double()
            finished.add(records, (unchanged[:n].mean().item(), unchanged[n:].mean().item()))
            bar.update(len(pending))
    return finished


LAYERS_AT_ONCE = 16
"""Layers whose candidates run together, and are kept together once they are finished."""


def _split(contrast: Contrast) -> tuple[Contrast, Contrast]:
    """The contrast without every fourth prompt, and those."""
    sides = (contrast.target, contrast.baseline)
    if min(map(len, sides)) < 2 * HELD_OUT:
        raise InputError(
            f"a side of {min(map(len, sides))} prompts is too small to hold some out: give "
            f"`validation` prompts, or at least {2 * HELD_OUT} a side"
        )

    def part(held_out: bool) -> Contrast:
        kept = [
            tuple(p for i, p in enumerate(side) if (i % HELD_OUT == HELD_OUT - 1) == held_out)
            for side in sides
        ]
        return Contrast(
            contrast.name,
            kept[0],
            kept[1],
            contrast.target_name,
            contrast.baseline_name,
            paired=contrast.paired,
        )

    return part(False), part(True)
