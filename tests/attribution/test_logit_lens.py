"""The logit lens names the tokens that a direction promotes, and the direct effect can be taken out."""

import pytest
import torch
from families import TOKENS, random_model
from wired import build, tokenizer

from refusal_lens.attribution.logit_lens import logit_lens, without_direct_effect
from refusal_lens.errors import InputError
from refusal_lens.interventions import add_direction, openings_of, refusal_log_odds
from refusal_lens.models.forward import effective_unembedding
from refusal_lens.models.load import from_hugging_face
from refusal_lens.prompts.tokenize import build_inputs_with_chat_template


@pytest.fixture(scope="module")
def wired():
    return from_hugging_face(build("sympathy"), tokenizer(), name="sympathy")


def drawn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("family", ["Llama 3.1, 3.2", "Gemma 2", "Gemma 3", "GPT-2"])
@torch.no_grad()
def test_the_norm_that_is_folded_into_the_unembedding_is_the_models_own(family):
    model = from_hugging_face(random_model(family), None, name=family)
    stream = drawn(1, 1, model.cfg.d_model)
    last = f"blocks.{model.cfg.n_layers - 1}.hook_resid_post"

    def logits(x):
        with model.hooks(fwd_hooks=[(last, lambda y, hook: x.expand_as(y))]):
            return model(TOKENS)[0, -1].double()

    # A change of sign leaves the size of the stream, and a bias of the norm cancels.
    mine = stream[0, 0] - (stream.mean() if family == "GPT-2" else 0)
    mine = (mine / mine.square().mean().sqrt()) @ effective_unembedding(model)
    theirs = ((logits(stream) - logits(-stream)) / 2).float()
    torch.testing.assert_close(mine - mine.mean(), theirs - theirs.mean(), rtol=1e-2, atol=3e-2)


def test_a_direction_that_writes_one_tokens_logit_promotes_that_token(wired):
    unembedding = effective_unembedding(wired)
    word = wired.tokenizer.encode("Sure", add_special_tokens=False)[0]
    direction = torch.stack([unembedding[:, word], -unembedding[:, word]])
    found = logit_lens(wired, direction, k=3)
    assert found.promoted[0][0][0] == "Sure"
    assert found.suppressed[1][0][0] == "Sure"
    assert found.promoted[0][0][1] == pytest.approx(-found.suppressed[1][0][1])
    assert found.promoted[0][0][1] > max(0, 2 * found.promoted[0][1][1])
    assert "'Sure'" in repr(found)
    assert "<td>&#x27;Sure&#x27;" in found._repr_html_()
    longer = logit_lens(wired, 7 * direction, k=3)
    assert longer.promoted[0][0] == pytest.approx(found.promoted[0][0])


@pytest.mark.parametrize("n", [1, None], ids=["one token", "all first tokens"])
def test_a_direction_without_its_direct_effect_leaves_these_tokens_logits(wired, n):
    ids = openings_of(wired.tokenizer).first_tokens[:n]
    direction = drawn(2, wired.cfg.d_model) + 3 * effective_unembedding(wired)[:, ids[0]]
    cleaned = without_direct_effect(wired, direction, ids)
    logits = cleaned @ effective_unembedding(wired)
    above_mean = logits - logits.mean(-1, keepdim=True)
    assert above_mean[:, list(ids)].abs().max() < 1e-4 * above_mean.abs().max()
    torch.testing.assert_close(without_direct_effect(wired, cleaned, ids), cleaned)
    # What is taken out lies in the span of as many unembeddings as there are tokens.
    assert torch.linalg.matrix_rank(direction - cleaned, rtol=1e-4) <= len(ids)
    assert not torch.allclose(cleaned, direction, atol=0.1)


@torch.no_grad()
def test_only_the_direct_part_of_a_direction_moves_refusal_after_the_last_layer(wired):
    ids = openings_of(wired.tokenizer).first_tokens
    direction = drawn(wired.cfg.d_model) + 5 * effective_unembedding(wired)[:, ids[0]]
    cleaned = without_direct_effect(wired, direction, ids)
    inputs = build_inputs_with_chat_template(wired.tokenizer, ["How do I bake bread?"])
    last = wired.cfg.n_layers - 1

    def score(*added):
        with wired.hooks(fwd_hooks=[hook for x in added for hook in add_direction(wired, x, last)]):
            return refusal_log_odds(wired(inputs.tokens)[0, -1], ids).item()

    plain = score()
    assert abs(score(0.1 * (direction - cleaned)) - plain) > 0.3
    assert abs(score(0.1 * cleaned) - plain) < 0.1 * abs(score(0.1 * (direction - cleaned)) - plain)


@pytest.mark.parametrize("ids", [[], [-1], [10**6]])
def test_tokens_outside_the_vocabulary_are_refused(wired, ids):
    with pytest.raises(InputError, match=r"the tokens are .* give ids of this vocabulary"):
        without_direct_effect(wired, torch.ones(wired.cfg.d_model), ids)
