"""The cosine and the verdict of two contrasts under many protocols.

Layer `l` follows the count of each specification. Interventions always use the default protocol, so
known bugs of a specification affect its directions alone.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from math import isnan
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from ..activations.store import Cache
from ..directions.estimators import mean_difference
from ..errors import InputError
from ..experiment.cached_model import CachedModel
from ..experiment.causal import FEWEST_PROMPTS
from ..experiment.config import Config
from ..experiment.run import highlighted_layer
from ..experiment.verdict import Estimate, Evidence, Thresholds
from ..experiment.wording import Names
from ..interventions import Effects
from ..models.load import model_provenance
from ..prompts.contrast import Contrast
from ..uncertainty import Gram
from ..uncertainty.cosine import estimate_cosine, split_half_reliability
from ..uncertainty.effects import cosine_difference
from .activations import read_specifications
from .results import CURVES, Change, Sensitivity
from .specifications import Family, Specification, specify
from .verdicts import Measured, judge_all, measure_responses

if TYPE_CHECKING:
    from ..models import HookedModel

SIZES = (5, 10, 20, 50, 96)  # prompts (pairs, if paired) in a subset
CAUSAL_PROMPTS = 24  # prompts of each set under interventions
SUBSETS = 2000  # random subsets for the range of the cosine


def run_sensitivity(
    model: "str | Path | HookedModel",
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
    on_cosines: Callable[[Sensitivity], object] | None = None,
    cache: Cache | str | Path | None = None,
    **where: Any,
) -> Sensitivity:
    """Return the cosine and the verdict of two contrasts under every specification.

    A specification that the chat template refuses is skipped. InputError if the default is one of
    them, there are too few prompts, or the layer does not exist.

    Args:
        model, contrasts: the model or its name; refusal and negativity.
        layer: layer to report, from 0; None is layer 20 of 32, or the same relative depth.
        sizes, draws: prompts per set in the subsets (below the smallest set), and subsets per size.
        n_resamples, confidence: resamples behind each interval, and its confidence.
        causal_prompts: prompts of each set to intervene on; 0 makes all verdicts inconclusive.
        thresholds, seed: of the verdicts, None for the defaults; of subsets, resamples and chance.
        batch_size, progress: prompts in a forward pass, None derives it; whether to show progress.
        on_cosines: called with the cosines, without verdicts, before the interventions begin.
        cache, where: folder of finished work, from which an interrupted run resumes, and `device`,
            `dtype` and the like of `Config`; both for a model given by name alone.
    >>> sensitivity = run_sensitivity(model, contrasts, n_resamples=400, causal_prompts=0)
    """
    if causal_prompts and causal_prompts < FEWEST_PROMPTS:
        raise InputError(f"causal_prompts is {causal_prompts}: at least {FEWEST_PROMPTS}, or 0")
    remember, lens = _keeping(model, contrasts, causal_prompts, cache, where)
    at, _ = highlighted_layer(layer, lens.cfg.n_layers)
    specifications = specify(contrasts, sizes=sizes, draws=draws, seed=seed)
    options: dict[str, Any] = {"batch_size": batch_size, "progress": progress, "remember": remember}
    rows_of, skipped = read_specifications(lens, contrasts, specifications, **options)
    specifications = [each for each in specifications if each.name not in skipped]
    generator = torch.Generator().manual_seed(seed)
    sampling = {"n_resamples": n_resamples, "confidence": confidence, "generator": generator}
    measured = [_measure(each, rows_of(each), contrasts, **sampling) for each in specifications]
    rest = contrasts, causal_prompts, confidence, thresholds
    settings = {"seed": seed, "n_resamples": n_resamples, "causal_prompts": causal_prompts}
    known = _described(lens, contrasts, measured, settings) | {"layer": at, "skipped": skipped}
    known |= {"specifications": tuple(specifications), "confidence": confidence}
    known["changes"] = _changes(specifications, measured, at, confidence, seed)
    found = Sensitivity(verdicts=judge_all(measured, {}, *rest), **known)
    if on_cosines:
        on_cosines(found)
    options |= {"activations": rows_of(specifications[found.default]), "generator": generator}
    options |= {"n_prompts": causal_prompts, "least": (thresholds or Thresholds()).min_prompts}
    responses = measure_responses(lens, contrasts, measured, **options)
    return replace(found, verdicts=judge_all(measured, responses, *rest))


def _keeping(
    model: Any, contrasts: Any, n_prompts: int, cache: Any, where: dict[str, Any]
) -> tuple[Callable[..., Any], Any]:
    """Return a function that stores results `of` hashed inputs, and the loaded model."""
    name = model if isinstance(model, (str, Path)) else None
    source = CachedModel(Config.of(name, **where), cache, model=None if name else model)
    given = {"contrasts": [each.sha256 for each in contrasts], "prompts": n_prompts}

    def remember(what: str, inputs: str, run: Callable[[], Any]) -> Any:
        return source.remember(f"sensitivity: {what}", given | {"of": inputs}, run, (Effects,))

    return remember, source.model


def _described(model: Any, contrasts: Any, measured: Any, settings: Any) -> dict[str, Any]:
    """Return the curves of a `Sensitivity`, its names and its provenance."""
    known = {k: torch.stack([getattr(m.estimate, k) for m in measured]) for k in CURVES[1:]}
    known["plain"] = torch.stack([each.gram.plain for each in measured])
    reasons = tuple(each.estimate.reasons for each in measured)
    hashes = {contrast.name: contrast.sha256 for contrast in contrasts}
    provenance = {"model": model_provenance(model), "contrasts": hashes, **settings}
    words = {"names": Names.of(*contrasts), "provenance": provenance}
    return {**known, "reasons": reasons, **words}


def _measure(
    specification: Specification,
    rows: list[Float[Tensor, "_ layer d_model"]],
    contrasts: tuple[Contrast, Contrast],
    **sampling: Any,
) -> Measured:
    gram = Gram.of(*rows, a_paired=contrasts[0].paired, b_paired=contrasts[1].paired)
    estimate = estimate_cosine(gram, **sampling)
    reliabilities = [
        split_half_reliability(own, groups, generator=sampling["generator"])
        for own, groups in ((gram.aa, gram.groups_a), (gram.bb, gram.groups_b))
    ]
    ends = (estimate.unbiased, estimate.lower, estimate.upper)
    evidence = [
        Evidence(layer, specification.n_prompts, numbers[0], numbers[1], Estimate(*numbers[2:]))
        for layer, numbers in enumerate(torch.stack([*reliabilities, *ends], dim=-1).tolist())
    ]
    # Under resid_pre, layer l is the output of block l - 1, and layer 0 is the embedding.
    first = -1 if specification.protocol.hook == "resid_pre" else 0
    layers = torch.arange(first, first + len(evidence))
    directions = mean_difference(*rows[:2]), mean_difference(*rows[2:])
    return Measured(gram, estimate, *directions, layers, evidence)


def _changes(
    specifications: list[Specification],
    measured: list[Measured],
    layer: int,
    confidence: float,
    seed: int,
) -> tuple[Change, ...]:
    """Return the effect of each choice at one layer, the largest first and unknown effects last."""
    only = torch.arange(len(measured[0].evidence)) == layer
    here = [(s, m.gram.at(only)) for s, m in zip(specifications, measured, strict=True)]
    default = next(gram for specification, gram in here if specification.is_default)
    changes = []
    for each, gram in here:
        if each.family is Family.ONE_CHOICE:
            moved = Estimate(*map(float, cosine_difference(default, gram, confidence=confidence)))
            changes.append(Change(each.name, float(gram.plain), moved))
    sizes = [each.n_prompts for each in specifications if each.family is Family.SUBSET]
    changes += [_fewer_prompts(default, n, confidence, seed) for n in sizes[:1]]
    return tuple(sorted(changes, key=lambda c: (isnan(c.moved.value), -abs(c.moved.value))))


def _fewer_prompts(gram: Gram, n: int, confidence: float, seed: int) -> Change:
    """Return the change of the plain cosine over random subsets of `n` rows per group."""
    generator = torch.Generator().manual_seed(seed)

    def weights(size: int) -> Float[Tensor, "subset row"]:
        picked = torch.rand(SUBSETS, size, generator=generator).argsort(1)[:, :n]
        return torch.zeros(SUBSETS, size, dtype=torch.float64).scatter(1, picked, 1 / n)

    a, b = (torch.cat([*map(weights, map(len, x))], 1) for x in (gram.groups_a, gram.groups_b))
    inner = ((a @ gram.ab[0]) * b).sum(-1)
    norms = ((a @ gram.aa[0]) * a).sum(-1) * ((b @ gram.bb[0]) * b).sum(-1)
    cosines = inner / norms.sqrt()
    moved = cosines - gram.plain
    ends = (moved.quantile(q) for q in ((1 - confidence) / 2, (1 + confidence) / 2))
    scatter = Estimate(*map(float, (moved.mean(), *ends)))
    return Change(f"{n} prompts a set", float(cosines.mean()), scatter, n_prompts=n)
