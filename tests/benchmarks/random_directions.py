"""How often does a random direction in negativity's place pass for negativity?

    python tests/benchmarks/random_directions.py [--models organism:specific FILE.gguf+ADAPTER ...]
        [--n 64] [--seed 1] [--out FILE]

The whole experiment runs on each model. Then each of `n` directions, drawn with the covariance of the
activations of the judged layer within the four prompt sets, takes the place of that layer's
negativity direction, with its norm, and the same rule judges. The 20 random directions that a run
compares with stay the same, and so does what the model does to negative statements. Aim: `shared` at
most 2 times of 64, `partly shared` at most 6 times.

Every direction is ablated from harmful requests and added to harmless ones. Controls can only take
`shared` and `partly shared` away. So what is left of a direction without arousal, alarm and the
refusals' first tokens is measured only where the rule says one of these; `distinct` is a little too
rare in the table. A model whose verdict is inconclusive whatever negativity does is not run further.

Rows of models that are not named stay in `--out`.
"""

import argparse
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

import refusal_lens as rl
from refusal_lens.experiment.causal import PARTS, Causal, taken_out
from refusal_lens.experiment.config import some_prompts
from refusal_lens.experiment.evidence import Earlier, compute_evidence, evidence, responses_of
from refusal_lens.experiment.verdict import Thresholds, Verdict, judge, obstacles
from refusal_lens.interventions import ablation_effects, addition_effects
from refusal_lens.interventions.cross_ablation import outside, random_directions
from refusal_lens.interventions.sweep import affine_references

ANSWERS = ("distinct", "inconclusive", "partly shared", "shared")
THRESHOLDS = Thresholds()


class StandIns:
    """Random directions in negativity's place, and their effects on one model."""

    def __init__(self, model: Any, results: rl.Results, n: int, seed: int):
        assert isinstance(results.causal, Causal)
        self.model, self.results, self.causal = model, results, results.causal
        self.layer = self.causal.ablation.layer
        names = results.contrasts
        self.acts = {
            k: rl.get_layer_activations(model, v, progress=False) for k, v in names.items()
        }
        sets = [side[:, self.layer] for part in PARTS for side in self.acts[part]]
        drawn = random_directions(*sets, n=n, generator=torch.Generator().manual_seed(seed))
        norm = (sets[2].mean(0) - sets[3].mean(0)).norm()
        self.whole = functional.normalize(drawn, dim=-1) * norm
        span = taken_out(model, self.acts, self.causal.openings)[-1][self.layer]
        self.alone = torch.stack([outside(each, span) for each in self.whole])
        self.requests, self.statements = (
            some_prompts(names[part], self.causal.n_prompts) for part in PARTS
        )

    def ablated(self, prompts: Any, directions: Tensor, part: str = "refusal") -> Any:
        references = affine_references(directions, self.acts[part][1])
        return ablation_effects(
            self.model, prompts, directions, references=references, **self.options
        )

    def added(self, directions: Tensor) -> Any:
        at = torch.tensor(self.layer)
        return addition_effects(self.model, self.requests.baseline, directions, at, **self.options)

    @property
    def options(self) -> dict[str, Any]:
        return {"score": self.causal.openings, "last_position": True, "progress": False}

    def verdicts(self) -> list[Verdict]:
        """The verdict on every direction."""
        own, n = self.results.verdict.evidence, len(self.whole)
        on_requests, gained = self.ablated(self.requests.target, self.whole), self.added(self.whole)
        negative = torch.full((n, len(self.statements.target)), torch.nan)
        of_refusal = (own.statement_share, own.statement_ablation)
        if all(each.lower > THRESHOLDS.margin for each in of_refusal):  # else they decide nothing
            negative = self.ablated(self.statements.target, self.whole, "negativity").log_odds
        measured = [on_requests.log_odds, on_requests.kl.mean(-1), gained.log_odds, negative]
        found = [self._judged(*each) for each in zip(*measured, strict=True)]
        for i, verdict in enumerate(found):
            if verdict.answer in ("shared", "partly shared"):
                found[i] = self._judged(*(each[i] for each in measured), controlled=i)
        return found

    def _judged(
        self,
        harmful: Tensor,
        damage: Tensor,
        gained: Tensor,
        negative: Tensor,
        controlled: int | None = None,
    ) -> Verdict:
        """The verdict on the effects of one direction; `controlled` is its row, to run the rest."""
        rows, cosine = responses_of(self.causal), self.results.statistics["negativity"]
        in_place = [each.clone() for each in (rows.harmful, rows.negative, rows.added)]
        for of, effect in zip(in_place, (harmful, negative, gained), strict=True):
            of[2] = effect
        on_refusal = float(damage / self.causal.ablation.refusal.target_kl[1].mean())
        rows = rows._replace(
            harmful=in_place[0],
            negative=in_place[1],
            added=in_place[2],
            kl=(rows.kl[0], torch.nan),
            earlier=Earlier(self.layer, in_place[0][:3], on_refusal),
            controlled_earlier=None,
            controlled=None,
            strongest=None,
        )
        share = torch.nan
        if controlled is not None:
            whole, alone = self.whole[controlled, None], self.alone[controlled, None]
            share = float(alone.norm() / whole.norm())
            least = self.ablated(self.requests.target, alone).log_odds[0]
            on_harmless = self.ablated(self.requests.baseline, whole).kl
            rows = rows._replace(
                kl=(rows.kl[0], float(on_harmless.mean())),
                controlled=(least, self.added(alone).log_odds[0]),
                controlled_earlier=Earlier(
                    self.layer, torch.stack([*rows.harmful[:2], least]), on_refusal
                ),
            )
        geometry = evidence(self.results.contrasts, None, cosine, layer=self.layer)
        known = compute_evidence(
            replace(geometry, controlled_norm=share, words_alike=self.causal.words_alike),
            rows,
            contrasts=[self.results.contrasts["refusal"], self.requests, self.statements],
            confidence=cosine.confidence,
        )
        return judge(known, THRESHOLDS)


def judged(name: str, n: int, seed: int) -> tuple[Verdict, list[Verdict]]:
    """The verdict on negativity, and those on random directions in its place."""
    model = rl.load_model(name)
    results = rl.run_experiment(rl.Config(model=name), model=model, progress=False)
    in_the_way = {each.measure for each in obstacles(results.verdict.evidence, THRESHOLDS)}
    if in_the_way - {"reliability_negativity"}:
        return results.verdict, [results.verdict] * n
    return results.verdict, StandIns(model, results, n, seed).verdicts()


def row(name: str, own: Verdict, others: list[Verdict]) -> str:
    """One model's line of the table."""
    counts = Counter(verdict.answer for verdict in others)
    cells = " | ".join(f"{counts[answer]} of {len(others)}" for answer in ANSWERS)
    return f"| {shown(name)} | {own.answer} | {cells} |"


def shown(name: str) -> str:
    return name if name.startswith("organism:") else "+".join(map(last, name.split("+")))


def last(path: str) -> str:
    return Path(path).name


def table(rows: list[str], n: int, seed: int) -> str:
    """All rows as Markdown."""
    lines = [
        "# Random directions in negativity's place",
        "",
        f"`python tests/benchmarks/random_directions.py --n {n} --seed {seed}`",
        "",
        "| model | negativity itself | " + " | ".join(ANSWERS) + " |",
        "|---|---|" + "---|" * len(ANSWERS),
        *rows,
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="*", default=["organism:specific", "organism:entangled"])
    parser.add_argument("--n", type=int, default=64)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    new = {shown(name): row(name, *judged(name, args.n, args.seed)) for name in args.models}
    old = {}
    if args.out and args.out.is_file():
        lines = args.out.read_text().splitlines()[6:]
        old = {line.split(" | ")[0].removeprefix("| "): line for line in lines}
    text = table([*(old | new).values()], args.n, args.seed)
    print(text)
    if args.out:
        args.out.write_text(text)


if __name__ == "__main__":
    main()
