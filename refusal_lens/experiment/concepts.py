"""What a map of concepts rests on: cosines, and each concept's prompts under every ablation."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import normalize

from ..activations.extract import ContrastActivations
from ..directions.estimators import mean_difference
from ..interventions import (
    Effects,
    ablation_effects,
    addition_effects,
    cross_ablation,
    openings_of,
)
from ..interventions.batched_runs import Interventions, opening_log_odds
from ..interventions.reply_openings import ANSWERING, REFUSAL, SYMPATHY
from ..interventions.sweep import affine_references, measured
from ..prompts.contrast import Contrast
from ..uncertainty import Gram, cosine_statistics
from ..uncertainty.cosine import estimate_cosine, fewest_resamples
from ..uncertainty.effects import IndependentSample, auroc_interval, ratio_interval
from . import causal
from .cached_model import CachedModel
from .causal import FEW_PROMPTS
from .config import some_prompts, spread
from .evidence import (
    Earlier,
    Responses,
    compared,
    compute_evidence,
    evidence,
    labels_of,
    lowered_most,
)
from .verdict import Evidence

CURVE_RESAMPLES = 2000  # for the interval of a cosine at every layer
Pairs = Float[Tensor, "3 concept concept layer"]  # a value, and the ends of its interval
Runs = dict[str, Any]


@dataclass
class Concepts:
    """Contrasts by name, refusal first, their activations, and the highlighted layer.

    `begin` replaces it by the layer to intervene at.
    """

    source: CachedModel
    contrasts: dict[str, Contrast]
    activations: dict[str, ContrastActivations]
    layer: int

    def __post_init__(self) -> None:
        config, self.names = self.source.config, [*self.contrasts]
        most, (self.refusal, *_) = causal.EFFECT_PROMPTS, self.contrasts
        self.some = {k: some_prompts(c, most) for k, c in self.contrasts.items()}
        self.score = openings_of(self.source.tokenizer, config.refusal_openings or REFUSAL)
        self.options: dict[str, Any] = {"protocol": config.protocol, "progress": False}
        self.options |= {"batch_size": config.batch_size}
        self.quick = self.options | {"score": self.score.first_tokens, "last_position": True}
        self.highlighted = self.layer
        hashes = [(name, each.sha256) for name, each in self.contrasts.items()]
        self.decided_by = {"concepts": hashes, "layer": self.layer, "seed": config.seed}
        self.decided_by |= {"openings": self.score.texts, "protocol": config.protocol.to_dict()}
        self.decided_by["least gap"] = config.thresholds.min_refused_gap

    def begin(self) -> None:
        """Run the requests, unmodified and with refusal ablated, and settle the layer."""
        self.layer = self._unmodified["layer"]
        each = [mean_difference(*sides)[self.layer] for sides in self.activations.values()]
        self.directions = torch.stack(each).float()

    def cosines(self, names: Iterable[str]) -> Pairs:
        """The cosine of every two true directions at every layer; `names` are all, in order."""
        n, n_layers = len(self.names), self.activations[self.refusal].target.shape[1]
        found = torch.ones(3, n, n, n_layers)
        for i, a in enumerate(names):
            for j in range(i + 1, n):
                sampling = self._sampling(self.source.config.confidence, CURVE_RESAMPLES)
                pair = compared(self.contrasts, self.activations, a, self.names[j])
                sure = estimate_cosine(Gram.of(**pair), **sampling)
                ends = torch.stack([sure.unbiased, sure.lower, sure.upper]).float()
                found[:, i, j] = found[:, j, i] = ends
        return found

    def run(self, name: str) -> Runs:
        """Run one concept's prompts under every ablation; add and sweep its own direction.

        Returns, with rows for none and then for interventions:

            kl           mean next-token KL of the baselines under each ablation, in nats
            separable    AUROC of the sides by a held-out discriminant `[3 1 + concept later_layer]`
            kept         share left of the sides' distance along the direction `[3 concept]`
            odds         refusal log-odds, targets first, with refusal and the concept ablated (of
                         requests with each concept), and random directions, on some targets
            chance       log-odds of some harmless requests with random directions of its norm added
            sweep        `Effects` on harmful requests of ablating its direction of each layer
            least        the same of what controls leave of it, if there are controls
            alone, constant, words   what controls leave of it; of replies, see `Evidence`

        and, for refusal alone, what `_effects_on_requests` returns.
        """
        what, compute = f"atlas: effects of {name}", lambda: self._run(name)
        return self.source.remember(what, self.decided_by, compute, (Effects,))

    def _run(self, name: str) -> Runs:
        contrast, sides = self.some[name], self.activations[name]
        m, random = len(self.names), self._unmodified["random"]
        prompts, n = contrast.target + contrast.baseline, len(contrast.target)
        every, here = torch.cat([self.directions, random]), self.names.index(name)
        several = self._unmodified["several"]  # the refusal's; zeros stand behind the others
        every = torch.nn.functional.pad(every[:, None], (0, 0, 0, len(several) - 1))
        every[0] = several
        references = affine_references(every, sides.baseline, hook=self.options["protocol"].hook)
        ablate = Interventions(every, None, references, last_position=True)
        own = self.directions[here]
        _, kl, stream = self._measured(prompts, ablate.at(range(m), "cpu"), ())
        rows = stream.split([n, len(prompts) - n], dim=1)
        scores = [cross_ablation.held_out_scores(*each) for each in zip(*rows, strict=True)]
        areas = auroc_interval(*(torch.stack(side) for side in zip(*scores, strict=True)))
        # The separation of the sides in cosine to the direction, over later layers.
        a, b = ((normalize(x, dim=-1) @ normalize(own, dim=-1)).mean(-1) for x in rows)
        apart = [a - b] if contrast.paired else [a, -b]
        samples = [IndependentSample(x[1:], x[:1].expand_as(x[1:])) for x in apart]
        kept = ratio_interval(samples, clusters=labels_of(contrast)[: len(samples)])
        few, harmless = self.scored(name), self.scored(self.refusal).baseline
        these = ablate.at([*((0, here) if here else range(m)), *range(m, len(every))], "cpu")
        odds = self._measured(few.target + few.baseline, these, self.score, len(few.target))[0]
        others = normalize(self._unmodified["added"], dim=-1) * own.norm()
        alone, swept = self._alone(name), self._unmodified["sweep"]  # of refusal
        added = Interventions(others, [self.layer] * len(others), None, True)
        return {
            "kl": kl[:, n:].mean(-1),
            "separable": torch.stack(areas).float(),
            "kept": torch.stack(kept).float(),
            "odds": odds,
            "chance": self._measured(harmless, added, self.score)[0][1:],
            "sweep": self._sweep(mean_difference(*sides).float()) if here else swept,
            "least": self._sweep(alone) if here and not alone.isnan().all() else None,
            "alone": alone,
            "words": self._words_alike(few, odds[0]) if here else torch.nan,
            "constant": causal.constant_token(self.source.model, [few], self.score, self.options),
        } | ({} if here else self._effects_on_requests())

    def _effects_on_requests(self) -> Runs:
        """Measure what every concept's direction does to requests.

        added        log-odds of harmless requests with each concept's direction added, and with
                     what controls leave of it `[2 concept harmless]`
        controlled   log-odds of harmful requests while that is ablated `[concept harmful]`
        covered      see `Evidence`
        """
        requests, model = self.scored(self.refusal), self.source.model
        alone = torch.stack([self._alone(name)[self.layer] for name in self.names])
        both, layer = torch.stack([self.directions, alone]), torch.tensor(self.layer)
        options = self.options | {"score": self.score, "last_position": True}
        baseline, hook = self.activations[self.refusal].baseline, self.options["protocol"].hook
        references = affine_references(alone, baseline, hook=hook)
        ablated = ablation_effects(model, requests.target, alone, references=references, **options)
        added = addition_effects(model, requests.baseline, both, layer, **options)
        covered = self._covered(requests)
        return {"added": added.log_odds, "controlled": ablated.log_odds, "covered": covered}

    def _covered(self, requests: Contrast) -> float:
        model, few = self.source.model, some_prompts(requests, FEW_PROMPTS).target
        others = [openings_of(self.source.tokenizer, x) for x in (SYMPATHY, ANSWERING)]
        odds = [opening_log_odds(model, few, x, **self.options) for x in (self.score, *others)]
        return float(torch.stack(odds).sigmoid().mean(-1).sum())

    def _words_alike(self, few: Contrast, odds: Tensor) -> float:
        requests = self.scored(self.refusal)
        known = spread(self._unmodified["requests"][0].tolist(), len(requests.target))
        each = [requests, few], [torch.tensor(known), odds[: len(few.target)]]
        return causal.words_alike(self.source.model, *each, self.score, self.options)

    def _alone(self, name: str) -> Float[Tensor, "layer d_model"]:
        """What controls leave of a concept's direction at each layer; NaN without controls."""
        every = mean_difference(*self.activations[name]).float()
        controls = {k: v for k, v in self.activations.items() if k != name}
        spans = causal.taken_out(self.source.model, controls, self.score)
        alone = [*map(cross_ablation.outside, every, spans[-1])]
        return torch.stack(alone) if len(spans) > 1 else torch.full_like(every, torch.nan)

    def _everywhere(self, prompts: Sequence[str], axes: Tensor) -> Tensor:
        """Log-odds while orthogonal directions are ablated together, at every token."""
        baseline, hook = self.activations[self.refusal].baseline, self.options["protocol"].hook
        references = affine_references(axes, baseline, hook=hook)
        these = Interventions(axes[None], None, references[None])
        runs = [(these, [0], range(len(prompts)))]
        return measured(self.source.model, prompts, runs, 2, self.score, self.options)[0][1]

    def _sweep(self, directions: Float[Tensor, "layer d_model"]) -> Effects:
        model, baseline = self.source.model, self.activations[self.refusal].baseline
        return causal.sweep_ablations(model, self.others.target, directions, baseline, self.quick)

    def scored(self, name: str) -> Contrast:
        """The prompts whose replies are scored: few where too little is refused to explain."""
        refuses = len(self._unmodified["random"]) > 0
        return self.some[name] if refuses else some_prompts(self.some[name], FEW_PROMPTS)

    def _measured(
        self, prompts: Sequence[str], these: Interventions, score: Any, n: int | None = None
    ) -> tuple[Tensor, ...]:
        """Log-odds, KL and later stream; random directions run on some of the first `n` prompts."""
        model, every = self.source.model, len(these.directions)
        read = cross_ablation.later_layers(self.layer, model.cfg.n_layers)
        few = cross_ablation.sampled(range(n or len(prompts)))
        whole = every - (len(self._unmodified["random"]) if score is self.score else 0)
        parts = (range(whole), range(len(prompts))), (range(whole, every), few)
        runs = [(these, [*which], some) for which, some in parts if which]
        options = self.options | {"read_layers": read}
        return measured(model, prompts, runs, 1 + every, score, options)

    @cached_property
    def _requests(self) -> tuple[Tensor, Tensor]:
        """Log-odds of a refusal behind all harmful and behind all harmless requests."""
        whole, how = self.contrasts[self.refusal], (self.score, self.options)

        def compute() -> Any:
            return causal.request_scores(self.source.model, whole, *how)

        return self.source.remember("atlas: scores of requests", self.decided_by, compute)

    @cached_property
    def others(self) -> Contrast:
        """The requests on which layers are swept: few where none is refused."""
        most = causal.EFFECT_PROMPTS if (self._requests[0] > 0).any() else FEW_PROMPTS
        return causal.other_prompts(self.contrasts[self.refusal], most)

    @cached_property
    def _unmodified(self) -> Runs:
        """Log-odds of all requests, refusal's sweep, random directions to ablate and to add."""

        def compute() -> Runs:
            model, sides = self.source.model, self.activations[self.refusal]
            requests = self._requests
            sweep = self._sweep(mean_difference(*sides).float())
            layer = causal.judged_layer(sweep, self.highlighted)
            settled = layer, self.score, self.options
            several = causal.refusal_directions(model, self.others, sides, *settled)
            harmful, harmless = ((side > 0).double().mean() for side in requests)
            least = self.source.config.thresholds.min_refused_gap
            n = causal.N_RANDOM if harmful - harmless > least else 0  # else inconclusive anyway
            rows = [side[:, layer] for pair in self.activations.values() for side in pair]
            generator = torch.Generator().manual_seed(self.source.config.seed)
            draw = partial(cross_ablation.random_directions, *rows, n=n, generator=generator)
            found = {"requests": requests, "random": draw(), "added": draw(), "layer": layer}
            found["sweep"] = sweep
            requested = some_prompts(
                self.some[self.refusal], causal.EFFECT_PROMPTS if n else FEW_PROMPTS
            )
            some = cross_ablation.sampled(requested.target)
            everywhere = self._everywhere(some, several)
            strongest = causal.strongest_layer(sweep)
            return found | {"several": several, "everywhere": everywhere, "strongest": strongest}

        return self.source.remember("atlas: requests", self.decided_by, compute, (Effects,))

    def evidence(self, name: str, runs: dict[str, Runs], confidence: float) -> Evidence:
        """The evidence on refusal and one concept; geometry alone without runs."""
        at, every = slice(self.layer, self.layer + 1), (self.contrasts, self.activations)
        rows = compared(*every, self.refusal, name, at=at)
        n_resamples = max(self.source.config.n_resamples, fewest_resamples(confidence))
        sure = cosine_statistics(**rows, **self._sampling(confidence, n_resamples))
        pair = {"refusal": self.contrasts[self.refusal], "negativity": self.contrasts[name]}
        found = replace(evidence(pair, None, sure, layer=0), layer=self.layer)
        if not runs:
            return found
        harm, own, i = runs[self.refusal], runs[name], 1 + self.names.index(name)
        known = self._unmodified
        earlier: Any = partial(Earlier.of, harm["sweep"], layer=self.layer, last=self.highlighted)
        alone, whole = own["alone"][self.layer], self.directions[i - 1]
        found = replace(
            found,
            highlighted=self.highlighted,
            n_directions=len(known["several"]),
            controlled_norm=float(alone.norm() / whole.norm()),
            strongest_layer=known["strongest"],
        )
        requests, statements = self.scored(self.refusal), self.scored(name)
        n, m = len(requests.target), len(statements.target)
        with_random = [0, 1, i, *range(1 + len(self.names), len(harm["odds"]))]
        controlled = harm["controlled"][i - 1], harm["added"][1, i - 1]
        responses = Responses(
            harmful=harm["odds"][with_random, :n],
            harmless=harm["odds"][[0, 1, i], n:],
            negative=own["odds"][:, :m],
            neutral=own["odds"][:3, m:],
            added=torch.cat([harm["odds"][:1, n:], harm["added"][0, [0, i - 1]], own["chance"]]),
            requests=known["requests"],
            earlier=earlier(own["sweep"]),
            kl=(float(harm["kl"][1]), float(harm["kl"][i])),
            controlled_earlier=own["least"] and earlier(own["least"]),
            controlled=None if alone.isnan().any() else controlled,
            everywhere=known["everywhere"],
            strongest=lowered_most(harm["sweep"], own["least"] or own["sweep"]),
        )
        used = [pair["refusal"], requests, statements, self.others]
        constant = harm["constant"] if harm["constant"] == own["constant"] else ""
        of_replies = {"constant_token": constant, "words_alike": own["words"]}
        found = replace(found, covered=harm["covered"], **of_replies)
        return compute_evidence(found, responses, contrasts=used, confidence=confidence)

    def _sampling(self, confidence: float, n_resamples: int) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(self.source.config.seed)
        return {"n_resamples": n_resamples, "confidence": confidence, "generator": generator}
