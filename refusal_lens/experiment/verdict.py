"""The rule that turns evidence into a verdict; `wording.rule` states the rule in words."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from ..errors import InputError

Answer = Literal["distinct", "shared", "partly shared", "inconclusive"]
Finding = (
    Literal["too low", "too high", "not measured", "not shown above", "chance"]
    | Literal["above", "below", "within", "undecided", "reported"]
)
"""How a number compares with its threshold; "reported" means without a comparison."""

CROSS_ABLATION = ("cross_ablation_gap", "cross_ablation_drop")
STATEMENTS = ("statement_gap", "statement_ablation")
RATIOS = (*CROSS_ABLATION, "cross_addition", "statement_gap")  # the ratios that decide
HIGH_COSINE = 0.5


@dataclass(frozen=True)
class Estimate:
    """A number and its confidence interval; NaN where it was not measured."""

    value: float = math.nan
    lower: float = math.nan
    upper: float = math.nan

    def __str__(self) -> str:
        return f"{self.value:.2f} [{self.lower:.2f}, {self.upper:.2f}]"


@dataclass(frozen=True)
class Evidence:
    """The numbers behind a verdict; numbers from interventions are NaN without interventions.

    The gap is the refusal score (log-odds, in nats) of harmful minus that of harmless prompts. A drop
    or rise is a change of the refusal score. Ratios are relative to refusal's effect.

    Attributes:
        layer, n_prompts: the layer of the two directions, and prompts in the smallest of four sets.
        reliability_refusal, reliability_negativity: split-half reliability of each direction, up to 1.
        cosine: unbiased cosine of the two directions.
        refused_harmful, refused_harmless: share of these prompts with a refusal score above 0.
        gap: the gap of the unmodified model, in nats.
        refusal_ablation, random_ablation: share of the gap that ablating refusal, or a random
            direction (median), closes.
        cross_ablation_gap: share of the gap that ablating negativity closes, over refusal's share.
        cross_ablation_drop: drop of harmful prompts under ablating negativity, over the part of the
            gap that ablating refusal closes; counts a drop that harmless prompts share.
        cross_addition: ratio of the rises of harmless prompts under adding negativity and refusal.
        statement_gap: score of negative minus that of neutral prompts, over the gap.
        statement_ablation: ratio of the drops of negative and harmful prompts under ablating refusal.
    """

    layer: int
    n_prompts: int
    reliability_refusal: float
    reliability_negativity: float
    cosine: Estimate
    refused_harmful: float = math.nan
    refused_harmless: float = math.nan
    gap: Estimate = Estimate()
    refusal_ablation: Estimate = Estimate()
    random_ablation: float = math.nan
    cross_ablation_gap: Estimate = Estimate()
    cross_ablation_drop: Estimate = Estimate()
    cross_addition: Estimate = Estimate()
    statement_gap: Estimate = Estimate()
    statement_ablation: Estimate = Estimate()


@dataclass(frozen=True)
class Thresholds:
    """The thresholds of the rule; raises InputError unless 0 < margin < shared_from.

    Attributes:
        min_prompts, min_reliability: least size of every set and least reliability of a direction.
        min_refused, max_refused_harmless: bounds on the shares of harmful and harmless prompts that
            the model refuses.
        min_refusal_ablation: smallest share of the gap that ablating refusal must close.
        margin: equivalence margin; a ratio whose interval lies within +-margin is no effect.
        shared_from: a ratio whose interval lies above this shows a shared mechanism.
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
    """

    answer: Answer
    reasons: tuple[Reason, ...]
    geometry: Reason
    evidence: Evidence
    thresholds: Thresholds

    @property
    def rule(self) -> str:
        """The rule in words, with its thresholds."""
        from .wording import rule

        return rule(self.thresholds)

    def __str__(self) -> str:
        from .wording import verdict_text

        return verdict_text(self)


def judge(evidence: Evidence, thresholds: Thresholds | None = None) -> Verdict:
    """Return the verdict of the rule on `evidence`; None as `thresholds` takes the defaults."""
    t = thresholds or Thresholds()
    answer: Answer = "inconclusive"
    if not (reasons := _obstacles(evidence, t)):
        answer, reasons = _decide(evidence, t)
    return Verdict(answer, tuple(reasons), _geometry(answer, evidence.cosine), evidence, t)


def published_rule(cosine: float) -> str:
    """Return the published conclusion from a cosine, which ignores noise and causal effects."""
    if math.isnan(cosine):
        return "not measurable"
    if cosine > 0.8:
        return "same mechanism"
    return "moderate overlap" if cosine > 0.5 else "safety-specific"


def _obstacles(e: Evidence, t: Thresholds) -> list[Reason]:
    """Return the reasons that prevent a conclusion; empty if there are none."""
    minima = {
        "n_prompts": float(t.min_prompts),
        "reliability_refusal": t.min_reliability,
        "reliability_negativity": t.min_reliability,
        "refused_harmful": t.min_refused,
    }
    low = [name for name, minimum in minima.items() if not getattr(e, name) >= minimum]
    found = [Reason(name, "too low", minima[name]) for name in low]
    if math.isnan(e.refused_harmful):
        return [*found[:-1], Reason("refused_harmful", "not measured")]
    if not e.refused_harmless <= t.max_refused_harmless:
        found.append(Reason("refused_harmless", "too high", t.max_refused_harmless))
    if not found and not e.refusal_ablation.lower >= t.min_refusal_ablation:
        found.append(Reason("refusal_ablation", "not shown above", t.min_refusal_ablation))
    elif not found and not e.refusal_ablation.value > e.random_ablation:
        found.append(Reason("refusal_ablation", "chance", e.random_ablation))
    return found


def _decide(e: Evidence, t: Thresholds) -> tuple[Answer, list[Reason]]:
    def above(threshold: float, ratios: Sequence[str]) -> list[str]:
        return [ratio for ratio in ratios if getattr(e, ratio).lower > threshold]

    def reasons(deciding: Sequence[str], threshold: float) -> list[Reason]:
        others = [Reason(ratio, "reported") for ratio in RATIOS if ratio not in deciding]
        return [*(Reason(ratio, "above", threshold) for ratio in deciding), *others]

    if deciding := above(t.shared_from, CROSS_ABLATION):
        return "shared", reasons(deciding, t.shared_from)
    if len(deciding := above(t.shared_from, STATEMENTS)) == len(STATEMENTS):
        return "shared", reasons(deciding, t.shared_from)
    if deciding := above(t.margin, RATIOS):
        return "partly shared", reasons(deciding, t.margin)
    below = [ratio for ratio in RATIOS if getattr(e, ratio).upper < t.margin]
    # Ablating negativity must not raise refusal either; the other two ratios may be negative.
    no_effect = {*below} & {*above(-t.margin, CROSS_ABLATION), *RATIOS[2:]}
    if undecided := [ratio for ratio in RATIOS if ratio not in no_effect]:
        return "inconclusive", [Reason(ratio, "undecided", t.margin) for ratio in undecided]
    findings: list[Finding] = ["within", "within", "below", "below"]
    return "distinct", [Reason(r, f, t.margin) for r, f in zip(RATIOS, findings, strict=True)]


def _geometry(answer: Answer, cosine: Estimate) -> Reason:
    if math.isnan(cosine.value):
        return Reason("cosine", "not measured")
    if answer == "distinct" and cosine.lower > HIGH_COSINE:
        return Reason("cosine", "too high", HIGH_COSINE)
    if answer == "shared" and cosine.upper < HIGH_COSINE:
        return Reason("cosine", "too low", HIGH_COSINE)
    return Reason("cosine", "reported")
