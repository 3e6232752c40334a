"""Harm that a model sees and refusal that it decides, told apart by its own replies."""

from dataclasses import dataclass, replace
from itertools import product
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from .. import plotting
from ..activations.extract import get_prompt_activations
from ..attribution import Table
from ..directions.similarity import cosine_similarity, unit
from ..errors import InputError
from ..interventions import addition_effects, openings_of
from ..interventions.batched_runs import opening_log_odds
from ..interventions.reply_openings import REFUSAL
from ..models.load import tokenizer_of
from ..prompts.contrast import Contrast
from ..prompts.protocol import LAST_PROMPT_TOKEN, Protocol
from ..uncertainty.effects import mean_interval
from .causal import EFFECT_PROMPTS, spread
from .run import highlighted_layer

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from ..models import HookedModel

FEWEST = 8  # prompts of a cell on which a direction may rest
DIAGONAL = ("harmful refused", "harmless accepted")
CELLS = (DIAGONAL[0], "harmful accepted", "harmless refused", DIAGONAL[1])
HELD = {  # pairs of cells that differ in one respect alone
    "harm": ((CELLS[0], CELLS[2]), (CELLS[1], CELLS[3])),
    "refusal": ((CELLS[0], CELLS[1]), (CELLS[2], CELLS[3])),
}
QUESTION = "Is this request harmful? Answer yes or no. {}"


@dataclass(frozen=True, repr=False, eq=False)
class HarmAndRefusal(Table):
    """Directions of harm and refusal at the last token of the instruction and of the template.

    Attributes:
        counts: prompts of each cell, such as "harmful refused", by the model's own replies.
        too_small: cells of fewer than `FEWEST` prompts, which no direction rests on.
        apart: which of "harm" (at equal replies) and "refusal" (at equal harm) is held apart from the
            other. One that can't be is harmful refused less harmless accepted prompts.
        directions: "harm" and "refusal", `[position layer d_model]`.
        cosine: of harm (first axis) with refusal, by position.
        prompts, plane: by cell; the plane is of harm at the instruction and refusal at the template.
        added: change in nats if harm, then refusal (second axis), is added to harmless prompts: of the
            log-odds of a refusal, and of "Yes" to `QUESTION`. The first axis is an interval.
    """

    counts: dict[str, int]
    too_small: tuple[str, ...]
    apart: tuple[str, ...]
    directions: dict[str, Float[Tensor, "2 layer d_model"]]
    cosine: Float[Tensor, "2 2 layer"]
    prompts: dict[str, tuple[str, ...]]
    plane: dict[str, Float[Tensor, "_ layer 2"]]
    added: Float[Tensor, "3 2 2"]

    def figure(self, **theme: Any) -> "go.Figure":
        """Return the plane with every prompt; options are those of `prompts_in_plane`."""
        axes = "along harm, at the instruction", "along refusal, at the template"
        return plotting.prompts_in_plane(self.plane, self.prompts, axes=axes, **theme)

    def _rows(self) -> list[list[str]]:
        return [["set", "prompts"], *([cell, str(n)] for cell, n in self.counts.items())]


def harm_and_refusal(
    model: "HookedModel",
    contrast: Contrast,
    *,
    layer: int | None = None,
    protocol: Protocol = Protocol(),  # noqa: B008 (frozen)
    progress: bool = True,
) -> HarmAndRefusal:
    """Tell the direction of harm from that of refusal, by prompts that the model itself sorts.

    >>> found = harm_and_refusal(model, "refusal", progress=False)
    >>> shown = found.figure()

    Reference: Zhao et al. 2025, arXiv:2507.11878.

    Args:
        model, contrast: the model, and harmful (target) and harmless prompts.
        layer: the layer whose directions are added; None is 20 of 32, or the same relative depth.
        protocol, progress: as for `get_layer_activations`; the positions are replaced.

    Raises:
        InputError: if too few harmful prompts are refused or harmless ones accepted.
    """
    prompts = (*contrast.target, *contrast.baseline)
    both = replace(protocol, positions=(LAST_PROMPT_TOKEN, -1))
    options: dict[str, Any] = {"protocol": protocol, "progress": progress}
    score = openings_of(tokenizer_of(model), REFUSAL)
    odds = opening_log_odds(model, prompts, score, **options).tolist()
    rows_of: dict[str, list[int]] = {cell: [] for cell in CELLS}
    for i, log_odds in enumerate(odds):
        rows_of[CELLS[2 * (i >= len(contrast.target)) + (log_odds <= 0)]].append(i)
    counts = {cell: len(rows) for cell, rows in rows_of.items()}
    small = tuple(cell for cell in CELLS if counts[cell] < FEWEST)
    if {*DIAGONAL} & {*small}:
        raise InputError(f"replies are {counts}: add prompts, {FEWEST} {' and '.join(DIAGONAL)}")
    read = get_prompt_activations(model, prompts, **options | {"protocol": both})
    means = {cell: read[rows].double().mean(0) for cell, rows in rows_of.items()}
    known = {k: [pair for pair in v if not {*pair} & {*small}] for k, v in HELD.items()}
    harm, refusal = (
        torch.stack([means[a] - means[b] for a, b in pairs or [DIAGONAL]]).mean(0).float()
        for pairs in known.values()
    )
    axes, at = torch.stack([harm[0], refusal[1]]), highlighted_layer(layer, model.cfg.n_layers)[0]
    units = torch.stack([unit(axis) for axis in axes]).float()
    texts = [prompts[i] for i in spread(rows_of[DIAGONAL[1]], EFFECT_PROMPTS)]
    cosines = [cosine_similarity(a, b) for a, b in product(harm, refusal)]
    return HarmAndRefusal(
        counts=counts,
        too_small=small,
        apart=tuple(name for name, pairs in known.items() if pairs),
        directions={"harm": harm, "refusal": refusal},
        cosine=torch.stack(cosines).unflatten(0, (2, 2)),
        prompts={k: tuple(prompts[i] for i in rows) for k, rows in rows_of.items()},
        plane={k: torch.einsum("pald,ald->pla", read[rows], units) for k, rows in rows_of.items()},
        added=_added(model, texts, axes[:, at], at, options),
    )


def _added(model: Any, texts: list[str], axes: Tensor, layer: int, options: Any) -> Tensor:
    """Change of the log-odds of a refusal, and of "Yes" to the question, `[3 axis outcome]`."""
    found, layers = [], torch.full((len(axes),), layer)
    asked = [QUESTION.format(text) for text in texts]
    for prompts, openings in ((texts, REFUSAL), (asked, ("Yes", "yes"))):
        score = openings_of(tokenizer_of(model), openings)
        effects = addition_effects(model, prompts, axes, layers, score=score, **options)
        found.append(torch.stack(mean_interval(effects.log_odds - effects.unchanged)))
    return torch.stack(found, -1).float()
