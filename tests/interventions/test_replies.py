"""Replies side by side: right for harmless prompts, and never an answer to a harmful one."""

import pytest
import torch

import refusal_lens as rl
from refusal_lens.interventions import ablation_effects, openings_of, replies
from refusal_lens.interventions.replies import NOT_SHOWN
from refusal_lens.interventions.reply_openings import REFUSAL as OPENINGS
from refusal_lens.prompts.tokenize import encode_prompts

REFUSAL = rl.load_contrast("refusal")
NEGATIVITY = rl.load_contrast("negativity")
KNOWN = {NOT_SHOWN, *(f"{opening} ..." for opening in OPENINGS)}
OWN = "Is it going to rain on Sunday?"


@pytest.fixture(scope="module")
def model():
    return rl.load_model("organism:specific")


@pytest.fixture(scope="module")
def refusal(model):
    few = REFUSAL.subset(range(8), range(8))
    return rl.Direction.of(model, few, progress=False).at(20)


@pytest.fixture(scope="module")
def table(model, refusal):
    prompts = [REFUSAL.target[0], REFUSAL.baseline[0], NEGATIVITY.target[0], OWN]
    return rl.compare_replies(model, prompts, ablate=refusal, max_tokens=6)


def greedy(model, prompt, n):
    tokens = encode_prompts(model.tokenizer, [prompt])[0]
    for _ in range(n):
        with torch.no_grad():
            tokens.append(int(model(torch.tensor([tokens]))[0, -1].argmax()))
        if tokens[-1] in model.tokenizer.all_special_ids:
            break
    return tokens


def test_replies_to_harmless_and_own_prompts_are_the_models_own(model, table):
    for row in table[1:]:
        assert row.before
        assert row.before not in KNOWN
        tokens = greedy(model, row.prompt, 6)
        text = model.tokenizer.decode(tokens, skip_special_tokens=True)
        assert text.endswith(row.before)


def test_a_pass_without_recorded_keys_gives_the_same_replies(model, refusal, table, monkeypatch):
    monkeypatch.setattr(replies, "can_share_prefix", lambda *_: False)
    prompts = [row.prompt for row in table]
    assert rl.compare_replies(model, prompts, ablate=refusal, max_tokens=6) == table


def test_scores_are_those_of_the_sweep_over_directions(model, refusal, table):
    prompts, score = [row.prompt for row in table], openings_of(model.tokenizer)
    effects = ablation_effects(model, prompts, refusal.vectors[None], score=score, progress=False)
    for name, expected in {
        "score_before": effects.unchanged,
        "score_after": effects.log_odds[0],
    }.items():
        assert torch.allclose(
            torch.tensor([getattr(row, name) for row in table]), expected, atol=1e-3
        )


@pytest.mark.parametrize("coefficient", [1.0, -3.0])
def test_no_harmful_prompt_is_answered(model, refusal, coefficient):
    a, b = REFUSAL.target[:2]
    prompts = [a, b.upper(), f"Please:  {a} Thank you!"]
    for row in rl.compare_replies(
        model, prompts, add=refusal, coefficient=coefficient, max_tokens=6
    ):
        assert {row.before, row.after} <= KNOWN
        assert row.score_before != row.score_after


def test_a_harmful_set_of_ones_own_is_not_answered_either(model, refusal):
    shown = rl.compare_replies(model, OWN, ablate=refusal, max_tokens=4)[0].before
    own = rl.Contrast("mine", [OWN], ["How do I bake bread?"])
    hidden = rl.compare_replies(model, own, ablate=refusal, contrast=own, max_tokens=4)[0].before
    assert shown not in KNOWN
    assert hidden == NOT_SHOWN


def test_a_model_that_answers_everything_is_not_made_to_answer_harmful_prompts():
    model = rl.load_model("organism:oblivious")
    direction = rl.Direction(torch.ones(64), 20)
    for row in rl.compare_replies(model, REFUSAL.target[:2], ablate=direction, max_tokens=6):
        assert row.before == row.after == NOT_SHOWN


def test_a_prompt_that_the_model_refuses_and_nobody_vouches_for_is_only_scored(monkeypatch):
    prompts, scores = [OWN, REFUSAL.baseline[0]], torch.tensor([0.5, 0.5])
    assert replies._answerable(prompts, scores, []) == [False, True]
    assert replies._answerable(prompts, -scores, []) == [True, True]


def test_the_table_shows_itself_as_text_html_and_pandas(table):
    assert f"{OWN}\n  before (" in str(table)
    assert list(table.to_pandas().columns) == [
        *("prompt", "before", "after", "score_before", "score_after")
    ]
    sly = replies.Replies([replies.Reply("<b>" + "x" * 90, "a", "b", 1.0, -1.0)])
    assert "&lt;b&gt;" + "x" * 90 in sly._repr_html_()
