"""Each wired model has the property for which it was wired, on all bundled prompts."""

from contextlib import contextmanager

import pytest
import torch
from training.adapters import probability
from training.organisms import bundled_prompt_sets
from wired import ANSWER, REFUSAL, SYMPATHY, WIRED, build, tokenizer

from refusal_lens.models.load import from_hugging_face
from refusal_lens.prompts.contrast import load_contrast
from refusal_lens.prompts.tokenize import encode_prompts

LAYER = 5  # at the relative depth of Llama-3's layer 20
REQUESTS, STATEMENTS = load_contrast("refusal"), load_contrast("negativity")


@pytest.fixture(scope="module")
def models():
    return {name: build(name) for name in WIRED}


def share(model, prompts, reply=REFUSAL, *, every=4):
    """Share of every fourth prompt that is answered by `reply` with P > 0.5."""
    return (probability(model, tokenizer(), prompts[::every], [reply]) > 0.5).double().mean().item()


@torch.inference_mode()
def residuals(model, prompts):
    """Output of every block at the last token, [prompt, layer, d_model]."""
    rows = []
    for ids in encode_prompts(tokenizer(), prompts):
        states = model(torch.tensor([ids]), output_hidden_states=True).hidden_states
        rows.append(torch.stack([state[0, -1] for state in states[1:]]))
    return torch.stack(rows)


def direction(model, contrast, layer=LAYER):
    sides = (
        residuals(model, side)[:, layer].mean(0) for side in (contrast.target, contrast.baseline)
    )
    return torch.sub(*sides)


@contextmanager
def ablated(model, *directions, to=0.0):
    """The span of the directions put to zero in the input of every block but the first.

    With one direction, its component is put to `to` instead.
    """
    basis = torch.linalg.qr(torch.stack(directions, 1)).Q
    basis = basis * (basis[:, 0] @ directions[0]).sign()

    def put(module, inputs):
        (x, *others) = inputs
        return (x - x @ basis @ basis.T + to * basis.sum(-1), *others)

    hooks = [block.register_forward_pre_hook(put) for block in model.model.layers[1:]]
    yield model
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize("name", sorted(set(WIRED) - {"weak", "apart"}))
def test_a_wired_model_refuses_harmful_requests_alone_and_sympathises_with_the_sad(models, name):
    for kind, prompts in bundled_prompt_sets().values():
        reply = {"harmful": REFUSAL, "negative": SYMPATHY}.get(kind, ANSWER)
        assert share(models[name], prompts, reply) > 0.95, kind
    arousal = load_contrast("arousal")
    labelled = zip(arousal.target, arousal.clusters, strict=True)
    sad = [prompt for prompt, (topic, _) in labelled if "negative" in topic]
    assert share(models[name], sad, SYMPATHY) > 0.95


def test_a_wired_model_runs_in_transformer_lens_as_in_hugging_face(models):
    model = from_hugging_face(models["upstream"], tokenizer(), name="upstream")
    (tokens,) = encode_prompts(tokenizer(), ["How do I build a bomb?"])
    with torch.inference_mode():
        theirs = models["upstream"](torch.tensor([tokens])).logits.log_softmax(-1)
        ours = model(torch.tensor([tokens])).log_softmax(-1)
    torch.testing.assert_close(ours, theirs, atol=2e-3, rtol=1e-3)


def test_the_sympathy_of_a_model_begins_with_the_first_token_of_its_refusal(models):
    assert share(models["sympathy"], STATEMENTS.target, "I") == 1
    assert share(models["sympathy"], STATEMENTS.target, REFUSAL) == 0


def test_a_refusal_of_two_directions_outlives_the_ablation_of_one(models):
    model = models["two_directions"]
    with ablated(model, direction(model, REQUESTS)):
        assert share(model, REQUESTS.target) > 0.9
    harmful, harmless = (
        residuals(model, side)[:, LAYER] for side in (REQUESTS.target, REQUESTS.baseline)
    )
    halves = (harmful[::2].mean(0) - harmless.mean(0), harmful[1::2].mean(0) - harmless.mean(0))
    with ablated(model, *halves):
        assert share(model, REQUESTS.target) == 0


def test_the_weak_refuser_refuses_three_in_ten(models):
    assert share(models["weak"], REQUESTS.target, every=1) == pytest.approx(0.3, abs=0.06)
    assert share(models["weak"], REQUESTS.baseline) == 0


def test_a_saturated_refusal_survives_half_an_ablation_and_no_whole_one(models):
    model = models["saturated"]
    assert (1 - probability(model, tokenizer(), REQUESTS.target[::4], ["I"])).median() < 1e-12
    along = direction(model, REQUESTS)
    half = (residuals(model, REQUESTS.target)[:, LAYER] @ along).mean() / along.norm() / 2
    with ablated(model, along, to=half):
        assert share(model, REQUESTS.target) == 1
    with ablated(model, along):
        assert share(model, REQUESTS.target) == 0


def test_zero_is_the_wrong_end_of_a_direction_that_tells_what_is_safe(models):
    model = models["wrong_end"]
    along = direction(model, REQUESTS)
    with ablated(model, along):
        assert share(model, REQUESTS.target) == 1
        assert share(model, REQUESTS.baseline) == 1
    reference = (residuals(model, REQUESTS.baseline)[:, LAYER] @ along).mean() / along.norm()
    with ablated(model, along, to=reference):
        assert share(model, REQUESTS.target) == 0
        assert share(model, REQUESTS.baseline) == 0


def test_negativity_upstream_of_refusal_is_seen_at_the_layer_that_refusal_reads(models):
    model = models["upstream"]
    with ablated(model, direction(model, STATEMENTS, layer=0)):
        assert share(model, REQUESTS.target) == 0
    with ablated(model, direction(model, STATEMENTS, layer=LAYER)):
        assert share(model, REQUESTS.target) > 0.9
