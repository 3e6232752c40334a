"""Doses of directions: what each does, at which dose, and at which cost."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

import refusal_lens as rl
from refusal_lens.errors import InputError
from refusal_lens.interventions import openings_of
from refusal_lens.interventions.batched_runs import opening_log_odds
from refusal_lens.interventions.cross_ablation import random_directions
from refusal_lens.interventions.doses import DOSES, DoseResponse, dose_response
from refusal_lens.interventions.refusal_metric import next_token_kl
from refusal_lens.prompts.contrast import load_contrast
from refusal_lens.prompts.tokenize import encode_prompts

LAYER = 20
REFUSAL, NEGATIVITY = (
    load_contrast(name).subset(range(0, 96, 12), range(0, 96, 12))
    for name in ("refusal", "negativity")
)
OPTIONS = {"layer": LAYER, "progress": False}


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.fixture(scope="module")
def model():
    return rl.load_model("organism:specific")


@pytest.fixture(scope="module")
def activations(model):
    return tuple(rl.extract(model, [REFUSAL, NEGATIVITY], progress=False).values())


@pytest.fixture(scope="module")
def found(model, activations):
    given = {"activations": activations, "generator": seeded()}
    return dose_response(model, REFUSAL, NEGATIVITY, **OPTIONS, **given)


@torch.no_grad()
def by_hand(model, prompt: str, direction: Tensor | None) -> tuple[Tensor, Tensor]:
    """Next-token logits and log-odds of a refusal, with every opening scored in a pass of its own."""
    ids = encode_prompts(model.tokenizer, [prompt])[0]

    def add(x, hook):
        x[:, len(ids) - 1] += direction
        return x

    hooks = [] if direction is None else [(f"blocks.{LAYER}.hook_resid_post", add)]
    p, logits = 0.0, None
    for opening in openings_of(model.tokenizer).ids:
        out = model.run_with_hooks(torch.tensor([[*ids, *opening]]), fwd_hooks=hooks)[0]
        logits = out[len(ids) - 1]
        steps = out[len(ids) - 1 : -1].log_softmax(-1)
        p += steps[range(len(opening)), list(opening)].sum().exp().item()
    return logits, torch.tensor(p).logit()


def test_a_dose_is_added_at_the_last_token_as_a_hook_by_hand_adds_it(model, activations, found):
    dose, cell = 1.0, 1 + DOSES.index(1.0)
    for i, pair in enumerate(activations):
        direction = dose * (pair.target.mean(0) - pair.baseline.mean(0))[LAYER]
        for way, sign, prompts in (
            ("added", 1, REFUSAL.baseline),
            ("taken away", -1, REFUSAL.target),
        ):
            _, odds = by_hand(model, prompts[0], sign * direction)
            assert found.log_odds[way][i, cell, 0] == pytest.approx(odds.item(), abs=0.05)
            before, _ = by_hand(model, REFUSAL.baseline[0], None)
            after, _ = by_hand(model, REFUSAL.baseline[0], sign * direction)
            cost = next_token_kl(before, after).item()
            assert found.kl[way][i, cell, 0] == pytest.approx(cost, rel=0.01, abs=1e-4)


def test_dose_0_is_the_unmodified_model(model, found):
    score = openings_of(model.tokenizer)
    for way, prompts in (("added", REFUSAL.baseline), ("taken away", REFUSAL.target)):
        unmodified = opening_log_odds(model, prompts, score, progress=False)
        torch.testing.assert_close(
            found.log_odds[way][:, 0], unmodified.expand(22, -1), atol=1e-3, rtol=1e-3
        )
        assert (found.kl[way][:, 0] == 0).all()


def made(shares: list[list[float]], kl: list[list[float]]) -> DoseResponse:
    """Of ten prompts a side, the share refused of every direction at doses 0, 1, 2, and its KL."""
    rank = (torch.arange(10) + 0.5) / 10
    odds = {"added": torch.tensor(shares)[..., None] - rank}
    odds["taken away"] = 1 - torch.tensor(shares)[..., None] - rank
    costs = torch.tensor(kl)[..., None].expand(-1, -1, 10)
    return DoseResponse(
        3, ("refusal", "negativity"), (0.0, 1.0, 2.0), odds, dict.fromkeys(odds, costs), 1.0
    )


UP, FLAT = [0.0, 0.4, 0.8], [0.0, 0.0, 0.0]
COSTS = [0.0, 0.04, 0.16]


def test_half_effect_is_reached_between_the_doses_that_close_less_and_more_of_the_gap():
    found = made([UP, FLAT], [COSTS, COSTS])
    for way in ("added", "taken away"):
        refusal, *others = effect(found, HALF, 0.1, way)
        assert refusal == pytest.approx(1.25)
        assert np.isnan(others).all()
    assert effect(replace(found, gap=0.4), HALF, 0.1)[0] == pytest.approx(0.5)
    assert np.isnan(effect(replace(found, gap=0.0), HALF, 0.1)).all()


def effect(found: DoseResponse, what: str, kl: float, way: str = "added") -> np.ndarray:
    table = found.to_pandas([kl])
    [row] = table[(table.way == way) & (table.effect == what)].iloc[:, 3:].to_numpy(float)
    return row


HALF = "dose at half effect"


def test_effects_are_compared_where_the_directions_cost_the_same_kl():
    # Negativity costs four times the KL of refusal at each dose, so dose 1 of it counts as dose 2.
    found = made([UP, UP], [COSTS, [4 * cost for cost in COSTS]])
    assert effect(found, "refused", 0.1599)[:2] == pytest.approx([0.8, 0.4], abs=0.01)
    assert effect(found, "refused", 0.09)[:2] == pytest.approx([0.6, 0.3], abs=0.01)
    assert effect(found, "change", 0.04)[:2] == pytest.approx([0.4, 0.2])


def test_an_effect_is_unknown_beyond_the_kl_that_was_measured():
    found = made([UP, UP], [COSTS, [4 * cost for cost in COSTS]])
    refusal, negativity, *band = effect(found, "refused", 0.3)
    assert np.isnan(refusal)
    assert np.isfinite(negativity)
    assert np.isnan(band).all()


def test_the_band_is_of_the_random_directions_and_needs_half_of_them():
    slopes = torch.linspace(0, 1, 21)
    random = [[0.0, float(x) / 2, float(x)] for x in slopes]
    found = made([UP, FLAT, *random], [COSTS] * 23)
    assert effect(found, "change", 0.1599)[2:] == pytest.approx([0.5, 0.025, 0.975], abs=0.01)
    weak = [[0.0, 0.001, 0.002]] * 11
    few = made([UP, FLAT, *random], [*[COSTS] * 12, *weak])
    assert np.isnan(effect(few, "change", 0.1599)[2:]).all()


def test_a_prompt_moves_the_wrong_way_if_a_direction_added_lowers_its_refusal():
    found = made([UP, FLAT], [COSTS, COSTS])
    moved = found.log_odds["added"].clone()
    moved[1, 2, :3] -= 0.5  # three prompts fall
    moved[1, 2, 3:] -= 0.05  # by rounding
    turned = replace(found, log_odds={"added": moved, "taken away": moved})
    assert effect(turned, "wrong way", 0.1599)[:2] == pytest.approx([0.0, 0.3], abs=0.01)
    assert effect(turned, "wrong way", 0.1599, "taken away")[:2] == pytest.approx(
        [1.0, 0.0], abs=0.01
    )


def test_refusal_acts_more_than_the_median_random_direction_and_a_random_one_as_chance_does(
    model, activations, found
):
    assert effect(found, HALF, 0.1)[0] < 1
    refusal, _, median, low, high = effect(found, "refused", 0.1, "taken away")
    assert refusal < median - 0.3
    # The control: a random direction in negativity's place.
    at_layer = [side[:, LAYER] for pair in activations for side in pair]
    [random] = random_directions(*at_layer, n=1, generator=torch.Generator().manual_seed(1))
    mean = activations[1].baseline.mean(0).expand_as(activations[1].baseline)
    pair = (mean + random.expand_as(mean[0]), mean)
    given = {"activations": (activations[0], pair), "generator": seeded()}
    other = dose_response(model, REFUSAL, NEGATIVITY, **OPTIONS, **given)
    _, negativity, _, low, high = effect(other, "change", 0.1, "taken away")
    assert low <= negativity <= high


def test_a_layer_that_the_model_lacks_is_named(model):
    with pytest.raises(InputError, match="no layer 32"):
        rl.dose_response(model, "refusal", "negativity", layer=32)


def test_the_figure_has_a_point_for_each_dose_and_a_band_for_every_curve(found):
    figure = found.figure("added")
    curves = {trace.name: trace for trace in figure.data if trace.showlegend is not False}
    assert [*curves] == ["refusal", "negativity", "random (null)"]
    assert len(figure.data) >= 6
    costs = found.kl["added"][0, 1:].mean(-1).tolist()
    assert curves["refusal"].x == pytest.approx(costs, rel=1e-3)
    shares = (found.log_odds["added"][0, 1:] > 0).float().mean(-1).tolist()
    assert curves["refusal"].y == pytest.approx(shares, abs=1e-3)
    assert figure.layout.xaxis.type == "log"
    dark = found.figure("taken away", theme="dark")
    assert dark.layout.template.layout.paper_bgcolor != figure.layout.template.layout.paper_bgcolor


def test_a_run_with_doses_saves_loads_and_shows_them(tmp_path):
    options = {"max_prompts": 8, "resamples": 400, "controls": (), "progress": False}
    results = rl.run_experiment("organism:specific", doses=True, **options)
    again = rl.load_results(results.save(tmp_path / "run"))
    assert again.config.doses
    torch.testing.assert_close(again.causal.doses.log_odds, results.causal.doses.log_odds)
    assert again.causal.doses.layer == results.causal.ablation.layer
    page = rl.write_report(again, tmp_path / "report.html").read_text("utf-8")
    assert 'id="figure-doses-added"' in page
    assert 'id="figure-doses-taken"' in page
