"""The whole experiment in one call: model, activations, directions, interventions, verdict."""

import logging
import platform
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..activations.extract import ContrastActivations, by_contrast
from ..activations.progress import RunBar
from ..activations.store import Cache
from ..directions.estimators import mean_difference
from ..directions.similarity import causal_cosine
from ..errors import InputError, InterventionError, check_tensors
from ..interventions.reply_openings import REFUSAL
from ..models.load import model_provenance
from ..prompts.contrast import Contrast
from ..uncertainty import CosineStatistics, cosine_statistics
from . import measures
from .cached_model import PACKAGES, CachedModel
from .causal import FEWEST_PROMPTS, NUISANCES, PARTS, Causal, intervene, smallest_set, steps
from .config import Config
from .distributed import is_main
from .evidence import compared, evidence
from .results import SAVED, Results
from .verdict import judge
from .wording import Names

if TYPE_CHECKING:
    from ..models import HookedModel

logger = logging.getLogger(__name__)

PUBLISHED_LAYER, PUBLISHED_DEPTH = 20, 32  # the published layer, and its model's layers


def run_experiment(
    config: Config | Mapping[str, Any] | str | None = None,
    *,
    model: "HookedModel | None" = None,
    progress: bool = True,
    cache: Cache | str | Path | None = None,
    **options: Any,
) -> Results:
    """Run the whole experiment and return its results.

    >>> results = run_experiment("organism:specific", resamples=400, interventions=False)

    Under `torchrun` or `accelerate launch` the processes share the work; each returns all results.

    Args:
        config, options: every choice of the run, or the model's name, and fields to replace
            (`Config.of`); None is the published experiment on Llama-3-8B-Instruct.
        model: a loaded model to use instead of `config.model`; unchanged, and never cached.
        progress: show one progress bar, which names the step.
        cache: folder for finished work; None stores nothing. A fully cached run loads no model.

    Raises:
        InputError: if `config` is not valid, or another process of the run has ended.
    """
    config = Config.of(config, **options)
    contrasts = config.contrasts()
    if len(config.protocol.positions) != 1:
        several = config.protocol.positions
        raise InputError(f"the experiment takes one position, not {several}: use `positions=(-1,)`")
    source = CachedModel(config, cache, model=model)
    origin, n_layers = source.remember(
        "model", {}, lambda: (model_provenance(source.model), source.model.cfg.n_layers)
    )
    layer, _ = highlighted_layer(config.layer, n_layers)
    n_prompts = sum(len(c.target) + len(c.baseline) for c in contrasts.values())
    planned = {"reading prompts": n_prompts}
    planned |= steps(contrasts, n_layers, doses=config.doses) if config.interventions else {}
    with RunBar(planned | {"statistics": n_prompts}, shown=progress and is_main()) as bar:
        return _run(source, contrasts, origin, layer, bar)


def _run(
    source: CachedModel, contrasts: dict[str, Contrast], origin: Any, layer: int, bar: RunBar
) -> Results:
    config = source.config
    logger.info("running the prompts of %s at every layer", ", ".join(contrasts))
    bar.begin("reading prompts")
    activations = by_contrast(partial(source.prompt_activations, progress=bar), contrasts)
    causal, missing = None, {}
    prompts: dict[str, Any] = {"prompts": [contrasts[part].sha256 for part in PARTS]}
    prompts["protocol"] = config.protocol.to_dict()
    if config.interventions and smallest_set(contrasts) >= FEWEST_PROMPTS:
        logger.info("ablating and adding the directions of %s", " and ".join(PARTS))
        how = {"layer": layer, "bar": bar}
        try:
            causal = _interventions(source, prompts, contrasts, activations, how)
        except InterventionError as error:
            logger.warning("there are no interventions: %s", error)
            missing = {"interventions": f"none: {error}"}
    known = provenance(origin, contrasts, config) | missing
    given: Any = {"config": config, "contrasts": contrasts, "causal": causal, "provenance": known}
    bar.begin("statistics")
    results = analyse(activations, **given)
    a, b = (results.directions[part] for part in PARTS)
    metric = source.remember(
        "causal inner product",
        prompts,
        lambda: causal_cosine(a, b, measures.effective_unembedding(source.model)),
    )
    bar.update(bar.total - bar.n)
    return replace(results, metrics=results.metrics | {"causal inner product": metric})


def _interventions(
    source: CachedModel, prompts: Any, contrasts: Any, sides: Any, how: Any
) -> Causal:
    config = source.config
    key = prompts | {"layer": how["layer"], "seed": config.seed}
    key["openings"] = config.refusal_openings or REFUSAL
    key |= {"doses": True} if config.doses else {}  # keys without doses stay as they were
    key["controls"] = [contrasts[name].sha256 for name in NUISANCES if name in contrasts]

    def run() -> Causal:
        return intervene(source.model, contrasts, sides, config=config, **how)

    return source.remember("interventions", key, run, SAVED)


def analyse(
    activations: Mapping[str, tuple[Tensor, Tensor]],
    *,
    config: Config | None = None,
    contrasts: Mapping[str, Contrast] | None = None,
    causal: Causal | None = None,
    provenance: Mapping[str, Any] | None = None,
) -> Results:
    """Return the results for given activations, without running a model.

    >>> results = analyse({"refusal": (harmful, harmless), "negativity": (negative, neutral)})

    Args:
        activations: pairs `[prompt layer d_model]` of `refusal`, `negativity` and any controls.
        config: layer, resamples, confidence, seed and thresholds; None takes the defaults.
        contrasts: the prompts behind the activations; None is unpaired, numbered prompts.
        causal: effects of the interventions; without them the verdict is inconclusive.
        provenance: the origin of the activations, in JSON values.

    Raises:
        InputError: if a part or the layer is missing, a number is not finite, or shapes differ.
    """
    config = config or Config()
    sides = _checked(activations)
    contrasts = _matching(contrasts, sides)
    layer, note = highlighted_layer(config.layer, sides["refusal"].target.shape[1])
    directions = {part: mean_difference(*pair) for part, pair in sides.items()}
    statistics = {p: _statistics(sides, contrasts, p, config) for p in [*sides][1:]}
    names = Names.of(contrasts["refusal"], contrasts["negativity"]).sets()
    projections = measures.projections(sides, names)
    sets = {n: rows for part in PARTS for n, rows in zip(names[part], sides[part], strict=True)}
    paired = all(contrasts[part].paired for part in PARTS)
    if causal is not None and causal.highlighted != layer:
        raise InputError(f"the interventions are of layer {causal.highlighted}, not {layer}")
    judged = layer if causal is None else causal.ablation.layer
    measured = evidence(contrasts, causal, statistics["negativity"], layer=judged)
    measured = replace(measured, highlighted=layer)
    return Results(
        config=config,
        contrasts=contrasts,
        layer=layer,
        layer_note=note,
        directions=directions,
        similarities=measures.depth_profile(sides, directions),
        norms=measures.norms(sides, directions),
        statistics=statistics,
        metrics=measures.by_metric(sides, directions),
        estimators=measures.by_estimator(sides, paired=paired),
        auroc={k: area[0] for k, area in measures.aurocs(projections, names).items()},
        projections=projections,
        plane=measures.in_plane(sets, directions),
        components=measures.in_components(sets),
        causal=causal,
        verdict=judge(measured, config.thresholds),
        provenance=dict(provenance or {"model": {"model": "activations handed over"}}),
    )


def _statistics(sides: Any, contrasts: Any, part: str, config: Config) -> CosineStatistics:
    return cosine_statistics(
        **compared(contrasts, sides, "refusal", part),
        n_resamples=config.n_resamples,
        confidence=config.confidence,
        generator=torch.Generator().manual_seed(config.seed),
    )


def _checked(activations: Mapping[str, tuple[Tensor, Tensor]]) -> dict[str, ContrastActivations]:
    """Check the activations; return float32 copies on the CPU, refusal and negativity first."""
    parts = [*dict.fromkeys((*PARTS, *activations))]
    for part in parts:
        if len(activations.get(part, ())) != 2:
            raise InputError(f"the activations lack {part!r} as a pair: target and baseline")
    sides = {part: ContrastActivations(*activations[part]) for part in parts}
    named = {
        f"{part}'s {name}": (side, f"{part}_{name} layer d_model")
        for part, pair in sides.items()
        for name, side in pair._asdict().items()
    }
    check_tensors(**named)
    return {
        part: ContrastActivations(*(side.detach().float().cpu() for side in pair))
        for part, pair in sides.items()
    }


def _matching(
    contrasts: Mapping[str, Contrast] | None, sides: Mapping[str, ContrastActivations]
) -> dict[str, Contrast]:
    """Check that contrasts fit the activations; by default, return contrasts of numbered prompts."""
    n_rows = {part: (len(pair.target), len(pair.baseline)) for part, pair in sides.items()}
    if contrasts is None:
        known, contrasts = Names().sets(), {}
        for part, sizes in n_rows.items():
            names = known.get(part, (f"{part} target", f"{part} baseline"))
            target, baseline = (
                tuple(f"{name} prompt {i}" for i in range(n))
                for name, n in zip(names, sizes, strict=True)
            )
            contrasts[part] = Contrast(part, target, baseline, *names)
    n_prompts = {part: (len(c.target), len(c.baseline)) for part, c in contrasts.items()}
    if n_rows != n_prompts:
        raise InputError(f"activations of {n_rows} do not go with prompts of {n_prompts}")
    return {part: contrasts[part] for part in n_rows}


def main(config: Config | None = None) -> Results:
    """Print and return the results of `run_experiment(config)`, like the published `main`.
    >>> results = main(Config("organism:specific", resamples=400, interventions=False))
    organism:specific, ...
    """
    results = run_experiment(config)
    print(results)
    return results


def highlighted_layer(layer: int | None, n_layers: int) -> tuple[int, str]:
    """Return the layer to highlight in a model of `n_layers`, and a sentence that says why.

    A `layer` of None is the published relative depth. Raises InputError if the layer is missing.
    """
    if layer is not None:
        if not 0 <= layer < n_layers:
            known = f"this model's layers are 0 to {n_layers - 1}"
            raise InputError(f"layer {layer} is out of range: {known}")
        return layer, f"layer {layer} of {n_layers}, as asked for"
    published = f"the published experiment's layer {PUBLISHED_LAYER} of {PUBLISHED_DEPTH}"
    if n_layers == PUBLISHED_DEPTH:
        return PUBLISHED_LAYER, published
    layer = round(PUBLISHED_LAYER * (n_layers - 1) / (PUBLISHED_DEPTH - 1))
    return layer, f"layer {layer} of {n_layers}, the relative depth of {published}"


def provenance(
    model: Mapping[str, Any], contrasts: Mapping[str, Contrast], config: Config
) -> dict[str, Any]:
    """Return the origin of a result: `model_provenance`, prompts, seed and software versions."""
    versions = {package: version(package) for package in ("refusal_lens", *PACKAGES)}
    return {
        "model": dict(model),
        "contrasts": {k: {"name": c.name, "sha256": c.sha256} for k, c in contrasts.items()},
        "seed": config.seed,
        "versions": {"python": platform.python_version()} | versions,
    }
