"""The page around the figures: verdict first, then all that it takes to check it."""

import json
from collections.abc import Iterable, Sequence
from html import escape
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

from ..activations import disk as artifacts
from ..experiment.results import Results
from ..uncertainty.effects import auroc_interval
from .figures import NAMED, Figure, figures

HEADLINES = {
    "distinct": "Refusal is a mechanism of its own here",
    "shared": "Refusal and {other} share a mechanism here",
    "partly shared": "Refusal and {other} share part of a mechanism here",
    "inconclusive": "Nothing can be concluded here",
}


def write_report(results: Results, path: str | Path) -> Path:
    """Write the page to a file, whole or not at all, and return its path.

    Raises:
        InputError: if the file can't be written.
    """
    path = Path(path)
    with artifacts.whole_directory(path.parent) as staging:
        (staging / path.name).write_text(html(results), "utf-8")
    return path


def html(results: Results) -> str:
    """The whole page: one file that asks for nothing else, offline or on.

    Everything from outside (prompts, names of models and files) is shown as the text it is.
    """
    from plotly.offline import get_plotlyjs

    light, dark = figures(results, theme="light"), figures(results, theme="dark")
    shown = [_figure(figure) for figure in light]
    data = [
        {"id": f"figure-{a.name}", "light": (x := _plain(a)), "dark": _patch(x, _plain(b))}
        for a, b in zip(light, dark, strict=True)
    ]
    other = results.contrasts["negativity"].name
    headline = HEADLINES[results.verdict.answer].format(other=other)
    source = files(__package__).joinpath("page.html").read_text("utf-8")
    return Template(source).substitute(
        title=escape(f"{results.model_name}: is refusal just {other}?"),
        model=escape(results.model_name),
        question=escape(f"Is refusal its own mechanism, or is it {other}?"),
        answer=escape(results.verdict.answer),
        headline=escape(headline),
        reasons=_items([*results.verdict.reasons, results.verdict.geometry]),
        rule=escape(results.verdict.rule),
        layer_note=escape(results.layer_note),
        main=shown[0],
        table=_table(
            ["measure", "cosine", "the published rule would say"],
            [[name, f"{value:+.4f}", reading] for name, value, reading in results.table()],
        ),
        uncertainty=_items(results.uncertainty()),
        figures="\n".join(shown[1:]),
        readable=_readable(results),
        tokens=_tokens(results),
        protocol=_table(
            ["choice", "value"],
            [[k, json.dumps(v)] for k, v in results.config.protocol.to_dict().items()],
        ),
        prompts=_table(
            ["contrast", "target", "baseline", "paired", "SHA-256 of the prompts"],
            [
                [
                    c.name,
                    f"{len(c.target)} {c.target_name}",
                    f"{len(c.baseline)} {c.baseline_name}",
                    "yes" if c.paired else "no",
                    c.sha256[:16],
                ]
                for c in results.contrasts.values()
            ],
        ),
        provenance=escape(json.dumps(artifacts.plain(results.provenance), indent=1)),
        plotly=get_plotlyjs(),
        data=_in_script(data),
    )


def _figure(figure: Figure) -> str:
    name, heading, caption, _, curves = figure
    return (
        f'<figure aria-labelledby="caption-{name}"><h3>{escape(heading)}</h3>'
        f'<div class="wide" tabindex="0" role="group" aria-label="{escape(heading)}">'
        f'<div class="chart" id="figure-{name}"></div></div>'
        f'<figcaption id="caption-{name}">{escape(caption)}</figcaption>{_numbers(curves)}</figure>'
    )


def _numbers(curves: dict[str, Any]) -> str:
    if not curves:
        return ""
    n_layers = max(map(len, curves.values()))
    rows = [
        [str(layer), *(_written(curve, layer) for curve in curves.values())]
        for layer in range(n_layers)
    ]
    names = ["layer", *(name.replace("_", " ") for name in curves)]
    return f"<details><summary>The numbers</summary>{_table(names, rows)}</details>"


def _written(curve: Any, layer: int) -> str:
    if layer >= len(curve) or not curve[layer].isfinite():
        return "undefined"
    return f"{float(curve[layer]):.4g}"


def _readable(results: Results) -> str:
    """Whether the classes can still be told apart under intervention, as a table."""
    if results.causal is None:
        return "<p>Nothing was intervened with.</p>"
    effects = results.causal.ablation
    layer = effects.read_layers[-1]
    rows = []
    for i, name in enumerate(effects.interventions[:NAMED]):
        cells = []
        for part in (effects.refusal, effects.negativity):
            area = auroc_interval(part.target_scores[i, -1], part.baseline_scores[i, -1])
            value, low, high = (float(end) for end in area)
            cells.append(
                f"{value:.2f} ({low:.2f} to {high:.2f})" if value == value else "not measured"
            )
        rows.append(["nothing" if name == "none" else name, *cells])
    pairs = [
        f"{results.contrasts[part].target_name} from {results.contrasts[part].baseline_name}"
        for part in ("refusal", "negativity")
    ]
    return (
        f"<p>AUROC at layer {layer}, of the best linear reading there, held out: 0.5 is chance, 1 "
        "always. It tells whether the information is gone, or only no longer acted on.</p>"
        + _table(["ablated", *pairs], rows)
    )


def _tokens(results: Results) -> str:
    if results.causal is None:
        return "None were looked for."
    tokens = results.causal.refusal_tokens
    named = ", ".join(repr(text) for text in tokens.texts) or "none"
    return escape(
        f"{named}: {tokens.how}. Their mean probability is {tokens.refused:.3f} on harmful prompts "
        f"and {tokens.answered:.3f} on harmless ones."
    )


def _items(texts: Iterable[str]) -> str:
    return "".join(f"<li>{escape(text)}</li>" for text in texts)


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    cells = "".join(f'<th scope="col">{escape(name)}</th>' for name in head)
    body = "".join(
        f'<tr><th scope="row">{escape(first)}</th>'
        + "".join(f"<td>{escape(cell)}</td>" for cell in rest)
        + "</tr>"
        for first, *rest in rows
    )
    return (
        '<div class="wide" tabindex="0" role="group" aria-label="table"><table><thead><tr>'
        f"{cells}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _plain(figure: Figure) -> Any:
    return json.loads(figure.chart.to_json())


def _patch(light: Any, dark: Any) -> list[tuple[list[str | int], Any]]:
    """What to set, and where, to make one figure's JSON the other's."""
    if type(light) is type(dark):
        if isinstance(light, dict) and light.keys() == dark.keys():
            return [
                ([key, *path], value)
                for key in light
                for path, value in _patch(light[key], dark[key])
            ]
        if isinstance(light, list) and len(light) == len(dark):
            return [
                ([i, *path], value)
                for i, pair in enumerate(zip(light, dark, strict=True))
                for path, value in _patch(*pair)
            ]
    return [] if light == dark else [([], dark)]


def _in_script(value: Any) -> str:
    """JSON that can stand in a script element: nothing in it can end that, or be read as markup."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text
