"""Verdicts, reasons, the rule and uncertainty in English (`words.toml`), with contrasts' names."""

import math
import re
import tomllib
from collections.abc import Mapping
from importlib.resources import files
from typing import Any, NamedTuple

from torch import Tensor

from ..prompts.contrast import Contrast
from ..uncertainty import CosineStatistics, Unmeasured
from .causal import N_RANDOM, PARTS
from .verdict import CHANCE, CONTROLLED, EARLIER, Estimate, Reason, Thresholds, Verdict

WORDS: dict[str, Any] = tomllib.loads(files(__package__).joinpath("words.toml").read_text("utf-8"))
NO_SHARES = ("n_prompts", "reliability_refusal", "reliability_negativity", "kl_negativity")


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
        sets = [x for each in (refusal, negativity) for x in (each.target_name, each.baseline_name)]
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
    shares = {"left": left, "brought": brought, "earlier_left": 1 - e.earlier_ablation_share.value}
    effects = {k: _percent(min(max(v, 0.0), 1.0)) for k, v in shares.items()}  # NaN stays NaN
    sentence = WORDS["sentences"].get(first.measure, WORDS["both_effects"])
    if verdict.answer == "inconclusive" and first.measure in EARLIER:
        sentence = WORDS["upstream"]
    if first.measure == "statement_share":
        sentence += f" {WORDS['both_refusals' if verdict.answer == 'shared' else 'both_effects']}"
    measures = [reason.measure for reason in verdict.reasons]
    moved = [x for x, y in CONTROLLED.items() if y in measures and getattr(e, x).value > 0]
    controlled = verdict.answer == "distinct" and moved
    said = {"covered": "covered" in measures, "controlled": controlled}
    said |= {"apart": "words_alike" in measures, "several": e.n_directions > 1}
    said["other_layer"] = e.layer != e.highlighted >= 0
    sentence = " ".join([sentence, *(WORDS[each] for each, holds in said.items() if holds)])
    text = f"{WORDS['headlines'][verdict.answer]} {sentence}"
    return re.sub(r"(\d)%", r"\1 %", text.format(**vars(e) | names._asdict() | effects))


def effects(verdict: Verdict, names: Names = BUNDLED) -> list[list[str]]:
    """Return rows: an effect that decides, its size relative to refusal's, and what chance does."""
    numbers, rows = vars(verdict.evidence), []
    chances = CHANCE | {"statement_ablation": "chance_statement_ablation"}
    for measure, what in WORDS["effects"].items():
        of, effect = chances.get(measure.replace("controlled", "cross")), _percent(numbers[measure])
        chance = _percent(numbers[of]) if of else WORDS["no_intervention"]
        rows.append([what.format(**names._asdict()), effect, chance if "%" in effect else effect])
    return rows


def verdict_lines(verdict: Verdict, names: Names = BUNDLED) -> list[str]:
    """Return every reason, then the cosine, as one sentence each."""
    e, finding = verdict.evidence, str(verdict.geometry.finding)
    if finding == "reported" and verdict.answer == "inconclusive":
        finding = "undecided"
    words = {"layer": e.layer, "cosine": _within_one(e.cosine), "answer": verdict.answer}
    lines = [_reason(reason, verdict, names) for reason in verdict.reasons]
    lines.append(WORDS["cosine"][finding].format(**words))
    return [f"{line[0].upper()}{line[1:]}." for line in lines]


def verdict_text(verdict: Verdict, names: Names = BUNDLED) -> str:
    """Return the answer and, below it, `plain_sentence` and `verdict_lines`."""
    first = f"verdict: {verdict.answer}\n{plain_sentence(verdict, names)}"
    return "\n  - ".join([first, *verdict_lines(verdict, names)])


def rule(thresholds: Thresholds, names: Names = BUNDLED) -> str:
    """Return the rule with these thresholds and names."""
    plain = ("min_prompts", "min_reliability", "max_damage")
    numbers = {k: f"{v:g}" if k in plain else _percent(v) for k, v in vars(thresholds).items()}
    return WORDS["rule"].format(n_random=N_RANDOM, **numbers, **names._asdict())


def unmeasured(reason: Unmeasured, names: Mapping[str, str]) -> str:
    """Return why a cosine is NaN; `names` maps directions "a" and "b" to their names."""
    concerned = " and ".join(names[direction] for direction in reason.directions)
    return WORDS["unmeasured"][reason.cause].format(concerned=concerned)


def uncertainty(statistics: CosineStatistics, layer: int) -> list[str]:
    """Return a line each on the interval, reliability and null of a cosine at one layer."""
    at: dict[str, Any] = at_layer(statistics, layer)
    cautions = statistics.cautions[layer] if statistics.cautions else ()
    at["here"] = _within_one(Estimate(at["unbiased"], at["lower"], at["upper"]))
    everywhere = _within_one(Estimate(at["unbiased"], at["band_lower"], at["band_upper"]))
    at |= {"band": everywhere.split(maxsplit=1)[1], "percent": 100 * statistics.confidence}
    lines = [line.format(**at) for line in WORDS["uncertainty"]]
    return [*lines, *(WORDS["cautions"][each] for each in cautions)]


def at_layer(statistics: CosineStatistics, layer: int) -> dict[str, float]:
    """Return every number of the statistics at one layer, by name."""
    numbers = {name: v for name, v in vars(statistics).items() if isinstance(v, Tensor)}
    return {name: float(values[layer]) for name, values in numbers.items()}


def _reason(reason: Reason, verdict: Verdict, names: Names) -> str:
    if reason.measure == "constant_token":
        return WORDS["constant_token"].format(token=repr(verdict.evidence.constant_token))
    if reason.finding == "not measured":
        return WORDS["not_measured"]
    written = "{:.3g}".format if reason.measure in NO_SHARES else _percent
    value, finding = getattr(verdict.evidence, reason.measure), str(reason.finding)
    if finding == "undecided" and value.lower > (reason.threshold or 0.0):
        finding = "above alone"
    numbers = {"value": written(value)}
    numbers |= {"threshold": written(reason.threshold or 0.0)}
    sentence = WORDS["measures"][reason.measure] + WORDS["findings"][finding]
    return sentence.format(**vars(verdict.evidence) | names._asdict() | numbers)


def _within_one(cosine: Estimate) -> str:
    """Format a cosine with its interval, both cut at -1 and 1, and say so if they were."""
    ends = [min(max(end, -1.0), 1.0) for end in vars(cosine).values()]
    cut = "" if [*vars(cosine).values()] == ends else " (cut at 1)"
    return f"{Estimate(*ends):z.2f}{cut}"


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
