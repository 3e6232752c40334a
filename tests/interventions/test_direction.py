"""A direction in the hand: what it says, where it goes, what it does to a model."""

import numpy as np
import pytest
import torch

import refusal_lens as rl

REFUSAL = rl.load_contrast("refusal").subset(range(6), range(6))
NEGATIVITY = rl.load_contrast("negativity").subset(range(6), range(6))


@pytest.fixture(scope="module")
def model():
    return rl.load_model("organism:specific")


@pytest.fixture(scope="module")
def refusal(model):
    return rl.Direction.of(model, REFUSAL, progress=False)


@pytest.fixture(scope="module")
def negativity(model):
    return rl.Direction.of(model, NEGATIVITY, progress=False)


def logits(model, hooks):
    with torch.no_grad(), model.hooks(fwd_hooks=hooks):
        return model(torch.tensor([[5, 6, 7, 8]]))


def test_a_direction_is_the_mean_difference_of_its_contrast(model, refusal):
    sides = rl.get_layer_activations(model, REFUSAL, progress=False)
    assert torch.equal(refusal.vectors, rl.mean_difference(*sides))
    assert refusal.layers == tuple(range(32))
    assert repr(refusal.at(20)) == (
        "<Direction 'refusal' of organism:specific: layer 20, d_model 64>"
    )


def test_block_inputs_are_counted_as_the_outputs_before_them(model, refusal):
    inputs = rl.Direction.of(model, REFUSAL, protocol=rl.Protocol(hook="resid_pre"), progress=False)
    assert inputs.layers == tuple(range(-1, 31))
    assert torch.allclose(inputs.at(19).vectors, refusal.at(19).vectors, atol=1e-4)
    assert torch.allclose(
        inputs.at(19).project(REFUSAL.target[0]),
        refusal.at(19).project(REFUSAL.target[0]),
        atol=1e-3,
    )


def test_arithmetic_gives_directions_and_torch_and_numpy_take_them(refusal, negativity):
    r, n = refusal.vectors, negativity.vectors
    for found, expected in {
        refusal - negativity: r - n,
        refusal + n: r + n,
        -refusal: -r,
        2 * refusal: 2 * r,
        refusal / 2: r / 2,
    }.items():
        assert isinstance(found, rl.Direction)
        assert torch.equal(found.vectors, expected)
    assert torch.equal(
        torch.nn.functional.cosine_similarity(refusal, n), torch.cosine_similarity(r, n)
    )
    assert torch.equal(torch.ones(64) @ refusal.at(3), r[3].sum()) or torch.isclose(
        torch.ones(64) @ refusal.at(3), r[3].sum(), atol=1e-3
    )
    assert np.array_equal(np.asarray(refusal), r.numpy())
    assert torch.equal(refusal[20], r[20])
    assert torch.equal(refusal.norm(dim=-1), r.norm(dim=-1))
    assert torch.allclose(refusal.unit().norm(dim=-1), torch.ones(32))


def test_projections_of_prompts_are_those_of_their_activations(model, refusal):
    prompts = list(REFUSAL.target[:2])
    activations = rl.get_prompt_activations(model, prompts, progress=False)[:, 0]
    assert torch.equal(refusal.project(prompts), refusal.project(activations))
    assert torch.equal(refusal.at(20).project(prompts), refusal.project(activations)[:, 20])
    means = [
        refusal.at(20).project(list(side)).mean() for side in (REFUSAL.target, REFUSAL.baseline)
    ]
    assert torch.isclose(means[0] - means[1], refusal[20].norm(), rtol=1e-3)


def test_its_hooks_are_those_of_ablate_direction_and_add_direction(model, refusal):
    bare = logits(model, [])
    ablated = logits(model, rl.ablate_direction(model, refusal[20]))
    added = logits(model, rl.add_direction(model, 2 * refusal[20], 20))
    assert torch.equal(logits(model, refusal.at(20).ablate()), ablated)
    assert torch.equal(logits(model, refusal.at(20).add(2.0)), added)
    assert not torch.allclose(bare, ablated)
    assert not torch.allclose(bare, added)


@pytest.mark.parametrize("name", ["r.safetensors", "r.npy"])
def test_a_saved_direction_loads_with_its_layers_and_name(refusal, tmp_path, name):
    for direction in (refusal, refusal.at(20)):
        found = rl.Direction.load(direction.save(tmp_path / name))
        assert torch.equal(found.vectors.flatten(), direction.vectors.flatten())
        assert (found.layers, found.name) == (direction.layers, "refusal")


def test_top_tokens_are_those_that_a_planted_direction_writes(model):
    token = model.tokenizer.encode("sandcastle", add_special_tokens=False)[0]
    weight = getattr(model.ln_final, "w", getattr(model.ln_final, "weight", None))
    planted = torch.linalg.lstsq(
        (model.W_U.detach() * weight.detach()[:, None]).T,
        torch.nn.functional.one_hot(torch.tensor(token), model.cfg.d_vocab).float(),
    ).solution
    top = rl.Direction(planted, 31, model=model).top_tokens(1)
    assert top == [model.tokenizer.decode([token])]
    assert rl.Direction(-planted, 31, model=model).top_tokens(1) != top
