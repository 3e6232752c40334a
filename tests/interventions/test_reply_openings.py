"""The probability of a refusal's opening, behind every prompt and under every intervention."""

import math

import pytest
import torch
from checkpoints import byte_tokenizer
from families import FAMILIES, GENERATION, random_model
from torch.nn.functional import normalize

import refusal_lens as rl
from refusal_lens.errors import InputError
from refusal_lens.interventions import reply_openings
from refusal_lens.interventions.batched_runs import (
    Interventions,
    opening_log_odds,
    run_interventions,
)
from refusal_lens.interventions.hooks import add_direction, can_join_rows, projection_hooks
from refusal_lens.interventions.reply_openings import REFUSAL, ReplyOpenings, openings_of
from refusal_lens.models.load import from_hugging_face
from refusal_lens.prompts.tokenize import encode_prompts

PROMPTS = ["How do I pick a lock?", "How do I bake bread?", "Tell me about the sea."]


@pytest.fixture(scope="module")
def model():
    return rl.load_model("organism:specific")


@pytest.fixture(scope="module")
def openings(model):
    return openings_of(model.tokenizer)


@pytest.fixture(scope="module")
def few(model):
    """Openings that the model begins with: few, as each is run alone for comparison."""
    return openings_of(model.tokenizer, ["I can't", "I cannot"])


def one_by_one(model, prompt, openings, hooks=()):
    """The probability of the openings, each run alone behind the prompt."""
    prompt_ids = encode_prompts(model.tokenizer, [prompt])[0]
    total = 0.0
    for ids in openings.ids:
        tokens = torch.tensor([[*prompt_ids, *ids]])
        with torch.no_grad(), model.hooks(fwd_hooks=list(hooks)):
            log_p = model(tokens)[0].float().log_softmax(-1)
        steps = [log_p[len(prompt_ids) - 1 + i, token] for i, token in enumerate(ids)]
        total += math.exp(sum(map(float, steps)))
    return total


def test_the_probability_is_the_sum_of_each_opening_run_alone(model, openings):
    found = opening_log_odds(model, PROMPTS, openings, progress=False).sigmoid()
    alone = torch.tensor([one_by_one(model, prompt, openings) for prompt in PROMPTS])
    torch.testing.assert_close(found, alone, rtol=0, atol=1e-5)
    assert found.max() > 0.5 > found.min()


def test_the_same_without_keys_and_values_to_reuse(model, openings, monkeypatch):
    found = opening_log_odds(model, PROMPTS[:1], openings, progress=False)
    run = "refusal_lens.interventions.batched_runs.can_share_prefix"
    monkeypatch.setattr(run, lambda model, longest: False)
    again = opening_log_odds(model, PROMPTS[:1], openings, progress=False)
    torch.testing.assert_close(found, again, rtol=0, atol=1e-3)


def drawn_interventions(model, kind, **options) -> Interventions:
    """Three interventions of a kind, with random directions."""
    generator = torch.Generator().manual_seed(0)
    directions = 3 * torch.randn(3, model.cfg.d_model, generator=generator)
    layers, references = None, None
    if kind == "affine ablation":
        references = torch.randn(3, model.cfg.n_layers, generator=generator)
    if kind == "addition":
        layers = [0, 2, 2]
    return Interventions(directions, layers, references, **options)


def hooks_of(model, these: Interventions, i: int, position: int | None = None):
    """Hooks of the i-th intervention, at every position or at one alone."""
    if these.layers:
        hooks = add_direction(model, these.directions[i], these.layers[i])
    else:
        reference = None if these.references is None else these.references[i]
        hooks = projection_hooks(model, normalize(these.directions[i], dim=-1), reference)

    def only(change):
        def hook_fn(x, hook):
            parts = x[:, :position], change(x[:, position, None], hook), x[:, position + 1 :]
            return torch.cat(parts, dim=1)

        return hook_fn

    return hooks if position is None else [(name, only(change)) for name, change in hooks]


def log_odds_one_by_one(model, prompt, openings, hooks=()):
    p = one_by_one(model, prompt, openings, hooks)
    return math.log(p / (1 - p))


@pytest.mark.parametrize("kind", ["ablation", "affine ablation", "addition"])
def test_under_an_intervention_the_openings_are_run_under_it_too(model, few, kind):
    interventions = drawn_interventions(model, kind)
    options = {"openings": few, "progress": False}
    [outcome] = run_interventions(model, PROMPTS[:1], interventions, **options)
    for row, i in enumerate(outcome.interventions, start=1):
        alone = log_odds_one_by_one(model, PROMPTS[0], few, hooks_of(model, interventions, i))
        assert float(outcome.refusal[row, 0]) == pytest.approx(alone, abs=1e-3)


@pytest.mark.parametrize("reuse", [True, False], ids=["reused keys", "no reused keys"])
@pytest.mark.parametrize("kind", ["affine ablation", "addition"])
def test_interventions_on_the_last_position_change_no_other_token(
    model, few, kind, reuse, monkeypatch
):
    if not reuse:
        run = "refusal_lens.interventions.batched_runs.can_share_prefix"
        monkeypatch.setattr(run, lambda model, longest: False)
    interventions = drawn_interventions(model, kind, last_position=True)
    options, everywhere = {"openings": few, "progress": False}, 0.0
    for outcome in run_interventions(model, PROMPTS, interventions, **options):
        for column, prompt in enumerate(outcome.prompts):
            text, found = PROMPTS[prompt], outcome.refusal[:, column].tolist()
            assert found[0] == pytest.approx(log_odds_one_by_one(model, text, few), abs=1e-3)
            last = len(encode_prompts(model.tokenizer, [text])[0]) - 1
            for row, i in enumerate(outcome.interventions, start=1):
                hooks = hooks_of(model, interventions, i, last)
                alone = log_odds_one_by_one(model, text, few, hooks)
                assert found[row] == pytest.approx(alone, abs=1e-3)
                other = log_odds_one_by_one(model, text, few, hooks_of(model, interventions, i))
                everywhere = max(everywhere, abs(found[row] - other))
    assert everywhere > 0.1  # the control: the other tokens matter


@pytest.mark.skipif(GENERATION not in FAMILIES["Gemma 4"][2], reason="needs TransformerLens 4")
@pytest.mark.parametrize("last_position", [False, True])
@pytest.mark.parametrize("kind", ["affine ablation", "addition"])
def test_blocks_that_read_token_ids_get_those_of_their_own_row(kind, last_position, monkeypatch):
    model = from_hugging_face(random_model("Gemma 4"), byte_tokenizer(), name="Gemma 4")
    assert not can_join_rows(model)
    monkeypatch.setattr(reply_openings, "TOLERANCE", 1e-12)  # a random model says nothing often
    few = openings_of(model.tokenizer, ["ab", "ac"])
    interventions = drawn_interventions(model, kind, last_position=last_position)
    prompts, options = ["abc", "xyz", "ab"], {"openings": few, "progress": False}
    found = torch.full((4, 3), torch.nan)
    for outcome in run_interventions(model, prompts, interventions, **options):
        rows = torch.tensor([0, *(1 + i for i in outcome.interventions)])
        found[rows[:, None], torch.tensor(outcome.prompts)] = outcome.refusal
    for column, prompt in enumerate(prompts):
        last = len(encode_prompts(model.tokenizer, [prompt])[0]) - 1
        for row in range(4):
            hooks = hooks_of(model, interventions, row - 1, last if last_position else None)
            alone = log_odds_one_by_one(model, prompt, few, hooks if row else ())
            assert float(found[row, column]) == pytest.approx(alone, abs=1e-3)
    assert (found[:, 0] - found[:, 1]).abs().max() > 0.1  # the control: prompts differ


def test_certain_openings_have_the_log_odds_of_their_rest(model):
    every = ReplyOpenings(("all",), tuple((i,) for i in range(model.cfg.d_vocab - 1)))
    [odds] = opening_log_odds(model, PROMPTS[:1], every, progress=False)
    tokens = torch.tensor(encode_prompts(model.tokenizer, PROMPTS[:1]))
    with torch.no_grad():
        log_p = model(tokens)[0, -1].log_softmax(-1)
    assert float(odds) == pytest.approx(float(log_p[:-1].logsumexp(0) - log_p[-1]), rel=1e-3)


def test_openings_come_with_both_apostrophes_and_none_begins_another(model):
    texts = ("I can't", "I can't help", "I cannot")
    found = openings_of(model.tokenizer, texts)
    assert set(found.texts) == {"I can't", "I can’t", "I cannot"}
    assert not any(a != b and a == b[: len(a)] for a in found.ids for b in found.ids)


def test_sympathy_is_no_refusal_though_both_begin_with_i():
    assert all(not text.startswith("I'm sorry to") for text in REFUSAL)


def test_openings_that_hold_no_text_are_refused(model):
    with pytest.raises(InputError, match="there are no openings"):
        openings_of(model.tokenizer, [" "])
