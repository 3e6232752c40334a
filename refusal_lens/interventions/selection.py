"""Select one direction among positions and layers by the effects of ablating and adding it.

Every candidate has three scores, without generation: the refusal score of harmful prompts under
ablation, the refusal score of harmless prompts under addition, and the KL divergence that ablation
causes on harmless prompts. Among the candidates that pass filters on the last two scores, the
selected candidate has the lowest first score. Reference: Arditi et al. 2024, arXiv:2406.11717,
sections 2.3 and C.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from ..activations import disk
from ..activations.extract import get_prompt_activations
from ..directions.estimators import mean_difference
from ..directions.similarity import NOISE_FLOOR
from ..errors import InputError
from ..models.load import model_provenance, tokenizer_of
from ..prompts.contrast import Contrast
from ..prompts.protocol import Protocol
from ..prompts.tokenize import arditi
from .refusal_metric import RefusalTokens, find_refusal_tokens
from .selection_rule import RECORD, CandidateScores, Choice, SelectionFilters, choose, passes
from .sweep import ablation_effects, addition_effects

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from ..models import HookedModel

FILE = "candidates.json"
HELD_OUT = 4  # without validation prompts, every fourth prompt of the contrast is held out
LAYERS_AT_ONCE = 16  # candidates of these layers run together and are saved together

Divide = Callable[[Callable[[slice], Any]], list[Any]]
"""A function that returns the results of `run(share)`, for shares that together are everything."""


@dataclass(frozen=True)
class Selection:
    """The result of `select_direction`.

    Attributes:
        chosen: position, and layer as the protocol numbers layers; None if no candidate passes.
        scores, directions: of every candidate; directions are mean differences, not normalised.
        unchanged: refusal scores of harmful and of harmless prompts in the unmodified model.
        protocol, refusal_tokens, filters: the settings of the selection.
    >>> direction, layer = selection.direction, selection.layer
    >>> why, charts = selection.reason(), selection.figures()
    """

    chosen: Choice | None
    scores: CandidateScores
    directions: Float[Tensor, "pos layer d_model"]
    protocol: Protocol
    refusal_tokens: RefusalTokens
    unchanged: tuple[float, float]
    filters: SelectionFilters

    @property
    def direction(self) -> Float[Tensor, " d_model"]:
        """The chosen direction. Raises InputError if no candidate passes."""
        return self.directions[self._cell()]

    @property
    def layer(self) -> int:
        """The chosen layer, -1 the embedding's output. InputError if no candidate passes."""
        return self._cell()[1] - (self.protocol.hook == "resid_pre")

    def reason(self) -> str:
        """One sentence with the chosen candidate and its scores, or the filters that failed."""
        filters, n = passes(self.scores, self.filters), self.scores.ablation.numel()
        if self.chosen is None:
            each = ", ".join(f"{int(ok.sum())} {name}" for name, ok in filters.items())
            return f"none of {n} candidates passes every filter ({each})"
        passing = int(torch.stack(list(filters.values())).all(0).sum())
        cell = self._cell()
        return (
            f"position {self.chosen.position}, {self.protocol.hook}[{self.chosen.layer}]: of the "
            f"{passing} among {n} candidates that pass, its ablation leaves the lowest refusal "
            f"score, {self.scores.ablation[cell]:.2f} (without {self.unchanged[0]:.2f}; added to "
            f"harmless prompts it gives {self.scores.addition[cell]:.2f}, without "
            f"{self.unchanged[1]:.2f}; KL {self.scores.kl[cell]:.3f})"
        )

    __str__ = reason

    def figures(self) -> "dict[str, go.Figure]":
        """A heatmap of each score over positions and layers, with the chosen candidate outlined."""
        from .. import plotting

        return plotting.selection_scores(
            {name: getattr(self.scores, name) for name in ("ablation", "addition", "kl")},
            positions=self.scores.positions,
            selected=self._cell() if self.chosen else None,
            counting="input" if self.protocol.hook == "resid_pre" else "output",
        )

    def _cell(self) -> tuple[int, int]:
        if self.chosen is None:
            raise InputError(f"no direction was chosen: {self.reason()}")
        return self.scores.positions.index(self.chosen.position), self.chosen.layer


def select_direction(
    model: "HookedModel",
    contrast: Contrast,
    validation: Contrast | None = None,
    *,
    refusal_tokens: RefusalTokens | None = None,
    protocol: Protocol | None = None,
    filters: SelectionFilters | None = None,
    folder: str | Path | None = None,
    batch_size: int | None = None,
    progress: bool = True,
    divide: Divide = lambda run: [run(slice(None))],
) -> Selection:
    """Select a direction of a contrast as Arditi et al. do, over positions and layers.

    Args:
        model: the model, without hooks.
        contrast: harmful (target) and harmless (baseline) prompts to take the directions from.
        validation: prompts to score directions on; None holds out every fourth of `contrast`.
        refusal_tokens: the first tokens of a refusal; None calls `find_refusal_tokens`.
        protocol: InputError for positions that are not numbers; None is Arditi et al.'s protocol.
        filters: conditions on a candidate; None is the published filters.
        folder: of the scores so far, to resume a run; InputError if it holds another run's scores.
        batch_size: maximum rows in a pass; None derives the number from the prompts' lengths.
        progress: whether to show progress bars.
        divide: divides the candidates over processes, as `experiment.distributed.in_shares` does;
            one process alone is given a `folder`, and its scores are the ones to resume from.
    >>> selection = select_direction(model, contrast)
    """
    protocol = protocol or arditi(tokenizer_of(model))
    positions = tuple(p for p in protocol.positions if isinstance(p, int))
    if len(positions) < len(protocol.positions):
        raise InputError(f"{protocol.positions} are no numbered positions: -1 is the last token")
    train, held_out = (contrast, validation) if validation else _split(contrast)
    tokens = refusal_tokens or find_refusal_tokens(
        model, held_out.target, held_out.baseline, protocol=protocol, progress=progress
    )
    options: dict[str, Any] = {"protocol": protocol, "batch_size": batch_size}
    directions = candidate_directions(model, train, progress=progress, **options)
    identity = {
        "model": model_provenance(model),
        "prompts": {"directions": train.sha256, "scores": held_out.sha256},
        "protocol": protocol.to_dict(),
        "refusal_tokens": list(tokens.ids),
    }
    options |= {"score": tokens, "progress": False}
    saved = divide(lambda _: _saved(folder, disk.plain(identity)))[0]
    _measure(model, directions, positions, held_out, saved, folder, options, progress, divide)
    scores = CandidateScores.from_records(saved["candidates"])
    order = [scores.positions.index(position) for position in positions]
    maps = (each[order] for each in (scores.ablation, scores.addition, scores.kl))
    scores = CandidateScores(positions, *maps)
    harmful, harmless = (math.nan if x is None else x for x in saved["unchanged"])
    filters = filters or SelectionFilters()
    found = scores, directions, protocol, tokens, (harmful, harmless), filters
    return Selection(choose(scores, filters), *found)


def candidate_directions(
    model: "HookedModel",
    contrast: Contrast,
    *,
    protocol: Protocol,
    **options: Any,
) -> Float[Tensor, "pos layer d_model"]:
    """Mean differences of a contrast at every position and layer of a protocol.

    Zero where a difference is rounding noise, as at template tokens at the first block's input. A
    zero candidate has the scores of the unmodified model. `options` are `batch_size` and `progress`
    of `get_prompt_activations`.
    """
    prompts = [*contrast.target, *contrast.baseline]
    activations = get_prompt_activations(model, prompts, protocol=protocol, **options)
    flat = rearrange(activations, "prompt pos layer d -> prompt (pos layer) d")
    target, baseline = flat.split([len(contrast.target), len(contrast.baseline)])
    rows = mean_difference(target, baseline).unflatten(0, activations.shape[1:3])
    norms = rows.norm(dim=-1, keepdim=True)
    return torch.where(norms > NOISE_FLOOR * norms.amax(1, keepdim=True), rows, 0.0)


def _saved(folder: str | Path | None, identity: dict[str, Any]) -> dict[str, Any]:
    """The saved scores, or an empty record of this run."""
    if folder is not None:
        disk.check_writable(folder)
    if folder is None or not (path := Path(folder) / FILE).exists():
        return {"identity": identity, "unchanged": (None, None), "candidates": []}
    saved = disk.read_json(path)
    if not isinstance(saved, dict) or saved.get("identity") != identity:
        problem = f"{path} is of another model, other prompts or another protocol"
        raise InputError(f"{problem}: choose another folder, or delete the file")
    return saved


def _measure(
    model: "HookedModel",
    directions: Float[Tensor, "pos layer d_model"],
    positions: tuple[int, ...],
    prompts: Contrast,
    saved: dict[str, Any],
    folder: str | Path | None,
    options: dict[str, Any],
    progress: bool,
    divide: Divide,
) -> None:
    """Score the candidates that are not in `saved`, a few layers at a time, and save the scores."""
    n_layers, n = directions.shape[1], len(prompts.target)
    shift = int(options["protocol"].hook == "resid_pre")

    def score(
        cells: list[tuple[int, int]], share: slice
    ) -> tuple[list[dict[str, Any]], list[float]]:
        """The records of a share of the candidates, and the unmodified model's mean scores."""
        part, every = cells[share], [*prompts.target, *prompts.baseline]
        places = [(positions.index(position), layer) for position, layer in part]
        rows, layers = torch.tensor(places).reshape(-1, 2).long().T
        these = directions[rows, layers]
        ablated = ablation_effects(model, every, these, **options)
        added = addition_effects(model, prompts.baseline, these, layers - shift, **options)
        scores = (ablated.log_odds[:, :n], added.log_odds, ablated.kl[:, n:])
        means = torch.stack([each.double().mean(-1) for each in scores], dim=-1).tolist()
        values = [(*cell, *each) for cell, each in zip(part, means, strict=True)]
        unchanged = [each.mean().item() for each in ablated.unchanged.double().tensor_split([n])]
        return [dict(zip(RECORD, each, strict=True)) for each in values], unchanged

    done = {(record["position"], record["layer"]) for record in saved["candidates"]}
    total = len(positions) * n_layers
    with tqdm(total=total, initial=len(done), desc="candidates", disable=not progress) as bar:
        for start in range(0, n_layers, LAYERS_AT_ONCE):
            layers = range(n_layers)[start : start + LAYERS_AT_ONCE]
            cells = [(p, layer) for layer in layers for p in positions if (p, layer) not in done]
            if not cells:
                continue
            shares = divide(partial(score, cells))
            records = [record for records, _ in shares for record in records]
            records.sort(key=lambda each: cells.index((each["position"], each["layer"])))
            saved["candidates"] += records
            saved["unchanged"] = shares[0][1]
            if folder is not None:
                with disk.whole_directory(folder) as staging:
                    disk.write_json(staging / FILE, disk.plain(saved))
            bar.update(len(cells))


def _split(contrast: Contrast) -> tuple[Contrast, Contrast]:
    fewest = min(len(contrast.target), len(contrast.baseline))
    if fewest < 2 * HELD_OUT:
        problem = f"a side of {fewest} prompts is too small to hold some out"
        raise InputError(f"{problem}: give `validation`, or at least {2 * HELD_OUT} a side")

    def part(held_out: bool) -> Contrast:
        sides = (range(len(side)) for side in (contrast.target, contrast.baseline))
        kept = ([i for i in r if (i % HELD_OUT == HELD_OUT - 1) == held_out] for r in sides)
        return contrast.subset(*kept)

    return part(False), part(True)
