"""The HTML page: the verdict, then everything needed to check the verdict."""

import json
import math
import re
from importlib.resources import files
from itertools import zip_longest
from pathlib import Path
from typing import Any

from ..activations import disk
from ..experiment import wording
from ..experiment.results import Results
from ..interventions.cross_ablation import Intervention
from ..prompts.protocol import Protocol
from ..uncertainty.effects import auroc_interval
from .figures import Curves, figures, intervention_names


def write_report(results: Results, path: str | Path) -> Path:
    """Write the report of the results to a file and return the path; InputError on failure.

    >>> path = write_report(results, "report.html")
    """
    path = Path(path)
    with disk.whole_directory(path.parent) as staging:
        (staging / path.name).write_text(html(results), "utf-8")
    return path


def html(results: Results) -> str:
    """Return the report of the results as HTML that loads no other file.

    The template `page.html` escapes everything but plotly's code and the data of the figures.
    """
    from jinja2 import Environment, StrictUndefined
    from plotly.offline import get_plotlyjs

    light, dark = figures(results, theme="light"), figures(results, theme="dark")
    drawn = [[json.loads(f.chart.to_json()) for f in charts] for charts in (light, dark)]
    data = [
        {"id": f"figure-{figure.name}", "light": a, "dark": _patch(a, b)}
        for figure, a, b in zip(light, *drawn, strict=True)
    ]
    source = files(__package__).joinpath("page.html").read_text("utf-8")
    template = Environment(autoescape=True, undefined=StrictUndefined).from_string(source)
    return template.render(
        results=results,
        names=results.names,
        other=results.names.negativity,
        lines=map(_minus, results.verdict_lines()),
        effects=[[*map(_minus, row)] for row in wording.effects(results.verdict, results.names)],
        figures={figure.name: (figure, _numbers(figure.curves)) for figure in light},
        uncertainty=map(_minus, results.uncertainty()),
        measures=[
            (name, _minus(f"{cosine:+z.4f}"), rule) for name, cosine, rule in results.table()
        ],
        decodable=_decodable(results),
        openings=_openings(results),
        replies=_replies(results),
        protocol=map(_minus, _protocol(results.config.protocol)),
        prompts=_prompts(results),
        contrasts=_contrasts(results),
        provenance=json.dumps(disk.plain(results.provenance), indent=1),
        plotly=get_plotlyjs(),
        data=_in_script(data),
    )


def _minus(text: str) -> str:
    """Return text with a true minus sign before each negative number."""
    return re.sub(r"(?<![\w.,)-])-(?=\d)", "\N{MINUS SIGN}", text)


def _protocol(p: Protocol) -> list[str]:
    """Return a sentence on every choice about how a prompt becomes a vector."""
    where = " and ".join(str(position).replace("_", " ") for position in p.positions)
    side = "output" if p.hook == "resid_post" else "input"
    own = "the model's own" if p.chat_template is None else p.chat_template[:200]
    return [
        f"The residual stream is read at the {side} of every block, at token {where}, counted "
        "from the end.",
        f"The chat template is {own}; templates that read the clock read {p.date}.",
        f"The prompt ends with{'' if p.generation_prompt else 'out'} the header of the reply.",
        "There is no system prompt."
        if p.system_prompt is None
        else f"The system prompt is {p.system_prompt!r}.",
        f"A thinking model {'may think' if p.thinking else 'finds its block of thought closed'}.",
        *(f"Known bug: {bug}." for bug in p.bugs),
    ]


def _prompts(results: Results) -> list[list[str]]:
    """Return every prompt with its set and its projections at the highlighted layer."""
    return [
        [prompt, name, *(_minus(f"{x:z.2f}") for x in at.tolist())]
        for name, prompts in results.prompts().items()
        for prompt, at in zip(prompts, results.plane[name][:, results.layer], strict=True)
    ]


def _numbers(curves: Curves) -> list[list[str]]:
    """Return a table of curves with one row per layer."""
    rows = zip_longest(*(curve.tolist() for curve in curves.values()), fillvalue=math.nan)
    return [
        [str(layer), *(f"{v:.4g}" if math.isfinite(v) else "undefined" for v in row)]
        for layer, row in enumerate(rows)
    ]


def _decodable(results: Results) -> list[list[str]]:
    """Return the held-out AUROC of both contrasts under each ablation, with intervals."""
    if results.causal is None:
        return []
    effects, names, rows = results.causal.ablation, intervention_names(results), []
    for i, intervention in enumerate(effects.interventions):
        cells = []
        for part in (effects.refusal, effects.negativity):
            area = auroc_interval(part.target_scores[i, -1], part.baseline_scores[i, -1])
            value, low, high = map(float, area)
            known = math.isfinite(value)
            cells.append(f"{value:.2f} ({low:.2f} to {high:.2f})" if known else "not measured")
        if intervention is not Intervention.RANDOM:
            rows.append([names[intervention], *cells])
    return rows


def _openings(results: Results) -> list[str]:
    """Return the refusal openings, each with a straight apostrophe alone."""
    if results.causal is None:
        return []
    return [*dict.fromkeys(text.replace("’", "'") for text in results.causal.openings.texts)]


def _replies(results: Results) -> list[list[str]]:
    """Return the mean probability of each kind of reply, a row for each prompt set."""
    if results.causal is None:
        return []
    return [
        [name, *(f"{replies[kind]:.3f}" for kind in ("refusal", "sympathy", "answer"))]
        for name, replies in zip(results.names[2:], results.causal.replies.values(), strict=True)
    ]


def _contrasts(results: Results) -> list[list[str]]:
    """Return the sets of every contrast, with sizes and the hash of the prompts."""
    rows = []
    for c in results.contrasts.values():
        sides = f"{len(c.target)} {c.target_name}", f"{len(c.baseline)} {c.baseline_name}"
        rows.append([c.name, *sides, "yes" if c.paired else "no", c.sha256[:16]])
    return rows


def _patch(light: Any, dark: Any) -> list[tuple[list[str | int], Any]]:
    """Return the paths and values that turn the JSON of one figure into the other."""
    keys: Any = ()
    if isinstance(light, dict) and isinstance(dark, dict) and light.keys() == dark.keys():
        keys = light
    elif isinstance(light, list) and isinstance(dark, list) and len(light) == len(dark):
        keys = range(len(light))
    elif light != dark:
        return [([], dark)]
    return [([k, *path], value) for k in keys for path, value in _patch(light[k], dark[k])]


def _in_script(value: Any) -> str:
    """Return JSON for a script element, with markup characters escaped."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text
