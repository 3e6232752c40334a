"""The report page: what stands where, that it asks for nothing, and that text stays text."""

import json
import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest
import torch

import refusal_lens as rl
from refusal_lens.attribution.components import Components
from refusal_lens.attribution.logit_lens import LogitLens
from refusal_lens.errors import InputError
from refusal_lens.plotting.text import with_minus
from refusal_lens.report.figures import cross_changes, figures
from refusal_lens.report.page import _patch, html, write_report
from refusal_lens.uncertainty.effects import Interval

HOSTILE = "<script>alert(1)</script>"


class Page(HTMLParser):
    """What a page is made of: its headings, the text outside of scripts, and what it would load."""

    def __init__(self, source: str):
        super().__init__()
        self.headings: list[int] = []
        self.text = ""
        self.loads: list[str] = []
        self.scripts = 0
        self.ids: list[str] = []
        self._silent = 0
        self.feed(source)

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        if re.fullmatch(r"h[1-6]", tag):
            self.headings.append(int(tag[1]))
        if tag in ("script", "style"):
            self._silent += 1
        self.scripts += tag == "script"
        self.ids += [values["id"]] if "id" in values else []
        self.loads += [values[name] for name in ("src", "action") if name in values]
        self.loads += [values["href"]] if tag == "link" else []

    def handle_endtag(self, tag):
        self._silent -= tag in ("script", "style")

    def handle_data(self, data):
        if not self._silent:
            self.text += data


def figure_data(source: str) -> list[dict]:
    inside = re.search(r'<script id="figure-data" type="application/json">(.*?)</script>', source)
    assert inside
    return json.loads(inside[1])


def made(n=24, layers=3, width=12, change=lambda rows: rows):
    generator = torch.Generator().manual_seed(0)
    rows = change(torch.randn(4, n, layers, width, generator=generator))
    rows[0, ..., 0] += 3
    rows[2, ..., :2] += 3
    config = rl.Config(n_resamples=1000, layer=min(1, layers - 1))
    activations = {"refusal": (rows[0], rows[1]), "negativity": (rows[2], rows[3])}
    return rl.analyse(activations, config=config)


@pytest.fixture(scope="module")
def page(quick_results):
    return html(quick_results("specific"))


def test_the_verdict_and_every_reason_come_before_the_first_figure(page, quick_results):
    results = quick_results("specific")
    verdict = results.verdict
    first = page.index('class="chart"')
    text = Page(page[:first]).text
    assert f"{verdict.answer}. {results.sentence()}" in text
    assert all(with_minus(line) in text for line in results.verdict_lines())


def test_it_is_made_from_saved_results_alone(page, quick_results, tmp_path):
    loaded = rl.Results.load(quick_results("specific").save(tmp_path))
    assert html(loaded) == page


def test_every_number_of_the_table_is_on_the_page(page, quick_results):
    text = Page(page).text
    for measure, value, rule in quick_results("specific").table():
        assert measure in text
        assert with_minus(f"{value:+.4f}") in text
        assert rule in text


def test_every_effect_stands_beside_what_a_random_direction_does(page, quick_results):
    text = Page(page[: page.index('class="question"')]).text
    evidence = quick_results("specific").verdict.evidence
    for kind in ("ablation", "addition"):
        effect, chance = (
            f"{float(x):.0%}"
            for x in (getattr(evidence, f"cross_{kind}").value, getattr(evidence, f"chance_{kind}"))
        )
        effect, chance = (
            with_minus(x.replace("%", " %").replace("-0 ", "0 ")) for x in (effect, chance)
        )
        assert re.search(rf"{effect} \[[^]]*\]{chance}", text)


def test_minus_signs_stand_before_negative_numbers_alone():
    assert with_minus("-0.01 [-1, 2] on 2024-07-26, safety-specific") == (
        "\N{MINUS SIGN}0.01 [\N{MINUS SIGN}1, 2] on 2024-07-26, safety-specific"
    )


def test_the_protocol_is_told_in_words(page):
    text = Page(page).text
    assert "at token \N{MINUS SIGN}1, counted from the end." in text
    assert "There is no system prompt." in text
    assert "generation_prompt" not in text


def test_every_prompt_is_in_a_table_with_its_projections(page, quick_results):
    results = quick_results("specific")
    text = Page(page).text
    for name, prompts in results.prompts().items():
        first = results.plane[name][0, results.layer].tolist()
        assert prompts[0] + name + "".join(with_minus(f"{x:.2f}") for x in first) in text


def test_nothing_is_loaded_from_anywhere(page):
    parsed = Page(page)
    assert parsed.loads == []
    assert "default-src 'none'" in page
    # The control: a page that does load something is seen to.
    assert Page('<img src="https://example.org/x.png">').loads == ["https://example.org/x.png"]


def test_it_stays_below_eight_megabytes(page):
    assert len(page.encode()) < 8_000_000


def test_headings_descend_one_step_at_a_time_and_ids_are_unique(page):
    parsed = Page(page)
    assert parsed.headings[0] == 1
    assert parsed.headings.count(1) == 1
    assert all(b - a <= 1 for a, b in zip(parsed.headings, parsed.headings[1:], strict=False))
    assert len(set(parsed.ids)) == len(parsed.ids)


def with_first_set_named(name, results):
    """Results whose harmful prompts have another name."""
    first = next(iter(results.plane))
    renamed = replace(results.contrasts["refusal"], target_name=name)
    own = {
        part: {name if key == first else key: rows for key, rows in sets.items()}
        for part, sets in results.projections.items()
    }
    return replace(
        results,
        contrasts={**results.contrasts, "refusal": renamed},
        plane={name if key == first else key: rows for key, rows in results.plane.items()},
        components={name if key == first else key: x for key, x in results.components.items()},
        projections=own,
    )


def test_text_from_outside_is_shown_and_not_run(quick_results):
    results = quick_results("specific")
    refusal = results.contrasts["refusal"]
    hostile = replace(refusal, name=HOSTILE, target=(HOSTILE, *refusal.target[1:]))
    results = replace(
        results,
        contrasts={**results.contrasts, "refusal": hostile},
        provenance={**results.provenance, "model": {"model": HOSTILE}},
    )
    source = html(with_first_set_named("</style>", results))
    assert HOSTILE not in source
    assert HOSTILE in Page(source).text
    plain = html(quick_results("entangled"))
    assert Page(source).scripts == Page(plain).scripts


def test_the_dark_figures_are_the_light_ones_with_the_patch_applied(page, quick_results):
    dark = {
        f"figure-{figure.name}": json.loads(figure.chart.to_json())
        for figure in figures(quick_results("specific"), theme="dark")
    }
    for figure in figure_data(page):
        made_dark = figure["light"]
        assert made_dark != dark[figure["id"]]
        for path, value in figure["dark"]:
            place = made_dark
            for step in path[:-1]:
                place = place[step]
            place[path[-1]] = value
        assert made_dark == dark[figure["id"]]


def test_a_patch_says_where_two_values_differ():
    assert _patch({"a": [1, 2], "b": 3}, {"a": [1, 5], "b": 3}) == [(["a", 1], 5)]
    assert _patch({"a": 1}, {"a": 1}) == []


def test_there_is_a_figure_for_every_kind_of_evidence(page):
    names = {figure["id"].removeprefix("figure-") for figure in figure_data(page)}
    assert names == {
        *("cosine", "sweep", "cross-ablate", "cross-add", "metrics", "estimators", "norms"),
        *("matrix-refusal-refusal", "matrix-negativity-negativity", "matrix-refusal-negativity"),
        *("plane", "components", "projections-refusal", "projections-negativity"),
    }


def test_cross_effects_are_the_changes_of_the_means(quick_results, page):
    results = quick_results("specific")
    effects = results.causal.ablation
    change = effects.refusal.target_log_odds[1] - effects.refusal.target_log_odds[0]
    (figure,) = (f for f in figure_data(page) if f["id"] == "figure-cross-ablate")
    drawn = figure["light"]["data"][0]["z"][0][0]
    assert drawn == pytest.approx(float(change.mean()), rel=0.01)


def test_the_openings_and_what_replies_begin_with_are_on_the_page(quick_results, page):
    text = Page(page).text
    causal = quick_results("specific").causal
    assert all(opening in text for opening in causal.openings.texts if "’" not in opening)
    assert "’" in "".join(causal.openings.texts)
    for prompts, replies in causal.replies.items():
        shares = [f"{replies[kind]:.3f}" for kind in ("refusal", "sympathy", "answer")]
        assert "".join((prompts, *shares)) in text, prompts
    assert f"{100 * quick_results('specific').verdict.evidence.covered:.0f} %" in text


def test_a_set_s_replies_stand_by_the_name_that_the_user_gave_the_set(quick_results):
    results = quick_results("specific")
    text = Page(html(with_first_set_named("mine", results))).text
    assert f"mine{results.causal.replies['harmful']['refusal']:.3f}" in text


def test_the_random_direction_shown_was_run_on_the_prompts_that_it_stands_for(quick_results):
    causal = quick_results("specific").causal
    for column, effects in enumerate((causal.ablation, causal.addition)):
        changes, rows = cross_changes(effects)
        assert effects.interventions[rows[-1]] == "random"
        assert changes.value[-1, column].isfinite()
        # No row of what did not run: an addition "to zero".
        assert changes.value[:-1, column].isfinite().all()


@pytest.mark.parametrize("layers", [1, 126])
def test_results_without_interventions_and_of_any_depth_make_a_page(layers):
    page = html(made(layers=layers))
    text = Page(page).text
    assert "inconclusive" in text
    assert "was not measured" in text
    assert "No intervention was run" in text


def test_results_that_are_all_undefined_make_a_page():
    same = made(change=lambda rows: torch.zeros_like(rows))
    nothing = {name: torch.full_like(v, torch.nan) for name, v in same.similarities.items()}
    page = html(replace(same, similarities=nothing))
    assert "undefined" in Page(page).text
    assert not re.search(r"[\[:,](NaN|-?Infinity)\b", page[page.index('id="figure-data"') :])


def test_what_attribution_found_is_on_the_page_with_its_figure():
    ends = torch.tensor([0.5, -0.25, 0.0, 0.0], dtype=torch.float64)
    names = ("L1H0", "L1 MLP", "embedding", "biases")
    writers = Components(names, Interval(ends, ends - 0.1, ends + 0.1), Interval(*[ends.sum()] * 3))
    words = LogitLens(((("<sorry>", 1.0),),), ((("sure", -1.0),),))
    source = html(made(), {"Who writes it": writers, "What it says": words})
    text = Page(source).text
    assert "Who writes it" in text
    assert "+0.5 [0.4, 0.6]" in text
    assert "'<sorry>'" in text
    drawn = {each["id"]: each["light"]["data"] for each in figure_data(source)}["figure-found-0"]
    assert drawn[0]["x"] == [0.5, -0.25]
    assert "figure-found-1" not in source
    assert "Where do the directions come from?" not in html(made())


def test_the_file_is_written_whole_and_says_where_it_can_not_be(quick_results, tmp_path):
    path = write_report(quick_results("specific"), tmp_path / "new" / "report.html")
    assert path.read_text("utf-8").rstrip().endswith("</html>")
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="can't write"):
        write_report(quick_results("specific"), tmp_path / "file" / "report.html")
