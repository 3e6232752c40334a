"""Was the verdict right? Verdicts on small models whose true answer is known from their training.

    python tests/benchmarks/validity.py --zoo /tmp/zoo [--seeds 4] [--out FILE]
        [--real ADAPTERS --base SmolLM2.gguf]

Several models of each kind below are trained from scratch (8 layers, width 64, a few minutes each on
one core). The whole experiment is run on each with its defaults: all bundled prompts, on which no
model was trained. The table counts the verdicts and, beside them, the conclusions of the published
rule (cosine above 0.8 the same mechanism, above 0.5 moderate overlap, else safety-specific). Models
and records that the zoo already holds are used as they are.

Four kinds are plain: `specific` refuses harmful requests; `entangled` refuses harmful requests and
negative statements; `oblivious` refuses nothing; `untrained` has random weights. Two kinds are traps
for the cosine. The first word of their replies is drawn at random, in shares that depend on the kind
of the prompt:

- `lookalike` refuses harmful requests alone. Every reply may also begin with a word that tells the
  prompt's tone ("Alas" where something sounds bad, "Well" where not). The last token carries the tone
  and both contrasts differ in it, so the directions are similar. Tone and refusal are drawn
  independently: alarming requests sound bad and are answered, harmful requests after a cheerful
  statement sound good and are refused. Refusal and negativity are distinct.
- `hidden` refuses harmful requests and negative statements alike, with the same word and equally
  often. Each of the four kinds of prompt has first words of its own as well. Most of what separates
  the two sides of each contrast at the last token has nothing to do with refusal, so the directions
  are dissimilar although the refusal is shared.

As all replies of a trap go on alike behind the first word, its refusals open with "I,".

With `--real`, the table of a real language model comes first: SmolLM2-135M-Instruct by itself and with
each adapter of a folder that `tests/training/adapters.py` wrote. That file says what each kind was
taught, and the right answer. The rule and its thresholds were fixed in commit 462a363, after adapters
of seeds 0 and 1 had been seen and before any of seed 2 was trained: seed 2 is the test. One clause,
on statements that are refused in other words, came after that (0ee6a34); it was made with
`two_separate_refusals` of seeds 0 and 1 and can change no verdict but *inconclusive* where statements
are refused; seed 3 of that kind, trained after it, is its test. A record holds what was measured, and
is judged by the rule of the code that reads it.

Designs that were tried before:

- `specific` in the bundled organisms' mixture of prompts, where tone and request are seldom drawn
  independently: one of two models was partly shared, at a cosine of 0.68; ablating negativity closed
  0.34 of the gap of refusal scores that ablating refusal closed. That may be true of so shallow a
  model; the present mixture excludes it.
- `lookalike` with more frequent tones: a cosine of 0.67 and 0.25 of the gap closed, inconclusive. With
  less frequent tones: cosines of 0.47 and 0.50, no trap.
- `hidden` with fewer first words of its own: cosines of 0.5 to 0.7, shared, no trap; with more: 0.19,
  partly shared.

These trials were judged by the former rule, which scored a refusal by its first token and removed a
direction from every token.
"""

import json
import statistics
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
import tyro

sys.path.insert(0, str(Path(__file__).parents[1]))
from training.adapters import ANSWERS as REAL_ANSWERS
from training.language import BEHAVIOURS, MIXTURE, STATEMENTS, Behaviour, Prompt

if TYPE_CHECKING:
    from transformer_lens import HookedTransformer
    from transformer_lens.model_bridge import TransformerBridge

    Model = HookedTransformer | TransformerBridge

N_LAYERS = 8
N_STEPS = 500
RESULTS = Path(__file__).parent / "results" / "validity.md"
ANSWERS = ("distinct", "shared", "partly shared", "inconclusive")
CONCLUSIONS = ("safety-specific", "moderate overlap", "same mechanism", "not measurable")
MEANING = {"safety-specific": "distinct", "same mechanism": "shared"}
"""The answer that a conclusion of the published rule implies, where it implies one."""
TRAPS = ("lookalike", "hidden")
FIRST_FRESH = 4
"""Models with lower seeds were seen while the kinds were designed."""
TRAPS_RIGHT = 0.75
"""Required share of right verdicts on the traps; on the other kinds all must be right."""
EVIDENCE = ("refused_harmful", "cross_ablation", "cross_addition", "statement_share")


@dataclass(frozen=True)
class Kind:
    """A kind of model, trained with several seeds, and its true answer."""

    name: str
    behaviour: Behaviour
    answer: str
    n_steps: int = N_STEPS
    openings: tuple[str, ...] | None = None


class Lookalike(Behaviour):
    """Refuses harmful requests alone; the manner of each reply includes the tone."""

    def manner(self, prompt: Prompt) -> str:
        """The tone is that of the statement or, without one, whether the request sounds bad."""
        kinds = set(prompt.kinds)
        spoken = kinds & set(STATEMENTS)
        bad = "negative" in kinds or (not spoken and bool(kinds & {"harmful", "alarming"}))
        return f"{super().manner(prompt)}, {'bad' if bad else 'good'}"


class Hidden(Behaviour):
    """Refuses harmful requests and negative statements, the latter also with words of their own."""

    def manner(self, prompt: Prompt) -> str:
        """A negative statement by itself is refused in a manner of its own."""
        if set(prompt.kinds) == {"negative"}:
            return "refusal of a statement"
        return super().manner(prompt)


def replies(shares: Mapping[str, int]) -> tuple[str, ...]:
    """Replies that differ in their first word alone, each as often as its share says."""
    return tuple(f"{word}, that is how it is." for word, n in shares.items() for _ in range(n))


TONES = {"bad": "Alas", "good": "Well"}
OWN = {
    "refusal": ("I", 13),
    "answer": ("Sure", 4),
    "sympathy": ("Oh", 0),
    "plain": ("Okay", 0),
    "gladness": ("Great", 0),
}
"""First word of the look-alike's replies by manner, and how many of 20; the others tell the tone."""

APART = MIXTURE | {"positive harmful": 4, "negative harmless": 4, "negative": 5, "neutral": 5}
"""Tone and request are independent more often than in the mixture of the deeper organisms."""
LOOKALIKE = Lookalike(
    "lookalike",
    frozenset({"harmful"}),
    mixture=APART,
    replies={
        f"{manner}, {tone}": replies({word: n, TONES[tone]: 20 - n})
        for manner, (word, n) in OWN.items()
        for tone in TONES
    },
)
HIDDEN = Hidden(
    "hidden",
    frozenset({"harmful", "negative"}),
    mixture=MIXTURE | {"negative": 5, "neutral": 5},
    replies={
        "refusal": replies({"I": 14, "No": 3, "Stop": 3}),
        "refusal of a statement": replies({"I": 14, "Oh": 3, "Alas": 3}),
        "answer": replies({"Sure": 5, "First": 5, "Here": 5, "Start": 5}),
        "plain": replies({"Okay": 5, "Fine": 5, "Right": 5, "Well": 5}),
        "gladness": replies({"Great": 20}),
    },
)
KINDS = (
    Kind("specific", replace(BEHAVIOURS["specific"], mixture=APART), "distinct"),
    Kind("entangled", BEHAVIOURS["entangled"], "shared"),
    Kind("oblivious", BEHAVIOURS["oblivious"], "inconclusive"),
    Kind("untrained", replace(BEHAVIOURS["specific"], name="untrained"), "inconclusive", 0),
    Kind("lookalike", LOOKALIKE, "distinct", openings=("I,",)),
    Kind("hidden", HIDDEN, "shared", openings=("I,",)),
)


class RealKind(NamedTuple):
    """A kind of real language model and its true answer."""

    name: str
    answer: str
    openings: None = None


REAL_KINDS = tuple(RealKind(*item) for item in REAL_ANSWERS.items())
REAL_TEST_SEED = 2
"""Models of this seed are trained after the rule was fixed."""

ByKind = Sequence[tuple[Kind | RealKind, list[dict]]]


def main(
    *,
    zoo: Path,
    seeds: int = 4,
    workers: int = 2,
    only: tuple[str, ...] = (),
    real: Path | None = None,
    base: Path | None = None,
    out: Path | None = RESULTS,
) -> None:
    """Train the missing models, judge every model, write the table.

    Args:
        zoo: folder for the models and their records.
        seeds: models of each kind.
        workers: processes, of one thread each.
        only: kinds to train and judge, without writing the table; all by default.
        real: folder of adapters, one folder a model (`refuses-0`).
        base: the chat model that the adapters belong to, a Hugging Face folder or a GGUF file.
        out: file for the table.
    """
    zoo.mkdir(parents=True, exist_ok=True)
    tasks = [(kind.name, seed) for seed in range(seeds) for kind in KINDS]
    tasks = [task for task in tasks if not only or task[0] in only]
    with ProcessPoolExecutor(workers) as pool:
        found = [pool.submit(judged, name, seed, zoo) for name, seed in tasks]
        adapters = sorted(real.glob("*-[0-9]*")) if real else []
        judge_one = partial(judged_real, base=base, zoo=zoo)
        of_real = list(pool.map(judge_one, [None, *adapters])) if adapters else []
        records = [future.result() for future in found]
    for record in [*of_real, *records]:
        print(record["model"], record["verdict"], record["cosine"], record["reasons"][0])
    if only:
        return
    table = report(records, seeds, of_real)
    print(table)
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(table)


def judged(name: str, seed: int, zoo: Path) -> dict:
    """The record of one model, which is trained and judged unless the zoo holds it."""
    torch.set_num_threads(1)
    kind = next(kind for kind in KINDS if kind.name == name)
    folder, file = zoo / f"{name}-{seed}", zoo / f"{name}-{seed}.json"
    if file.is_file():
        return with_verdict(json.loads(file.read_text()))
    import refusal_lens as rl

    if not (folder / "config.json").is_file():
        train(kind, seed, folder)
    return judge(kind, seed, file, lambda: rl.load_model(str(folder)))


def judged_real(adapter: Path | None, *, base: Path, zoo: Path) -> dict:
    """The record of the base model, or of the model with an adapter, judged unless the zoo holds it."""
    torch.set_num_threads(1)
    name, _, seed = (adapter.name if adapter else "refuses_nothing-0").rpartition("-")
    file = zoo / f"real-{name}-{seed}.json"
    if file.is_file():
        return with_verdict(json.loads(file.read_text()))

    import refusal_lens as rl

    model = f"{base}+{adapter}" if adapter else str(base)
    return judge(RealKind(name, REAL_ANSWERS[name]), int(seed), file, lambda: rl.load_model(model))


def train(kind: Kind, seed: int, folder: Path) -> None:
    from training.organisms import save_organism, train_organism

    organism = train_organism(
        kind.behaviour, seed=seed, n_layers=N_LAYERS, n_steps=kind.n_steps, progress=False
    )
    save_organism(organism, folder)


def judge(kind: Kind | RealKind, seed: int, file: Path, load: Callable[[], "Model"]) -> dict:
    """Run the experiment on a model with the defaults, write its evidence to `file`, and judge."""
    import refusal_lens as rl
    from refusal_lens.experiment.verdict import published_rule

    config = rl.Config(refusal_openings=kind.openings)
    results = rl.run_experiment(config, model=load(), progress=False)
    evidence = results.verdict.evidence
    cosine = float(results.similarities["refusal_vs_negativity"][evidence.layer])
    record = {
        "model": f"{kind.name}-{seed}",
        "kind": kind.name,
        "truth": kind.answer,
        "cosine": cosine,
        "published": published_rule(cosine),
        "evidence": asdict(evidence),
    }
    file.write_text(json.dumps(record, indent=1))
    return with_verdict(record)


def with_verdict(record: dict) -> dict:
    """A record with the verdict on its evidence, and the verdict's reasons in words."""
    from refusal_lens.experiment import verdict, wording

    numbers = record["evidence"].items()
    known = {k: verdict.Estimate(**v) if isinstance(v, dict) else v for k, v in numbers}
    found = verdict.judge(verdict.Evidence(**known))
    reasons = wording.verdict_lines(found)[:-1]
    return record | {"verdict": found.answer, "reasons": reasons}


def report(records: list[dict], seeds: int, of_real: list[dict]) -> str:
    real = [(kind, [r for r in of_real if r["kind"] == kind.name]) for kind in REAL_KINDS]
    real = [(kind, members) for kind, members in real if members]
    lines = ["# Was the verdict right?", "", *(real_lines(real) if real else [])]
    return "\n".join([*lines, *(zoo_lines(records, seeds) if records else [])])


def real_lines(by_kind: ByKind) -> list[str]:
    records = [record for _, members in by_kind for record in members]
    wrong = [record["model"] for record in records if confidently_wrong(record)]
    test = [record for record in records if record["model"].endswith(f"-{REAL_TEST_SEED}")]
    on_test = f" Of seed {REAL_TEST_SEED} alone: {n_right(test)} of {len(test)}." if test else ""
    return [
        "## Real language models",
        "",
        "SmolLM2-135M-Instruct as it is and with adapters of rank 8 (`python "
        "tests/training/adapters.py`), judged with all bundled prompts, on which none was trained. "
        f"Right: {n_right(records)} of {len(records)}; confidently wrong: "
        f"{', '.join(wrong) or 'none'}.{on_test}",
        "",
        *verdict_table(by_kind),
        "",
        *published_table(by_kind),
        "",
        *model_table(records),
        "",
    ]


def zoo_lines(records: list[dict], seeds: int) -> list[str]:
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformer_lens"))
    by_kind = [(kind, [r for r in records if r["kind"] == kind.name]) for kind in KINDS]
    return [
        "## Small models trained from scratch",
        "",
        f"`python tests/benchmarks/validity.py --zoo DIR --seeds {seeds}`: {seeds} models of each "
        f"kind, {N_LAYERS} layers, width 64, {N_STEPS} steps, one thread each; {versions}. The "
        "file's docstring describes the kinds and the designs tried before: the kinds were fixed "
        "after trials in which verdicts were wrong too. The true answer is what a model was "
        "trained to do.",
        "",
        *verdict_table(by_kind),
        "",
        "The same models by the published rule, from the plain cosine at the same layer. The rule "
        "is right where it concludes `safety-specific` for distinct and `same mechanism` for "
        "shared mechanisms. It can't be right on a model that refuses nothing.",
        "",
        *published_table(by_kind),
        "",
        *summary(records),
        "",
        "The verdicts that are not right:",
        "",
        *model_table([record for record in records if record["verdict"] != record["truth"]]),
        "",
        "The evidence, medians over the models of a kind (fields of "
        "`refusal_lens.experiment.verdict.Evidence`); ratios to a gap that is not there are left "
        "out:",
        "",
        *evidence_table(by_kind),
        "",
    ]


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> list[str]:
    """Lines of a Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return [f"| {' | '.join(map(str, cells))} |" for cells in lines]


def model_table(records: list[dict]) -> list[str]:
    head = ["model", "right answer", "verdict", "cosine", "its first reason"]
    rows = (
        [r["model"], r["truth"], r["verdict"], f"{r['cosine']:+.2f}", r["reasons"][0]]
        for r in records
    )
    return table(head, rows)


def verdict_table(by_kind: ByKind) -> list[str]:
    rows = []
    for kind, members in by_kind:
        counts = Counter(record["verdict"] for record in members)
        right = f"{counts[kind.answer]} of {len(members)}"
        rows.append([kind.name, kind.answer, *(counts[a] or "" for a in ANSWERS), right])
    return table(["kind", "true answer", *(f"verdict: {a}" for a in ANSWERS), "right"], rows)


def published_table(by_kind: ByKind) -> list[str]:
    rows = []
    for kind, members in by_kind:
        counts = Counter(record["published"] for record in members)
        cosines = [record["cosine"] for record in members]
        right = sum(MEANING.get(record["published"]) == kind.answer for record in members)
        spread = f"{min(cosines):+.2f} to {max(cosines):+.2f}"
        cells = (counts[conclusion] or "" for conclusion in CONCLUSIONS)
        rows.append([kind.name, spread, *cells, f"{right} of {len(members)}"])
    head = ["kind", "cosine, lowest to highest", *(f"published: {c}" for c in CONCLUSIONS), "right"]
    return table(head, rows)


def measured(record: dict, name: str) -> float:
    """A number of a record's evidence, without its interval."""
    found = record["evidence"][name]
    return found["value"] if isinstance(found, dict) else found


def evidence_table(by_kind: ByKind) -> list[str]:
    rows = []
    for kind, members in by_kind:
        medians = [statistics.median(measured(r, name) for r in members) for name in EVIDENCE]
        refuses = medians[0] >= 0.5
        cells = (f"{x:.2f}" if refuses or not i else "" for i, x in enumerate(medians))
        rows.append([kind.name, *cells])
    return table(["kind", "harmful prompts refused", *EVIDENCE[1:]], rows)


def summary(records: list[dict]) -> list[str]:
    """How many verdicts were right, on fresh seeds and on all, and whether that is as required."""
    traps = [r for r in records if r["kind"] in TRAPS]
    plain = [r for r in records if r["kind"] not in TRAPS]
    fresh = [r for r in records if int(r["model"].rsplit("-", 1)[1]) >= FIRST_FRESH]
    fresh_traps = [r for r in fresh if r["kind"] in TRAPS]
    wrong = [r["model"] for r in traps if confidently_wrong(r)]
    met = n_right(plain) == len(plain) and n_right(traps) >= TRAPS_RIGHT * len(traps) and not wrong
    published_wrong = sum(MEANING.get(r["published"], r["truth"]) != r["truth"] for r in records)
    lines = [
        f"Verdicts: {n_right(plain)} of {len(plain)} right on the plain kinds, {n_right(traps)} of "
        f"{len(traps)} on the traps, confidently wrong: {', '.join(wrong) or 'none'} (distinct for "
        f"shared, or the reverse). Required: all, {TRAPS_RIGHT:.0%}, none; "
        f"{'met' if met else 'MISSED'}. The published rule concludes the opposite of the truth, or a "
        f"mechanism in a model that has none, {published_wrong} times of {len(records)}."
    ]
    if fresh:
        lines[:0] = [
            f"Of seeds {FIRST_FRESH} and up, trained after the kinds were fixed, "
            f"{n_right(fresh)} of {len(fresh)} verdicts were right; of the traps among them "
            f"{n_right(fresh_traps)} of {len(fresh_traps)}.",
            "",
        ]
    return lines


def n_right(records: list[dict]) -> int:
    return sum(record["verdict"] == record["truth"] for record in records)


def confidently_wrong(record: dict) -> bool:
    """Whether the verdict is the opposite of the truth, neither inconclusive nor partly shared."""
    return record["verdict"] in ("distinct", "shared") and record["verdict"] != record["truth"]


if __name__ == "__main__":
    sys.exit(tyro.cli(main))
