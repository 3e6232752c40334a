"""The map of concepts finds what is wired into a model, and nothing where there is nothing."""

from dataclasses import fields

import pytest
import torch
from checkpoints import byte_tokenizer
from families import BARE, random_model
from wired import build, tokenizer

import refusal_lens as rl
from refusal_lens.experiment import atlas as atlases
from refusal_lens.experiment.verdict import Estimate

CONCEPTS = ["negativity", "arousal", "alarm"]
REFUSAL, NEGATIVITY, AROUSAL = range(3)


@pytest.fixture(scope="module")
def atlas():
    """Of a model that refuses what sounds agitated, as harmful requests do."""
    model = rl.from_hugging_face(build("aroused"), tokenizer(), name="aroused")
    return rl.compare_concepts(model, CONCEPTS, progress=False, n_resamples=1000)


@pytest.fixture(scope="module")
def control():
    """A model that refuses harm alone, its map, and the verdict of the experiment."""
    model = rl.from_hugging_face(build("sympathy"), tokenizer(), name="sympathy")
    options = {"model": model, "progress": False, "n_resamples": 1000}
    verdict = rl.run_experiment(controls=("alarm",), **options).verdict
    return rl.compare_concepts(concepts=["negativity", "alarm"], **options), verdict


def test_refusal_that_hangs_on_arousal_is_most_like_arousal(atlas):
    ranking = atlas.to_pandas().set_index("concept")
    assert list(ranking["rank"]) == ["1 to 1", "2 to 2", "3 to 3"]
    assert ranking.index[0] == "arousal"
    assert ranking.loc["arousal", "verdict"] == "shared"
    assert ranking.loc["arousal", "cross_ablation lower"] > 0.9
    assert ranking.loc["negativity", "cross_ablation upper"] < 0.1
    assert "shared" not in set(ranking["verdict"][1:])


def test_two_names_of_one_direction_are_one_point_and_others_are_apart(atlas):
    here = atlas.cosine[:, :, :, atlas.layer]
    assert here[0, REFUSAL, AROUSAL] == pytest.approx(1, abs=0.01)
    assert here[1, REFUSAL, NEGATIVITY] < 0 < here[2, REFUSAL, NEGATIVITY]
    drawn = atlas.figures()["cosines"].layout.sliders[0].steps[atlas.layer].args[0]
    places = torch.tensor([drawn["x"][1], drawn["y"][1]]).T
    assert (places[REFUSAL] - places[AROUSAL]).norm() < 0.1
    assert (places[REFUSAL] - places[NEGATIVITY]).norm() > 1


def test_a_direction_tells_the_concept_that_it_is_and_no_other(atlas):
    here, lower, upper = atlas.auroc[..., atlas.layer]
    assert here[AROUSAL, REFUSAL] > 0.99
    assert here[REFUSAL, AROUSAL] > 0.99
    assert abs(here[REFUSAL, NEGATIVITY] - 0.5) < 0.1
    assert abs(here[NEGATIVITY, REFUSAL] - 0.5) < 0.1
    assert lower[AROUSAL, REFUSAL] > 0.9
    assert lower[NEGATIVITY, REFUSAL] < here[NEGATIVITY, REFUSAL] < upper[NEGATIVITY, REFUSAL]


def test_ablating_arousal_takes_refusal_away_and_leaves_negativity(atlas):
    value, lower, upper = atlas.kept
    assert value[AROUSAL, REFUSAL].abs() < 0.05
    assert value[REFUSAL, AROUSAL].abs() < 0.05
    assert lower[AROUSAL, NEGATIVITY] > 0.95
    assert upper[NEGATIVITY, AROUSAL] < 1.05
    after = atlas.separable[0, :, :, -1]
    assert after[0, REFUSAL] > 0.95
    assert after[1 + AROUSAL, REFUSAL] < 0.7
    assert after[1 + NEGATIVITY, REFUSAL] > 0.95


def test_nothing_is_found_where_nothing_brings_refusal_but_harm(control):
    specific, _ = control
    row = specific.to_pandas().set_index("concept").loc["negativity"]
    assert row["verdict"] == "distinct"
    assert -0.25 < row["cross_ablation lower"] <= row["cross_ablation upper"] < 0.25
    assert (specific.kept[1:, 0, 1] - 1).abs().max() < 0.25


def test_nothing_ranks_by_effects_in_a_model_that_refuses_nothing():
    options = {"progress": False, "max_prompts": 4, "n_resamples": 500}
    atlas = rl.compare_concepts("organism:oblivious", ["negativity", "joy"], **options)
    assert atlas.likeness[:, :, 1:].isnan().all()
    assert {verdict.answer for verdict in atlas.verdicts.values()} == {"inconclusive"}
    assert atlas.kept.shape == (3, 3, 3)


def test_a_verdict_is_that_of_the_experiment(control):
    mine, alone = control[0].verdicts["negativity"], control[1]
    assert mine.answer == alone.answer
    assert alone.evidence.controlled_norm < 1  # the control is taken out in both
    for name in (each.name for each in fields(alone.evidence)):
        if name.startswith(("chance", "typical")):
            continue  # a map draws its random directions from the activations of all concepts
        one, other = getattr(mine.evidence, name), getattr(alone.evidence, name)
        if isinstance(one, Estimate):
            one, other = [*vars(one).values()], [*vars(other).values()]
        assert one == pytest.approx(other, abs=1e-3, nan_ok=True), name


def test_intervals_of_the_ranking_hold_for_all_concepts_at_once(atlas):
    alone = atlas.verdicts["negativity"].evidence.cross_ablation
    value, lower, upper = atlas.likeness[:, 0, 1].tolist()
    assert value == pytest.approx(alone.value)
    assert upper - lower > 1.2 * (alone.upper - alone.lower)


def test_a_saved_map_is_read_back(atlas, tmp_path):
    loaded = rl.Atlas.load(atlas.save(tmp_path))
    assert str(loaded.verdicts) == str(atlas.verdicts)
    assert torch.equal(loaded.kept, atlas.kept)
    assert loaded.to_pandas().equals(atlas.to_pandas())
    pages = {path.stem for path in tmp_path.glob("*.html")}
    assert pages == {"cosines", "detection", "independence"}
    (tmp_path / "atlas.json").write_text('{"saved": {"dict": {}}}')
    with pytest.raises(rl.InputError, match="holds no map of concepts"):
        rl.Atlas.load(tmp_path)


def test_an_interrupted_run_resumes_with_the_concepts_that_are_left(tmp_path, monkeypatch):
    ran = []

    def interrupted(self, name):
        ran.append(name)
        if len(ran) == 3:
            raise KeyboardInterrupt
        return {"odds": torch.zeros(1)}

    monkeypatch.setattr(atlases.Concepts, "_run", interrupted)

    def finished(work, runs, *_):
        raise LookupError([*runs])

    monkeypatch.setattr(atlases, "_atlas", finished)
    options = {"max_prompts": 4, "cache": tmp_path, "progress": False}
    with pytest.raises(KeyboardInterrupt):
        rl.compare_concepts("organism:specific", CONCEPTS, **options)
    with pytest.raises(LookupError, match="alarm"):
        rl.compare_concepts("organism:specific", CONCEPTS, **options)
    assert ran == ["refusal", "negativity", "arousal", "arousal", "alarm"]


def test_several_models_stand_side_by_side_in_one_figure(atlas, control):
    chart = atlas.beside(control[0], likeness="cross_ablation")
    assert [trace.name for trace in chart.data] == ["aroused, layer 5", "sympathy, layer 5"]
    wired, specific = chart.data
    assert wired.x[wired.text.index("arousal")] > 0.9
    assert all(abs(x) < 0.25 for x in specific.x)
    assert atlas.beside().layout.xaxis.title.text == "cosine, 1 is that of refusal itself"


def test_a_model_whose_every_reply_begins_alike_gets_no_verdict_here_either():
    thinking = random_model("GPT-J")
    thinking.lm_head.bias.data[30] += 100
    model = rl.from_hugging_face(thinking, byte_tokenizer(), name="thinking")
    sides = [[f"{side} {x}" for x in "abcdefgh"] for side in ("Rob bank", "Bake cake", "Bad", "A")]
    refusal, other = rl.Contrast("refusal", *sides[:2]), rl.Contrast("negativity", *sides[2:])
    options = {"refusal": refusal, "n_resamples": 400, "protocol": rl.Protocol(chat_template=BARE)}
    atlas = rl.compare_concepts(model, [other], progress=False, **options)
    evidence = atlas.verdicts["negativity"].evidence
    assert evidence.constant_token == byte_tokenizer().decode([30])
    assert evidence.covered < 0.01
    assert atlas.verdicts["negativity"].answer == "inconclusive"


def test_negativity_may_stand_anywhere_among_the_concepts():
    quick = {"max_prompts": 8, "interventions": False, "progress": False}
    atlas = rl.compare_concepts("organism:specific", ["joy", "negativity"], **quick)
    assert set(atlas.directions) == {"refusal", "negativity", "joy"}


def test_one_bar_names_every_step(capsys):
    options = {"max_prompts": 4, "n_resamples": 500, "interventions": False}
    rl.compare_concepts("organism:specific", ["alarm", "joy"], **options)
    shown = capsys.readouterr().err
    assert "reading joy" in shown
    assert "cosines of alarm" in shown


@pytest.mark.parametrize(
    ("concepts", "words"),
    [
        (["refusal"], "nothing to compare 'refusal' with"),
        ([rl.Contrast("x", ["a"], ["b"]), rl.Contrast("x", ["c"], ["d"])], "share a name"),
        ([rl.Contrast("x", ["a"], ["b"]), rl.Contrast("y", ["a"], ["d"])], "share the prompt"),
    ],
)
def test_concepts_that_can_t_be_compared_are_refused(concepts, words):
    with pytest.raises(rl.InputError, match=words):
        rl.compare_concepts("organism:specific", concepts)
