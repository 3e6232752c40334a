"""Hooks on the residual stream: affine ablation, rows, and that incomplete interventions are seen."""

import pytest
import torch
from checkpoints import write_checkpoint

from refusal_lens.errors import InputError
from refusal_lens.interventions import ablate_direction, add_direction, hooks
from refusal_lens.interventions.hooks import check_interventions, projection_hooks, stream_points
from refusal_lens.interventions.sweep import affine_references
from refusal_lens.models.load import load_model

TOKENS = torch.arange(40, 52).reshape(2, 6)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    directory = write_checkpoint(tmp_path_factory.mktemp("model") / "random")
    return load_model(str(directory), device="cpu", dtype=torch.float32)


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def streams(model, fwd_hooks) -> dict[str, torch.Tensor]:
    names = stream_points(model)
    with model.hooks(fwd_hooks=fwd_hooks):
        return dict(model.run_with_cache(TOKENS, names_filter=names, return_cache_object=False)[1])


@pytest.mark.parametrize("reference", [0.7, torch.tensor(-2.0)])
def test_affine_ablation_sets_the_component_at_every_position_and_layer(model, reference):
    direction = drawn(32)
    for name, x in streams(model, ablate_direction(model, 3 * direction, reference)).items():
        component = x @ (direction / direction.norm())
        torch.testing.assert_close(component, torch.full_like(component, reference), msg=name)


def test_a_reference_of_zero_is_directional_ablation_and_another_one_is_not(model):
    last = stream_points(model)[-1]
    plain, zero, mean = (
        streams(model, ablate_direction(model, drawn(32), reference))[last]
        for reference in (None, 0.0, 1.0)
    )
    assert torch.equal(plain, zero)
    assert (plain - mean).abs().max() > 0.1


def test_each_row_can_have_its_own_direction_and_reference(model):
    directions, references = drawn(2, 32), torch.tensor([0.5, -3.0])
    together = streams(model, ablate_direction(model, directions, references))
    for row in range(2):
        alone = streams(model, ablate_direction(model, directions[row], references[row]))
        for name, x in together.items():
            torch.testing.assert_close(x[row], alone[name][row], atol=1e-5, rtol=1e-5)


def test_a_layers_reference_holds_from_the_end_of_its_block_to_the_end_of_the_next(model):
    unit, references = torch.eye(32)[3], torch.tensor([1.0, -2.0, 0.5, 4.0])
    found = streams(model, ablate_direction(model, unit, references))
    points = stream_points(model)
    first = points.index("blocks.0.hook_resid_post")
    for name in points[:first]:
        torch.testing.assert_close(found[name], streams(model, [])[name], atol=0, rtol=0)
    layer = -1
    for name in points[first:]:
        layer += name.endswith("hook_resid_post")
        torch.testing.assert_close(found[name][..., 3], references[layer].expand(2, 6), msg=name)
    assert len(points[first:]) > model.cfg.n_layers


def test_a_zero_unit_changes_nothing_with_a_reference_too(model):
    units = torch.stack([torch.zeros(32), torch.eye(32)[3]])
    untouched = streams(model, [])
    for name, x in streams(model, projection_hooks(model, units, torch.tensor([5.0, 5.0]))).items():
        torch.testing.assert_close(x[0], untouched[name][0], atol=0, rtol=0)
        torch.testing.assert_close(x[1, :, 3], torch.full((6,), 5.0))


@pytest.mark.parametrize("intervene", ["ablate", "add"])
def test_a_direction_for_each_layer_is_refused_where_rows_are_meant(model, intervene):
    hooks = {"ablate": ablate_direction, "add": lambda *given: add_direction(*given, 1)}[intervene]
    for shape in [(model.cfg.n_layers, 32), (2, 4, 32)]:
        with pytest.raises(InputError, match=r"not one for all rows.*directions\[layer\]"):
            hooks(model, drawn(*shape))
    with pytest.raises(InputError, match=r"\[3, 32\] met a batch of 2 rows.*directions\[layer\]"):
        streams(model, hooks(model, drawn(3, 32)))
    assert streams(model, hooks(model, drawn(2, 32)))


def test_a_reference_that_cannot_be_one_is_refused(model):
    with pytest.raises(InputError, match="NaN or infinite"):
        ablate_direction(model, drawn(32), float("nan"))
    with pytest.raises(InputError, match=r"references of shape \[3\] for directions"):
        projection_hooks(model, drawn(32), torch.ones(3))


# Interventions that are incomplete


def test_a_model_is_checked_once(model, monkeypatch):
    check_interventions(model)
    assert not any(point.has_hooks() for point in model.hook_dict.values())
    monkeypatch.setattr(hooks, "_short_pass", lambda *_: pytest.fail("checked again"))
    check_interventions(model)


@pytest.mark.parametrize("missing", ["blocks.1.hook_resid_mid", "blocks.2.hook_resid_post"])
def test_an_ablation_that_leaves_a_component_somewhere_is_seen(model, monkeypatch, missing):
    monkeypatch.setattr(hooks, "_checked", set())
    kept = [name for name in stream_points(model) if name != missing]
    monkeypatch.setattr(hooks, "stream_points", lambda _: kept)
    with pytest.raises(InputError, match="an ablated direction is found again at blocks"):
        check_interventions(model)


@pytest.mark.parametrize("layer", [0, 2, 3])
def test_a_block_whose_hooks_change_nothing_is_seen(model, monkeypatch, layer):
    monkeypatch.setattr(hooks, "_checked", set())
    point = model.hook_dict[f"blocks.{layer}.hook_resid_post"]
    adding = point.add_hook

    def add_and_drop_what_it_returns(hook, *args, **options):
        return adding(lambda *inputs, **named: (hook(*inputs, **named), None)[1], *args, **options)

    monkeypatch.setattr(point, "add_hook", add_and_drop_what_it_returns)
    found = (
        "logits" if layer == 3 else rf"direction added .* at blocks\.{layer + 1}\.hook_resid_pre"
    )
    with pytest.raises(InputError, match=found):
        check_interventions(model)


def test_references_of_block_inputs_are_those_of_the_block_before():
    outputs = torch.randn(6, 4, 8, generator=torch.Generator().manual_seed(0))
    inputs = torch.cat([torch.randn(6, 1, 8), outputs[:, :-1]], dim=1)
    direction = torch.ones(8)
    after = affine_references(direction, outputs)
    before = affine_references(direction, inputs, hook="resid_pre")
    torch.testing.assert_close(before[:-1], after[:-1])
    torch.testing.assert_close(after[2], outputs[:, 2].mean(0).sum() / 8**0.5)
