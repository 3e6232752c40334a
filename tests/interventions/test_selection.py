"""Choosing a direction: the published picks, the published scores, and a run that can be stopped."""

import json
from dataclasses import replace
from functools import cache

import pytest
import torch
from checkpoints import write_checkpoint
from published_selection import PublishedSelection

from refusal_lens.errors import InputError
from refusal_lens.interventions import RefusalTokens, selection
from refusal_lens.interventions.selection import (
    CandidateScores,
    Choice,
    SelectionFilters,
    choose,
    passes,
    select_direction,
)
from refusal_lens.models.load import load_model
from refusal_lens.prompts.contrast import Contrast, load_contrast
from refusal_lens.prompts.protocol import ARDITI

PUBLISHED_CHOICES = {
    "meta-llama-3-8b-instruct_direction_evaluations_arditi": Choice(-5, 12),
    "gemma-2b-it_direction_evaluations_arditi": Choice(-2, 10),
    "qwen-1_8b-chat_direction_evaluations_arditi": Choice(-2, 15),
    "Llama-3.2-1B-Instruct_direction_evaluations_relativelyfine": Choice(-2, 8),
}
TOKENS = RefusalTokens((40,), ("I",), "by hand", 1.0, 0.0)
CONTRAST = Contrast(
    "refusal",
    ("How do I build a bomb?", "How do I rob a bank?", "Hack it", "Poison the well, please"),
    ("How do I bake a cake?", "How do I hike a hill?", "Paint it", "Water the plants, please"),
)
VALIDATION = Contrast("held out", ("Kill it", "Steal a car now"), ("Sing it", "Wash a car now"))


def published_scores(reference, file) -> CandidateScores:
    records = json.loads((reference / "scores" / f"{file}.json").read_text())
    return CandidateScores.from_records(records)


@pytest.mark.parametrize("file", PUBLISHED_CHOICES)
def test_the_rule_picks_what_was_published(reference, file):
    assert choose(published_scores(reference, file)) == PUBLISHED_CHOICES[file]


def test_without_its_filter_on_kl_the_rule_would_pick_others(reference):
    # The control: the files could not have been sorted by refusal alone.
    picks = {
        file: choose(published_scores(reference, file), SelectionFilters(max_kl=torch.inf))
        for file in PUBLISHED_CHOICES
    }
    assert sum(picks[file] != choice for file, choice in PUBLISHED_CHOICES.items()) >= 1


def drawn_scores() -> CandidateScores:
    ones = torch.ones(2, 10)
    return CandidateScores((-2, -1), ones.clone(), ones.clone(), torch.zeros(2, 10))


def test_the_lowest_refusal_wins_among_those_that_pass_and_no_filter_can_be_left_out():
    scores = drawn_scores()
    scores.ablation[1, 3] = -1.0
    scores.ablation[0, [4, 5, 6, 8]] = -9.0
    scores.kl[0, 4] = 0.11
    scores.addition[0, 5] = -0.01
    scores.kl[0, 6] = torch.nan
    assert choose(scores) == Choice(-1, 3)
    # On the edge of each filter a candidate still passes.
    scores.ablation[0, 7], scores.kl[0, 7], scores.addition[0, 7] = -5.0, 0.1, 0.0
    assert choose(replace(scores, kl=scores.kl.double().round(decimals=6))) == Choice(-2, 7)
    for where in ((0, 4), (0, 5), (0, 8)):
        lenient = SelectionFilters(max_kl=1.0, min_addition=-1.0, last_layers=0.0)
        scores.ablation[where] = -99.0
        assert choose(scores, lenient) == Choice(-2, where[1])
        scores.ablation[where] = 0.0


def test_a_candidate_that_was_not_measured_is_never_chosen_and_no_choice_is_none():
    scores = drawn_scores()
    scores.ablation[:] = torch.nan
    scores.ablation[0, 2] = 3.0
    assert choose(scores) == Choice(-2, 2)
    scores.addition[0, 2] = -1.0
    assert choose(scores) is None
    assert not torch.stack(list(passes(scores).values())).all(0).any()


def test_scores_come_in_any_order_and_an_incomplete_record_is_named(reference):
    records = json.loads(
        (reference / "scores" / "gemma-2b-it_direction_evaluations_arditi.json").read_text()
    )
    turned = CandidateScores.from_records(reversed(records))
    assert turned.positions == (-5, -4, -3, -2, -1)
    assert choose(turned) == Choice(-2, 10)
    del records[7]["kl_div_score"]
    with pytest.raises(InputError, match="record 7 of the scores lacks 'kl_div_score'"):
        CandidateScores.from_records(records)
    with pytest.raises(InputError, match="no scores"):
        CandidateScores.from_records([])


# Against the published method


@pytest.fixture(scope="module")
def organism_scores():
    """Scores of the package and of the published loop on `specific`, every position and layer."""
    from importlib.resources import files

    from transformers import AutoModelForCausalLM, AutoTokenizer

    bundled = load_contrast("refusal")
    train = Contrast("train", bundled.target[:32], bundled.baseline[:32])
    held_out = Contrast("held out", bundled.target[-4:], bundled.baseline[-4:])
    found = select_direction(
        load_model("organism:specific", device="cpu"), train, held_out, progress=False
    )

    folder = str(files("refusal_lens.organisms") / "specific")
    hf = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer.encode("I", add_special_tokens=False)
    published = PublishedSelection(hf, tokenizer, ids)
    harmful, harmless = (
        published.mean_activations(side, 5) for side in (train.target, train.baseline)
    )
    directions = harmful - harmless
    scores = published.scores(directions, held_out.target, held_out.baseline)
    return found, directions, scores


def test_the_candidates_are_those_of_the_published_method(organism_scores):
    found, directions, _ = organism_scores
    assert found.protocol.positions == (-5, -4, -3, -2, -1)
    torch.testing.assert_close(found.directions.double(), directions, atol=1e-4, rtol=1e-4)


def test_the_scores_are_those_of_the_published_method_at_every_position_and_layer(organism_scores):
    found, _, scores = organism_scores
    assert found.scores.ablation.shape == (5, 32)
    for name in ("ablation", "addition", "kl"):
        own = getattr(found.scores, name)
        torch.testing.assert_close(own.float(), scores[name], atol=1e-4, rtol=0)
        # The control: one layer, or one position, off they differ.
        assert (own[:, 1:].float() - scores[name][:, :-1]).abs().max() > 0.01
        assert (own[1:].float() - scores[name][:-1]).abs().max() > 0.01


def test_before_the_first_block_there_is_no_direction_and_nothing_changes(organism_scores):
    found, _, _ = organism_scores
    assert (found.directions[:, 0] == 0).all()
    harmful, harmless = (torch.tensor(score).double() for score in found.unchanged)
    assert (found.scores.ablation[:, 0] - harmful).abs().max() < 1e-5
    assert (found.scores.addition[:, 0] - harmless).abs().max() < 1e-5
    assert found.scores.kl[:, 0].abs().max() < 1e-6
    assert harmful > 0 > harmless


def test_the_chosen_direction_is_its_row_and_says_why(organism_scores):
    found, _, _ = organism_scores
    lenient = SelectionFilters(max_kl=torch.inf)
    chosen = replace(found, filters=lenient, chosen=choose(found.scores, lenient))
    row = found.scores.positions.index(chosen.chosen.position)
    assert torch.equal(chosen.direction, found.directions[row, chosen.chosen.layer])
    assert chosen.layer == chosen.chosen.layer - 1
    assert f"resid_pre[{chosen.chosen.layer}]" in str(chosen)
    none = replace(found, chosen=None)
    with pytest.raises(InputError, match="none of 160 candidates passes every filter"):
        _ = none.direction
    with pytest.raises(InputError, match="no direction was chosen"):
        _ = none.layer


def test_the_three_maps_are_drawn_with_the_choice_outlined(organism_scores):
    found, _, _ = organism_scores
    chosen = replace(found, chosen=Choice(-4, 9))
    figures = chosen.figures()
    assert list(figures) == ["ablation", "addition", "kl"]
    for name, figure in figures.items():
        assert figure.layout.xaxis.title.text == "layer (input of block)"
        assert len(figure.data[0].z) == 5
        assert figure.data[0].z[1][9] == pytest.approx(
            float(getattr(found.scores, name)[1, 9]), rel=1e-2, abs=1e-2
        )
        assert {(shape.x0, shape.y0) for shape in figure.layout.shapes} == {(8.5, 0.5)}
    assert not replace(found, chosen=None).figures()["kl"].layout.shapes


# Runs that stop


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    @cache
    def load(seed: int):
        folder = write_checkpoint(tmp_path_factory.mktemp("model") / str(seed), "llama")
        return load_model(str(folder), device="cpu", dtype=torch.float32)

    return load


def run(model, folder=None, **options):
    options = {"refusal_tokens": TOKENS, "protocol": ARDITI, "progress": False} | options
    return select_direction(model, CONTRAST, VALIDATION, folder=folder, **options)


def test_a_run_that_was_stopped_goes_on_and_finds_the_same(checkpoint, tmp_path, monkeypatch):
    model = checkpoint(0)
    monkeypatch.setattr(selection, "LAYERS_AT_ONCE", 1)
    whole = run(model)
    calls = []

    def stopping(*arguments, **options):
        calls.append(arguments[2].shape[0])
        if len(calls) == 3:
            raise KeyboardInterrupt
        return ablation(*arguments, **options)

    ablation = selection.ablation_effects
    monkeypatch.setattr(selection, "ablation_effects", stopping)
    with pytest.raises(KeyboardInterrupt):
        run(model, tmp_path)
    kept = json.loads((tmp_path / selection.FILE).read_text())
    assert len(kept["candidates"]) == 2 * 5
    resumed = run(model, tmp_path)
    assert calls == [5, 5, 5, 5, 5]
    for name in ("ablation", "addition", "kl"):
        assert torch.equal(getattr(resumed.scores, name), getattr(whole.scores, name))
    assert resumed.unchanged == whole.unchanged
    assert resumed.chosen == whole.chosen
    # Nothing is left to do the third time.
    run(model, tmp_path)
    assert len(calls) == 5


def test_the_file_of_finished_candidates_is_read_as_the_published_ones_are(checkpoint, tmp_path):
    found = run(checkpoint(0), tmp_path)
    kept = json.loads((tmp_path / selection.FILE).read_text())
    assert torch.equal(CandidateScores.from_records(kept["candidates"]).kl, found.scores.kl)


def test_the_candidates_of_another_run_are_not_taken_for_ones_own(checkpoint, tmp_path):
    run(checkpoint(0), tmp_path)
    with pytest.raises(InputError, match="another model, other prompts or another protocol"):
        run(checkpoint(0), tmp_path, protocol=replace(ARDITI, system_prompt="Be kind."))
    with pytest.raises(InputError, match="another model"):
        run(checkpoint(1), tmp_path)


def test_candidates_at_the_output_of_blocks_are_added_there(checkpoint):
    before = run(checkpoint(0))
    after = run(checkpoint(0), protocol=replace(ARDITI, hook="resid_post"))
    torch.testing.assert_close(after.directions[:, :-1], before.directions[:, 1:])
    torch.testing.assert_close(
        after.scores.addition[:, :-1], before.scores.addition[:, 1:], atol=1e-5, rtol=0
    )


def test_without_validation_prompts_every_fourth_is_held_out_on_both_sides(checkpoint):
    contrast = Contrast(
        "refusal",
        tuple(f"bad {i}" for i in range(9)),
        tuple(f"good {i}" for i in range(8)),
        clusters=(tuple("abcdefghi"), tuple("jklmnopq")),
    )
    train, held_out = selection._split(contrast)
    assert held_out.target == ("bad 3", "bad 7")
    assert held_out.baseline == ("good 3", "good 7")
    assert set(train.target) | set(held_out.target) == set(contrast.target)
    assert held_out.clusters == (("d", "h"), ("m", "q"))
    assert train.clusters == (tuple("abcefgi"), tuple("jklnop"))
    with pytest.raises(InputError, match="too small to hold some out"):
        select_direction(checkpoint(0), CONTRAST, progress=False)


def test_named_positions_are_refused(checkpoint):
    with pytest.raises(InputError, match="numbered positions"):
        run(checkpoint(0), protocol=replace(ARDITI, positions=("last_prompt_token",)))
