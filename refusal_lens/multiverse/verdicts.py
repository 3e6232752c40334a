"""Verdicts of many pairs of directions at once: what each reading found, put to the same test.

The directions are a reading's own, faults and all. What they do is measured in one way for all of
them: in the model as it is used, on the same prompts, one sweep over all pairs.
"""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..experiment.evidence import TOKEN_PROMPTS, Geometry, Responses, spread, weigh
from ..experiment.verdict import Thresholds, Verdict, judge
from ..interventions import ablation_effects, addition_effects, find_refusal_tokens
from ..models.load import LensModel
from ..prompts.contrast import Contrast


def respond(
    model: LensModel,
    contrasts: tuple[Contrast, Contrast],
    directions: tuple[
        Float[Tensor, "reading layer d_model"], Float[Tensor, "reading layer d_model"]
    ],
    layers: Int[Tensor, "reading layer"],
    random: Float[Tensor, "layer random d_model"],
    *,
    n_prompts: int,
    batch_size: int | None = None,
    progress: bool = True,
) -> list[list[Responses]] | None:
    """What ablating and adding every reading's directions does; None without refusal tokens.

    Args:
        model: the model.
        contrasts: refusal and negativity.
        directions: of refusal and of negativity, of every reading and layer.
        layers: after which of our layers each is added, -1 the embedding.
        random: directions to compare with, ablated, from each of our layers.
        n_prompts: prompts of each side to intervene on, spread over the set.
        batch_size: as `ablation_effects`.
        progress: show progress bars.

    Raises:
        InputError: as `ablation_effects` and `find_refusal_tokens`.
    """
    refusal, negativity = directions
    tokens = find_refusal_tokens(
        model,
        spread(contrasts[0].target, TOKEN_PROMPTS),
        spread(contrasts[0].baseline, TOKEN_PROMPTS),
        progress=False,
    )
    if not tokens.ids:
        return None
    sides = [spread(side, n_prompts) for c in contrasts for side in (c.target, c.baseline)]
    harmful, harmless, negative, neutral = sides
    requests = harmful + harmless
    rest: dict[str, Any] = {
        "refusal_tokens": tokens,
        "batch_size": batch_size,
        "progress": progress,
    }
    by_refusal = ablation_effects(model, requests + negative, refusal, **rest)
    by_negativity = ablation_effects(model, requests, negativity, **rest)
    by_chance = ablation_effects(model, requests, random, **rest).log_odds
    added = [
        addition_effects(model, harmless, each, layers, **rest).log_odds for each in directions
    ]
    nothing = torch.zeros(1, model.cfg.d_model)
    plain = ablation_effects(model, neutral, nothing, **rest | {"progress": False}).unchanged
    n = len(harmful)
    before = by_refusal.unchanged.split([n, len(harmless), len(negative)])

    def responses(reading: int, layer: int) -> Responses:
        own = by_refusal.log_odds[reading, layer].split([n, len(harmless), len(negative)])
        other = by_negativity.log_odds[reading, layer].split([n, len(harmless)])
        chance = by_chance[max(0, int(layers[reading, layer]))].split([n, len(harmless)], dim=-1)

        def ablated(side: int) -> dict[str, Tensor]:
            found = {"none": before[side], "refusal": own[side], "negativity": other[side]}
            return found | {f"random {i}": row for i, row in enumerate(chance[side])}

        return Responses(
            harmful=ablated(0),
            harmless=ablated(1),
            negative={"none": before[2], "refusal": own[2]},
            neutral={"none": plain},
            added={
                name: odds[reading, layer]
                for name, odds in zip(("refusal", "negativity"), added, strict=True)
            },
        )

    return [
        [responses(reading, layer) for layer in range(layers.shape[1])]
        for reading in range(len(layers))
    ]


def judge_all(
    geometries: Sequence[Sequence[Geometry]],
    responses: Sequence[Sequence[Responses]] | None,
    *,
    paired: tuple[bool, bool],
    confidence: float,
    thresholds: Thresholds | None = None,
) -> tuple[tuple[Verdict, ...], ...]:
    """The verdict of every reading at every layer; without responses all of them inconclusive."""
    return tuple(
        tuple(
            judge(
                weigh(
                    geometry,
                    None if responses is None else responses[reading][layer],
                    paired=paired,
                    confidence=confidence,
                ),
                thresholds,
            )
            for layer, geometry in enumerate(row)
        )
        for reading, row in enumerate(geometries)
    )
