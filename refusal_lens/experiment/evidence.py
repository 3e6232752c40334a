"""What the two directions do, measured by intervening: the evidence that the verdict rests on."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ..activations.extract import ContrastActivations
from ..interventions import (
    CrossEffects,
    Effects,
    RefusalTokens,
    ablation_cross_effects,
    ablation_effects,
    addition_cross_effects,
    find_refusal_tokens,
)
from ..models.load import LensModel
from ..prompts.contrast import Contrast
from ..prompts.protocol import Protocol
from ..uncertainty import CosineStatistics
from ..uncertainty.effects import Group, Interval, ratio_interval, total_interval
from .verdict import Estimate, Evidence

SWEEP_PROMPTS = 48
"""Harmful prompts, spread over the set, on which every layer's direction is tried."""
TOKEN_PROMPTS = 64
"""Prompts of each side on which the refusal tokens are found, or measured."""

FEWEST_PROMPTS = 4
"""Prompts a side, below which nothing is intervened with."""

PARTS = ("refusal", "negativity")


@dataclass(frozen=True)
class Causal:
    """What intervening did.

    Attributes:
        refusal_tokens: the tokens that count as the opening of a refusal, and how they are known.
        sweep: part -> refusal log-odds of some harmful prompts, each layer's direction of that part
            ablated everywhere in turn.
        strongest: the layer whose refusal direction, ablated, lowers refusal most; -1 where there
            are no refusal tokens.
        ablation: both directions of the highlighted layer ablated, all prompts of both contrasts.
        addition: both directions added after the highlighted layer.
    """

    refusal_tokens: RefusalTokens
    sweep: dict[str, Effects]
    strongest: int
    ablation: CrossEffects
    addition: CrossEffects


def intervene(
    model: LensModel,
    contrasts: Mapping[str, Contrast],
    activations: Mapping[str, ContrastActivations],
    directions: Mapping[str, Float[Tensor, "layer d_model"]],
    *,
    layer: int,
    generator: torch.Generator,
    protocol: Protocol = Protocol(),  # noqa: B008 (frozen)
    batch_size: int | None = None,
    progress: bool = True,
) -> Causal:
    """Ablate and add the refusal and negativity directions, and read the first token of the reply.

    All three mappings hold the parts `refusal` and `negativity`.

    Raises:
        InputError: as `interventions.ablation_cross_effects`.
    """
    harmful, harmless = contrasts["refusal"].target, contrasts["refusal"].baseline
    tokens = find_refusal_tokens(
        model,
        spread(harmful, TOKEN_PROMPTS),
        spread(harmless, TOKEN_PROMPTS),
        protocol=protocol,
        progress=progress,
    )
    sweep = {
        part: ablation_effects(
            model,
            spread(harmful, SWEEP_PROMPTS),
            directions[part].float(),
            refusal_tokens=tokens,
            protocol=protocol,
            batch_size=batch_size,
            progress=progress,
        )
        for part in PARTS
    }
    ablation, addition = (
        cross_effects(
            model,
            (contrasts["refusal"], contrasts["negativity"]),
            (activations["refusal"], activations["negativity"]),
            layer=layer,
            refusal_tokens=tokens,
            generator=generator,
            protocol=protocol,
            batch_size=batch_size,
            progress=progress,
        )
        for cross_effects in (ablation_cross_effects, addition_cross_effects)
    )
    return Causal(tokens, sweep, strongest_layer(sweep["refusal"]), ablation, addition)


def can_intervene(contrasts: Mapping[str, Contrast]) -> bool:
    """Whether both contrasts have prompts enough to read an intervention's effect on them."""
    sides = [side for part in PARTS for side in (contrasts[part].target, contrasts[part].baseline)]
    return min(map(len, sides)) >= FEWEST_PROMPTS


def strongest_layer(sweep: Effects) -> int:
    """The layer whose direction, ablated, leaves the lowest mean refusal log-odds; -1 if unknown."""
    means = sweep.log_odds.mean(-1)
    if means.isnan().all():
        return -1
    return int(means.nan_to_num(nan=torch.inf).argmin())


@dataclass(frozen=True)
class Responses:
    """Refusal log-odds of the prompts, under interventions by name; "none" is the model as it is.

    Attributes:
        harmful: "none", and "refusal", "negativity" and random directions ablated.
        harmless: the same.
        negative: "none", and "refusal" ablated.
        neutral: "none".
        added: harmless prompts with "refusal" and with "negativity" added.
    """

    harmful: Mapping[str, Float[Tensor, " harmful"]]
    harmless: Mapping[str, Float[Tensor, " harmless"]]
    negative: Mapping[str, Float[Tensor, " negative"]]
    neutral: Mapping[str, Float[Tensor, " neutral"]]
    added: Mapping[str, Float[Tensor, " harmless"]]


@dataclass(frozen=True)
class Geometry:
    """What the directions themselves tell at one layer; see `Evidence` for the words."""

    layer: int
    n_prompts: int
    reliability_refusal: float
    reliability_negativity: float
    cosine: Estimate


def evidence(
    contrasts: Mapping[str, Contrast],
    causal: Causal | None,
    cosine: CosineStatistics,
    *,
    layer: int,
) -> Evidence:
    """The numbers that `verdict.judge` decides by, at one layer.

    `cosine` is the statistics of refusal against negativity. All intervals are at its confidence.
    Without `causal`, what only an intervention can tell is NaN.
    """
    sides = [side for part in PARTS for side in (contrasts[part].target, contrasts[part].baseline)]
    geometry = Geometry(
        layer=layer,
        n_prompts=min(map(len, sides)),
        reliability_refusal=float(cosine.reliability_a[layer]),
        reliability_negativity=float(cosine.reliability_b[layer]),
        cosine=Estimate(
            *(float(curve[layer]) for curve in (cosine.unbiased, cosine.lower, cosine.upper))
        ),
    )
    responses = None
    if causal is not None:
        harmful, harmless = _log_odds(causal.ablation, "refusal")
        negative, neutral = _log_odds(causal.ablation, "negativity")
        _, added = _log_odds(causal.addition, "refusal")
        responses = Responses(harmful, harmless, negative, neutral, added)
    paired = (contrasts["refusal"].paired, contrasts["negativity"].paired)
    return weigh(geometry, responses, paired=paired, confidence=cosine.confidence)


def weigh(
    geometry: Geometry,
    responses: Responses | None,
    *,
    paired: tuple[bool, bool],
    confidence: float,
) -> Evidence:
    """The evidence at one layer, from what the directions tell and how the model responds to them.

    `paired` tells whether the prompts of refusal and of negativity come in pairs.
    """
    if responses is None:
        unknown = Estimate(math.nan, math.nan, math.nan)
        ratios = (
            "gap",
            "refusal_ablation",
            "cross_ablation_gap",
            "cross_ablation_drop",
            "cross_addition",
            "statement_gap",
            "statement_ablation",
        )
        shares = ("refused_harmful", "refused_harmless", "random_ablation")
        unmeasured: dict[str, Any] = dict.fromkeys(ratios, unknown) | dict.fromkeys(
            shares, math.nan
        )
        return Evidence(**vars(geometry), **unmeasured)
    options = {"confidence": confidence}
    harmful, harmless = responses.harmful, responses.harmless
    negative, neutral, added = responses.negative, responses.neutral, responses.added
    before = harmful["none"], harmless["none"]

    def closed(intervention: str) -> tuple[Tensor, Tensor]:
        return before[0] - harmful[intervention], before[1] - harmless[intervention]

    def gap_closed(intervention: str, relative_to: tuple[Tensor, Tensor]) -> Interval:
        groups = _gaps(closed(intervention), relative_to, paired=paired[0])
        return ratio_interval(groups, **options)

    gap = _gaps(before, before, paired=paired[0])
    statements = (negative["none"], neutral["none"])
    statement_gaps = _gaps(statements, statements, paired=paired[1])
    lowered = before[0] - harmful["refusal"]
    random = [name for name in harmful if name.startswith("random")]
    return Evidence(
        **vars(geometry),
        refused_harmful=_share_refused(before[0]),
        refused_harmless=_share_refused(before[1]),
        gap=_estimate(total_interval([group.denominator for group in gap], **options)),
        refusal_ablation=_estimate(gap_closed("refusal", before)),
        random_ablation=_median([float(gap_closed(name, before).value) for name in random]),
        cross_ablation_gap=_estimate(gap_closed("negativity", closed("refusal"))),
        cross_ablation_drop=_estimate(
            ratio_interval(
                _cross_ablation_drop(closed("negativity")[0], closed("refusal"), paired=paired[0]),
                **options,
            )
        ),
        cross_addition=_estimate(
            ratio_interval(
                [Group(added["negativity"] - before[1], added["refusal"] - before[1])], **options
            )
        ),
        statement_gap=_estimate(
            ratio_interval(
                [
                    *(
                        Group(one.numerator, torch.zeros_like(one.numerator))
                        for one in statement_gaps
                    ),
                    *(Group(torch.zeros_like(one.numerator), one.denominator) for one in gap),
                ],
                **options,
            )
        ),
        statement_ablation=_estimate(
            ratio_interval(
                [
                    Group(
                        negative["none"] - negative["refusal"], torch.zeros_like(negative["none"])
                    ),
                    Group(torch.zeros_like(lowered), lowered),
                ],
                **options,
            )
        ),
    )


def _log_odds(effects: CrossEffects, part: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Refusal log-odds of a contrast's target and baseline prompts, by intervention."""
    found = getattr(effects, part)
    return (
        dict(zip(effects.interventions, found.target_log_odds, strict=True)),
        dict(zip(effects.interventions, found.baseline_log_odds, strict=True)),
    )


def _gaps(
    numerators: tuple[Tensor, Tensor], denominators: tuple[Tensor, Tensor], *, paired: bool
) -> list[Group]:
    """Target less baseline, as one group of pairs where the prompts come in pairs."""
    (a, b), (c, d) = numerators, denominators
    return [Group(a - b, c - d)] if paired else [Group(a, c), Group(-b, -d)]


def _cross_ablation_drop(
    lowered: Float[Tensor, " target"], closed: tuple[Tensor, Tensor], *, paired: bool
) -> list[Group]:
    """What the target prompts lose, over the part of the gap that is closed."""
    nothing = torch.zeros_like(closed[1])
    if paired:
        return [Group(lowered, closed[0] - closed[1])]
    return [Group(lowered, closed[0]), Group(nothing, -closed[1])]


def _share_refused(log_odds: Float[Tensor, " prompt"]) -> float:
    return float((log_odds > 0).double().mean()) if log_odds.isfinite().all() else float("nan")


def _estimate(interval: Interval) -> Estimate:
    return Estimate(*(float(end) for end in interval))


def _median(values: Sequence[float]) -> float:
    return (
        float(torch.tensor(values, dtype=torch.float64).quantile(0.5)) if values else float("nan")
    )


def spread(prompts: Sequence[str], at_most: int) -> list[str]:
    """So many of the prompts, evenly from first to last."""
    if len(prompts) <= at_most:
        return list(prompts)
    places = torch.linspace(0, len(prompts) - 1, at_most).round().long().tolist()
    return [prompts[place] for place in places]
