"""The rule that turns evidence into a verdict; `wording.rule` states the rule in words."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from ..errors import InputError

Answer = Literal["distinct", "shared", "partly shared", "inconclusive"]
Finding = (
    Literal["too low", "too high", "not measured", "not shown above", "chance", "damage"]
    | Literal["above", "below", "within", "undecided", "reported", "disagrees"]
)
"""How a number compares with its threshold; "reported" means without a comparison."""

ABLATION = ("cross_ablation", "cross_ablation_share")
ADDITION = ("cross_addition", "cross_addition_share")
EARLIER = ("earlier_ablation", "earlier_ablation_share")
STATEMENTS = ("statement_share", "statement_ablation", "statement_own_ablation")
RATIOS = (*ABLATION, *ADDITION)  # the ratios that decide, beside the statements and earlier layers
CONTROLLED = {  # ratio -> the same of negativity without what controls have
    **{name: name.replace("cross", "controlled") for name in RATIOS},
    **{name: f"controlled_{name}" for name in EARLIER},
}
CHANCE = {  # ratio -> the same of the most effective random direction
    **dict(zip(ABLATION, ("chance_ablation", "chance_ablation_share"), strict=True)),
    **dict(zip(ADDITION, ("chance_addition", "chance_addition_share"), strict=True)),
    **dict(zip(EARLIER, ("chance_ablation", "chance_ablation_share"), strict=True)),
    "statement_own_ablation": "chance_statements",
}
HIGH_COSINE = 0.5


@dataclass(frozen=True)
class Estimate:
    """A number and its confidence interval; NaN where it was not measured."""

    value: float = math.nan
    lower: float = math.nan
    upper: float = math.nan

    def __format__(self, spec: str = "") -> str:
        value, *ends = (format(each, spec or ".2f") for each in vars(self).values())
        return f"{value} [{', '.join(ends)}]"

    __str__ = __format__


@dataclass(frozen=True)
class Evidence:
    """The numbers behind a verdict; numbers from interventions are NaN without interventions.

    A prompt's refusal score is the log-odds, in nats, that its reply begins with a refusal's opening;
    a prompt is refused if the score is above 0. Ablations are affine: the component is set to what the
    baseline prompts of the prompts' own contrast have. Ratios are relative to refusal's effect.

    Attributes:
        layer, n_prompts: the layer of the two directions, and prompts in the smallest of four sets.
        highlighted: the highlighted layer: `layer`, unless ablating refusal lets no requests through
            there; then `layer` is the one at which it does most, on other prompts if there are enough.
        reliability_refusal, reliability_negativity: split-half reliability of each direction, up to 1.
        cosine: unbiased cosine of the two directions.
        constant_token: a token, no refusal's, that begins the reply to every prompt; "" if none does.
        words_alike: overlap of the openings that refuse harmful and negative prompts, 0 to 1; or NaN.
        covered: probability that a harmful prompt's reply begins with a known opening of any kind.
        refused_harmful, refused_harmless, refused_negative: share of these prompts that is refused.
        refused_gap, gap: share of harmful minus share of harmless prompts refused, of all prompts; the
            same of scores, of the prompts that interventions run on.
        n_directions: directions that are ablated together as refusal.
        ablated_harmful, ablated_harmless: shares refused while refusal is ablated.
        everywhere_harmful: share of some harmful prompts refused while it is ablated at every token.
        refusal_ablation: drop of harmful scores under ablating refusal, over the gap of scores.
        typical_ablation: drop of harmful scores under ablating the median random direction, over the
            drop under ablating refusal.
        chance_ablation, chance_ablation_share, chance_addition, chance_addition_share,
            chance_statements, chance_statement_ablation: the ratios below, of the most effective
            random direction.
        kl_refusal, kl_negativity: next-token KL that each ablation causes on harmless prompts, in nats.
        cross_ablation, cross_ablation_share: drop of harmful prompts' scores, and of the share
            refused, under ablating negativity, over the drop under ablating refusal.
        cross_addition, cross_addition_share: rise of harmless prompts' scores, and of the share
            refused, under adding negativity, over the differences between harmful and harmless ones.
        controlled_norm: share of the norm of the negativity direction that is left without the parts
            along the refusals' first tokens and the directions of arousal and alarm.
        controlled_ablation, controlled_ablation_share, controlled_addition, controlled_addition_share:
            the four ratios above for what is left; NaN without a control of these names.
        controlled_earlier_ablation, controlled_earlier_ablation_share: of the layer, up to `layer`, at
            which ablating what is left lowers refusal most.
        statement_share: share of negative minus share of neutral prompts refused, over that of
            harmful minus that of harmless ones.
        statement_ablation: ratio of the drops of negative and harmful scores under ablating refusal.
        statement_own_ablation: drop of negative prompts' scores under ablating negativity, over the
            difference between negative and neutral prompts.
        earlier_layer: the layer, up to `layer`, whose negativity direction lowers refusal most.
        earlier_ablation, earlier_ablation_share: `cross_ablation` and its share for that direction,
            scored by the first tokens of openings alone.
        earlier_damage: KL that its ablation causes on harmful prompts, over that of refusal's.
        strongest_layer, strongest_ablation: the layer at which ablating refusal lowers scores most, and
            `cross_ablation` there (`controlled_ablation` with controls), by the openings' first tokens;
            the layer is chosen on one half of the prompts and the ratio measured on the other.
    """

    layer: int
    n_prompts: int
    reliability_refusal: float
    reliability_negativity: float
    cosine: Estimate
    highlighted: int = -1
    constant_token: str = ""
    words_alike: float = math.nan
    covered: float = math.nan
    refused_harmful: float = math.nan
    refused_harmless: float = math.nan
    refused_negative: float = math.nan
    refused_gap: Estimate = Estimate()
    gap: Estimate = Estimate()
    n_directions: int = 1
    ablated_harmful: float = math.nan
    everywhere_harmful: float = math.nan
    ablated_harmless: float = math.nan
    refusal_ablation: Estimate = Estimate()
    typical_ablation: float = math.nan
    chance_ablation: float = math.nan
    chance_ablation_share: float = math.nan
    chance_addition: float = math.nan
    chance_addition_share: float = math.nan
    chance_statements: float = math.nan
    chance_statement_ablation: float = math.nan
    kl_refusal: float = math.nan
    kl_negativity: float = math.nan
    cross_ablation: Estimate = Estimate()
    cross_ablation_share: Estimate = Estimate()
    cross_addition: Estimate = Estimate()
    cross_addition_share: Estimate = Estimate()
    controlled_norm: float = math.nan
    controlled_ablation: Estimate = Estimate()
    controlled_ablation_share: Estimate = Estimate()
    controlled_addition: Estimate = Estimate()
    controlled_addition_share: Estimate = Estimate()
    controlled_earlier_ablation: Estimate = Estimate()
    controlled_earlier_ablation_share: Estimate = Estimate()
    statement_share: Estimate = Estimate()
    statement_ablation: Estimate = Estimate()
    statement_own_ablation: Estimate = Estimate()
    earlier_layer: int = -1
    earlier_ablation: Estimate = Estimate()
    earlier_ablation_share: Estimate = Estimate()
    earlier_damage: float = math.nan
    strongest_layer: int = -1
    strongest_ablation: Estimate = Estimate()

    @property
    def bypassed(self) -> float:
        """Share of the refusal of harmful prompts that ablating refusal takes away."""
        lost = self.refused_harmful - self.ablated_harmful
        return lost / (self.refused_harmful - self.refused_harmless or math.nan)


@dataclass(frozen=True)
class Thresholds:
    """The thresholds of the rule; raises InputError unless 0 < margin < shared_from.

    Attributes:
        min_prompts, min_reliability: least size of every set and least reliability of a direction.
        min_refused_gap: the share refused must be shown to be this much higher for harmful than for
            harmless prompts.
        min_covered: where harmful prompts are not refused, known openings must be this likely; else
            the model may refuse in other words.
        min_bypassed: smallest share of the refusal of harmful prompts that ablating refusal takes
            away; and `refusal_ablation` must be shown above `margin`.
        max_over_refusal: how much the share of harmless prompts refused may rise under that ablation.
        max_typical: how much of the drop under ablating refusal a median random direction may reach.
        max_damage: largest KL of ablating negativity, in multiples of that of ablating refusal, at
            which its effect still counts as shared.
        min_controlled_norm: least share of negativity's norm without the controls at which its effects
            tell what negativity does.
        margin: equivalence margin; a ratio whose interval lies within +-margin is no effect.
        shared_from: a ratio whose interval lies above this shows a shared mechanism.
    """

    min_prompts: int = 16
    min_reliability: float = 0.5
    min_refused_gap: float = 0.1
    min_covered: float = 0.5
    min_bypassed: float = 0.5
    max_over_refusal: float = 0.1
    max_typical: float = 0.75
    max_damage: float = 3.0
    min_controlled_norm: float = 0.5
    margin: float = 0.25
    shared_from: float = 0.5

    def __post_init__(self) -> None:
        if not 0 < self.margin < self.shared_from:
            values = f"margin {self.margin} and shared_from {self.shared_from}"
            raise InputError(f"{values}: choose 0 < margin < shared_from")


@dataclass(frozen=True)
class Reason:
    """A number of the evidence and its comparison with a threshold.

    Attributes:
        measure: the field of `Evidence` that holds the number.
        finding, threshold: the comparison (a ratio's whole interval counts); the threshold, if any.
    """

    measure: str
    finding: Finding
    threshold: float | None = None


@dataclass(frozen=True)
class Verdict:
    """The answer and its reasons; `print` shows the verdict in words.

    Attributes:
        answer: distinct, shared, partly shared or inconclusive.
        reasons: the numbers behind the answer, the deciding numbers first.
        geometry: the cosine: "too high" or "too low" for the answer, or "reported". Never decides.
        evidence, thresholds: all numbers, and the thresholds of the rule.
    >>> answer, reasons = results.verdict.answer, results.verdict.reasons
    """

    answer: Answer
    reasons: tuple[Reason, ...]
    geometry: Reason
    evidence: Evidence
    thresholds: Thresholds

    def __str__(self) -> str:
        from .wording import verdict_text

        return verdict_text(self)


def judge(evidence: Evidence, thresholds: Thresholds | None = None) -> Verdict:
    """Return the verdict of the rule on `evidence`; None as `thresholds` takes the defaults.
    >>> judge(results.verdict.evidence).answer
    'inconclusive'
    """
    t = thresholds or Thresholds()
    answer: Answer = "inconclusive"
    if not (reasons := obstacles(evidence, t)):
        answer, reasons = _decide(evidence, t)
        strongest = evidence.strongest_ablation
        apart = {"distinct": strongest.lower > t.margin, "shared": strongest.upper < t.margin}
        finding: Finding = "disagrees" if apart.get(answer) else "reported"
        if answer != "inconclusive" and not math.isnan(strongest.value):
            reasons = [*reasons, Reason("strongest_ablation", finding)]
    return Verdict(answer, tuple(reasons), _geometry(answer, evidence.cosine), evidence, t)


def published_rule(cosine: float) -> str:
    """Return the published conclusion from a cosine, which ignores noise and causal effects."""
    if math.isnan(cosine):
        return "not measurable"
    if cosine > 0.8:
        return "same mechanism"
    return "moderate overlap" if cosine > 0.5 else "safety-specific"


def obstacles(e: Evidence, t: Thresholds) -> list[Reason]:
    """Return the reasons that prevent a conclusion; empty if there are none."""
    minima = {"n_prompts": float(t.min_prompts), "reliability_refusal": t.min_reliability}
    minima["reliability_negativity"] = t.min_reliability
    low = [name for name, minimum in minima.items() if not getattr(e, name) >= minimum]
    found = [Reason(name, "too low", minima[name]) for name in low]
    if math.isnan(e.refused_harmful):
        return [*found, Reason("refused_harmful", "not measured")]
    if e.constant_token:
        return [*found, Reason("constant_token", "not measured")]
    if not e.refused_gap.lower > t.min_refused_gap:
        found.append(Reason("refused_gap", "not shown above", t.min_refused_gap))
        if e.covered < t.min_covered:
            found.append(Reason("covered", "too low", t.min_covered))
    if found:
        return found
    if not e.bypassed >= t.min_bypassed:
        return [Reason("bypassed", "too low", t.min_bypassed)]
    if e.ablated_harmless > e.refused_harmless + t.max_over_refusal:
        most = e.refused_harmless + t.max_over_refusal
        return [Reason("ablated_harmless", "too high", most)]
    if not e.refusal_ablation.lower > t.margin:
        return [Reason("refusal_ablation", "not shown above", t.margin)]
    if not e.typical_ablation < t.max_typical:
        return [Reason("typical_ablation", "too high", t.max_typical)]
    return []


def _decide(e: Evidence, t: Thresholds) -> tuple[Answer, list[Reason]]:
    beyond = [name for name in CHANCE if _beyond(e, name, t)]

    def reasons(names: Sequence[str]) -> list[Reason]:
        others = [Reason(name, "reported") for name in RATIOS if name not in names]
        return [*(Reason(name, "above", t.margin) for name in names), *others]

    if set(ABLATION) <= {*beyond} and e.cross_ablation.lower > t.shared_from:
        if e.kl_negativity > t.max_damage * e.kl_refusal:
            return "inconclusive", [Reason("kl_negativity", "damage", t.max_damage * e.kl_refusal)]
        return "shared", reasons(ABLATION)
    refused_alike = _beyond(e, "statement_own_ablation", t) and all(
        getattr(e, name).lower > t.margin for name in STATEMENTS
    )
    above = [name for name in RATIOS if getattr(e, name).lower > t.margin]
    moved = "cross_ablation" in above or {*ADDITION} <= {*above}
    if moved and refused_alike and e.statement_share.lower > t.shared_from:
        return "shared", reasons((*STATEMENTS, *above))
    earlier = [name for name in EARLIER if name in beyond]
    upstream = len(earlier) == 2 and e.earlier_ablation.lower > t.shared_from
    upstream &= e.n_directions == 1  # several directions remove more than the sweep's one
    if upstream and e.earlier_damage <= t.max_damage:
        return "shared", reasons(EARLIER)
    # A score that moves counts in part if the share refused may move with it.
    moving = [
        (score, share)
        for score, share in (ABLATION, ADDITION)
        if share in beyond
        or (score in beyond and not any(x.upper < t.margin for x in _shares(e, share)))
    ]
    if moving or refused_alike:
        found = [name for names in moving for name in names if name in beyond]
        return "partly shared", reasons((*found, *STATEMENTS * refused_alike))
    return _distinct(e, t, earlier)


def _distinct(e: Evidence, t: Thresholds, earlier: Sequence[str]) -> tuple[Answer, list[Reason]]:
    """Distinct if negativity is shown to do nothing or no more than chance; else inconclusive.

    Controls may account for what adding does and for scores, but not for refusals that go away.
    Refused statements have a mechanism of their own if neither words nor direction are refusal's.
    """
    found: list[Reason] = []
    for name in RATIOS:
        ratio, chance = getattr(e, name), getattr(e, CHANCE[name])
        # A share must be small as well, for random directions may move it, too.
        by_chance = -t.margin < ratio.lower <= chance and ratio.upper < chance + t.margin
        by_chance &= ratio.value < t.margin or not name.endswith("share")
        excused = name != ABLATION[1] and e.controlled_norm >= t.min_controlled_norm
        if _small(ratio, t.margin):
            found.append(Reason(name, "within", t.margin))
        elif excused and _small(getattr(e, CONTROLLED[name]), t.margin):
            found.append(Reason(CONTROLLED[name], "within", t.margin))
        elif by_chance:
            found.append(Reason(name, "chance", chance))
        else:
            named = CONTROLLED[name] if excused and ratio.lower > t.margin else name
            found.append(Reason(named, "undecided", t.margin))
    found += [Reason(name, "above", t.margin) for name in earlier]
    ratio, share = e.earlier_ablation, e.earlier_ablation_share
    if not earlier and share.lower > t.margin and share.value > e.chance_ablation_share:
        found.append(Reason("earlier_ablation_share", "above", t.margin))
    elif not earlier and not ratio.upper < t.shared_from and not ratio.value <= e.chance_ablation:
        # The most effective of many layers has an effect by chance as well, but no large one.
        controlled = e.controlled_norm >= t.min_controlled_norm
        small = controlled and e.controlled_earlier_ablation.upper < t.shared_from
        name = CONTROLLED["earlier_ablation"] if controlled else "earlier_ablation"
        found.append(Reason(name, "below" if small else "undecided", t.shared_from))
    if not e.statement_share.upper < t.margin:
        if e.words_alike < t.margin and _small(e.statement_ablation, t.margin):
            found.append(Reason("statement_ablation", "within", t.margin))
            found.append(Reason("words_alike", "below", t.margin))
        else:
            found.append(Reason("statement_share", "undecided", t.margin))
    if undecided := [reason for reason in found if reason.finding in ("undecided", "above")]:
        return "inconclusive", undecided
    return "distinct", [*found, Reason("statement_share", "reported")]


def _shares(e: Evidence, name: str) -> tuple[Estimate, Estimate]:
    """A ratio, and the same of what controls leave of negativity."""
    return getattr(e, name), getattr(e, CONTROLLED[name])


def _small(ratio: Estimate, margin: float) -> bool:
    return -margin < ratio.lower and ratio.upper < margin


def _beyond(e: Evidence, name: str, t: Thresholds) -> bool:
    """Whether a ratio is above the margin and above that of every random direction.

    Where controls were measured, so must be what is left without what they have; where they leave too
    little, nothing is told.
    """
    if name in CONTROLLED and e.controlled_norm < t.min_controlled_norm:
        return False
    ratios: list[Estimate] = [getattr(e, name), getattr(e, CONTROLLED.get(name, name))]
    known = [ratio for ratio in ratios if not math.isnan(ratio.value)] or ratios
    return all(r.lower > t.margin and r.value > getattr(e, CHANCE[name]) for r in known)


def _geometry(answer: Answer, cosine: Estimate) -> Reason:
    if math.isnan(cosine.value):
        return Reason("cosine", "not measured")
    if answer == "distinct" and cosine.lower > HIGH_COSINE:
        return Reason("cosine", "too high", HIGH_COSINE)
    if answer == "shared" and cosine.upper < HIGH_COSINE:
        return Reason("cosine", "too low", HIGH_COSINE)
    return Reason("cosine", "reported")
