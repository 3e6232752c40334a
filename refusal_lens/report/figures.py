"""Every figure that results hold, each with its heading and what to read off it."""

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from .. import plotting
from ..directions.similarity import cosine_matrix
from ..experiment.results import Results
from ..interventions import CrossEffects
from ..plotting.look import Theme
from ..uncertainty.effects import Interval, mean_interval

if TYPE_CHECKING:
    import plotly.graph_objects as go

NAMED = 5
"""Interventions of a `CrossEffects` before the random ones."""


class Figure(NamedTuple):
    """One figure of the page.

    `curves` holds the numbers across depth that it shows, by name, for those who can't see it.
    """

    name: str
    heading: str
    caption: str
    chart: "go.Figure"
    curves: dict[str, Float[Tensor, " layer"]]


def figures(results: Results, *, theme: Theme = "light") -> list[Figure]:
    """Every figure there is of these results, the main one first."""
    negativity = results.contrasts["negativity"].name
    both = f"{results.contrasts['refusal'].name} and {negativity}"
    sure = results.statistics["negativity"]
    found = [
        Figure(
            "cosine",
            f"Cosine of {both} across depth",
            "The plain cosine at every layer, its estimate with the noise taken off, how sure that "
            "is, and the controls on the same axes. Outside the grey band a cosine is more than "
            "two unrelated directions show.",
            results.figure(theme=theme),
            results.similarities
            | {"noise taken off": sure.unbiased}
            | {"interval, lower": sure.lower, "interval, upper": sure.upper},
        )
    ]
    if results.causal is not None:
        found += _causal(results, theme)
    options: dict[str, Any] = {"highlight": results.layer, "theme": theme}
    found += [
        Figure(
            "metrics",
            "Does the answer depend on the metric?",
            "The same two directions under other inner products: each dimension in its own spread, "
            "without the few dimensions of massive activation, whitened by the covariance within "
            "classes, and by the unembedding's.",
            plotting.metric_panel(results.metrics, **options),
            results.metrics,
        ),
        Figure(
            "estimators",
            "Does it depend on how a direction is estimated?",
            "The cosine where both directions are found in another way than as a difference of "
            "means.",
            plotting.metric_panel(
                results.estimators,
                title="Cosine of the two directions across depth, by estimator",
                **options,
            ),
            results.estimators,
        ),
        Figure(
            "norms",
            "How large the directions are",
            "Norms across depth. A direction whose norm is a rounding error of the stream's has no "
            "cosine.",
            plotting.norms_by_layer(results.norms, **options),
            results.norms,
        ),
    ]
    parts = (("refusal", "refusal"), ("negativity", "negativity"), ("refusal", "negativity"))
    for a, b in parts:
        names = results.contrasts[a].name, results.contrasts[b].name
        found.append(
            Figure(
                f"matrix-{a}-{b}",
                f"{names[0]} with itself, layer by layer"
                if a == b
                else f"{names[0]} with {names[1]}, layer by layer",
                "Cosine of every layer's direction with every other's: where a block of one colour "
                "begins, the direction settles.",
                plotting.cosine_matrix(
                    cosine_matrix(results.directions[a], results.directions[b]),
                    names=names,
                    **options,
                ),
                {},
            )
        )
    return found + _prompts(results, theme)


def _causal(results: Results, theme: Theme) -> list[Figure]:
    causal = results.causal
    assert causal is not None
    level = results.statistics["negativity"].confidence
    swept = {
        f"ablate {results.contrasts[part].name}": mean_interval(effects.log_odds, confidence=level)
        for part, effects in causal.sweep.items()
    }
    unchanged = causal.sweep["refusal"].unchanged.mean().item()
    found = [
        Figure(
            "sweep",
            "What ablating each layer's direction does to refusal",
            "Refusal log-odds of harmful prompts while one layer's direction is removed from every "
            "write to the residual stream. A curve that stays at the dotted line does nothing.",
            plotting.log_odds_by_ablated_layer(
                {name: found.value for name, found in swept.items()},
                without=dict.fromkeys(swept, unchanged),
                interval={name: (found.lower, found.upper) for name, found in swept.items()},
                confidence=level,
                highlight=results.layer,
                theme=theme,
            ),
            {name: found.value for name, found in swept.items()},
        )
    ]
    for effects, verb, what in (
        (causal.ablation, "ablate", "removed"),
        (causal.addition, "add", "added"),
    ):
        changes, names = cross_changes(results, effects)
        found.append(
            Figure(
                f"cross-{verb}",
                f"What happens where a direction is {what}",
                f"Change of mean refusal log-odds where layer {effects.layer}'s directions are "
                f"{what}, with intervals over prompts. Two mechanisms: each row moves its own "
                "columns. A typical random direction shows what any direction does.",
                plotting.cross_effects(
                    changes.value.float(),
                    interventions=[f"{verb} {name}" for name in names[0]],
                    outcomes=names[1],
                    interval=(changes.lower.float(), changes.upper.float()),
                    quantity="change in refusal log-odds (nats)",
                    title=f"Cross-effects: directions of layer {effects.layer} {what}",
                    theme=theme,
                ),
                {},
            )
        )
    return found


def cross_changes(
    results: Results, effects: CrossEffects
) -> tuple[Interval, tuple[list[str], list[str]]]:
    """Change of mean refusal log-odds, `[intervention outcome]`, and the names of both axes.

    The last row is a typical random direction: the one whose effect on harmful prompts is the
    median of all of them.
    """
    columns = [
        log_odds[1:] - log_odds[:1]
        for part in (effects.refusal, effects.negativity)
        for log_odds in (part.target_log_odds, part.baseline_log_odds)
    ]
    named = list(range(NAMED - 1))
    random = list(range(NAMED - 1, len(columns[0])))
    if random:
        means = columns[0][random].mean(-1)
        order = means.nan_to_num(nan=torch.inf).argsort()
        named.append(random[int(order[len(order) // 2])])
    cells = [mean_interval(column[named]) for column in columns]
    stacked = (torch.stack(ends, dim=1) for ends in zip(*cells, strict=True))
    rows = [_named(results, name) for name in effects.interventions[1:NAMED]]
    rows += ["a random direction"] if random else []
    return Interval(*stacked), (rows, list(results.prompts()))


def _named(results: Results, intervention: str) -> str:
    """An intervention's name with the contrasts' own names."""
    words = intervention.split()
    return " ".join(
        results.contrasts[word].name if word in results.contrasts else word for word in words
    )


def _prompts(results: Results, theme: Theme) -> list[Figure]:
    prompts = results.prompts()
    options: dict[str, Any] = {"highlight": results.layer, "theme": theme}
    names = {part: results.contrasts[part].name for part in ("refusal", "negativity")}
    found = [
        Figure(
            "plane",
            "The prompts in the plane of the two directions",
            "Each point is a prompt, projected on the two unit directions. Move the slider through "
            "the layers; the prompt shows on hover.",
            plotting.prompts_in_plane(
                results.plane,
                prompts,
                axes=tuple(f"along unit {name} direction" for name in names.values()),  # type: ignore[arg-type]
                **options,
            ),
            {},
        ),
        Figure(
            "components",
            "The prompts in their first two principal components",
            "No direction was chosen here: what separates the prompts most, whatever it is.",
            plotting.prompts_in_plane(
                results.components,
                prompts,
                axes=("first principal component", "second principal component"),
                title="Prompts in their first two principal components",
                **options,
            ),
            {},
        ),
    ]
    for part, sets in results.projections.items():
        areas = {
            name.removeprefix(f"{part} direction on "): area
            for name, area in results.auroc.items()
            if name.startswith(f"{part} direction")
        }
        found.append(
            Figure(
                f"projections-{part}",
                f"How far the prompts lie along {names.get(part, part)}",
                "Projections on a direction that the prompt took no part in, and how well they "
                "tell target from baseline (AUROC: 0.5 is chance, 1 always).",
                plotting.projections_by_layer(
                    sets, prompts, auroc=areas, direction=names.get(part, part), **options
                ),
                {f"AUROC on {name}": area for name, area in areas.items()},
            )
        )
    return found
