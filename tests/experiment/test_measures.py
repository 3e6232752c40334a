"""What a run measures besides the plain cosine, on activations with a planted answer."""

import numpy as np
import pytest
import torch

from refusal_lens.activations.extract import ContrastActivations
from refusal_lens.directions.estimators import mean_difference
from refusal_lens.directions.similarity import unit
from refusal_lens.experiment import measures

N, LAYERS, WIDTH = 40, 3, 10


def draw(seed, shift=None):
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(N, LAYERS, WIDTH, generator=generator)
    return rows if shift is None else rows + shift


AXES = torch.eye(WIDTH)
ACTIVATIONS = {
    "refusal": ContrastActivations(draw(0, 4 * AXES[0]), draw(1)),
    "negativity": ContrastActivations(draw(2, 2 * AXES[0] + 3 * AXES[1]), draw(3)),
}
DIRECTIONS = {part: mean_difference(*sides) for part, sides in ACTIVATIONS.items()}
SETS = {
    "harmful": ACTIVATIONS["refusal"].target,
    "harmless": ACTIVATIONS["refusal"].baseline,
    "negative": ACTIVATIONS["negativity"].target,
    "neutral": ACTIVATIONS["negativity"].baseline,
}


def test_coordinates_in_the_plane_are_projections_on_unit_directions():
    plane = measures.in_plane(SETS, DIRECTIONS)
    for axis, part in enumerate(("refusal", "negativity")):
        direction = unit(DIRECTIONS[part]).float()
        expected = torch.einsum("pld,ld->pl", SETS["harmful"], direction)
        torch.testing.assert_close(plane["harmful"][..., axis], expected)
    gap = plane["harmful"][..., 0].mean(0) - plane["harmless"][..., 0].mean(0)
    torch.testing.assert_close(gap, DIRECTIONS["refusal"].norm(dim=-1))


def test_components_equal_numpys_up_to_sign():
    found = torch.cat(list(measures.in_components(SETS).values()))
    for layer in range(LAYERS):
        rows = torch.cat(list(SETS.values()))[:, layer].numpy()
        left, singular, _ = np.linalg.svd(rows - rows.mean(0), full_matrices=False)
        np.testing.assert_allclose(
            np.abs(found[:, layer].numpy()), np.abs(left[:, :2] * singular[:2]), atol=1e-3
        )


@pytest.mark.parametrize("part", ["refusal", "negativity"])
def test_held_out_projections_separate_a_planted_contrast_and_nothing_else(part):
    target, baseline = measures.held_out_projections(ACTIVATIONS[part])
    assert (target.mean(0) - baseline.mean(0) > 1.5).all()
    # The control: noise separates on its own direction, but not on that of the other half.
    noise = ContrastActivations(draw(7), draw(8))
    target, baseline = measures.held_out_projections(noise)
    assert (target.mean(0) - baseline.mean(0) < 0.6).all()
    assert (mean_difference(*noise).norm(dim=-1) > 0.4).all()


def test_a_held_out_row_does_not_move_its_own_axis():
    sides = ACTIVATIONS["refusal"]
    before, _ = measures.held_out_projections(sides)
    changed = sides.target.clone()
    changed[0] *= 1.5
    after, _ = measures.held_out_projections(ContrastActivations(changed, sides.baseline))
    torch.testing.assert_close(after[0], 1.5 * before[0])
    torch.testing.assert_close(after[2::2], before[2::2])
    assert not torch.allclose(after[1::2], before[1::2])


def test_every_metric_and_estimator_sees_two_directions_that_share_half():
    metrics = measures.by_metric(ACTIVATIONS, DIRECTIONS)
    assert len(metrics) == 4
    estimators = measures.by_estimator(ACTIVATIONS, paired=True)
    assert len(estimators) == 4
    for name, values in {**metrics, **estimators}.items():
        if name != "without massive dimensions":
            assert (values > 0.25).all(), name
            assert (values < 0.85).all(), name


def test_of_many_prompts_some_are_taken_in_pairs_and_the_names_say_how_many(monkeypatch):
    few = {part: measures._at_most(list(sides), 8)[0] for part, sides in ACTIVATIONS.items()}
    assert [len(side) for side in few["refusal"]] == [8, 8]
    expected = measures.by_estimator(
        {part: ContrastActivations(*sides) for part, sides in few.items()}, paired=True
    )
    monkeypatch.setattr(measures, "MOST_PROMPTS", 8)
    found = measures.by_estimator(ACTIVATIONS, paired=True)
    for name, curve in expected.items():
        if name == "mean difference":  # of all prompts
            assert not torch.allclose(found[name], curve)
        else:
            torch.testing.assert_close(found[f"{name} (8 prompts a set)"], curve)
    metrics = measures.by_metric(ACTIVATIONS, DIRECTIONS)
    assert sum(name.endswith("(8 prompts a set)") for name in metrics) == 3


def test_components_of_some_prompts_place_all_of_them(monkeypatch):
    monkeypatch.setattr(measures, "MOST_PROMPTS", 16)
    found = torch.cat(list(measures.in_components(SETS).values()))
    some = torch.cat(measures._at_most(list(SETS.values()), 8)[0])
    assert (len(some), len(found)) == (32, 160)
    for layer in range(LAYERS):
        rows, every = some[:, layer].numpy(), torch.cat(list(SETS.values()))[:, layer].numpy()
        axes = np.linalg.svd(rows - rows.mean(0), full_matrices=False)[2][:2]
        expected = (every - rows.mean(0)) @ axes.T
        np.testing.assert_allclose(np.abs(found[:, layer].numpy()), np.abs(expected), atol=1e-3)


def test_the_component_of_pairs_is_left_out_where_there_are_no_pairs():
    assert len(measures.by_estimator(ACTIVATIONS, paired=False)) == 3


def test_the_effective_unembedding_gives_the_models_own_logits():
    from refusal_lens import load_model

    model = load_model("organism:specific")
    tokens = torch.tensor([[5, 6, 7]])
    logits, cache = model.run_with_cache(tokens)
    stream = cache["blocks.31.hook_resid_post"][0, -1].detach()
    scale = (stream.square().mean() + model.cfg.eps).sqrt()
    mine = (stream / scale) @ measures.effective_unembedding(model)
    torch.testing.assert_close(mine, logits[0, -1].detach(), atol=1e-3, rtol=1e-3)
