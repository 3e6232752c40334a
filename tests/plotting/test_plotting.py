"""Figures hold the data they were given, and can be read in every light."""

import inspect
import itertools
import json
import re

import numpy as np
import plotly.graph_objects as go
import plotly.io as pio
import pytest
import torch
from plotly.colors import sample_colorscale

from refusal_lens import plotting
from refusal_lens.errors import InputError
from refusal_lens.plotting.depth import PLOT_HEIGHT
from refusal_lens.plotting.matrices import DARK_SHARE
from refusal_lens.plotting.text import escaped, numbers, wrapped, written
from refusal_lens.plotting.theme import SIGNED, UNSIGNED, Style, palette, styles

THEMES = ["light", "dark"]
NAN = float("nan")


@pytest.fixture
def curve():
    return torch.linspace(0.3, -0.4, 32)


@pytest.fixture
def sets():
    generator = torch.Generator().manual_seed(0)
    names = ("harmful", "harmless", "negative", "neutral")
    return {name: torch.randn(128, 32, 2, generator=generator) for name in names}


def every_figure(n_layers: int = 32, *, value: float | None = None, theme: str = "light"):
    """Each figure of the package, by name."""
    generator = torch.Generator().manual_seed(1)

    def data(*shape: int) -> torch.Tensor:
        random = torch.rand(*shape, generator=generator)
        return random if value is None else torch.full(shape, value)

    sets = {"harmful": data(6, n_layers, 2), "harmless": data(5, n_layers, 2)}
    cosine = data(n_layers)
    n_rows = min(n_layers, 5)
    return {
        "cosine_by_layer": plotting.cosine_by_layer(
            {"refusal vs negativity": cosine, "organism:specific": data(n_layers)},
            interval=(cosine - 0.1, cosine + 0.1),
            band=(cosine - 0.2, cosine + 0.2),
            null=(data(n_layers) - 1, data(n_layers)),
            ceiling=data(n_layers),
            unbiased=data(n_layers),
            strongest=12,
            theme=theme,
        ),
        "log_odds_by_ablated_layer": plotting.log_odds_by_ablated_layer(
            {"harmful": data(n_layers)}, without={"harmful": 8.0}, theme=theme
        ),
        "norms_by_layer": plotting.norms_by_layer({"refusal": data(n_layers)}, theme=theme),
        "cosine_matrix": plotting.cosine_matrix(data(n_layers, n_layers), theme=theme),
        "position_by_layer": plotting.position_by_layer(data(5, n_layers), theme=theme),
        "concept_map": plotting.concept_map(data(3, 3, 3, n_layers), ["a", "b", "c"], theme=theme),
        "cross_effects": plotting.cross_effects(
            data(n_rows, n_rows),
            interventions=[f"ablate {i}" for i in range(n_rows)],
            outcomes=[f"outcome {i}" for i in range(n_rows)],
            theme=theme,
        ),
        "intervals_by_name": plotting.intervals_by_name(
            {name: {"joy": data(3).tolist()} if n_layers else {} for name in "ab"}, theme=theme
        ),
        "prompts_in_plane": plotting.prompts_in_plane(sets, theme=theme),
        "projections_by_layer": plotting.projections_by_layer(
            {name: points[..., 0] for name, points in sets.items()},
            auroc={"harmful vs harmless": data(n_layers)},
            theme=theme,
        ),
    }


def trace(figure, name):
    (found,) = [t for t in figure.data if t.name == name]
    return found


def notes(figure):
    return [note.text for note in figure.layout.annotations]


def texts(node):
    """Every string in a figure's JSON."""
    if isinstance(node, str):
        yield node
    elif isinstance(node, dict):
        for key, child in node.items():
            yield from texts(child) if key != "template" else ()
    elif isinstance(node, list):
        for child in node:
            yield from texts(child)


# --- the cosine across depth ---------------------------------------------------------------------


def test_the_curve_is_the_cosine_against_whole_layers(curve):
    figure = plotting.cosine_by_layer(curve)
    drawn = trace(figure, "cosine similarity")
    assert list(drawn.x) == list(range(32))
    assert drawn.y == pytest.approx(curve.tolist(), abs=1e-4)
    assert figure.layout.xaxis.title.text == "layer (output of block)"
    assert figure.layout.yaxis.title.text == "cosine similarity"
    assert figure.layout.yaxis.zeroline is True
    low, high = figure.layout.yaxis.range
    assert low < curve.min()
    assert curve.max() < high


@pytest.mark.parametrize("layer", [0, 20, 31])
def test_the_highlighted_layer_is_ruled_and_the_curve_s_value_there_labelled(curve, layer):
    figure = plotting.cosine_by_layer(curve, highlight=layer)
    assert f"layer {layer}" in notes(figure)
    label = f"<b>{written(curve[layer].item())}</b>"
    (note,) = (note for note in figure.layout.annotations if note.text == label)
    assert (note.x, note.y) == (layer, pytest.approx(curve[layer].item(), abs=1e-4))
    assert [shape.x0 for shape in figure.layout.shapes] == [layer]


def test_no_layer_is_highlighted_where_none_is_asked_for_or_the_curve_ends_before(curve):
    for figure in (
        plotting.cosine_by_layer(curve, highlight=None),
        plotting.cosine_by_layer(curve[:20], highlight=20),
    ):
        assert len(figure.data) == 1
        assert not figure.layout.shapes
        assert not figure.layout.annotations


def test_several_models_of_different_depth_share_a_figure(curve):
    deep = torch.linspace(0, 0.8, 80)
    figure = plotting.cosine_by_layer({"shallow": curve[:12], "deep": deep}, highlight=20)
    assert len(trace(figure, "shallow").y) == 12
    assert len(trace(figure, "deep").y) == 80
    assert figure.layout.xaxis.range == (-0.6, 79.6)
    assert sum("<b>" in note for note in notes(figure)) == 1  # of the deep one
    assert figure.layout.showlegend is not False


def test_hover_tells_every_number_of_a_layer(curve):
    figure = plotting.cosine_by_layer(
        curve,
        interval=(curve - 0.1, curve + 0.1),
        band=(curve - 0.2, curve + 0.2),
        null=(torch.full((32,), -0.05), torch.full((32,), 0.06)),
        ceiling=torch.full((32,), 0.9),
        unbiased=2 * curve,
        confidence=0.9,
    )
    text = trace(figure, "cosine similarity").text[20]
    value = curve[20].item()
    for number in (value, value - 0.1, value + 0.1, value - 0.2, value + 0.2, -0.05, 0.06):
        assert written(number) in text
    assert "90" in text
    assert "95" not in text
    assert trace(figure, "noise ceiling").text[20] == "<b>0.900</b>"
    assert trace(figure, "corrected for noise").text[20] == f"<b>{written(2 * value)}</b>"
    assert figure.layout.hovermode == "x unified"


def test_a_band_runs_along_its_ends_and_breaks_at_nan(curve):
    low, high = curve - 0.1, curve + 0.1
    low[5] = NAN
    figure = plotting.cosine_by_layer(curve, interval=(low, high))
    band = trace(figure, "95 % interval")
    assert band.fill == "toself"
    gap = band.x.index(None)
    assert band.x[:gap] == (0, 1, 2, 3, 4, 4, 3, 2, 1, 0)
    assert band.y[:gap] == pytest.approx([*low[:5].tolist(), *high[:5].flip(0).tolist()], abs=1e-4)
    assert 5 not in band.x


def test_bands_go_to_the_curve_they_name(curve):
    ends = (curve - 0.1, curve + 0.1)
    figure = plotting.cosine_by_layer({"a": curve, "b": -curve}, interval={"b": ends})
    assert "interval" in trace(figure, "b").text[0]
    assert "interval" not in trace(figure, "a").text[0]


def test_the_causally_strongest_layer_is_marked_beside_the_highlighted_one(curve):
    figure = plotting.cosine_by_layer(curve, strongest=12)
    assert {shape.x0: shape.line.dash for shape in figure.layout.shapes} == {12: "dot", 20: None}


def test_the_range_holds_everything_drawn_and_stays_within_what_a_cosine_can_be(curve):
    figure = plotting.cosine_by_layer(curve, ceiling=torch.full((32,), 0.97))
    low, high = figure.layout.yaxis.range
    assert low < -0.4
    assert 0.97 < high < 1.1
    narrow = plotting.cosine_by_layer(curve / 100).layout.yaxis.range
    assert narrow == plotting.cosine_by_layer(curve / 200).layout.yaxis.range


def test_labels_of_neighbouring_curves_do_not_touch():
    figure = plotting.cosine_by_layer(
        {str(i): torch.full((32,), 0.1 + 0.005 * i) for i in range(6)}, highlight=20
    )
    low, high = figure.layout.yaxis.range
    labels = [note for note in figure.layout.annotations if note.ay is not None]
    values = [note.y for note in labels]
    heights = [PLOT_HEIGHT * (note.ay - low) / (high - low) for note in labels]
    assert min(a - b for a, b in itertools.pairwise(heights)) >= 27.9  # 20 pixels on a phone
    assert 0 < heights[-1] < heights[0] < PLOT_HEIGHT
    assert values == sorted(values, reverse=True)  # in the order of their values
    # The labels are placed by value, so they keep this order at any size; and the control:
    assert {note.ayref for note in labels} == {"y"}
    assert PLOT_HEIGHT * (max(values) - min(values)) / (high - low) < 19.9


def test_no_interval_leaves_what_a_cosine_can_be(curve):
    figure = plotting.cosine_by_layer(
        curve, interval=(curve - 1, curve + 1), unbiased=curve + 0.9, highlight=None
    )
    band = trace(figure, "95 % interval")
    assert (min(band.y), max(band.y)) == (-1, 1)
    assert "\N{MINUS SIGN}0.700 to 1.000" in trace(figure, "cosine similarity").text[0]
    assert max(trace(figure, "corrected for noise").y) == 1


def test_the_legend_lists_curves_and_the_subtitle_explains_bands(curve):
    ends = (curve - 0.1, curve + 0.1)
    curves = {"a": curve, "b": curve + 0.1, "c": curve + 0.2}
    figure = plotting.cosine_by_layer(
        curves, interval=ends, band=ends, null=ends, ceiling=curve + 0.5, unbiased=curve
    )
    listed = [t.name for t in figure.data if t.showlegend is not False]
    assert listed == ["noise ceiling", "corrected for noise", "a", "b", "c"]
    more = plotting.cosine_by_layer(curves | {"d": curve}, ceiling=curve + 0.5, unbiased=curve)
    listed = [t.name for t in more.data if t.showlegend is not False]
    assert listed == ["noise ceiling", "a", "b", "c", "d"]  # at most five
    for explained in (
        "shaded: 95 % intervals",
        "lighter: for all layers at once",
        "grey: permuted",
    ):
        assert explained in figure.layout.title.text


def test_mistakes_are_named(curve):
    with pytest.raises(InputError, match="highlight=-1"):
        plotting.cosine_by_layer(curve, highlight=-1)
    with pytest.raises(InputError, match="differ in layer, 32 and 31"):
        plotting.cosine_by_layer(curve, interval=(curve[:31], curve[:31]))
    with pytest.raises(InputError, match="'c'"):
        plotting.cosine_by_layer({"a": curve}, band={"c": (curve, curve)})
    with pytest.raises(InputError, match="below 0"):
        plotting.norms_by_layer({"refusal": -torch.ones(3)})
    with pytest.raises(InputError, match="1 interventions for 2 values"):
        plotting.cross_effects(torch.ones(2, 1), interventions=["a"], outcomes=["b"])
    with pytest.raises(InputError, match="lies outside"):
        plotting.position_by_layer(torch.ones(2, 3), selected=(2, 0))
    with pytest.raises(InputError, match="0 prompts of 'b' for 4 values"):
        plotting.prompts_in_plane({"b": torch.ones(4, 3, 2)}, {"a": ["x"] * 4})
    with pytest.raises(InputError, match="differ in layer"):
        plotting.prompts_in_plane({"a": torch.ones(4, 3, 2), "b": torch.ones(4, 2, 2)})
    with pytest.raises(InputError, match="without names"):
        plotting.log_odds_by_ablated_layer({"a": curve}, without={"b": 1.0})


# --- the other figures ---------------------------------------------------------------------------


def test_log_odds_stand_against_those_with_nothing_ablated():
    log_odds = {"harmful": torch.tensor([8.0, -3.0, 5.0]), "harmless": torch.tensor([-9.0] * 3)}
    figure = plotting.log_odds_by_ablated_layer(log_odds, without={"harmful": 8.4}, highlight=1)
    assert trace(figure, "harmful").y == (8.0, -3.0, 5.0)
    assert 8.4 in [shape.y0 for shape in figure.layout.shapes]
    assert [note.y for note in figure.layout.annotations if "<b>" in note.text] == [-3.0, -9.0]
    assert "nats" in figure.layout.yaxis.title.text


def test_norms_are_on_a_log_axis_which_leaves_zero_out():
    norms = {"refusal": torch.tensor([0.0, 1e-16, 2.0]), "residual stream": torch.ones(3)}
    figure = plotting.norms_by_layer(norms)
    assert figure.layout.yaxis.type == "log"
    assert trace(figure, "refusal").y == (None, 1e-16, 2.0)


def test_every_metric_has_a_curve_and_its_value_at_the_marked_layer():
    metrics = {name: torch.rand(8) for name in ("plain", "whitened", "causal")}
    figure = plotting.cosine_by_layer(metrics, highlight=3)
    for name, values in metrics.items():
        assert trace(figure, name).y == pytest.approx(values.tolist(), abs=1e-4)
        assert any(written(values[3].item()) in note for note in notes(figure))
    assert (
        len(
            {(trace(figure, name).line.dash, trace(figure, name).marker.symbol) for name in metrics}
        )
        == 3
    )


def test_the_layer_matrix_keeps_rows_and_columns_apart():
    matrix = torch.arange(6).reshape(2, 3) / 10
    matrix[0, 1] = NAN
    figure = plotting.cosine_matrix(matrix, names=("refusal", "negativity"), highlight=1)
    assert figure.data[0].z == ([0.0, None, 0.2], [0.3, 0.4, 0.5])
    assert (figure.data[0].zmin, figure.data[0].zmax) == (-1, 1)
    assert "refusal" in figure.layout.yaxis.title.text
    assert "negativity" in figure.layout.xaxis.title.text
    assert {(s.x0, s.x1, s.y0, s.y1) for s in figure.layout.shapes} == {(0.5, 1.5, 0.5, 1.5)}
    assert "layer 1: 0.400" in figure.layout.title.text


def test_the_layer_matrix_counts_from_the_embedding_where_it_is_the_first_row():
    figure = plotting.cosine_matrix(torch.rand(4, 4), highlight=1, first=-1)
    assert (figure.data[0].x0, figure.data[0].y0) == (-1, -1)
    assert figure.layout.xaxis.range == figure.layout.yaxis.range == (-1.5, 2.5)
    assert {(s.x0, s.x1, s.y0, s.y1) for s in figure.layout.shapes} == {(0.5, 1.5, 0.5, 1.5)}
    cell = figure.data[0].z[2][2]  # layer 1
    assert f"layer 1: {written(cell)}"[:12] in figure.layout.title.text


def test_a_page_of_one_figure_fills_the_window_and_loads_nothing(curve):
    page = plotting.page(plotting.cosine_by_layer(curve, title=HOSTILE))
    assert 'name="viewport"' in page
    assert "calc(100vh - 80px)" in page
    assert "<script>alert" not in page
    assert not re.search(r"(?:src|href)=", re.sub(r"<script.*?</script>", "", page, flags=re.S))
    tall = plotting.page(plotting.cosine_by_layer(curve).update_layout(height=900))
    assert '"height":900' in tall


def test_positions_are_listed_from_the_top_and_the_selected_cell_is_outlined():
    values = torch.arange(-5.0, 5.0).reshape(2, 5)
    figure = plotting.position_by_layer(values, selected=(0, 3))
    assert figure.layout.yaxis.ticktext == ("\N{MINUS SIGN}2", "\N{MINUS SIGN}1")
    assert figure.layout.yaxis.range == (1.5, -0.5)
    assert {(s.x0, s.y0) for s in figure.layout.shapes} == {(2.5, -0.5)}
    assert (figure.data[0].zmin, figure.data[0].zmax) == (-5, 5)
    assert plotting.position_by_layer(values + 6).data[0].zmin == 1


def test_cross_effects_write_each_effect_with_its_interval():
    effects = torch.tensor([[-8.25, NAN]])
    figure = plotting.cross_effects(
        effects,
        interventions=["ablate refusal"],
        outcomes=["refusal", "sympathy"],
        interval=(effects - 1, effects + 1),
    )
    first, second = notes(figure)
    assert "\N{MINUS SIGN}8.2" in first
    assert "\N{MINUS SIGN}9.2 to \N{MINUS SIGN}7.2" in first
    assert second == "not<br>measured"
    assert figure.layout.yaxis.ticktext == ("ablate refusal",)


def test_the_slider_moves_every_set_to_its_place_at_that_layer(sets):
    figure = plotting.prompts_in_plane(sets, highlight=20)
    (slider,) = figure.layout.sliders
    assert slider.active == 20
    assert [step.label for step in slider.steps] == [str(i) for i in range(32)]
    for layer in (0, 20, 31):
        moved, axes, which = slider.steps[layer].args
        assert which == (0, 1, 2, 3)
        for i, points in enumerate(sets.values()):
            assert moved["x"][i] == pytest.approx(points[:, layer, 0].tolist(), abs=2e-3)
            assert moved["y"][i] == pytest.approx(points[:, layer, 1].tolist(), abs=2e-3)
            low, high = axes["xaxis.range"]
            assert low < points[:, layer, 0].min()
            assert points[:, layer, 0].max() < high
    shown = slider.steps[20].args[0]
    assert [list(t.x) for t in figure.data] == shown["x"]
    assert [list(t.y) for t in figure.data] == shown["y"]
    assert slider.steps[5].args[0]["x"] != shown["x"]


def test_the_slider_takes_distributions_and_title_along(sets):
    auroc = torch.linspace(0.5, 1, 32)
    figure = plotting.projections_by_layer(
        {name: points[..., 0] for name, points in sets.items()},
        auroc={"harmful vs harmless": auroc},
        highlight=7,
    )
    assert [t.type for t in figure.data] == ["violin"] * 4
    assert (
        f"AUROC harmful vs harmless {written(auroc[7].item(), '.2f')}" in figure.layout.title.text
    )
    moved, layout, which = figure.layout.sliders[0].steps[30].args
    assert which == (0, 1, 2, 3)
    assert len(moved["x"]) == 4
    assert (
        f"layer 30; AUROC harmful vs harmless {written(auroc[30].item(), '.2f')}"
        in layout["title.text"]
    )


def test_prompts_show_on_hover_in_the_order_of_their_points(sets):
    prompts = {name: [f"{name} prompt {i}" for i in range(128)] for name in sets}
    for figure in (
        plotting.prompts_in_plane(sets, prompts),
        plotting.projections_by_layer({k: v[..., 0] for k, v in sets.items()}, prompts),
    ):
        assert trace(figure, "neutral").text[17] == "neutral prompt 17"


def test_a_plane_of_four_times_128_prompts_and_32_layers_stays_small(sets):
    prompts = {name: ["a prompt of usual length, " * 3] * 128 for name in sets}
    assert len(plotting.prompts_in_plane(sets, prompts).to_json()) < 600_000


# --- all of them ---------------------------------------------------------------------------------


@pytest.mark.parametrize("n_layers", [0, 1, 126])
def test_few_and_many_layers_give_figures(n_layers):
    for name, figure in every_figure(n_layers).items():
        json.loads(figure.to_json())
        if n_layers == 0:
            assert any(text.startswith("No ") for text in notes(figure)), name
        elif name != "cross_effects":
            labelled = figure.layout.xaxis.dtick
            assert labelled is None or n_layers / labelled <= 16, name


def test_values_that_are_all_undefined_are_said_to_be():
    for name, figure in every_figure(value=NAN).items():
        assert any("undefined (NaN)" in text for text in notes(figure)), name
    for name, figure in every_figure(value=0.5).items():
        assert not any("undefined" in text for text in notes(figure)), name


def test_no_nan_is_written_into_the_json():
    for figure in every_figure(value=NAN).values():
        assert "NaN" not in re.sub("undefined .NaN.", "", figure.to_json())


HOSTILE = "<script>alert(1)</script> & <b>5</b> costs $5 to $10 %{x}"


def test_text_from_outside_is_shown_and_not_read():
    curve, points = torch.rand(3), torch.rand(2, 3, 2)
    figures = [
        plotting.cosine_by_layer({HOSTILE: curve}, title=HOSTILE, highlight=1),
        plotting.log_odds_by_ablated_layer({HOSTILE: curve}, without={HOSTILE: 1.0}),
        plotting.norms_by_layer({HOSTILE: curve}),
        plotting.cosine_by_layer({HOSTILE: curve, "b": curve}),
        plotting.cosine_matrix(torch.rand(3, 3), names=(HOSTILE, HOSTILE), highlight=1),
        plotting.position_by_layer(
            torch.rand(1, 3), positions=[HOSTILE], quantity=HOSTILE, title=HOSTILE
        ),
        plotting.cross_effects(
            torch.rand(1, 1), interventions=[HOSTILE], outcomes=[HOSTILE], quantity=HOSTILE
        ),
        plotting.prompts_in_plane(
            {HOSTILE: points}, {HOSTILE: [HOSTILE] * 2}, axes=(HOSTILE, HOSTILE)
        ),
        plotting.projections_by_layer(
            {HOSTILE: points[..., 0]},
            {HOSTILE: [HOSTILE] * 2},
            auroc={HOSTILE: curve},
            direction=HOSTILE,
        ),
    ]
    for figure in figures:
        shown = " ".join(texts(json.loads(figure.to_json())))
        assert "&lt;script&gt;" in shown
        assert "<script" not in shown
        assert "<b>5" not in shown
        assert "$" not in shown
        assert "%{x} " not in shown
        assert "10 %{x}" not in shown


def test_escaping_changes_nothing_else():
    assert escaped("naïve <b> & 'c' \"d\" 日本") == "naïve &lt;b&gt; &amp; 'c' \"d\" 日本"
    assert escaped("\ud800") == "?"


def test_long_text_is_wrapped_and_cut():
    rows = wrapped("word\n" * 200, width=40, lines=3).split("<br>")
    assert len(rows) == 3
    assert all(len(row) <= 40 for row in rows)
    assert rows[-1].endswith("…")
    assert wrapped("short") == "short"


def test_numbers_keep_four_digits_and_gaps():
    tensor = torch.tensor([[0.123456, NAN], [float("inf"), -1234567.0]], dtype=torch.float64)
    assert numbers(tensor) == [[0.1235, None], [None, -1235000.0]]
    assert numbers(torch.tensor([0.1031], dtype=torch.bfloat16)) == [0.1030]
    assert written(-0.0004) == "0.000"
    assert written(-0.5, ".1f") == "\N{MINUS SIGN}0.5"
    assert written(None) == written(NAN) == "undefined"


def test_figures_leave_what_they_are_given_as_it_was(curve):
    curve.requires_grad_()
    before = curve.detach().clone()
    plotting.cosine_by_layer(curve, interval=(curve - 1, curve + 1))
    plotting.norms_by_layer({"refusal": curve.abs()})
    assert torch.equal(curve, before)


# --- the theme -----------------------------------------------------------------------------------


def test_the_template_is_on_the_figures_of_the_package_alone():
    every_figure(3)
    assert pio.templates.default == "plotly"
    assert not any("refusal" in name for name in pio.templates)
    other = go.Figure().to_dict()["layout"]["template"]["layout"]
    themed = plotting.cosine_by_layer(torch.rand(3)).to_dict()["layout"]["template"]["layout"]
    assert other.get("paper_bgcolor") != themed["paper_bgcolor"]


def test_the_default_template_of_the_user_does_not_reach_the_figures(monkeypatch):
    before = plotting.cosine_by_layer(torch.ones(3)).to_json()
    monkeypatch.setattr(pio.templates, "default", "plotly_dark")
    assert plotting.cosine_by_layer(torch.ones(3)).to_json() == before


def linear(colour):
    c = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    return np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)


def luminance(colour):
    return float(linear(colour) @ [0.2126, 0.7152, 0.0722])


def contrast(a, b):
    low, high = sorted((luminance(a), luminance(b)))
    return (high + 0.05) / (low + 0.05)


# Machado, Oliveira and Fernandes 2009, full severity, on linear RGB
VISION = {
    "normal": np.eye(3),
    "deuteranopia": np.array(
        [
            [0.367322, 0.860646, -0.227968],
            [0.280085, 0.672501, 0.047413],
            [-0.011820, 0.042940, 0.968881],
        ]
    ),
    "protanopia": np.array(
        [
            [0.152286, 1.052583, -0.204868],
            [0.114503, 0.786281, 0.099216],
            [-0.003882, -0.048116, 1.051998],
        ]
    ),
}
XYZ = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])


def lab(colour, vision="normal"):
    xyz = XYZ @ np.clip(VISION[vision] @ linear(colour), 0, 1) / [0.9505, 1, 1.089]
    x, y, z = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


def told_apart(a, b):
    """By dash, or by colour in every vision and by lightness in grey; and by symbol, always."""
    seen = [np.linalg.norm(lab(a.colour, v) - lab(b.colour, v)) for v in VISION]
    in_grey = abs(lab(a.colour)[0] - lab(b.colour)[0])
    return a.symbol != b.symbol and (a.dash != b.dash or (min(seen) >= 15 and in_grey >= 9))


@pytest.mark.parametrize("theme", THEMES)
def test_no_two_styles_differ_by_colour_alone(theme):
    for group in (palette(theme).concepts.values(), palette(theme).series):
        for a, b in itertools.combinations(group, 2):
            assert told_apart(a, b), (a, b)


@pytest.mark.parametrize("theme", THEMES)
def test_the_four_prompt_sets_differ_in_every_vision_even_without_symbols(theme):
    sets = [
        palette(theme).concepts[n].colour for n in ("harmful", "harmless", "negative", "neutral")
    ]
    for a, b in itertools.combinations(sets, 2):
        for vision in VISION:
            assert np.linalg.norm(lab(a, vision) - lab(b, vision)) >= 20, (a, b, vision)


def test_red_and_green_of_one_lightness_would_not_pass_for_different():
    red, green = Style("#c05a4a", "solid", "circle"), Style("#6f8a3a", "solid", "square")
    assert not told_apart(red, green)


@pytest.mark.parametrize("theme", THEMES)
def test_every_colour_of_text_can_be_read(theme):
    page = palette(theme).background
    for figure in every_figure(theme=theme).values():
        plain = figure.to_dict()
        assert plain["layout"]["template"]["layout"]["paper_bgcolor"] == page
        if figure.data[0].type == "heatmap":
            plain["layout"].pop("annotations", None)  # these stand on cells: the test below
        for colour in font_colours(plain):
            assert contrast(colour, page) >= 4.5, colour


def font_colours(node, key=""):
    if isinstance(node, dict):
        for name, child in node.items():
            if (name == "color" and key.endswith("font")) or name == "font_color":
                yield child
            else:
                yield from font_colours(child, name)
    elif isinstance(node, (list, tuple)):
        for child in node:
            yield from font_colours(child, key)
    elif isinstance(node, str):
        yield from re.findall(r"(?<=[;\"]color:)#[0-9a-f]{6}", node)


@pytest.mark.parametrize("theme", THEMES)
def test_curves_stand_out_from_the_page(theme):
    page = palette(theme)
    faint = {"harmless", "neutral"}  # light partners of a dark target, drawn open
    for name, style in page.concepts.items():
        assert contrast(style.colour, page.background) >= (1.9 if name in faint else 3), name
    for style in page.series:
        assert contrast(style.colour, page.background) >= 3


def shades(scale):
    """A colour scale at 101 shares, as hex colours."""
    sampled = sample_colorscale(list(scale), 101, colortype="tuple")
    return ["#" + "".join(f"{round(255 * channel):02x}" for channel in each) for each in sampled]


@pytest.mark.parametrize("scale", [SIGNED, UNSIGNED])
def test_heatmaps_grow_lighter_throughout(scale):
    lightness = [lab(shade)[0] for shade in shades(scale)]
    assert all(b > a for a, b in itertools.pairwise(lightness))


def test_the_numbers_of_cross_effects_can_be_read_on_their_cells():
    for i, shade in enumerate(shades(SIGNED)):
        text = "#000000" if i / 100 > DARK_SHARE else "#ffffff"
        assert contrast(shade, text) >= 4.5, shade


def test_a_concept_keeps_its_colour_from_figure_to_figure():
    concepts = palette("light").concepts
    for name, concept in {
        "refusal": "refusal",
        "refusal vs negativity": "negativity",
        "Refusal / alarm": "alarm",
        "harmful vs harmless": "harmful",
        "refusal vs mean negative": "negative",
        "residual stream": "residual",
    }.items():
        assert styles([name], "light")[name] == concepts[concept]
    assert styles(["nullify"], "light")["nullify"] not in concepts.values()


def test_no_two_of_a_figures_curves_share_a_style():
    names = ["negativity", "refusal vs negativity", "a", "b", "c", "d", "e"]
    assert len(set(styles(names, "dark").values())) == 7


def test_an_unknown_theme_is_refused():
    unchecked = inspect.unwrap(palette)  # the type checker of the tests would refuse it first
    with pytest.raises(InputError, match="theme 'sepia': choose 'light' or 'dark'"):
        unchecked("sepia")


def test_a_map_of_concepts_shows_each_layer_s_numbers_and_leaves_unknown_cells_empty():
    matrix = torch.eye(3)[..., None].repeat(3, 1, 1, 4)
    matrix[:, 0, 1] = torch.tensor([0.1, 0.2, 0.3, float("nan")])
    matrix[1:, 0, 1, 2] = torch.tensor([0.25, 0.35])
    chart = plotting.concept_map(matrix, ["refusal", "joy", "<b>"], highlight=2)
    assert chart.data[0].z[0][1] == 0.3
    assert list(chart.data[0].customdata[0][1]) == [0.3, 0.25, 0.35]
    drawn = [step.args[0]["z"][0][0][1] for step in chart.layout.sliders[0].steps]
    assert drawn == [0.1, 0.2, 0.3, None]
    assert list(chart.layout.xaxis.ticktext) == ["refusal", "joy", "&lt;b&gt;"]
    assert chart.layout.yaxis.range[0] > chart.layout.yaxis.range[1]  # the first concept on top
    with pytest.raises(InputError, match="2 names for 3 values"):
        plotting.concept_map(matrix, ["a", "b"])


def test_the_places_of_concepts_stand_beside_their_numbers_and_move_with_one_slider():
    places = torch.arange(24.0).view(3, 4, 2)
    chart = plotting.concept_map(torch.ones(3, 3, 3, 4), ["a", "b", "c"], places=places)
    _, points = chart.data
    assert chart.layout.xaxis.domain[1] < chart.layout.xaxis2.domain[0]
    step = chart.layout.sliders[0].steps[1]
    assert step.args[0]["x"] == [None, [2, 10, 18]]
    assert list(step.args[2]) == [0, 1]
    assert list(points.y) == [7, 15, 23]
    assert "innerWidth < 700" in plotting.page(chart)
    narrow = chart.layout.meta["narrow"][1]
    assert narrow["yaxis2.domain"][1] < narrow["yaxis.domain"][0]


def test_each_model_has_a_colour_and_each_concept_a_row_with_its_interval():
    nan = float("nan")
    values = {
        "one": {"joy": (0.2, 0.1, 0.4), "fear": (nan, nan, nan)},
        "two": {"fear": (1.0, 0.0, 2.0)},
    }
    chart = plotting.intervals_by_name(values)
    one, two = chart.data
    assert (list(one.x), list(two.x)) == ([0.2, None], [1])
    assert (one.error_x.array[0], one.error_x.arrayminus[0]) == (0.2, 0.1)
    assert list(chart.layout.yaxis.ticktext) == ["joy", "fear"]
    assert abs(two.y[0] - 1) < 0.5
    assert one.marker.color != two.marker.color
    assert "undefined" in notes(plotting.intervals_by_name({"one": {"joy": (nan,) * 3}}))[0]
