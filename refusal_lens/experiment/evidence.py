"""The numbers on which the verdict rests, from the scores under interventions."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import permutations
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from ..interventions import Effects, Intervention
from ..prompts.contrast import Contrast
from ..uncertainty import CosineStatistics
from ..uncertainty.effects import IndependentSample, ratio_interval, total_interval
from .causal import PARTS, Causal, deepest, other_prompts, smallest_set
from .config import some_prompts
from .verdict import Estimate, Evidence


class Earlier(NamedTuple):
    """Of layers 0 to the judged one, the layer whose negativity direction lowers refusal most.

    Attributes:
        layer: that layer.
        log_odds: scores by the openings' first tokens: unmodified, under ablating refusal at the
            judged layer, under ablating negativity of `layer`.
        damage: KL on these prompts of ablating negativity of `layer`, over that of ablating refusal.
    """

    layer: int
    log_odds: Float[Tensor, "3 harmful"]
    damage: float

    @classmethod
    def of(cls, refusal: Effects, negativity: Effects, layer: int, last: int = 0) -> "Earlier":
        """Find the layer, up to `layer` or `last`, in two sweeps over the same harmful prompts."""
        means = negativity.log_odds[: max(layer, last) + 1].mean(-1).nan_to_num(nan=torch.inf)
        best = int(means.argmin())
        rows = [refusal.unchanged, refusal.log_odds[layer], negativity.log_odds[best]]
        damage = negativity.kl[best].mean() / refusal.kl[layer].mean()
        return cls(best, torch.stack(rows), float(damage))

    def lost(self, of: Callable[[Tensor], Tensor] = torch.clone) -> tuple[Tensor, Tensor]:
        """Drops under ablating negativity and refusal, of scores or of what is taken `of` them."""
        unmodified, refusal, negativity = of(self.log_odds)
        return unmodified - negativity, unmodified - refusal


class Responses(NamedTuple):
    """Refusal log-odds of each prompt set under interventions.

    Row 0 is the unmodified model; rows 1 and 2 are under ablating refusal and negativity (in `added`,
    adding them); rows from 3 on, of `harmful`, `negative` and `added` alone, are random directions.

    Attributes:
        harmful, harmless, negative, neutral: the four sets while a direction is ablated.
        added: harmless prompts while a direction is added.
        requests: all harmful and all harmless prompts, unmodified.
        earlier, controlled_earlier: the most effective negativity direction of an earlier layer, and
            the most effective one without controls.
        kl: mean KL on harmless prompts of the two ablations, in nats.
        controlled: harmful prompts while negativity without controls is ablated, and harmless ones
            while it is added.
        everywhere: some harmful prompts while refusal is ablated at every token.
        strongest: `lowered_most` of the sweeps.
    """

    harmful: Float[Tensor, "intervention harmful"]
    harmless: Float[Tensor, "3 harmless"]
    negative: Float[Tensor, "intervention negative"]
    neutral: Float[Tensor, "_ neutral"]
    added: Float[Tensor, "intervention harmless"]
    requests: tuple[Float[Tensor, " all_harmful"], Float[Tensor, " all_harmless"]]
    earlier: Earlier
    kl: tuple[float, float] = (math.nan, math.nan)
    controlled_earlier: Earlier | None = None
    controlled: tuple[Float[Tensor, " harmful"], Float[Tensor, " harmless"]] | None = None
    everywhere: Float[Tensor, " harmful"] = torch.tensor([math.nan])
    strongest: Float[Tensor, "2 harmful"] | None = None


def lowered_most(refusal: Effects, negativity: Effects) -> Float[Tensor, "2 harmful"]:
    """Drops of scores under ablating negativity and refusal, where ablating refusal does most.

    Each half of the prompts has the layer that is best on the other half (cross-fitting).
    """
    n = deepest(len(refusal.log_odds))
    drops = torch.stack([each.unchanged - each.log_odds[:n] for each in (negativity, refusal)])
    found = torch.full_like(drops[:, 0], torch.nan)
    for here, there in permutations((slice(0, None, 2), slice(1, None, 2))):
        best = drops[1, :, there].mean(-1).nan_to_num(nan=-torch.inf).argmax()
        found[:, here] = drops[:, best, here]
    return found


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
    pair = [contrasts["refusal"], *(some_prompts(contrasts[p], causal.n_prompts) for p in PARTS)]
    pair.append(other_prompts(contrasts["refusal"], causal.n_prompts))
    parts = Intervention.NEGATIVITY_CONTROLLED, Intervention.NEGATIVITY
    left, whole = (causal.addition.norms[causal.addition.rows(part)[0]] for part in parts)
    geometry = replace(
        geometry,
        covered=sum(causal.replies["harmful"].values()),
        constant_token=causal.constant_token,
        words_alike=causal.words_alike,
        strongest_layer=causal.strongest,
        n_directions=len(causal.several),
        controlled_norm=share_left(left, whole, controls=causal.controlled_sweep is not None),
    )
    responses = responses_of(causal)
    return compute_evidence(geometry, responses, contrasts=pair, confidence=cosine.confidence)


def share_left(norm: Tensor, whole: Tensor, *, controls: bool) -> float:
    """Share of a norm that controls leave; 0 if that is only rounding, NaN without controls."""
    return float((norm / whole).nan_to_num(0.0)) if controls else math.nan


def responses_of(causal: Causal) -> Responses:
    """Return the scores on which the evidence rests."""
    first = [causal.ablation.rows(Intervention(kind))[0] for kind in ("none", *PARTS)]
    rows = [*first, *causal.ablation.rows(Intervention.RANDOM)]
    layer, here = causal.ablation.layer, causal.ablation.rows(Intervention.NEGATIVITY_CONTROLLED)[0]
    everywhere = causal.ablation.rows(Intervention.REFUSAL_EVERYWHERE)[0]
    refusal, least = causal.sweep["refusal"], None
    if causal.controlled_sweep is not None:
        least = Earlier.of(refusal, causal.controlled_sweep, layer, causal.highlighted)
    return Responses(
        harmful=causal.ablation.refusal.target_log_odds[rows],
        harmless=causal.ablation.refusal.baseline_log_odds[first],
        negative=causal.ablation.negativity.target_log_odds[rows],
        neutral=causal.ablation.negativity.baseline_log_odds[first],
        added=causal.addition.refusal.baseline_log_odds[rows],
        requests=causal.requests,
        earlier=Earlier.of(refusal, causal.sweep["negativity"], layer, causal.highlighted),
        controlled_earlier=least,
        kl=tuple(causal.ablation.refusal.baseline_kl[first[1:]].mean(-1).tolist()),
        controlled=(
            causal.ablation.refusal.target_log_odds[here],
            causal.addition.refusal.baseline_log_odds[here],
        ),
        everywhere=causal.ablation.refusal.target_log_odds[everywhere],
        strongest=lowered_most(refusal, causal.controlled_sweep or causal.sweep["negativity"]),
    )


def compute_evidence(
    geometry: Evidence, responses: Responses, *, contrasts: Sequence[Contrast], confidence: float
) -> Evidence:
    """Return `geometry` with the evidence from interventions.

    `contrasts` hold all requests, then the requests and statements that the responses are of, then
    the requests of `earlier` if these are others; their clusters are the units that are sampled.
    """
    every, requests, statements, *swept = contrasts
    harmful, harmless, negative, _, added = scores = responses[:5]
    refused = [*map(_refused, scores)]
    (labels, other_labels), all_labels = map(labels_of, (requests, statements)), labels_of(every)
    gaps, shares = (_gap(each[0], each[1], requests.paired) for each in (scores, refused))
    of_negative, apart = (_gap(each[2], each[3], statements.paired) for each in (scores, refused))
    of_gap, of_statements = labels[: len(gaps)], other_labels[: len(apart)]
    dropped, left = harmful[0] - harmful[1], refused[0][0] - refused[0][1]
    all_refused = [_refused(side[None]) for side in responses.requests]
    whole = _gap(all_refused[0], all_refused[1], every.paired)
    own = _over_gap(negative[0] - negative[2], of_negative, 0)

    ratio = partial(_ratio, confidence=confidence)
    total = partial(total_interval, confidence=confidence)
    earlier, same = responses.earlier, _apart([negative[0] - negative[1]], [dropped])
    swept_labels = labels_of(*swept or [requests])[:1]
    clusters = {"harmful": labels[:1], "gap": of_gap, "swept": swept_labels}
    samples = _controlled(responses, gaps, shares)
    further: Any = {k: ratio(each, clusters[of]) for k, (each, of) in samples.items()}
    return replace(
        geometry,
        refused_harmful=float(refused[0][0].mean()),
        refused_harmless=float(refused[1][0].mean()),
        refused_negative=float(refused[2][0].mean()),
        ablated_harmful=float(refused[0][1].mean()),
        ablated_harmless=float(refused[1][1].mean()),
        everywhere_harmful=float(_refused(responses.everywhere).nanmean()),
        refused_gap=Estimate(*map(float, total(whole, clusters=all_labels[: len(whole)]))),
        gap=Estimate(*map(float, total(gaps, clusters=of_gap))),
        refusal_ablation=ratio(_over_gap(dropped, gaps, 0), of_gap),
        typical_ablation=_chance(harmful, dropped, torch.median),
        chance_ablation=_chance(harmful, dropped),
        chance_ablation_share=_chance(refused[0], left),
        chance_addition=_chance(-added, _total(gaps)),
        chance_addition_share=_chance(-refused[4], _total(shares)),
        chance_statements=_chance(negative, _total(of_negative)),
        chance_statement_ablation=_chance(negative, dropped.double().mean()),
        kl_refusal=responses.kl[0],
        kl_negativity=responses.kl[1],
        cross_ablation=ratio([(harmful[0] - harmful[2], dropped)], labels[:1]),
        cross_ablation_share=ratio([(refused[0][0] - refused[0][2], left)], labels[:1]),
        cross_addition=ratio(_over_gap(added[2] - harmless[0], gaps, 1), of_gap),
        cross_addition_share=ratio(_over_gap(refused[4][2] - refused[1][0], shares, 1), of_gap),
        statement_share=ratio(_apart(apart, shares), [*of_statements, *of_gap]),
        statement_ablation=ratio(same, [other_labels[0], labels[0]]),
        statement_own_ablation=ratio(own, of_statements),
        earlier_layer=earlier.layer,
        earlier_ablation=ratio([earlier.lost()], swept_labels),
        earlier_ablation_share=ratio([earlier.lost(_refused)], swept_labels),
        earlier_damage=earlier.damage,
        **further,
    )


def _controlled(
    responses: Responses, gaps: Sequence[Tensor], shares: Sequence[Tensor]
) -> dict[str, tuple[list[tuple[Tensor, Tensor]], str]]:
    """Samples of each further ratio, and the prompts that are sampled: harmful, gap or swept.

    Further ratios are those of what controls leave of negativity, and that of the strongest layer.
    """
    found: dict[str, tuple[list[tuple[Tensor, Tensor]], str]] = {}
    for which, of in ("", torch.clone), ("_share", _refused):
        harmful, harmless = of(responses.harmful[:2]), of(responses.harmless[0])
        if responses.controlled is not None:
            ablated, raised = map(of, responses.controlled)
            pair = (harmful[0] - ablated, harmful[0] - harmful[1])
            found[f"controlled_ablation{which}"] = [pair], "harmful"
            over = _over_gap(raised - harmless, shares if which else gaps, 1)
            found[f"controlled_addition{which}"] = over, "gap"
        if (least := responses.controlled_earlier) is not None:
            found[f"controlled_earlier_ablation{which}"] = [least.lost(of)], "swept"
    if responses.strongest is not None:
        found["strongest_ablation"] = [(responses.strongest[0], responses.strongest[1])], "swept"
    return found


def _refused(scores: Tensor) -> Tensor:
    """Which prompts are refused; NaN where nothing ran and there is no score."""
    return (scores > 0).double().masked_fill(scores.isnan(), torch.nan)


def _ratio(
    samples: Sequence[tuple[Tensor, Tensor]], clusters: Sequence[Any], *, confidence: float
) -> Estimate:
    pairs = [IndependentSample(*each) for each in samples]
    return Estimate(*map(float, ratio_interval(pairs, confidence=confidence, clusters=clusters)))


def _total(samples: Sequence[Tensor]) -> Tensor:
    return torch.stack([each.double().mean() for each in samples]).sum()


def _chance(
    rows: Float[Tensor, "intervention prompt"],
    whole: Float[Tensor, "*prompt"],
    of: Callable[[Tensor], Tensor] = torch.max,
) -> float:
    """The largest (or median) drop under random directions over the mean of `whole`; or NaN.

    Random directions are the rows from 3 on; they run on some of the prompts.
    """
    some = ~rows.isnan().any(0)
    drops = (rows[0] - rows[3:])[:, some].double().mean(-1)
    ratios = drops / (whole[some] if whole.ndim else whole).double().mean()
    known = ratios[ratios.isfinite()]
    return float(of(known)) if len(known) else torch.nan


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


def compared(
    contrasts: Mapping[str, Contrast], sides: Mapping[str, Any], *pair: str, at: slice = slice(None)
) -> dict[str, Any]:
    """What `cosine_statistics` takes of two contrasts, with their activations at some layers."""
    found: dict[str, Any] = {}
    for of, name in zip("ab", pair, strict=True):
        contrast, (target, baseline) = contrasts[name], sides[name]
        found |= {f"{of}_target": target[:, at], f"{of}_baseline": baseline[:, at]}
        found |= {f"{of}_paired": contrast.paired, f"{of}_clusters": contrast.clusters}
    return found


def labels_of(contrast: Contrast) -> tuple[Any, Any]:
    """The clusters of target and of baseline prompts; None where prompts are independent."""
    if not contrast.clusters:
        return None, None
    return (contrast.clusters,) * 2 if contrast.paired else contrast.clusters
