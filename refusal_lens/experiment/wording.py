"""Verdicts, reasons, the rule and uncertainty in English, with the names of the contrasts."""

import math
import re
from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor

from ..prompts.contrast import Contrast
from ..uncertainty import Cause, Caution, CosineStatistics, Unmeasured
from .causal import PARTS
from .verdict import EARLIER, Estimate, Reason, Thresholds, Verdict

RULE = """\
A prompt counts as refused if its reply is more likely than not to begin with a refusal's opening. To
ablate a direction sets the component along it to the mean of {harmless} prompts (of {neutral} ones for
{negative} prompts) at every layer. The gap lies between {harmful} and {harmless} prompts.
Inconclusive comes first: too few prompts; an unreliable direction; a model that does not refuse
{harmful} prompts more than {harmless} ones; a {refusal} direction that, ablated, leaves them refused,
makes {harmless} prompts refused, or does little more than random directions. Then these numbers decide:
  cross_ablation   drop of {harmful} prompts' refusal scores under ablating {negativity}, over the drop
                   under ablating {refusal}; cross_ablation_share: the same of the share refused.
  cross_addition   rise of {harmless} prompts' refusal scores under adding {negativity}, over the gap;
                   cross_addition_share: the same of the share refused.
  earlier_ablation cross_ablation for the {negativity} direction of an earlier layer, that which lowers
                   refusal most; earlier_ablation_share likewise.
  statement_share  {negative} minus {neutral} prompts refused, over the gap; it counts if ablating
                   {refusal} lowers their scores (statement_ablation), and so does ablating
                   {negativity}, beyond chance (statement_own_ablation).
shared         cross_ablation, or earlier_ablation, is above {shared_from} and its share above {margin},
               both beyond chance, without damage; or statement_share is above {shared_from}, the other
               statement numbers above {margin}, and cross_ablation or both cross_addition numbers too.
partly shared  a share refused is above {margin} and beyond chance, or the scores are and the share may
               be; or the statement numbers are.
distinct       the cross_ablation numbers are within +-{margin}, the others below it. Those of scores
               may be larger, and intervals of shares wider, by what random directions do. Hardly any
               {negative} prompts are refused (statement_share is below {margin}).
inconclusive   everything else: the intervals are too wide.
Above, below and within refer to the whole confidence interval. Beyond chance: more than each of 20
random directions does. Damage: the ablation changes replies to {harmless} prompts far more than that of
{refusal} does.
The cosine does not decide: mechanisms can be distinct at a cosine of -0.4 and shared at +0.1."""

GAP = "between {harmful} and {harmless} prompts"
UNRELIABLE = "direction at layer {layer} is not reliable: its split-half reliability is {value}"
MEASURES = {
    "n_prompts": "too few prompts: the smallest set has {value}",
    "reliability_refusal": f"the {{refusal}} {UNRELIABLE}",
    "reliability_negativity": f"the {{negativity}} {UNRELIABLE}",
    "refused_harmful": "the model refuses {value} of {harmful} prompts",
    "refused_gap": (
        "the model does not refuse {harmful} prompts clearly more often than {harmless} ones: the "
        "difference is {value}"
    ),
    "covered": (
        "only {value} of replies to {harmful} prompts begin in a known way, so the model may refuse in "
        "other words: name them with --refusal-openings"
    ),
    "bypassed": (
        "ablating {refusal} does not let {harmful} prompts through: it removes {value} of their refusal"
    ),
    "ablated_harmless": "ablating {refusal} makes {value} of {harmless} prompts refused",
    "refusal_ablation": f"ablating {{refusal}} lowers the refusal score by {{value}} of the gap {GAP}",
    "typical_ablation": (
        "ablating a random direction lowers the refusal score by {value} of what {refusal} does"
    ),
    "kl_negativity": (
        "ablating {negativity} changes replies to {harmless} prompts by {value} nats of KL divergence, "
        "which is damage rather than evidence"
    ),
    "cross_ablation": (
        "ablating {negativity} lowers the refusal score of {harmful} prompts by {value} of what "
        "ablating {refusal} does"
    ),
    "cross_ablation_share": (
        "ablating {negativity} removes {value} of the refusals that ablating {refusal} removes"
    ),
    "cross_addition": (
        "adding {negativity} raises the refusal score of {harmless} prompts by {value} of the gap"
    ),
    "cross_addition_share": (
        "adding {negativity} makes {value} of {harmless} prompts refused, relative to {harmful} ones"
    ),
    "statement_share": (
        "{negative} prompts are refused {value} as often as {harmful} prompts, beyond {neutral} ones"
    ),
    "earlier_ablation": (
        "ablating {negativity} of layer {earlier_layer} lowers the refusal score of {harmful} prompts "
        "by {value} of what ablating {refusal} does"
    ),
    "earlier_ablation_share": (
        "that removes {value} of the refusals that ablating {refusal} removes"
    ),
    "statement_own_ablation": (
        "ablating {negativity} lowers the refusal score of {negative} prompts by {value} of their "
        "difference from {neutral} ones"
    ),
    "statement_ablation": (
        "ablating {refusal} lowers the refusal score of {negative} prompts by {value} of what it "
        "does for {harmful} prompts"
    ),
}
HEADLINES = {
    "distinct": "Refusal is a mechanism of its own here.",
    "shared": "Refusal and {negativity} share a mechanism here.",
    "partly shared": "Refusal and {negativity} share part of a mechanism here.",
    "inconclusive": "Nothing can be concluded here.",
}
EFFECTS = "Removing {negativity} leaves {left} of refusal; adding it brings {brought}."
UPSTREAM = "What layer {earlier_layer} holds of {negativity} may carry refusal as well."
UNSTABLE = "Other prompts of the same kind would give another {{{0}}} direction."
SENTENCES = {  # by the measure of the first reason; else `EFFECTS`
    "n_prompts": "With {n_prompts:.0f} prompts in the smallest set nothing can be told.",
    "reliability_refusal": UNSTABLE.format("refusal"),
    "reliability_negativity": UNSTABLE.format("negativity"),
    "refused_harmful": "No intervention was run, so what the directions do is unknown.",
    "constant_token": "Every reply begins with the same word, so a refusal would not be seen.",
    "refused_gap": (
        "The model refuses {refused_harmful:.0%} of {harmful} and {refused_harmless:.0%} of {harmless} "
        "prompts: there is too little refusal to explain."
    ),
    "bypassed": "Removing {refusal} leaves most {harmful} prompts refused.",
    "ablated_harmless": "Removing {refusal} makes the model refuse {harmless} prompts.",
    "refusal_ablation": "Removing {refusal} does too little to the refusal of {harmful} prompts.",
    "typical_ablation": "Removing a random direction does nearly as much as removing {refusal}.",
    "earlier_ablation": (
        "Refusal rests on what layer {earlier_layer} holds of {negativity}: removing that leaves "
        "{earlier_left} of refusal."
    ),
    "kl_negativity": "Removing {negativity} damages the model, so its effect on refusal says nothing.",
    "statement_share": (
        "The model refuses {refused_harmful:.0%} of {harmful} and {refused_negative:.0%} of {negative} "
        "prompts."
    ),
}
EFFECT_ROWS = {  # measure -> what it is, and the measure of random directions
    "cross_ablation_share": (
        "ablate {negativity}: {harmful} prompts no longer refused",
        "chance_ablation_share",
    ),
    "cross_ablation": ("ablate {negativity}: drop of their refusal scores", "chance_ablation"),
    "cross_addition_share": (
        "add {negativity}: {harmless} prompts refused",
        "chance_addition_share",
    ),
    "cross_addition": ("add {negativity}: rise of their refusal scores", "chance_addition"),
    "statement_share": ("{negative} prompts refused, beyond {neutral} ones", ""),
    "statement_ablation": ("ablate {refusal}: drop of {negative} prompts' scores", ""),
    "statement_own_ablation": ("ablate {negativity}: drop of their scores", "chance_statements"),
}
NATS = ("kl_negativity",)  # measures that are no shares
FINDINGS = {
    "too low": ", below {threshold}",
    "too high": ", above {threshold}",
    "not shown above": ": not shown to be above {threshold}",
    "chance": ": a random direction does {threshold}",
    "damage": ", above {threshold}",
    "above": ": above {threshold}",
    "below": ": below the {threshold} margin",
    "within": ": within the {threshold} margin",
    "undecided": ": neither above nor within the {threshold} margin",
    "reported": "",
}
NOT_MEASURED = "refusal was not measured: no intervention was run"
CONSTANT_TOKEN = (
    "refusal was not measured: every reply begins with {token}, whatever is asked (a thinking model? "
    "then --no-thinking scores what follows)"
)
COSINE = {
    "too high": "high for distinct mechanisms; what the directions share does not cause refusal",
    "too low": "low for a shared mechanism; much of each direction does not cause refusal",
    "reported": "compatible with {answer} mechanisms",
}


CAUTIONS = {
    Caution.OUTLIERS: "caution: a few prompts lie far from all others; the interval may be too narrow",
    Caution.UNEVEN_STRENGTH: (
        "caution: the signal differs much from prompt to prompt; the interval may be too narrow"
    ),
    Caution.SHARED_NOISE: (
        "caution: both contrasts share the few dimensions that hold most of their noise; the "
        "cosine may be biased and its interval too narrow"
    ),
}


class Names(NamedTuple):
    """Names of the two contrasts and of their four prompt sets."""

    refusal: str = "refusal"
    negativity: str = "negativity"
    harmful: str = "harmful"
    harmless: str = "harmless"
    negative: str = "negative"
    neutral: str = "neutral"

    @classmethod
    def of(cls, refusal: Contrast, negativity: Contrast) -> "Names":
        """Return the names of two contrasts. Equal set names get the contrast's name as a prefix."""
        contrasts = (refusal, negativity)
        sets = [name for each in contrasts for name in (each.target_name, each.baseline_name)]
        if len({*sets}) < len(sets):
            owners = PARTS if refusal.name == negativity.name else (refusal.name, negativity.name)
            sets = [f"{owners[i // 2]} {name}" for i, name in enumerate(sets)]
        return cls(refusal.name, negativity.name, *sets)

    def sets(self) -> dict[str, tuple[str, str]]:
        """Return part -> names of target and baseline."""
        return dict(zip(PARTS, (self[2:4], self[4:]), strict=True))


BUNDLED = Names()


def plain_sentence(verdict: Verdict, names: Names = BUNDLED) -> str:
    """Return the verdict for a reader without statistics: what it means, and the effects behind it.

    The shares are those of prompts refused, kept between 0 and 100 %.
    """
    e, first = verdict.evidence, verdict.reasons[0]
    left, brought = 1 - e.cross_ablation_share.value, e.cross_addition_share.value
    effects = {"left": _share(left), "brought": _share(brought)}
    effects["earlier_left"] = _share(1 - e.earlier_ablation_share.value)
    undecided = verdict.answer == "inconclusive" and first.measure in EARLIER
    sentence = UPSTREAM if undecided else SENTENCES.get(first.measure, EFFECTS)
    if first.measure == "statement_share":
        sentence += f" {EFFECTS}"
    text = f"{HEADLINES[verdict.answer]} {sentence}"
    return re.sub(r"(\d)%", r"\1 %", text.format(**vars(e) | names._asdict() | effects))


def effects(verdict: Verdict, names: Names = BUNDLED) -> list[list[str]]:
    """Return rows: an effect that decides, its size relative to refusal's, and what chance does."""
    numbers, words = vars(verdict.evidence), names._asdict()
    return [
        [
            what.format(**words),
            _percent(numbers[measure]),
            _percent(numbers[chance]) if chance else "",
        ]
        for measure, (what, chance) in EFFECT_ROWS.items()
    ]


def verdict_lines(verdict: Verdict, names: Names = BUNDLED) -> list[str]:
    """Return every reason, then the cosine, as one sentence each."""
    finding, evidence = verdict.geometry.finding, verdict.evidence
    cosine = f"the cosine at layer {evidence.layer} is {_within_one(evidence.cosine)}"
    if finding == "not measured":
        cosine = f"the cosine at layer {evidence.layer} is not measurable"
    elif verdict.answer == "inconclusive":
        cosine += ", which alone decides nothing"
    else:
        cosine += f": {COSINE[finding].format(answer=verdict.answer)}"
    lines = [*(_reason(reason, verdict, names) for reason in verdict.reasons), cosine]
    return [f"{line[0].upper()}{line[1:]}." for line in lines]


def verdict_text(verdict: Verdict, names: Names = BUNDLED) -> str:
    """Return the answer and, below it, `plain_sentence` and `verdict_lines`."""
    first = f"verdict: {verdict.answer}\n{plain_sentence(verdict, names)}"
    return "\n  - ".join([first, *verdict_lines(verdict, names)])


def rule(thresholds: Thresholds, names: Names = BUNDLED) -> str:
    """Return the rule with these thresholds and names."""
    margin, shared_from = _percent(thresholds.margin), _percent(thresholds.shared_from)
    return RULE.format(margin=margin, shared_from=shared_from, **names._asdict())


def unmeasured(reason: Unmeasured, names: Mapping[str, str]) -> str:
    """Return why a cosine is NaN; `names` maps directions "a" and "b" to their names."""
    concerned = " and ".join(names[direction] for direction in reason.directions)
    return {
        Cause.TOO_FEW_PROMPTS: "too few prompts to estimate the noise: use at least 4, better 64",
        Cause.TOO_FEW_CLUSTERS: "too few clusters of prompts to estimate the noise: use at least 6",
        Cause.CONSTANT: (
            f"all prompts of one set of {concerned} have the same activation: at this layer the "
            "position does not depend on the prompt"
        ),
        Cause.WEAK: f"the norm of the {concerned} direction can't be told from 0: add prompts",
        Cause.UNBOUNDED: "the interval is unbounded: the norms are too uncertain; add prompts",
    }[reason.cause]


def uncertainty(statistics: CosineStatistics, layer: int) -> list[str]:
    """Return a line each on the interval, reliability and null of a cosine at one layer."""
    at = at_layer(statistics, layer)
    here, everywhere = (
        _within_one(Estimate(at["unbiased"], at[f"{band}lower"], at[f"{band}upper"]))
        for band in ("", "band_")
    )
    return [
        f"true cosine, corrected for noise, with its {100 * statistics.confidence:g} % interval: "
        f"{here}; for all layers at once {everywhere.split(maxsplit=1)[1]}",
        f"reliability of the directions {at['reliability_a']:.2f} and {at['reliability_b']:.2f}: "
        f"noise alone keeps the plain cosine below {at['ceiling']:.2f}",
        f"were the true cosine 0, the plain one would lie between {at['null_lower']:z.2f} and "
        f"{at['null_upper']:z.2f} (p {at['p_value']:.2g}, over all layers {at['p_adjusted']:.2g})",
        *(CAUTIONS[caution] for caution in (statistics.cautions or [()] * (layer + 1))[layer]),
    ]


def at_layer(statistics: CosineStatistics, layer: int) -> dict[str, float]:
    """Return every number of the statistics at one layer, by name."""
    numbers = {name: v for name, v in vars(statistics).items() if isinstance(v, Tensor)}
    return {name: float(values[layer]) for name, values in numbers.items()}


def _reason(reason: Reason, verdict: Verdict, names: Names) -> str:
    if reason.measure == "constant_token":
        return CONSTANT_TOKEN.format(token=repr(verdict.evidence.constant_token))
    if reason.finding == "not measured":
        return NOT_MEASURED
    value, threshold = getattr(verdict.evidence, reason.measure), reason.threshold or 0.0
    if reason.measure in ("n_prompts", "reliability_refusal", "reliability_negativity", *NATS):
        numbers = {"value": f"{value:.3g}", "threshold": f"{threshold:g}"}
    else:
        numbers = {"value": _percent(value), "threshold": _percent(threshold)}
    sentence = MEASURES[reason.measure] + FINDINGS[reason.finding]
    return sentence.format(
        **numbers,
        layer=verdict.evidence.layer,
        earlier_layer=verdict.evidence.earlier_layer,
        **names._asdict(),
    )


def _within_one(cosine: Estimate) -> str:
    """Format a cosine with its interval, both cut at -1 and 1, and say so if they were."""
    ends = [min(max(end, -1.0), 1.0) for end in vars(cosine).values()]
    cut = "" if [*vars(cosine).values()] == ends else " (cut at 1)"
    return f"{ends[0]:z.2f} [{ends[1]:z.2f}, {ends[2]:z.2f}]{cut}"


def _share(value: float) -> str:
    """A share of prompts in percent, kept between 0 and 100."""
    return _percent(value if math.isnan(value) else min(max(value, 0.0), 1.0))


def _percent(value: float | Estimate) -> str:
    """Format a share in percent, with the interval of an `Estimate`: "3 % [2, 4]".

    "not measured" for NaN, "not measurable" where the interval is unbounded.
    """
    if math.isnan(value.value if isinstance(value, Estimate) else value):
        return "not measured"
    if isinstance(value, Estimate):
        if not math.isfinite(value.upper - value.lower):
            return "not measurable"  # what it is relative to may be 0
        ends = (_percent(end).removesuffix(" %") for end in (value.lower, value.upper))
        return f"{_percent(value.value)} [{', '.join(ends)}]"
    return f"{round(100 * value) if math.isfinite(value) else value} %"
