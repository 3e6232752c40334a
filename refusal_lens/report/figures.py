"""Every figure of the report. Headings and captions are in `captions.json`."""

import json
from importlib.resources import files
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from .. import plotting
from ..directions.similarity import cosine_matrix
from ..experiment.results import Results
from ..interventions import CrossEffects
from ..interventions.cross_ablation import Intervention
from ..plotting.theme import Theme
from ..uncertainty.effects import Interval, mean_interval

if TYPE_CHECKING:
    import plotly.graph_objects as go

Curves = dict[str, Float[Tensor, " layer"]]


class Figure(NamedTuple):
    """One figure of the page; `curves` holds its numbers across depth, for screen readers."""

    name: str
    heading: str
    caption: str
    chart: "go.Figure"
    curves: Curves


def figures(results: Results, *, theme: Theme = "light") -> list[Figure]:
    """Return every figure of the results in a light or dark theme, the main figure first."""
    sure = results.statistics["negativity"]
    curves = results.similarities | {"corrected for noise": sure.unbiased}
    curves |= {"interval, lower": sure.lower, "interval, upper": sure.upper}
    options: dict[str, Any] = {"highlight": results.layer, "theme": theme}
    by_measure = "Similarity of the two directions across depth, by measure"
    by_estimator = "Cosine of the two directions across depth, by estimator"
    metrics = plotting.cosine_by_layer(results.metrics, title=by_measure, **options)
    estimators = plotting.cosine_by_layer(results.estimators, title=by_estimator, **options)
    norms = plotting.norms_by_layer(results.norms, **options)
    return [
        _figure(results, "cosine", results.figure(theme=theme), curves),
        *_interventions(results, theme),
        _figure(results, "metrics", metrics, results.metrics),
        _figure(results, "estimators", estimators, results.estimators),
        _figure(results, "norms", norms, results.norms),
        *_matrices(results, options),
        *_prompts(results, options),
    ]


def _figure(
    results: Results,
    name: str,
    chart: "go.Figure",
    curves: Curves | None = None,
    *,
    text: str | None = None,
    **words: str,
) -> Figure:
    """Return a figure with the heading and caption of `text`, by default its name."""
    a, b = results.names[:2]
    sets = {"harmful": results.names.harmful, "harmless": results.names.harmless}
    words = {"a": a, "b": b} | sets | words
    captions = json.loads(files(__package__).joinpath("captions.json").read_text("utf-8"))
    found = captions[text or name]
    heading, caption = (found[part].format(**words) for part in ("heading", "caption"))
    return Figure(name, heading, caption, chart, curves or {})


def _matrices(results: Results, options: dict[str, Any]) -> list[Figure]:
    found = []
    for a, b in ("refusal", "refusal"), ("negativity", "negativity"), ("refusal", "negativity"):
        names = results.contrasts[a].name, results.contrasts[b].name
        matrix = cosine_matrix(results.directions[a], results.directions[b])
        chart = plotting.cosine_matrix(matrix, names=names, **options)
        name, other = f"matrix-{a}-{b}", "itself" if a == b else names[1]
        found.append(_figure(results, name, chart, text="matrix", a=names[0], b=other))
    return found


def _interventions(results: Results, theme: Theme) -> list[Figure]:
    if results.causal is None:
        return []
    level = results.statistics["negativity"].confidence
    swept = {
        f"ablate {results.contrasts[part].name}": mean_interval(effects.log_odds, confidence=level)
        for part, effects in results.causal.sweep.items()
    }
    curves = {name: mean.value for name, mean in swept.items()}
    unmodified = results.causal.sweep["refusal"].unchanged.mean().item()
    options: Any = {"confidence": level, "highlight": results.layer, "theme": theme}
    options["interval"] = {name: (mean.lower, mean.upper) for name, mean in swept.items()}
    without = dict.fromkeys(swept, unmodified)
    sweep = plotting.log_odds_by_ablated_layer(curves, without=without, **options)
    found, names = [_figure(results, "sweep", sweep, curves)], intervention_names(results)
    for verb, effects in (("ablate", results.causal.ablation), ("add", results.causal.addition)):
        changes, rows = cross_changes(effects)
        chart = plotting.cross_effects(
            changes.value.float(),
            interventions=[f"{verb} {names[effects.interventions[row]]}" for row in rows],
            outcomes=list(results.prompts())[: changes.value.shape[1]],
            interval=(changes.lower.float(), changes.upper.float()),
            quantity="change in refusal log-odds (nats)",
            title=f"Cross-effects of {effects.kind}: directions of layer {effects.layer}",
            theme=theme,
        )
        found.append(_figure(results, f"cross-{verb}", chart))
    if doses := results.causal.doses:
        for name, way in (("doses-added", "added"), ("doses-taken", "taken away")):
            found.append(_figure(results, name, doses.figure(way, theme=theme)))
    return found


def cross_changes(effects: CrossEffects) -> tuple[Interval, list[int]]:
    """Return changes of the mean refusal log-odds, `[intervention outcome]`, and their rows.

    The last row is the random direction whose effect is the median, on some harmful prompts under
    ablation and some harmless ones under addition. What did not run has no row, and an addition no
    columns of statements.
    """
    added = effects.kind == "addition"
    columns = [
        log_odds - log_odds[:1]
        for part in (effects.refusal, effects.negativity)[: 2 - added]
        for log_odds in (part.target_log_odds, part.baseline_log_odds)
    ]
    random = effects.rows(Intervention.RANDOM)
    left_out = {Intervention.NONE, Intervention.RANDOM}
    ran = columns[added].isfinite().any(-1).tolist()
    known = zip(effects.interventions, ran, strict=True)
    rows = [i for i, (each, runs) in enumerate(known) if runs and each not in left_out]
    if random:
        order = columns[added][random].nanmean(-1).nan_to_num(nan=torch.inf).argsort()
        rows.append(random[int(order[len(order) // 2])])

    def interval(changes: Float[Tensor, " prompt"]) -> Tensor:
        known = changes.isfinite()  # random directions are not run on every prompt
        return torch.stack(mean_interval(changes[known] if known.any() else changes))

    cells = [torch.stack([interval(column[row]) for row in rows]) for column in columns]
    return Interval(*torch.stack(cells, dim=1).unbind(-1)), rows


def intervention_names(results: Results) -> dict[Intervention, str]:
    """Return the name of each intervention, from the names of the contrasts."""
    a, b = results.names[:2]
    alone = f"{a} without {b}", f"{b} without {a}"
    less = f"{b}, first tokens taken out", f"{b}, controls taken out"
    ways = "to zero", "at every token", "resampled"
    others = [f"{name}, {how}" for how in ways for name in (a, b)]
    names = ("nothing", a, b, *alone, *less, *others, "a random direction")
    return dict(zip(Intervention, names, strict=True))


def _prompts(results: Results, options: dict[str, Any]) -> list[Figure]:
    prompts = results.prompts()
    a, b = (f"along unit {name} direction" for name in results.names[:2])
    plane = plotting.prompts_in_plane(results.plane, prompts, axes=(a, b), **options)
    title = "Prompts in their first two principal components"
    axes = "first principal component", "second principal component"
    placed: dict[str, Any] = options | {"axes": axes, "title": title}
    components = plotting.prompts_in_plane(results.components, prompts, **placed)
    found = [_figure(results, "plane", plane), _figure(results, "components", components)]
    for part, sets in results.projections.items():
        prefix, name = f"{part} direction on ", results.contrasts[part].name
        keys = [key for key in results.auroc if key.startswith(prefix)]
        areas = {key.removeprefix(prefix): results.auroc[key] for key in keys}
        chart = plotting.projections_by_layer(sets, prompts, auroc=areas, direction=name, **options)
        curves = {f"AUROC on {compared}": area for compared, area in areas.items()}
        words = {"text": "projections", "a": name}
        found.append(_figure(results, f"projections-{part}", chart, curves, **words))
    return found
