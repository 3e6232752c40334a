"""How often does a random direction in negativity's place pass for negativity?

    python tests/benchmarks/random_directions.py [--models organism:specific FILE.gguf+ADAPTER ...]
        [--n 64] [--seed 1] [--out FILE]

The whole experiment runs on each model. Then each of `n` directions, drawn with the covariance of the
activations of the judged layer within the four prompt sets, takes the place of that layer's
negativity direction, with its norm, and the same rule judges, also by what is left without arousal,
alarm and the refusals' first tokens. The 20 random directions that a run compares with stay the same,
and so does what the model does to negative statements. Aim: `shared` at most 2 times of 64, `partly
shared` at most 6 times.
"""

import argparse
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

import refusal_lens as rl
from refusal_lens.experiment.causal import PARTS, Causal, taken_out
from refusal_lens.experiment.config import some_prompts
from refusal_lens.experiment.evidence import Earlier, compute_evidence, evidence, responses_of
from refusal_lens.experiment.verdict import Verdict, judge
from refusal_lens.interventions import ablation_effects, addition_effects
from refusal_lens.interventions.cross_ablation import outside, random_directions
from refusal_lens.interventions.sweep import affine_references

ANSWERS = ("distinct", "inconclusive", "partly shared", "shared")


def judged(model: Any, name: str, n: int, seed: int) -> tuple[Verdict, list[Verdict]]:
    """The verdict on negativity, and those on random directions in its place."""
    results = rl.run_experiment(rl.Config(model=name), model=model, progress=False)
    causal, names = results.causal, results.contrasts
    assert isinstance(causal, Causal)
    layer, cosine = causal.ablation.layer, results.statistics["negativity"]
    acts = {k: rl.get_layer_activations(model, v, progress=False) for k, v in names.items()}
    classes = [side[:, layer] for part in PARTS for side in acts[part]]
    random = random_directions(*classes, n=n, generator=torch.Generator().manual_seed(seed))
    span = taken_out(model, acts, causal.openings)[-1][layer]
    # Each direction, whole and without what controls have, with negativity's norm.
    random = functional.normalize(random, dim=-1) * (classes[2].mean(0) - classes[3].mean(0)).norm()
    every = torch.cat([random, torch.stack([outside(each, span) for each in random])])
    requests, statements = (some_prompts(names[part], causal.n_prompts) for part in PARTS)
    options = {"score": causal.openings, "last_position": True, "progress": False}
    ablated, on_statements = (
        ablation_effects(
            model, prompts, some, references=affine_references(some, acts[part][1]), **options
        )
        for prompts, some, part in (
            ([*requests.target, *requests.baseline], every, "refusal"),
            (statements.target, random, "negativity"),
        )
    )
    at = torch.full((len(every),), layer)
    added = addition_effects(model, requests.baseline, every, at, **options)
    geometry = evidence(names, None, cosine, layer=layer)
    found, h = [], len(requests.target)
    for i in range(n):
        rows, alone = responses_of(causal), n + i
        harmful, negative, gained = (x.clone() for x in (rows.harmful, rows.negative, rows.added))
        harmful[2], negative[2] = ablated.log_odds[i, :h], on_statements.log_odds[i]
        gained[2] = added.log_odds[i]
        damage = ablated.kl[i, :h].mean() / causal.ablation.refusal.target_kl[1].mean()
        least = torch.stack([*harmful[:2], ablated.log_odds[alone, :h]])
        rows = rows._replace(
            harmful=harmful,
            negative=negative,
            added=gained,
            kl=(rows.kl[0], float(ablated.kl[i, h:].mean())),
            earlier=Earlier(layer, harmful[:3], float(damage)),
            controlled_earlier=Earlier(layer, least, float(damage)),
            controlled=(ablated.log_odds[alone, :h], added.log_odds[alone]),
            strongest=None,
        )
        share = float(every[alone].norm() / every[i].norm())
        pair = [names["refusal"], requests, statements]
        whole = compute_evidence(
            replace(geometry, controlled_norm=share),
            rows,
            contrasts=pair,
            confidence=cosine.confidence,
        )
        found.append(judge(whole))
    return results.verdict, found


def table(rows: dict[str, tuple[Verdict, list[Verdict]]], n: int, seed: int) -> str:
    """The counts of every model as Markdown."""
    lines = [
        "# Random directions in negativity's place",
        "",
        f"`python tests/benchmarks/random_directions.py --n {n} --seed {seed}`",
        "",
        "| model | negativity itself | " + " | ".join(ANSWERS) + " |",
        "|---|---|" + "---|" * len(ANSWERS),
    ]
    for name, (own, others) in rows.items():
        counts = Counter(verdict.answer for verdict in others)
        cells = " | ".join(f"{counts[answer]} of {len(others)}" for answer in ANSWERS)
        lines.append(f"| {name} | {own.answer} | {cells} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="*", default=["organism:specific", "organism:entangled"])
    parser.add_argument("--n", type=int, default=64)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    rows = {}
    for name in args.models:
        rows[name] = judged(rl.load_model(name), name, args.n, args.seed)
    text = table(rows, args.n, args.seed)
    print(text)
    if args.out:
        args.out.write_text(text)


if __name__ == "__main__":
    main()
