"""The evidence -> distinct, shared, partly shared or inconclusive, with reasons.

Pure arithmetic on numbers that others measured. The rule is `RULE`, printed with every verdict.
"""

import math
from dataclasses import dataclass
from typing import Literal

from ..errors import InputError

Answer = Literal["distinct", "shared", "partly shared", "inconclusive"]


@dataclass(frozen=True)
class Estimate:
    """A number and its confidence interval; NaN where it could not be measured."""

    value: float
    lower: float
    upper: float

    def __str__(self) -> str:
        return f"{self.value:.2f} [{self.lower:.2f}, {self.upper:.2f}]"


@dataclass(frozen=True)
class Evidence:
    """What the verdict is made from. Log-odds are refusal log-odds, in nats.

    Attributes:
        layer: the layer whose directions were intervened with.
        n_prompts: prompts in the smallest of the four sets.
        reliability_refusal: split-half reliability of the refusal direction there, at most 1.
        reliability_negativity: the same of the negativity direction.
        refused_harmful: share of harmful prompts whose refusal log-odds are above 0.
        refused_harmless: the same of harmless prompts.
        gap: log-odds of harmful less those of harmless prompts.
        refusal_ablation: how much of `gap` ablating refusal closes: 1 where harmful and harmless prompts
            are refused alike afterwards.
        random_ablation: the same for ablating a random direction, the median of several.
        cross_ablation_gap: how much of `gap` ablating negativity closes, over how much refusal's does.
        cross_ablation_drop: how far ablating negativity lowers the log-odds of harmful prompts, over the part of
            `gap`, in nats, that refusal's closes. Tells what `cross_ablation_gap` can't: a gap that moves
            down as a whole.
        cross_addition: what adding negativity does to harmless prompts, over what refusal's does.
        statement_gap: log-odds of negative less those of neutral prompts, over `gap`.
        statement_ablation: what ablating refusal does to negative prompts, over what to harmful ones.
        cosine: the unbiased cosine of the two directions at `layer`.
    """

    layer: int
    n_prompts: int
    reliability_refusal: float
    reliability_negativity: float
    refused_harmful: float
    refused_harmless: float
    gap: Estimate
    refusal_ablation: Estimate
    random_ablation: float
    cross_ablation_gap: Estimate
    cross_ablation_drop: Estimate
    cross_addition: Estimate
    statement_gap: Estimate
    statement_ablation: Estimate
    cosine: Estimate


@dataclass(frozen=True)
class Thresholds:
    """Every number the rule compares with.

    Attributes:
        min_prompts: fewer in any set is too few.
        min_reliability: a direction below it is mostly noise.
        min_refused: a model that refuses a smaller share of harmful prompts does not refuse.
        max_refused_harmless: one that refuses a larger share of harmless ones refuses anything.
        min_refusal_ablation: the part of the gap that ablating refusal must close.
        margin: a ratio whose whole interval lies within +-margin is nothing.
        shared_from: a ratio whose whole interval lies above it is as good as refusal's own.
    """

    min_prompts: int = 16
    min_reliability: float = 0.5
    min_refused: float = 0.5
    max_refused_harmless: float = 0.5
    min_refusal_ablation: float = 0.25
    margin: float = 0.25
    shared_from: float = 0.5

    def __post_init__(self) -> None:
        if not 0 < self.margin < self.shared_from:
            raise InputError(
                f"margin {self.margin} and shared_from {self.shared_from}: choose "
                "0 < margin < shared_from"
            )


RULE = """\
Inconclusive comes first: too few prompts, a direction that is not reliable, a model that does not
refuse what it should (or refuses anything), a refusal direction that does not move refusal.
Otherwise four ratios decide, each relative to what the refusal direction itself does:
  cross_ablation_gap    ablate negativity: how much of the gap between harmful and harmless prompts goes?
  cross_ablation_drop         ablate negativity: how far does the refusal of harmful prompts sink?
  cross_addition  add negativity: how much refusal does it bring to harmless prompts?
  statement_gap      are negative statements themselves refused?
shared         cross_ablation_gap or cross_ablation_drop is shown above {shared_from}; or statement_gap is, and ablating refusal
               takes the refusal of negative statements away as it does that of harmful prompts.
distinct       cross_ablation_gap and cross_ablation_drop are shown within +-{margin} of nothing, the others below {margin}.
partly shared  one of the four is shown above {margin}, without being shared.
inconclusive   everything else: the intervals are too wide to say.
"Shown" means the whole confidence interval. Geometry does not decide: two mechanisms may be
distinct at a cosine of -0.4, or one at +0.1. It is reported beside the verdict."""


@dataclass(frozen=True)
class Verdict:
    """The answer, why, and by which thresholds.

    Attributes:
        answer: distinct, shared, partly shared or inconclusive.
        reasons: what it rests on, the deciding ones first.
        geometry: what the cosine adds: support or qualification, never the decision.
        evidence: the numbers.
        thresholds: what they were compared with.
    """

    answer: Answer
    reasons: tuple[str, ...]
    geometry: str
    evidence: Evidence
    thresholds: Thresholds

    @property
    def rule(self) -> str:
        """The rule in words, with the thresholds that were used."""
        return RULE.format(margin=self.thresholds.margin, shared_from=self.thresholds.shared_from)

    def __str__(self) -> str:
        lines = [f"verdict: {self.answer}", *(f"  - {reason}" for reason in self.reasons)]
        return "\n".join([*lines, f"  - {self.geometry}"])


def judge(evidence: Evidence, thresholds: Thresholds | None = None) -> Verdict:
    """Decide by the rule in `RULE`, and say why."""
    t = thresholds or Thresholds()
    if problems := _problems(evidence, t):
        answer: Answer = "inconclusive"
        reasons = problems
    else:
        answer, reasons = _decide(evidence, t)
    return Verdict(answer, tuple(reasons), _geometry(answer, evidence), evidence, t)


def published_rule(cosine: float) -> str:
    """What the published rule reads into a cosine: above 0.8 the same, above 0.5 moderate overlap.

    Kept to be compared with: it knows neither noise nor cause. NaN reads as "not measurable".
    """
    if math.isnan(cosine):
        return "not measurable"
    if cosine > 0.8:
        return "same mechanism"
    if cosine > 0.5:
        return "moderate overlap"
    return "safety-specific"


def _problems(e: Evidence, t: Thresholds) -> list[str]:
    """Why nothing can be concluded; empty where something can."""
    found = []
    if e.n_prompts < t.min_prompts:
        found.append(f"too few prompts: the smallest set has {e.n_prompts}, below {t.min_prompts}")
    for part, reliability in (
        ("refusal", e.reliability_refusal),
        ("negativity", e.reliability_negativity),
    ):
        if not reliability >= t.min_reliability:
            found.append(
                f"the {part} direction at layer {e.layer} is not reliable: two halves of the "
                f"prompts agree on it to {reliability:.2f}, below {t.min_reliability}"
            )
    if math.isnan(e.refused_harmful):
        found.append(
            "nothing was intervened with, or no token opens a refusal: whether this model refuses, "
            "and what moves it, was not measured"
        )
        return found
    if not e.refused_harmful >= t.min_refused:
        found.append(
            f"the model does not refuse what it should: {e.refused_harmful:.0%} of harmful prompts "
            f"are refused, below {t.min_refused:.0%}"
        )
    if not e.refused_harmless <= t.max_refused_harmless:
        found.append(
            f"the model refuses anything: {e.refused_harmless:.0%} of harmless prompts are "
            f"refused, above {t.max_refused_harmless:.0%}"
        )
    if not found and not e.refusal_ablation.lower >= t.min_refusal_ablation:
        found.append(
            f"the refusal direction does not move refusal: ablating it closes {e.refusal_ablation} of "
            f"the gap between harmful and harmless prompts, not shown above {t.min_refusal_ablation}"
        )
    elif not found and not e.refusal_ablation.value > e.random_ablation:
        found.append(
            f"ablating the refusal direction closes {e.refusal_ablation.value:.2f} of the gap, and a "
            f"typical random direction {e.random_ablation:.2f}: it is no better than chance"
        )
    return found


def _decide(e: Evidence, t: Thresholds) -> tuple[Answer, list[str]]:
    cross_ablation_gap = (
        f"ablating negativity closes {e.cross_ablation_gap} as much of the gap between harmful and harmless "
        "prompts as ablating refusal does"
    )
    cross_ablation_drop = (
        f"ablating negativity lowers the refusal of harmful prompts by {e.cross_ablation_drop} of the gap that "
        "ablating refusal closes"
    )
    cross_addition = f"adding negativity brings {e.cross_addition} of what adding refusal brings"
    statement_gap = f"negative statements are refused {e.statement_gap} as much as harmful requests"
    statement_ablation = (
        f"ablating refusal takes {e.statement_ablation} as much from them as from harmful requests"
    )
    by_name = {
        cross_ablation_gap: e.cross_ablation_gap,
        cross_ablation_drop: e.cross_ablation_drop,
        cross_addition: e.cross_addition,
        statement_gap: e.statement_gap,
    }

    if e.cross_ablation_gap.lower > t.shared_from or e.cross_ablation_drop.lower > t.shared_from:
        return "shared", [
            *(
                f"{x}: above {t.shared_from}"
                for x in (cross_ablation_gap, cross_ablation_drop)
                if by_name[x].lower > t.shared_from
            ),
            *(
                x
                for x in (cross_ablation_gap, cross_ablation_drop)
                if not by_name[x].lower > t.shared_from
            ),
            cross_addition,
            statement_gap,
        ]
    if e.statement_gap.lower > t.shared_from and e.statement_ablation.lower > t.shared_from:
        return "shared", [
            f"{statement_gap}: above {t.shared_from}",
            f"{statement_ablation}: above {t.shared_from}, the same direction refuses both",
            cross_ablation_gap,
            cross_ablation_drop,
        ]
    above = [text for text, ratio in by_name.items() if ratio.lower > t.margin]
    if above:
        return "partly shared", [
            *(f"{text}: above {t.margin}" for text in above),
            *(text for text in by_name if text not in above),
        ]
    nothing = {
        text: -t.margin < by_name[text].lower and by_name[text].upper < t.margin
        for text in (cross_ablation_gap, cross_ablation_drop)
    }
    if (
        all(nothing.values())
        and e.cross_addition.upper < t.margin
        and e.statement_gap.upper < t.margin
    ):
        return "distinct", [
            f"{cross_ablation_gap}: within {t.margin} of nothing",
            f"{cross_ablation_drop}: within {t.margin} of nothing",
            f"{cross_addition}: below {t.margin}",
            f"{statement_gap}: below {t.margin}",
        ]
    return "inconclusive", [
        f"{text}: neither shown above {t.margin} nor within it"
        for text, ratio in by_name.items()
        if not ratio.upper < t.margin or not nothing.get(text, True)
    ]


def _geometry(answer: Answer, e: Evidence) -> str:
    if math.isnan(e.cosine.value):
        return f"the cosine at layer {e.layer} can't be measured"
    said = f"the cosine at layer {e.layer} is {e.cosine}"
    if answer == "distinct" and e.cosine.lower > 0.5:
        return f"{said}: high for distinct mechanisms, something idle is shared"
    if answer == "shared" and e.cosine.upper < 0.5:
        return f"{said}: low for a shared mechanism, each direction carries much else"
    if answer == "inconclusive":
        return f"{said}: no mechanism can be read from it alone"
    return f"{said}, as may be for {answer} mechanisms"
