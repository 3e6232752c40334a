"""The whole experiment in one call: model, activations, directions, similarities across depth."""

import logging
import platform
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from ..activations.extract import ContrastActivations, extract
from ..activations.store import Cache
from ..directions.estimators import mean_difference
from ..directions.similarity import causal_cosine
from ..errors import InputError
from ..interventions import ContrastEffects, CrossEffects, Effects, RefusalTokens
from ..models.load import LensModel, model_provenance
from ..prompts.contrast import Contrast
from ..uncertainty import cosine_statistics
from . import measures
from .config import Config
from .distributed import ALONE, Team
from .evidence import Causal, can_intervene, evidence, intervene
from .lazy_model import LazyModel
from .results import Results, set_names
from .verdict import judge

Answer = TypeVar("Answer")

logger = logging.getLogger(__name__)

PUBLISHED_LAYER, PUBLISHED_DEPTH = 20, 32
"""The layer the published experiment reads, and the number of layers of the model it reads."""
MAIN_PARTS = ("refusal", "negativity")


def run_experiment(
    config: Config | None = None,
    *,
    model: LensModel | None = None,
    progress: bool = True,
    cache: Cache | str | Path | None = None,
    team: Team = ALONE,
) -> Results:
    """Run the whole experiment and return everything it found.

    `model` takes the place of `config.model` with one that is loaded already (it is left as it was
    found). With a `cache`, a folder, nothing is computed twice, and a run whose every part is there
    loads no model; a model that is handed over has no name to be found by, and is not cached. A
    `team` (`distributed.join`) divides the prompts over several processes.

    Raises:
        InputError: on anything in `config` that can't be used; if another process of the team ends.
    """
    config = config or Config()
    contrasts = config.contrasts()
    if len(config.protocol.positions) != 1:
        raise InputError(
            f"the protocol reads {len(config.protocol.positions)} positions: the experiment takes "
            "one, choose it with `positions=(-1,)`"
        )
    source = _Source.of(config, model, cache, team)
    n_layers = source.remember("layers", {}, lambda: source.lens().cfg.n_layers)
    layer, _ = highlighted_layer(config.layer, n_layers)
    logger.info("reading the prompts of %s at every layer", ", ".join(contrasts))
    found = extract(
        source.model,
        list(contrasts.values()),
        protocol=config.protocol,
        batch_size=config.batch_size,
        progress=progress,
        cache=source.cache,
        team=team,
    )
    activations = dict(zip(contrasts, found.values(), strict=True))
    directions = {part: mean_difference(*activations[part]) for part in MAIN_PARTS}
    causal = None
    if config.interventions and can_intervene(contrasts):
        logger.info("ablating and adding the directions of %s", " and ".join(MAIN_PARTS))
        causal = source.remember(
            "interventions",
            {
                "prompts": [contrasts[part].sha256 for part in MAIN_PARTS],
                "layer": layer,
                "protocol": config.protocol.to_dict(),
                "seed": config.seed,
                "directions": list(directions.values()),
            },
            lambda: intervene(
                source.lens(),
                contrasts,
                activations,
                directions,
                layer=layer,
                generator=torch.Generator().manual_seed(config.seed),
                protocol=config.protocol,
                batch_size=config.batch_size,
                progress=progress,
            ),
            (Causal, RefusalTokens, Effects, CrossEffects, ContrastEffects),
        )
    causal_inner_product = source.remember(
        "causal inner product",
        {"directions": list(directions.values())},
        lambda: causal_cosine(
            directions["refusal"],
            directions["negativity"],
            measures.effective_unembedding(source.lens()),
        ),
    )
    results = analyse(
        activations,
        config=config,
        contrasts=contrasts,
        causal=causal,
        provenance=provenance(
            source.remember("provenance", {}, lambda: model_provenance(source.lens())),
            contrasts,
            config,
        ),
    )
    metrics = {**results.metrics, "causal inner product": causal_inner_product}
    return replace(results, metrics=metrics)


@dataclass(frozen=True)
class _Source:
    """The model of a run, loaded when it is first needed, and what was computed with it before."""

    model: LensModel | LazyModel
    cache: Cache
    team: Team

    @classmethod
    def of(
        cls,
        config: Config,
        model: LensModel | None,
        cache: Cache | str | Path | None,
        team: Team,
    ) -> "_Source":
        if model is not None:
            return cls(model, Cache(None), team)
        lazy = LazyModel(
            config.model,
            device=config.device,
            dtype=config.torch_dtype(),
            revision=config.revision,
        )
        return cls(lazy, cache if isinstance(cache, Cache) else Cache(cache), team)

    def lens(self) -> LensModel:
        return self.model() if isinstance(self.model, LazyModel) else self.model

    def remember(
        self,
        what: str,
        decided_by: dict[str, Any],
        compute: Callable[[], Answer],
        types: tuple[type, ...] = (),
    ) -> Answer:
        """Computed by the leading process alone, and once for all runs that it is the same in."""
        if not isinstance(self.model, LazyModel):
            return self.team.once(compute)
        key = {"what": what, "model": self.model.identity, "decided by": decided_by}
        return self.team.once(lambda: self.cache.remember(key, compute, types))


def analyse(
    activations: Mapping[str, tuple[Tensor, Tensor]],
    *,
    config: Config | None = None,
    contrasts: Mapping[str, Contrast] | None = None,
    causal: Causal | None = None,
    unembedding: Float[Tensor, "d_model d_vocab"] | None = None,
    provenance: Mapping[str, Any] | None = None,
) -> Results:
    """Everything that activations alone can tell: all of the experiment but running the model.

    `activations` maps the parts `refusal` and `negativity`, then any controls, to their target's and
    baseline's activations, each `[prompt layer d_model]`, from whatever source. `contrasts` holds
    the prompts behind them, by the same names; without it the prompts are numbered and taken not to
    be in pairs. Without `causal` there is no verdict but inconclusive, without `unembedding` (as
    `measures.effective_unembedding` gives it) no causal inner product.

    Raises:
        InputError: if a part is missing, the sets differ in layers or width, hold a number that is
            not finite or do not go with their contrasts, or the layer to highlight isn't there.
    """
    config = config or Config()
    sides = _checked(activations)
    contrasts = dict(contrasts) if contrasts is not None else _numbered(sides)
    _check_contrasts(sides, contrasts)
    n_layers = sides["refusal"].target.shape[1]
    layer, note = highlighted_layer(config.layer, n_layers)
    directions = {part: mean_difference(*pair) for part, pair in sides.items()}
    statistics = {
        part: cosine_statistics(
            *sides["refusal"],
            *sides[part],
            a_paired=contrasts["refusal"].paired,
            b_paired=contrasts[part].paired,
            n_resamples=config.n_resamples,
            confidence=config.confidence,
            generator=torch.Generator().manual_seed(config.seed),
        )
        for part in list(sides)[1:]
    }
    names = set_names(contrasts)
    projections = measures.projections(sides, names)
    sets = {
        name: side
        for part in MAIN_PARTS
        for name, side in zip(names[part], sides[part], strict=True)
    }
    both_paired = all(contrasts[part].paired for part in MAIN_PARTS)
    found = evidence(contrasts, causal, statistics["negativity"], layer=layer)
    return Results(
        config=config,
        contrasts=contrasts,
        layer=layer,
        layer_note=note,
        directions=directions,
        similarities=measures.depth_profile(sides, directions),
        norms=measures.norms(sides, directions),
        statistics=statistics,
        metrics=measures.by_metric(sides, directions, unembedding),
        estimators=measures.by_estimator(sides, paired=both_paired),
        auroc=measures.aurocs(projections, names),
        projections=projections,
        plane=measures.in_plane(sets, directions),
        components=measures.in_components(sets),
        causal=causal,
        verdict=judge(found, config.thresholds),
        provenance=dict(provenance or {"model": {"model": "activations handed over"}}),
    )


def _checked(activations: Mapping[str, tuple[Tensor, Tensor]]) -> dict[str, ContrastActivations]:
    if missing := [part for part in MAIN_PARTS if part not in activations]:
        raise InputError(f"the activations lack {missing[0]!r}: hand over refusal and negativity")
    parts = [*MAIN_PARTS, *(part for part in activations if part not in MAIN_PARTS)]
    sides = {}
    for part in parts:
        pair = tuple(activations[part])
        if len(pair) != 2 or any(not isinstance(s, Tensor) or s.ndim != 3 for s in pair):
            raise InputError(
                f"the activations of {part!r} are not a pair of tensors [prompt layer d_model], "
                "target and baseline"
            )
        sides[part] = ContrastActivations(*(side.detach().float().cpu() for side in pair))
    shapes = {part: tuple(side.shape[1:]) for part, pair in sides.items() for side in pair}
    if len(set(shapes.values())) > 1 or any(
        p[0].shape[1:] != p[1].shape[1:] for p in sides.values()
    ):
        raise InputError(f"the sets differ in [layer d_model], {shapes}: take one model's")
    return sides


def _check_contrasts(
    sides: Mapping[str, ContrastActivations], contrasts: Mapping[str, Contrast]
) -> None:
    if list(sides) != list(contrasts):
        raise InputError(f"activations of {list(sides)} do not go with contrasts {list(contrasts)}")
    for part, contrast in contrasts.items():
        have = tuple(map(len, sides[part]))
        said = len(contrast.target), len(contrast.baseline)
        if have != said:
            raise InputError(f"{part!r} has {have} rows of activations and {said} prompts")


def _numbered(sides: Mapping[str, ContrastActivations]) -> dict[str, Contrast]:
    named = {"refusal": ("harmful", "harmless"), "negativity": ("negative", "neutral")}
    made = {}
    for part, pair in sides.items():
        names = named.get(part, (f"{part} target", f"{part} baseline"))
        target, baseline = (
            tuple(f"{name} prompt {i}" for i in range(len(side)))
            for name, side in zip(names, pair, strict=True)
        )
        made[part] = Contrast(part, target, baseline, target_name=names[0], baseline_name=names[1])
    return made


def main(config: Config | None = None) -> Results:
    """Run the experiment and print its table, as the published script's `main` does."""
    results = run_experiment(config)
    print(results)
    return results


def highlighted_layer(layer: int | None, n_layers: int) -> tuple[int, str]:
    """The layer to highlight in a model of `n_layers`, and a sentence that says why that one.

    Raises:
        InputError: if the model has no such layer.
    """
    if layer is not None:
        if not 0 <= layer < n_layers:
            raise InputError(
                f"layer {layer} is out of range: this model's layers are 0 to {n_layers - 1}"
            )
        return layer, f"layer {layer} of {n_layers}, as asked for"
    if n_layers == PUBLISHED_DEPTH:
        return PUBLISHED_LAYER, f"layer {PUBLISHED_LAYER}, the published experiment's"
    same_depth = round(PUBLISHED_LAYER * (n_layers - 1) / (PUBLISHED_DEPTH - 1))
    return same_depth, (
        f"layer {same_depth} of {n_layers}, the relative depth of the published experiment's layer "
        f"{PUBLISHED_LAYER} of {PUBLISHED_DEPTH}"
    )


def provenance(
    model: Mapping[str, Any], contrasts: Mapping[str, Contrast], config: Config
) -> dict[str, Any]:
    """Where a result came from: model, prompts, protocol, seed and the versions of what made it."""
    packages = ("refusal_lens", "transformer_lens", "transformers", "torch")
    return {
        "model": dict(model),
        "contrasts": {
            part: {
                "name": contrast.name,
                "target": contrast.target_name,
                "baseline": contrast.baseline_name,
                "n_target": len(contrast.target),
                "n_baseline": len(contrast.baseline),
                "paired": contrast.paired,
                "sha256": contrast.sha256,
            }
            for part, contrast in contrasts.items()
        },
        "seed": config.seed,
        "versions": {"python": platform.python_version()}
        | {package: version(package) for package in packages},
    }
