"""What a cosine depends on: the same two contrasts read in many ways, one choice at a time.

Three families of specifications, all compared at every layer:

- from the published experiment's protocol, faults included, to ours, one choice after another;
- one choice changed at a time around ours, and Arditi et al.'s positions;
- ours over random subsets of the prompts.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ..activations import disk as artifacts
from ..directions.estimators import mean_difference
from ..errors import InputError
from ..experiment.evidence import FEWEST_PROMPTS, Geometry
from ..experiment.run import highlighted_layer
from ..experiment.verdict import Estimate, Thresholds
from ..interventions.cross_ablation import random_directions
from ..models.load import LensModel, model_provenance
from ..prompts.contrast import Contrast
from ..prompts.protocol import (
    ARDITI,
    ASSUMED_SYSTEM_PROMPT,
    DEFAULT,
    LAST_PROMPT_TOKEN,
    PUBLISHED,
    PUBLISHED_PROMPTS,
    Protocol,
)
from ..uncertainty import CosineEstimate, Gram, estimate_cosine
from ..uncertainty.difference import cosine_difference
from ..uncertainty.reliability import split_half_reliability
from .specifications import OURS, Change, Rows, Sensitivity, Specification
from .streams import Reading, read_streams, readings
from .verdicts import judge_all, respond

SIZES = (5, 10, 20, 50, 96)
"""Prompts (pairs, in a paired contrast) of the subsets."""

STEPS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("every prompt", {}),
    ("no padding is read", {"padding": "left"}),
    ("one BOS", {"bos": "once"}),
    ("generation prompt", {"generation_prompt": True}),
    ("no system prompt", {"system_prompt": None}),
    ("layers counted at the output", {"hook": "resid_post"}),
)
"""The way from the published protocol to ours."""

SINGLE: tuple[tuple[str, dict[str, Any]], ...] = (
    ("padding is read", {"padding": "right_in_twos", "allow_bugs": True}),
    ("two BOS", {"bos": "twice", "allow_bugs": True}),
    ("no generation prompt", {"generation_prompt": False}),
    ("a system prompt", {"system_prompt": ASSUMED_SYSTEM_PROMPT}),
    ("layers counted at the input", {"hook": "resid_pre"}),
    ("read at the prompt's own last token", {"positions": (LAST_PROMPT_TOKEN,)}),
)
"""One choice changed in ours."""


CAUSAL_PROMPTS = 24
"""Prompts of each set on which the verdicts' interventions are read."""
N_RANDOM = 8
"""Random directions a layer that refusal's is compared with."""
SUBSETS = 2000
"""Random subsets from which the scatter of a small set's cosine is read."""


def run_sensitivity(
    model: LensModel,
    contrasts: tuple[Contrast, Contrast],
    *,
    layer: int | None = None,
    sizes: Sequence[int] = SIZES,
    draws: int = 3,
    n_resamples: int = 10_000,
    confidence: float = 0.95,
    causal_prompts: int = CAUSAL_PROMPTS,
    thresholds: Thresholds | None = None,
    seed: int = 0,
    batch_size: int | None = None,
    progress: bool = True,
) -> Sensitivity:
    """Read two contrasts in every way that is compared, and say what the cosine depends on.

    Protocols that share tokens share the run over them. Layer `l` means what each specification
    counts as `l`: for one that counts at the input of blocks it is our layer `l - 1`.

    Each specification's directions get a verdict at every layer. What ablating and adding them does
    is measured in one way for all of them, with the default protocol, which is how the model is
    used; the faults are those of the directions.

    Args:
        model: the model.
        contrasts: refusal and negativity.
        layer: the highlighted layer; None as in `Config`.
        sizes: how many prompts of each set the subsets have; sizes above what there is are left out.
        draws: random subsets of each size.
        n_resamples: resamples behind each interval.
        confidence: of the intervals.
        causal_prompts: prompts of each set, spread over it, on which interventions are read; with 0
            nothing is intervened with, which saves most of the time, and all verdicts are
            inconclusive.
        thresholds: of the verdicts.
        seed: of subsets, resamples and random directions.
        batch_size: prompts a forward pass; None finds it.
        progress: show progress bars.

    Raises:
        InputError: as `get_prompt_activations`; if there is no such layer; if the chat template takes
            no system prompt; with fewer than two prompts in a set, or from 1 to 3 `causal_prompts`.
    """
    at, _ = highlighted_layer(layer, model.cfg.n_layers)
    sides = [side for contrast in contrasts for side in (contrast.target, contrast.baseline)]
    if min(map(len, sides)) < 2:
        raise InputError("a set has a single prompt: subsets need at least two")
    if causal_prompts and causal_prompts < FEWEST_PROMPTS:
        raise InputError(
            f"causal_prompts is {causal_prompts}: at least {FEWEST_PROMPTS}, or 0 for no verdicts"
        )
    specifications = specify(contrasts, sizes=sizes, draws=draws, seed=seed)
    activations = _Activations(model, sides, specifications, batch_size, progress)
    generator = torch.Generator().manual_seed(seed)
    paired = (contrasts[0].paired, contrasts[1].paired)
    grams, estimates, directions, geometries = [], [], [], []
    for specification in specifications:
        read = activations.of(specification)
        gram = Gram.of(*read, a_paired=paired[0], b_paired=paired[1])
        estimate = estimate_cosine(
            gram, n_resamples=n_resamples, confidence=confidence, generator=generator
        )
        grams.append(gram)
        estimates.append(estimate)
        directions.append((mean_difference(*read[:2]), mean_difference(*read[2:])))
        geometries.append(_geometries(specification, gram, estimate, generator))
    responses = None
    if causal_prompts:
        counted_before = torch.tensor([s.protocol.hook == "resid_pre" for s in specifications])
        ours = next(s for s in specifications if s.name == OURS)
        refusal, negativity = (torch.stack(rows) for rows in zip(*directions, strict=True))
        responses = respond(
            model,
            contrasts,
            (refusal, negativity),
            torch.arange(refusal.shape[1]) - counted_before[:, None].long(),
            _random(activations.of(ours), generator),
            n_prompts=causal_prompts,
            batch_size=batch_size,
            progress=progress,
        )
    verdicts = judge_all(
        geometries, responses, paired=paired, confidence=confidence, thresholds=thresholds
    )
    plain = torch.stack([gram.plain for gram in grams])
    changes = _changes(specifications, grams, plain, at, confidence, seed)
    return Sensitivity(
        specifications=tuple(specifications),
        plain=plain,
        unbiased=torch.stack([estimate.unbiased for estimate in estimates]),
        lower=torch.stack([estimate.intervals.lower for estimate in estimates]),
        upper=torch.stack([estimate.intervals.upper for estimate in estimates]),
        reasons=tuple(estimate.reasons for estimate in estimates),
        verdicts=verdicts,
        changes=changes,
        layer=at,
        confidence=confidence,
        provenance={
            "model": model_provenance(model),
            "contrasts": {contrast.name: contrast.sha256 for contrast in contrasts},
            "seed": seed,
            "n_resamples": n_resamples,
            "causal_prompts": causal_prompts,
            "thresholds": artifacts.plain(thresholds or Thresholds()),
            "published system prompt": f"assumed: {ASSUMED_SYSTEM_PROMPT!r}",
        },
    )


def _geometries(
    specification: Specification, gram: Gram, estimate: CosineEstimate, generator: torch.Generator
) -> list[Geometry]:
    """What one specification's directions tell at every layer."""
    reliability = [
        split_half_reliability(own, groups, generator=generator)
        for own, groups in ((gram.aa, gram.groups_a), (gram.bb, gram.groups_b))
    ]
    ends = (estimate.unbiased, estimate.intervals.lower, estimate.intervals.upper)
    return [
        Geometry(
            layer=layer,
            n_prompts=specification.n_prompts,
            reliability_refusal=float(reliability[0][layer]),
            reliability_negativity=float(reliability[1][layer]),
            cosine=Estimate(*(float(end[layer]) for end in ends)),
        )
        for layer in range(len(gram.aa))
    ]


def _random(
    sides: Sequence[Float[Tensor, "_ layer d_model"]], generator: torch.Generator
) -> Float[Tensor, "layer random d_model"]:
    """Random directions of the activations' own covariance, at every layer."""
    each = [
        random_directions(*(side[:, layer] for side in sides), n=N_RANDOM, generator=generator)
        for layer in range(sides[0].shape[1])
    ]
    return torch.stack(each)


def specify(
    contrasts: tuple[Contrast, Contrast], *, sizes: Sequence[int], draws: int, seed: int
) -> list[Specification]:
    """Every way that is compared, ours among them."""
    sides = [side for contrast in contrasts for side in (contrast.target, contrast.baseline)]
    every: Rows = tuple(tuple(range(len(side))) for side in sides)
    first: Rows = tuple(rows[:PUBLISHED_PROMPTS] for rows in every)
    family = "from published to ours"
    published = f"published, {PUBLISHED_PROMPTS} prompts a set"
    found = [Specification(published, family, PUBLISHED, first)]
    protocol = PUBLISHED
    for name, choice in STEPS[:-1]:
        protocol = replace(protocol, **choice, name=f"published, {name}")
        found.append(Specification(f"+ {name}", family, protocol, every))
    found.append(Specification(OURS, family, DEFAULT, every))
    for name, choice in SINGLE:
        changed = replace(DEFAULT, **choice, name=f"default, {name}")
        found.append(Specification(name, "one choice changed", changed, every))
    for position in ARDITI.positions:
        read = replace(ARDITI, positions=(position,))
        found.append(Specification(f"position {position}", "Arditi et al.", read, every))
    generator = torch.Generator().manual_seed(seed)
    smallest = min(map(len, every))
    for size in sorted({size for size in sizes if 1 < size < smallest}):
        for draw in range(draws):
            rows = _subset(contrasts, every, size, generator)
            name = f"{size} prompts, draw {draw + 1}"
            found.append(Specification(name, "subset", DEFAULT, rows))
    return found


def _subset(
    contrasts: tuple[Contrast, Contrast], every: Rows, size: int, generator: torch.Generator
) -> Rows:
    """Random prompts of each set, in their order; the same rows on both sides where paired."""
    drawn: list[tuple[int, ...]] = []
    for i, rows in enumerate(every):
        if i % 2 and contrasts[i // 2].paired:
            drawn.append(drawn[-1])
            continue
        picked = torch.randperm(len(rows), generator=generator)[:size].sort().values
        drawn.append(tuple(picked.tolist()))
    return tuple(drawn)


class _Activations:
    """What every specification reads, each activation computed once."""

    def __init__(
        self,
        model: LensModel,
        sides: Sequence[tuple[str, ...]],
        specifications: Sequence[Specification],
        batch_size: int | None,
        progress: bool,
    ):
        self._places: dict[tuple[Protocol, int, tuple[int, ...]], list[Reading]] = {}
        for specification in specifications:
            for side in range(len(sides)):
                key = self._key(specification, side, len(sides[side]))
                if key not in self._places:
                    prompts = [sides[side][row] for row in key[2]]
                    self._places[key] = readings(model, prompts, specification.protocol)
        wanted = [reading for place in self._places.values() for reading in place]
        self._streams = read_streams(model, wanted, batch_size=batch_size, progress=progress)
        self._sizes = [len(side) for side in sides]

    def of(self, specification: Specification) -> list[Float[Tensor, "prompt layer d_model"]]:
        """The activations of the four sets, counted as the specification counts layers."""
        found = []
        for side, rows in enumerate(specification.rows):
            key = self._key(specification, side, self._sizes[side])
            places = self._places[key]
            if len(places) > len(rows):
                places = [places[row] for row in rows]
            streams = torch.stack([self._streams[place] for place in places])
            kept = (
                streams[:, 1:] if specification.protocol.hook == "resid_post" else streams[:, :-1]
            )
            found.append(kept)
        return found

    @staticmethod
    def _key(
        specification: Specification, side: int, n: int
    ) -> tuple[Protocol, int, tuple[int, ...]]:
        """Prompts are read alone, but for padding, which comes from the neighbour in the subset."""
        alone = specification.protocol.padding == "left"
        rows = tuple(range(n)) if alone else specification.rows[side]
        return specification.protocol, side, rows


def _changes(
    specifications: Sequence[Specification],
    grams: Sequence[Gram],
    plain: Float[Tensor, "specification layer"],
    layer: int,
    confidence: float,
    seed: int,
) -> tuple[Change, ...]:
    """How far each choice moves the cosine at one layer, the largest first, unknown ones last."""
    ours = next(i for i, s in enumerate(specifications) if s.name == OURS)
    only = torch.arange(plain.shape[1]) == layer
    changes = []
    smallest = [s for s in specifications if s.family == "subset"][:1]
    for i, specification in enumerate(specifications):
        if specification.family == "one choice changed":
            ends = cosine_difference(grams[ours].at(only), grams[i].at(only), confidence=confidence)
            value, lower, upper = (float(end[0]) for end in ends)
            becomes = float(plain[i, layer])
            changes.append(Change(specification.name, value, lower, upper, becomes))
    for specification in smallest:
        changes.append(
            _fewer_prompts(grams[ours].at(only), specification.n_prompts, confidence, seed)
        )
    return tuple(sorted(changes, key=lambda c: -abs(c.value) if c.value == c.value else torch.inf))


def _fewer_prompts(gram: Gram, n: int, confidence: float, seed: int) -> Change:
    """What the plain cosine at one layer is in random subsets of `n` rows a group."""
    generator = torch.Generator().manual_seed(seed)

    def weights(groups: tuple[int, ...]) -> Float[Tensor, "subset row"]:
        each = []
        for size in groups:
            picked = torch.rand(SUBSETS, size, generator=generator).argsort(1)[:, :n]
            chosen = torch.zeros(SUBSETS, size, dtype=torch.float64)
            each.append(chosen.scatter(1, picked, 1 / n))
        return torch.cat(each, dim=1)

    a, b = weights(gram.groups_a), weights(gram.groups_b)
    inner = ((a @ gram.ab[0]) * b).sum(-1)
    norms = ((a @ gram.aa[0]) * a).sum(-1) * ((b @ gram.bb[0]) * b).sum(-1)
    cosines = inner / norms.sqrt()
    moved = cosines - gram.plain[0]
    tail = (1 - confidence) / 2
    lower, upper = (float(moved.quantile(q)) for q in (tail, 1 - tail))
    middle = float(cosines.mean())
    return Change(f"{n} prompts a set", float(moved.mean()), lower, upper, becomes=middle)
