"""The effects of ablating and adding the two directions, on which the verdict rests."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from ..activations.extract import ContrastActivations
from ..directions.estimators import mean_difference
from ..interventions import (
    CrossEffects,
    Effects,
    Intervention,
    RefusalTokens,
    ablation_effects,
    cross_effects,
    find_refusal_tokens,
)
from ..interventions.cross_ablation import random_directions
from ..prompts.contrast import Contrast
from ..prompts.protocol import Protocol
from ..uncertainty import CosineStatistics
from ..uncertainty.effects import IndependentSample, ratio_interval, total_interval
from .distributed import divide, in_shares
from .verdict import Estimate, Evidence

if TYPE_CHECKING:
    from transformer_lens import HookedTransformer
    from transformer_lens.model_bridge import TransformerBridge

SWEEP_PROMPTS = 48  # harmful prompts on which every layer's direction is ablated
TOKEN_PROMPTS = 64  # prompts of each side that determine the refusal tokens
FEWEST_PROMPTS = 4  # smallest set on which interventions run
N_RANDOM = 8  # random directions, ablated and added for comparison
PARTS = ("refusal", "negativity")


@dataclass(frozen=True)
class Causal:
    """The effects of the interventions.

    Attributes:
        refusal_tokens: the first tokens that count as a refusal.
        sweep: part -> refusal scores of harmful prompts under ablation of each layer's direction.
        strongest: layer whose refusal direction lowers refusal most when ablated; -1 if unknown.
        ablation, addition: effects of ablating and adding the directions of the highlighted layer.
    """

    refusal_tokens: RefusalTokens
    sweep: dict[str, Effects]
    strongest: int
    ablation: CrossEffects
    addition: CrossEffects


class Responses(NamedTuple):
    """Refusal scores of each prompt set, one row per intervention.

    Rows: unmodified model, then the refusal, negativity and random directions, ablated or `added`.
    """

    harmful: Float[Tensor, "intervention harmful"]
    harmless: Float[Tensor, "intervention harmless"]
    negative: Float[Tensor, "intervention negative"]
    neutral: Float[Tensor, "intervention neutral"]
    added: Float[Tensor, "intervention harmless"]


def intervene(
    model: "HookedTransformer | TransformerBridge",
    contrasts: Mapping[str, Contrast],
    activations: Mapping[str, ContrastActivations],
    *,
    layer: int,
    generator: torch.Generator,
    protocol: Protocol,
    batch_size: int | None,
    progress: bool,
) -> Causal:
    """Measure refusal scores while the refusal and negativity directions are ablated and added.

    Processes divide the layers of the sweeps, and the two cross-effects.

    Args:
        model: the model.
        contrasts, activations: the prompts and activations of refusal and negativity.
        layer: the layer whose directions are cross-ablated and added.
        generator: generator of the random directions, on the CPU.
        protocol, batch_size, progress: options of `ablation_effects` and `cross_effects`.
    """
    pair = contrasts["refusal"], contrasts["negativity"]
    sides = activations["refusal"], activations["negativity"]
    asked = [spread(side, TOKEN_PROMPTS) for side in (pair[0].target, pair[0].baseline)]
    tokens = find_refusal_tokens(model, *asked, protocol=protocol, progress=progress)
    options: dict[str, Any] = {"refusal_tokens": tokens, "protocol": protocol}
    options |= {"batch_size": batch_size, "progress": progress}
    sweep = partial(ablation_effects, model, spread(pair[0].target, SWEEP_PROMPTS), **options)
    cross = partial(cross_effects, model, pair, sides, layer=layer, **options)
    classes = [side[:, layer] for both in sides for side in both]
    ablated, added = (random_directions(*classes, n=N_RANDOM, generator=generator) for _ in PARTS)
    sweeps = [divide_sweep(sweep, mean_difference(*each).float()) for each in sides]
    ablation, addition = divide(
        [
            partial(cross, intervention="ablation", random=ablated),
            partial(cross, intervention="addition", random=added),
        ]
    )
    means = sweeps[0].log_odds.mean(-1)
    strongest = -1 if means.isnan().all() else int(means.nan_to_num(nan=torch.inf).argmin())
    return Causal(tokens, dict(zip(PARTS, sweeps, strict=True)), strongest, ablation, addition)


def divide_sweep(effects: Callable[..., Effects], *each: Tensor) -> Effects:
    """Return `effects(*each)`; the processes divide the first axis of the tensors `each`."""
    parts = in_shares(lambda share: effects(*(tensor[share] for tensor in each)))
    n, rows = len(parts), range(len(each[0]))

    def together(name: str) -> Tensor:
        return torch.stack([getattr(parts[i % n], name)[i // n] for i in rows])

    names = [field.name for field in fields(Effects) if field.name != "unchanged"]
    return replace(parts[0], **{name: together(name) for name in names})


def smallest_set(contrasts: Mapping[str, Contrast]) -> int:
    """Return the number of prompts in the smallest of the four sets."""
    return min(len(side) for p in PARTS for side in (contrasts[p].target, contrasts[p].baseline))


def can_intervene(contrasts: Mapping[str, Contrast]) -> bool:
    """Return whether each of the four sets is large enough for interventions."""
    return smallest_set(contrasts) >= FEWEST_PROMPTS


def evidence(
    contrasts: Mapping[str, Contrast],
    causal: Causal | None,
    cosine: CosineStatistics,
    *,
    layer: int,
) -> Evidence:
    """Return the evidence for `verdict.judge` at one layer; without `causal`, geometry alone.

    `cosine` compares refusal with negativity; its confidence is that of all intervals.
    """
    geometry = Evidence(
        layer=layer,
        n_prompts=smallest_set(contrasts),
        reliability_refusal=float(cosine.reliability_a[layer]),
        reliability_negativity=float(cosine.reliability_b[layer]),
        cosine=Estimate(*(float(x[layer]) for x in (cosine.unbiased, cosine.lower, cosine.upper))),
    )
    if causal is None:
        return geometry
    kinds = (Intervention.NONE, Intervention.REFUSAL, Intervention.NEGATIVITY, Intervention.RANDOM)
    rows = [row for kind in kinds for row in causal.ablation.rows(kind)]
    responses = Responses(
        harmful=causal.ablation.refusal.target_log_odds[rows],
        harmless=causal.ablation.refusal.baseline_log_odds[rows],
        negative=causal.ablation.negativity.target_log_odds[rows],
        neutral=causal.ablation.negativity.baseline_log_odds[rows],
        added=causal.addition.refusal.baseline_log_odds[rows],
    )
    paired = (contrasts["refusal"].paired, contrasts["negativity"].paired)
    return compute_evidence(geometry, responses, paired=paired, confidence=cosine.confidence)


def compute_evidence(
    geometry: Evidence, responses: Responses, *, paired: tuple[bool, bool], confidence: float
) -> Evidence:
    """Return `geometry` with the evidence from interventions.

    `paired` says whether the prompts of refusal and of negativity are paired.
    """
    harmful, harmless, negative, neutral, added = responses
    requests = _differences(harmful, harmless, paired[0])
    harmful_alone = _differences(harmful, torch.zeros_like(harmless), paired[0])
    statements = _differences(negative[:1], neutral[:1], paired[1])
    gaps, closed = [rows[0] for rows in requests], [rows[0] - rows[1] for rows in requests]
    gap = Estimate(*map(float, total_interval(gaps, confidence=confidence)))
    random = torch.stack([(rows[0] - rows[3:]).double().mean(-1) for rows in requests]).sum(0)

    def ratio(numerators: list[Tensor], denominators: list[Tensor]) -> Estimate:
        """Ratio whose numerators and denominators are over the same prompts."""
        samples = list(map(IndependentSample, numerators, denominators))
        return Estimate(*map(float, ratio_interval(samples, confidence=confidence)))

    def ratio_apart(numerators: list[Tensor], denominators: list[Tensor]) -> Estimate:
        """Ratio whose numerators and denominators are over different prompts."""
        tops = [*numerators, *map(torch.zeros_like, denominators)]
        return ratio(tops, [*map(torch.zeros_like, numerators), *denominators])

    return replace(
        geometry,
        refused_harmful=_share_refused(harmful[0]),
        refused_harmless=_share_refused(harmless[0]),
        gap=gap,
        refusal_ablation=ratio(closed, gaps),
        random_ablation=float((random / gap.value).quantile(0.5)),
        cross_ablation_gap=ratio([rows[0] - rows[2] for rows in requests], closed),
        cross_ablation_drop=ratio([rows[0] - rows[2] for rows in harmful_alone], closed),
        cross_addition=ratio([added[2] - harmless[0]], [added[1] - harmless[0]]),
        statement_gap=ratio_apart([rows[0] for rows in statements], gaps),
        statement_ablation=ratio_apart([negative[0] - negative[1]], [harmful[0] - harmful[1]]),
    )


def spread(prompts: Sequence[str], at_most: int) -> list[str]:
    """Return `at_most` prompts, spread evenly from first to last."""
    if len(prompts) <= at_most:
        return list(prompts)
    return [prompts[i] for i in torch.linspace(0, len(prompts) - 1, at_most).round().long()]


def _differences(target: Tensor, baseline: Tensor, paired: bool) -> list[Tensor]:
    """Return target minus baseline as independent samples: pairs, or both sides."""
    return [target - baseline] if paired else [target, -baseline]


def _share_refused(log_odds: Float[Tensor, " prompt"]) -> float:
    return float((log_odds > 0).double().mean()) if log_odds.isfinite().all() else torch.nan
