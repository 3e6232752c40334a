"""The HTML page: the verdict, then everything needed to check the verdict."""

import json
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

from ..activations import disk
from ..attribution.components import Components
from ..experiment import wording
from ..experiment.harmfulness import HarmAndRefusal
from ..experiment.results import Results
from ..interventions.cross_ablation import Intervention
from ..plotting.text import with_minus, written
from ..uncertainty.effects import auroc_interval
from .figures import Figure, figures, intervention_names


def write_report(results: Results, path: str | Path, found: Mapping[str, Any] = {}) -> Path:
    """Write the report of the results to a file and return the path; InputError on failure.

    `found` are what `harm_and_refusal` and functions of `attribution` return, by heading.
    >>> path = write_report(results, "report.html", {"What r says": logit_lens(model, r, k=4)})
    """
    path = Path(path)
    with disk.whole_directory(path.parent) as staging:
        (staging / path.name).write_text(html(results, found), "utf-8")
    return path


def html(results: Results, found: Mapping[str, Any] = {}) -> str:
    """Return the report of the results as HTML that loads no other file.

    The template `page.html` escapes everything but plotly's code and the data of the figures.
    """
    from jinja2 import Environment, StrictUndefined
    from plotly.offline import get_plotlyjs

    light, dark = figures(results, theme="light"), figures(results, theme="dark")
    for i, (heading, each) in enumerate(found.items()):
        for charts, theme in ((light, "light"), (dark, "dark")):
            if isinstance(each, Components | HarmAndRefusal):
                charts.append(Figure(f"found-{i}", heading, "", each.figure(theme=theme), {}))
    drawn = [[json.loads(f.chart.to_json()) for f in charts] for charts in (light, dark)]
    data = [
        {"id": f"figure-{figure.name}", "light": a, "dark": _patch(a, b)}
        for figure, a, b in zip(light, *drawn, strict=True)
    ]
    source = files(__package__).joinpath("page.html").read_text("utf-8")
    environment = Environment(autoescape=True, undefined=StrictUndefined)
    environment.filters |= {"minus": with_minus, "written": written}
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":"), "allow_nan": False}
    return environment.from_string(source).render(
        results=results,
        names=results.names,
        other=results.names.negativity,
        protocol=results.config.protocol,
        effects=wording.effects(results.verdict, results.names),
        figures={figure.name: figure for figure in light},
        decodable=_decodable(results),
        found={heading: each._rows() for heading, each in found.items()},
        provenance=json.dumps(disk.plain(results.provenance), indent=1),
        plotly=get_plotlyjs(),
        data=data,
    )


def _decodable(results: Results) -> list[list[str]]:
    """Return the held-out AUROC of both contrasts under each ablation, with intervals."""
    if results.causal is None:
        return []
    effects, names, rows = results.causal.ablation, intervention_names(results), []
    for i, intervention in enumerate(effects.interventions):
        cells = [names[intervention]]
        for part in (effects.refusal, effects.negativity):
            area = auroc_interval(part.target_scores[i, -1], part.baseline_scores[i, -1])
            value, low, high = (written(float(each), ".2f") for each in area)
            cells.append("not measured" if value == "undefined" else f"{value} ({low} to {high})")
        if intervention is not Intervention.RANDOM and {*cells[1:]} != {"not measured"}:
            rows.append(cells)
    return rows


def _patch(light: Any, dark: Any) -> list[tuple[list[str | int], Any]]:
    """Return the paths and values that turn the JSON of one figure into the other."""
    if not isinstance(light, (dict, list)) or type(light) is not type(dark):
        return [] if light == dark else [([], dark)]
    keys: Any = light if isinstance(light, dict) else range(len(light))
    return [([k, *path], value) for k in keys for path, value in _patch(light[k], dark[k])]
