"""The effects of ablating and adding the two directions, on which the verdict rests."""

import math
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
    ReplyOpenings,
    ablation_effects,
    cross_effects,
    openings_of,
)
from ..interventions.batched_runs import first_token_logits, opening_log_odds
from ..interventions.cross_ablation import random_directions
from ..interventions.reply_openings import ANSWERING, REFUSAL, SYMPATHY
from ..interventions.sweep import affine_references
from ..prompts.contrast import Contrast
from ..prompts.protocol import Protocol
from ..prompts.thinking import constant_first_token
from ..uncertainty import CosineStatistics
from ..uncertainty.effects import IndependentSample, ratio_interval, total_interval
from .distributed import divide, in_shares
from .verdict import Estimate, Evidence

if TYPE_CHECKING:
    from transformer_lens import HookedTransformer
    from transformer_lens.model_bridge import TransformerBridge

SWEEP_PROMPTS = 32  # harmful prompts on which every layer's direction is ablated
EFFECT_PROMPTS = 32  # prompts of each set on which the two directions are ablated and added
REPLY_PROMPTS = 8  # prompts of each set whose sympathy and answers are scored
FEWEST_PROMPTS = 4  # smallest set on which interventions run
N_RANDOM = 20  # random directions, ablated and added for comparison
PARTS = ("refusal", "negativity")
SETS = ("harmful", "harmless", "negative", "neutral")


@dataclass(frozen=True)
class Causal:
    """The effects of the interventions.

    Attributes:
        openings: the openings that count as a refusal.
        replies: prompt set ("harmful", "harmless", "negative", "neutral") -> kind of reply
            ("refusal", "sympathy", "answer") -> mean probability in the unmodified model.
        sweep: part -> scores of harmful prompts under affine ablation of each layer's direction, by
            the openings' first tokens alone.
        strongest: layer whose refusal direction lowers refusal most when ablated; -1 if unknown.
        ablation, addition: effects of ablating and adding the directions of the highlighted layer.
        constant_token: text of a token, no refusal's first, with which every reply begins; or "".
    """

    openings: ReplyOpenings
    replies: dict[str, dict[str, float]]
    sweep: dict[str, Effects]
    strongest: int
    ablation: CrossEffects
    addition: CrossEffects
    constant_token: str = ""


class Responses(NamedTuple):
    """Refusal log-odds of each prompt set, one row per intervention.

    Rows: unmodified model, then the refusal and the negativity direction, ablated or `added`; then
    random directions in `harmful` and `added` alone. `kl` is the mean KL on harmless prompts of the
    two ablations, in nats.
    """

    harmful: Float[Tensor, "intervention harmful"]
    harmless: Float[Tensor, "3 harmless"]
    negative: Float[Tensor, "_ negative"]
    neutral: Float[Tensor, "_ neutral"]
    added: Float[Tensor, "intervention harmless"]
    kl: tuple[float, float] = (math.nan, math.nan)


def intervene(
    model: "HookedTransformer | TransformerBridge",
    contrasts: Mapping[str, Contrast],
    activations: Mapping[str, ContrastActivations],
    *,
    layer: int,
    generator: torch.Generator,
    openings: Sequence[str] | None,
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
        openings: texts of refusals' openings; None takes `reply_openings.REFUSAL`.
        protocol, batch_size, progress: options of `ablation_effects` and `cross_effects`.
    """
    first, second = (some_prompts(contrasts[part], EFFECT_PROMPTS) for part in PARTS)
    pair = first, second
    sides = activations["refusal"], activations["negativity"]
    tokenizer: Any = model.tokenizer
    score = openings_of(tokenizer, openings or REFUSAL)
    options: dict[str, Any] = {"protocol": protocol, "batch_size": batch_size}
    options |= {"progress": progress}
    scored = options | {"score": score}
    harmful = spread(pair[0].target, SWEEP_PROMPTS)
    of_sweep = options | {"score": score.first_tokens, "last_position": True}

    def sweep(directions: Tensor, references: Tensor) -> Effects:
        return ablation_effects(model, harmful, directions, references=references, **of_sweep)

    cross = partial(cross_effects, model, pair, sides, layer=layer, **scored)
    classes = [side[:, layer] for both in sides for side in both]
    ablated, added = (random_directions(*classes, n=N_RANDOM, generator=generator) for _ in PARTS)
    sweeps = []
    for each in sides:
        directions = mean_difference(*each).float()
        references = affine_references(directions, sides[0].baseline, hook=protocol.hook)
        sweeps.append(divide_sweep(sweep, directions, references))
    ablation, addition = divide(
        [
            partial(cross, intervention="ablation", random=ablated),
            partial(cross, intervention="addition", random=added),
        ]
    )
    replies = _replies(model, pair, ablation, options)
    means = sweeps[0].log_odds.mean(-1)
    strongest = -1 if means.isnan().all() else int(means.nan_to_num(nan=torch.inf).argmin())
    found = dict(zip(PARTS, sweeps, strict=True))
    constant = _constant_token(model, pair, score, options)
    return Causal(score, replies, found, strongest, ablation, addition, constant)


def _constant_token(
    model: "HookedTransformer | TransformerBridge",
    pair: Sequence[Contrast],
    refusal: ReplyOpenings,
    options: dict[str, Any],
) -> str:
    """A token with which the reply to every prompt begins, unless refusals begin with it; else ""."""
    tokenizer: Any = model.tokenizer
    sets = [side for contrast in pair for side in (contrast.target, contrast.baseline)]
    token = constant_first_token(first_token_logits(model, sum(sets, ()), **options))
    return "" if token is None or token in refusal.first_tokens else tokenizer.decode([token])


def some_prompts(contrast: Contrast, at_most: int) -> Contrast:
    """The contrast with at most so many prompts a side, spread evenly, pairs kept together."""
    rows = [spread(range(len(side)), at_most) for side in (contrast.target, contrast.baseline)]
    return contrast.subset(*rows)


def _replies(
    model: "HookedTransformer | TransformerBridge",
    pair: Sequence[Contrast],
    effects: CrossEffects,
    options: dict[str, Any],
) -> dict[str, dict[str, float]]:
    """Mean probability of every kind of reply after each prompt set, in the unmodified model."""
    tokenizer: Any = model.tokenizer
    parts = effects.refusal, effects.negativity
    scores = [x[0] for part in parts for x in (part.target_log_odds, part.baseline_log_odds)]
    found = {
        name: {"refusal": float(each[spread(range(len(each)), REPLY_PROMPTS)].sigmoid().mean())}
        for name, each in zip(SETS, scores, strict=True)
    }
    some = [some_prompts(contrast, REPLY_PROMPTS) for contrast in pair]
    sides = [side for contrast in some for side in (contrast.target, contrast.baseline)]
    for kind, texts in (("sympathy", SYMPATHY), ("answer", ANSWERING)):
        odds = opening_log_odds(model, sum(sides, ()), openings_of(tokenizer, texts), **options)
        for name, each in zip(SETS, odds.sigmoid().split([*map(len, sides)]), strict=True):
            found[name][kind] = float(each.mean())
    return found


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
    named = (Intervention.NONE, Intervention.REFUSAL, Intervention.NEGATIVITY)
    first = [causal.ablation.rows(kind)[0] for kind in named]
    rows = [*first, *causal.ablation.rows(Intervention.RANDOM)]
    responses = Responses(
        harmful=causal.ablation.refusal.target_log_odds[rows],
        harmless=causal.ablation.refusal.baseline_log_odds[first],
        negative=causal.ablation.negativity.target_log_odds[first],
        neutral=causal.ablation.negativity.baseline_log_odds[first],
        added=causal.addition.refusal.baseline_log_odds[rows],
        kl=tuple(causal.ablation.refusal.baseline_kl[first[1:]].mean(-1).tolist()),
    )
    pair = [some_prompts(contrasts[part], EFFECT_PROMPTS) for part in PARTS]
    covered = sum(causal.replies["harmful"].values())
    geometry = replace(geometry, covered=covered, constant_token=causal.constant_token)
    return compute_evidence(geometry, responses, contrasts=pair, confidence=cosine.confidence)


def compute_evidence(
    geometry: Evidence,
    responses: Responses,
    *,
    contrasts: Sequence[Contrast],
    confidence: float,
) -> Evidence:
    """Return `geometry` with the evidence from interventions.

    `contrasts` hold the prompts of the responses; their clusters are the units that are sampled.
    """
    scores = responses[:5]
    refused = [(rows > 0).double() for rows in scores]
    (harmful, harmless, negative, _, added), (labels, other_labels) = (
        scores,
        map(_labels, contrasts),
    )
    gaps, shares = (_gap(each[0], each[1], contrasts[0].paired) for each in (scores, refused))
    statements = _gap(refused[2], refused[3], contrasts[1].paired)
    of_gap, of_statements = labels[: len(gaps)], other_labels[: len(statements)]
    dropped, left = harmful[0] - harmful[1], refused[0][0] - refused[0][1]
    some, others = (~rows.isnan().any(0) for rows in (harmful, added))  # ran under random ones
    lost, brought = harmful[0] - harmful[3:], added[3:] - added[0]
    chance = lost[:, some].double().mean(-1) / dropped[some].double().mean()
    whole_gap = sum(each.double().mean() for each in gaps)
    chance_added = brought[:, others].double().mean(-1) / whole_gap

    def ratio(samples: list[tuple[Tensor, Tensor]], clusters: Sequence[Any]) -> Estimate:
        pairs = [IndependentSample(*each) for each in samples]
        found = ratio_interval(pairs, confidence=confidence, clusters=clusters)
        return Estimate(*map(float, found))

    def total(samples: list[Tensor]) -> Estimate:
        found = total_interval(samples, confidence=confidence, clusters=of_gap)
        return Estimate(*map(float, found))

    same = _apart([negative[0] - negative[1]], [dropped])
    return replace(
        geometry,
        refused_harmful=float(refused[0][0].mean()),
        refused_harmless=float(refused[1][0].mean()),
        refused_negative=float(refused[2][0].mean()),
        ablated_harmful=float(refused[0][1].mean()),
        ablated_harmless=float(refused[1][1].mean()),
        refused_gap=total(shares),
        gap=total(gaps),
        refusal_ablation=ratio(_over_gap(dropped, gaps, 0), of_gap),
        chance_ablation=_beyond_chance(chance),
        chance_addition=_beyond_chance(chance_added),
        kl_refusal=responses.kl[0],
        kl_negativity=responses.kl[1],
        cross_ablation=ratio([(harmful[0] - harmful[2], dropped)], labels[:1]),
        cross_ablation_share=ratio([(refused[0][0] - refused[0][2], left)], labels[:1]),
        cross_addition=ratio(_over_gap(added[2] - harmless[0], gaps, 1), of_gap),
        cross_addition_share=ratio(_over_gap(refused[4][2] - refused[1][0], shares, 1), of_gap),
        statement_share=ratio(_apart(statements, shares), [*of_statements, *of_gap]),
        statement_ablation=ratio(same, [other_labels[0], labels[0]]),
    )


def _gap(target: Tensor, baseline: Tensor, paired: bool) -> list[Tensor]:
    """Target minus baseline in the unmodified model as independent samples: pairs, or both sides."""
    return [target[0] - baseline[0]] if paired else [target[0], -baseline[0]]


def _apart(tops: Sequence[Tensor], bottoms: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Samples of a ratio whose numerators and denominators are over different prompts."""
    above = [(each, torch.zeros_like(each)) for each in tops]
    return [*above, *((torch.zeros_like(each), each) for each in bottoms)]


def _over_gap(top: Tensor, gaps: Sequence[Tensor], of: int) -> list[tuple[Tensor, Tensor]]:
    """Samples of a ratio to a gap; `top` is over harmful (0) or harmless (1) prompts."""
    if len(gaps) == 1:
        return [(top, gaps[0])]
    tops = [torch.zeros_like(each) for each in gaps]
    tops[of] = top
    return list(zip(tops, gaps, strict=True))


def _labels(contrast: Contrast) -> tuple[Any, Any]:
    """The clusters of target and of baseline prompts; None where prompts are independent."""
    if not contrast.clusters:
        return None, None
    return (contrast.clusters,) * 2 if contrast.paired else contrast.clusters


def _beyond_chance(ratios: Float[Tensor, " random"]) -> float:
    """The largest effect of a random direction; NaN without any."""
    known = ratios[ratios.isfinite()]
    return float(known.max()) if len(known) else torch.nan


def spread(prompts: Sequence[Any], at_most: int) -> list[Any]:
    """Return `at_most` prompts, spread evenly from first to last."""
    if len(prompts) <= at_most:
        return list(prompts)
    return [prompts[i] for i in torch.linspace(0, len(prompts) - 1, at_most).round().long()]
