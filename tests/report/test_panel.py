"""The panel in Jupyter, moved from code: its widgets change what is drawn."""

import sys

import pytest
import torch

import refusal_lens as rl
from refusal_lens.interventions import addition_effects, openings_of


@pytest.fixture(scope="module")
def model():
    return rl.load_model("organism:specific")


@pytest.fixture(scope="module")
def results(model):
    options = {"max_prompts": 6, "resamples": 400, "interventions": False, "progress": False}
    return rl.run_experiment(model=model, controls=("alarm",), **options)


def test_each_widget_of_the_panel_changes_the_figure(results, model):
    panel = rl.panel(results, model)
    pair, layer, coefficient = panel.children[:3]
    assert pair.options == ("refusal vs negativity", "refusal vs alarm")
    panel.update()

    def drawn():
        curve, (harmful, harmless) = panel.result.data[0].y, panel.result.data[-2:]
        return list(curve), list(harmful.x), list(harmless.x)

    curve, harmful, harmless = drawn()
    assert curve[layer.value] == pytest.approx(float(results.table()[0][1]), abs=1e-3)
    assert min(harmful) > 0 > max(harmless)
    coefficient.value = 2.0
    expected = addition_effects(
        *(model, results.contrasts["refusal"].target[:1], 2 * results.directions["negativity"][20]),
        layers=torch.tensor(20),
        score=openings_of(model.tokenizer).first_tokens,
        progress=False,
    )
    assert drawn()[1][0] == pytest.approx(float(expected.log_odds), abs=1e-3)
    assert drawn()[1] != harmful
    layer.value = 3
    assert "layer 3" in {note.text for note in panel.result.layout.annotations}
    pair.value = "refusal vs alarm"
    assert drawn()[0] != curve
    assert panel.result.data[0].name == "refusal vs alarm"


def test_without_ipywidgets_the_panel_says_what_to_install(results, model, monkeypatch):
    monkeypatch.setitem(sys.modules, "ipywidgets", None)
    with pytest.raises(rl.InputError, match=r"pip install 'refusal_lens\[notebooks\]'"):
        rl.panel(results, model)
