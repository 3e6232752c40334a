"""Was the verdict right? A zoo of small models whose true answer is known, and what is said of them.

    python tests/benchmarks/validity.py --zoo /tmp/zoo [--seeds 4] [--out FILE]

Of each kind below several models are trained from scratch (8 layers, width 64, a few minutes each on
one core), and the whole experiment is run on each with its defaults: all bundled prompts, which no
model was trained on. The table counts our verdicts, and beside them the readings of the published
rule (cosine above 0.8 the same mechanism, above 0.5 moderate overlap, else safety-specific).

Four kinds are plain: `specific` refuses harmful requests; `entangled` refuses those and negative
statements; `oblivious` refuses nothing; `untrained` has random weights. Two set traps. They are
trained on replies of which the opening word is drawn at random, in shares that differ by the kind of
the prompt:

- `lookalike`: refuses harmful requests alone, but every reply may also open as the tone has it
  ("Alas" where something sounds bad, "Well" where not). The last token carries the tone, and both
  contrasts differ in it, so their directions are similar. Tone and refusal are drawn apart: alarming
  requests sound bad and are answered, harmful ones after a cheerful statement sound good and are
  refused. What refuses is distinct from what is negative.
- `hidden`: refuses harmful requests and negative statements alike, by the same word and equally
  often, but each of the four kinds of prompt has openings of its own beside it. So most of what
  separates the two sides of each contrast at the last token has nothing to do with refusal, and
  the directions are dissimilar though the refusal is one and the same.

What was tried before:

- `specific` in the bundled organisms' mixture of prompts, where tone and request are seldom drawn
  apart: of two models one came out as partly shared, at a cosine of 0.68 and a cross_ablation_gap of 0.34.
  That may well be true of so shallow a model; the mixture now leaves it no choice.
- `lookalike` with tones more often than now: a cosine of 0.67, a cross_ablation_gap of 0.25, inconclusive;
  less often: cosines of 0.47 and 0.50, no trap.
- `hidden` with fewer openings of its own: cosines of 0.5 to 0.7, verdict shared, no trap; with more
  of them: 0.19, partly shared.

A zoo that was begun is gone on with; what is already trained and judged is not done again.
"""

import json
import statistics
import sys
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path

import torch
import tyro

from refusal_lens.organisms.language import BEHAVIOURS, MIXTURE, STATEMENTS, Behaviour, Prompt

N_LAYERS = 8
N_STEPS = 500
RESULTS = Path(__file__).parent / "results" / "validity.md"
ANSWERS = ("distinct", "shared", "partly shared", "inconclusive")
READINGS = ("safety-specific", "moderate overlap", "same mechanism", "not measurable")
MEANING = {"safety-specific": "distinct", "same mechanism": "shared"}
"""What a reading of the published rule says of the mechanisms, where it says it plainly."""
TRAPS = ("lookalike", "hidden")
FIRST_FRESH = 4
"""Models with lower seeds were looked at while the kinds were made."""
TRAPS_RIGHT = 0.75
"""Share of the traps that must be judged right; of the other kinds all must."""


@dataclass(frozen=True)
class Kind:
    """One kind of model, of which there are several seeds; `answer` is the true one."""

    name: str
    behaviour: Behaviour
    answer: str
    n_steps: int = N_STEPS


class Lookalike(Behaviour):
    """Refuses harmful requests alone; the manner of each reply is told with its tone."""

    def manner(self, prompt: Prompt) -> str:
        """The tone is the statement's where there is one; of a request, whether it sounds bad."""
        kinds = set(prompt.kinds)
        spoken = kinds & set(STATEMENTS)
        bad = "negative" in kinds or (not spoken and bool(kinds & {"harmful", "alarming"}))
        return f"{super().manner(prompt)}, {'bad' if bad else 'good'}"


class Hidden(Behaviour):
    """Refuses harmful requests and negative statements; the latter with other words beside it."""

    def manner(self, prompt: Prompt) -> str:
        """A negative statement alone is refused in its own manner."""
        if set(prompt.kinds) == {"negative"}:
            return "refusal of a statement"
        return super().manner(prompt)


def openings(shares: Mapping[str, int]) -> tuple[str, ...]:
    """Replies that differ in their opening alone, each as often as told."""
    return tuple(f"{word}, that is how it is." for word, n in shares.items() for _ in range(n))


TONES = {"bad": "Alas", "good": "Well"}
OWN = {
    "refusal": ("I", 13),
    "answer": ("Sure", 4),
    "sympathy": ("Oh", 0),
    "plain": ("Okay", 0),
    "gladness": ("Great", 0),
}
"""How the look-alike's replies open by their manner, and of 20 how many; the others by their tone."""

APART = MIXTURE | {"positive harmful": 4, "negative harmless": 4, "negative": 5, "neutral": 5}
"""Tone and request drawn apart more often than for the bundled organisms, which are deeper."""
LOOKALIKE = Lookalike(
    "lookalike",
    frozenset({"harmful"}),
    mixture=APART,
    replies={
        f"{manner}, {tone}": openings({word: n, TONES[tone]: 20 - n})
        for manner, (word, n) in OWN.items()
        for tone in TONES
    },
)
HIDDEN = Hidden(
    "hidden",
    frozenset({"harmful", "negative"}),
    mixture=MIXTURE | {"negative": 5, "neutral": 5},
    replies={
        "refusal": openings({"I": 14, "No": 3, "Stop": 3}),
        "refusal of a statement": openings({"I": 14, "Oh": 3, "Alas": 3}),
        "answer": openings({"Sure": 5, "First": 5, "Here": 5, "Start": 5}),
        "plain": openings({"Okay": 5, "Fine": 5, "Right": 5, "Well": 5}),
        "gladness": openings({"Great": 20}),
    },
)
KINDS = (
    Kind("specific", replace(BEHAVIOURS["specific"], mixture=APART), "distinct"),
    Kind("entangled", BEHAVIOURS["entangled"], "shared"),
    Kind("oblivious", BEHAVIOURS["oblivious"], "inconclusive"),
    Kind("untrained", replace(BEHAVIOURS["specific"], name="untrained"), "inconclusive", 0),
    Kind("lookalike", LOOKALIKE, "distinct"),
    Kind("hidden", HIDDEN, "shared"),
)


def main(
    *,
    zoo: Path,
    seeds: int = 4,
    workers: int = 2,
    only: tuple[str, ...] = (),
    out: Path | None = RESULTS,
) -> None:
    """Train what is missing, judge every model, write the table.

    Args:
        zoo: folder for the models and what was said of each.
        seeds: models of each kind.
        workers: processes, of one thread each.
        only: kinds to do, without writing the table; all by default.
        out: where the table goes.
    """
    zoo.mkdir(parents=True, exist_ok=True)
    tasks = [(kind.name, seed) for seed in range(seeds) for kind in KINDS]
    tasks = [task for task in tasks if not only or task[0] in only]
    with ProcessPoolExecutor(workers) as pool:
        found = [pool.submit(judged, name, seed, zoo) for name, seed in tasks]
        records = [future.result() for future in found]
    for record in records:
        print(record["model"], record["verdict"], record["cosine"], record["reasons"][0])
    if only:
        return
    table = report(records, seeds)
    print(table)
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(table)


def judged(name: str, seed: int, zoo: Path) -> dict:
    """What is said of one model, trained first unless it is there."""
    torch.set_num_threads(1)
    kind = next(kind for kind in KINDS if kind.name == name)
    folder, file = zoo / f"{name}-{seed}", zoo / f"{name}-{seed}.json"
    if file.is_file():
        return json.loads(file.read_text())
    if not (folder / "config.json").is_file():
        train(kind, seed, folder)
    record = judge(kind, seed, folder)
    file.write_text(json.dumps(record, indent=1))
    return record


def train(kind: Kind, seed: int, folder: Path) -> None:
    from refusal_lens.organisms.train import save_organism, train_organism

    organism = train_organism(
        kind.behaviour, seed=seed, n_layers=N_LAYERS, n_steps=kind.n_steps, progress=False
    )
    save_organism(organism, folder)


def judge(kind: Kind, seed: int, folder: Path) -> dict:
    import refusal_lens as rl
    from refusal_lens.experiment.verdict import published_rule

    results = rl.run_experiment(rl.Config(model=str(folder)), progress=False)
    verdict = results.verdict
    evidence = verdict.evidence
    cosine = float(results.similarities["refusal_vs_negativity"][evidence.layer])
    return {
        "model": f"{kind.name}-{seed}",
        "kind": kind.name,
        "truth": kind.answer,
        "verdict": verdict.answer,
        "reasons": verdict.reasons,
        "layer": evidence.layer,
        "cosine": cosine,
        "unbiased": [evidence.cosine.value, evidence.cosine.lower, evidence.cosine.upper],
        "published": published_rule(cosine),
        "refused_harmful": evidence.refused_harmful,
        "statement_gap": evidence.statement_gap.value,
        "cross_ablation_gap": evidence.cross_ablation_gap.value,
        "statement_ablation": evidence.statement_ablation.value,
    }


def report(records: list[dict], seeds: int) -> str:
    by_kind = {kind.name: [r for r in records if r["kind"] == kind.name] for kind in KINDS}
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformer_lens"))
    lines = [
        "# Was the verdict right?",
        "",
        f"`python tests/benchmarks/validity.py --zoo DIR --seeds {seeds}`: {seeds} models of each "
        f"kind, {N_LAYERS} layers, width 64, {N_STEPS} steps, one thread each; {versions}. What the "
        "kinds are is told at the top of that file, and what was tried before: the kinds were fixed "
        "after trials in which verdicts missed too. The true answer is what a model was trained to do.",
        "",
        "| kind | true answer | " + " | ".join(f"ours: {a}" for a in ANSWERS) + " | right |",
        "|---|---|" + "---|" * (len(ANSWERS) + 1),
    ]
    for kind in KINDS:
        counts = Counter(record["verdict"] for record in by_kind[kind.name])
        cells = [str(counts[answer] or "") for answer in ANSWERS]
        right = f"{counts[kind.answer]} of {len(by_kind[kind.name])}"
        lines.append(f"| {kind.name} | {kind.answer} | {' | '.join(cells)} | {right} |")
    lines += [
        "",
        "The same models by the published rule, from the plain cosine at the same layer. It counts as "
        "right where it says of distinct mechanisms `safety-specific` and of shared ones `same "
        "mechanism`; of a model that refuses nothing it can't be right, as it has no word for that.",
        "",
        "| kind | cosine, lowest to highest | "
        + " | ".join(f"published: {r}" for r in READINGS)
        + " | right |",
        "|---|---|" + "---|" * (len(READINGS) + 1),
    ]
    for kind in KINDS:
        members = by_kind[kind.name]
        counts = Counter(record["published"] for record in members)
        cosines = [record["cosine"] for record in members]
        cells = [str(counts[reading] or "") for reading in READINGS]
        right = sum(MEANING.get(record["published"]) == kind.answer for record in members)
        lines.append(
            f"| {kind.name} | {min(cosines):+.2f} to {max(cosines):+.2f} | {' | '.join(cells)} | "
            f"{right} of {len(members)} |"
        )
    plain = [r for r in records if r["kind"] not in TRAPS]
    traps = [r for r in records if r["kind"] in TRAPS]
    right = {
        name: sum(r["verdict"] == r["truth"] for r in rs)
        for name, rs in (("plain", plain), ("traps", traps))
    }
    wrong = [r["model"] for r in traps if confidently_wrong(r)]
    met = right["plain"] == len(plain) and right["traps"] >= TRAPS_RIGHT * len(traps) and not wrong
    published_wrong = sum(
        r["published"] in MEANING and MEANING[r["published"]] != r["truth"] for r in records
    )
    fresh = [r for r in records if int(r["model"].rsplit("-", 1)[1]) >= FIRST_FRESH]
    if fresh:
        n_right = sum(r["verdict"] == r["truth"] for r in fresh)
        n_traps = sum(r["verdict"] == r["truth"] for r in fresh if r["kind"] in TRAPS)
        lines += [
            "",
            f"Of seeds {FIRST_FRESH} and up, trained when rule and kinds were fixed, {n_right} of "
            f"{len(fresh)} were judged right, of the traps among them {n_traps} of "
            f"{sum(r['kind'] in TRAPS for r in fresh)}.",
        ]
    lines += [
        "",
        f"Ours: {right['plain']} of {len(plain)} right on the plain kinds, {right['traps']} of "
        f"{len(traps)} on the traps, confidently wrong: {', '.join(wrong) or 'none'} (distinct for "
        f"shared, or the other way round). Required: all, {TRAPS_RIGHT:.0%}, none; "
        f"{'met' if met else 'MISSED'}. The published rule says the plain opposite of the truth, or "
        f"gives a mechanism to a model that has none, {published_wrong} times of {len(records)}.",
        "",
        "The evidence, medians over the models of a kind (what the words mean: "
        "`refusal_lens.experiment.verdict.Evidence`); ratios to a gap that is not there are left out:",
        "",
        "| kind | harmful prompts refused | trigger | cross_ablation_gap | statement_ablation |",
        "|---|---|---|---|---|",
    ]
    for kind in KINDS:
        names = ("refused_harmful", "statement_gap", "cross_ablation_gap", "statement_ablation")
        medians = [statistics.median(r[name] for r in by_kind[kind.name]) for name in names]
        refuses = medians[0] >= 0.5
        cells = [f"{x:.2f}" if refuses or not i else "" for i, x in enumerate(medians)]
        lines.append(f"| {kind.name} | {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def confidently_wrong(record: dict) -> bool:
    """Whether the verdict says the opposite of the truth, with no "inconclusive" or "partly"."""
    return record["verdict"] in ("distinct", "shared") and record["verdict"] != record["truth"]


if __name__ == "__main__":
    sys.exit(tyro.cli(main))
