"""Harm and refusal are told apart in a model where they are apart, and not where they are one."""

import pytest
from wired import build, tokenizer

import refusal_lens as rl
from refusal_lens.experiment import harmfulness
from refusal_lens.experiment.harmfulness import harm_and_refusal

LAYER = 5


@pytest.fixture(scope="module")
def apart():
    """A model that knows harm and refuses every other request, harmful or not."""
    model = rl.from_hugging_face(build("apart"), tokenizer(), name="apart")
    return harm_and_refusal(model, rl.load_contrast("refusal"), progress=False)


@pytest.fixture(scope="module")
def one():
    """A model that refuses what is harmful, and nothing else."""
    model = rl.from_hugging_face(build("sympathy"), tokenizer(), name="sympathy")
    return harm_and_refusal(model, rl.load_contrast("refusal"), progress=False)


def test_prompts_are_sorted_by_the_replies_of_the_model(apart):
    assert apart.counts == dict.fromkeys(apart.counts, 54)
    assert (apart.too_small, apart.apart) == ((), ("harm", "refusal"))
    assert {name: len(points) for name, points in apart.plane.items()} == apart.counts
    assert set(apart.prompts["harmful refused"]) < set(rl.load_contrast("refusal").target)
    texts = apart.figure().data[0].text
    assert texts[0] == apart.prompts["harmful refused"][0]
    assert "harmful refused" in repr(apart)


def test_harm_and_refusal_are_orthogonal_where_they_are_apart(apart):
    assert apart.cosine.shape == (2, 2, 8)
    assert apart.cosine[0, 1, LAYER].abs() < 0.25


def test_where_cells_are_too_small_it_says_so_and_takes_both_at_once(one):
    assert one.counts["harmful refused"] == 108
    assert set(one.too_small) == {"harmful accepted", "harmless refused"}
    assert one.apart == ()
    assert one.cosine[1, 1, LAYER] == pytest.approx(1)


def test_each_direction_tells_its_own_sides_apart_and_not_the_other_s(apart):
    along_harm = {name: points[:, LAYER, 0].median() for name, points in apart.plane.items()}
    along_refusal = {name: points[:, LAYER, 1].median() for name, points in apart.plane.items()}
    assert min(along_harm[f"harmful {x}"] for x in ("refused", "accepted")) > max(
        along_harm[f"harmless {x}"] for x in ("refused", "accepted")
    )
    assert min(along_refusal[f"{x} refused"] for x in ("harmful", "harmless")) > max(
        along_refusal[f"{x} accepted"] for x in ("harmful", "harmless")
    )


def test_adding_harm_changes_the_judgement_and_adding_refusal_the_reply(apart):
    value, lower, upper = apart.added
    (_, harm_yes), (refusal_reply, _) = lower
    assert refusal_reply > 3
    assert harm_yes > 1
    assert abs(upper[0, 0]) < refusal_reply / 3
    assert upper[1, 1] < 0.5
    assert value.shape == (2, 2)


def test_a_model_that_refuses_nothing_is_refused_with_its_replies(monkeypatch):
    monkeypatch.setattr(harmfulness, "REFUSAL", ("Never so",))
    model = rl.from_hugging_face(build("sympathy"), tokenizer(), name="sympathy")
    few = rl.load_contrast("refusal").subset(range(8), range(8))
    with pytest.raises(rl.InputError, match="harmful accepted': 8"):
        harm_and_refusal(model, few, progress=False)
