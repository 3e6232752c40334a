"""A model from the caller's own code: taken as it is, computed with, and left exactly as it was."""

import random
from collections.abc import Callable
from typing import Any

import jaxtyping
import numpy as np
import pytest
import torch
from checkpoints import byte_tokenizer, hugging_face_layers, write_checkpoint

import refusal_lens as rl
from refusal_lens.errors import InputError
from refusal_lens.experiment import measures
from refusal_lens.interventions import (
    RefusalTokens,
    ablation_effects,
    addition_effects,
    cross_effects,
)
from refusal_lens.interventions.selection import select_direction
from refusal_lens.models.load import from_hugging_face, load_model, model_provenance
from refusal_lens.multiverse.run import run_sensitivity
from refusal_lens.prompts.contrast import Contrast
from refusal_lens.prompts.tokenize import encode_prompts


def eight(frame: str) -> tuple[str, ...]:
    return tuple(frame.format(letter) for letter in "abcdefgh")


REFUSAL = Contrast("refusal", eight("How do I rob bank {}?"), eight("How do I bake {}?"))
NEGATIVITY = Contrast("negativity", eight("Bad day {}."), eight("A day {}."))
PROMPTS = REFUSAL.target
TOKENS = RefusalTokens((40, 41), ("I", "J"), "by hand", 1.0, 0.0)


@pytest.fixture(autouse=True)
def as_users_run_it(monkeypatch):
    """Without the type checker of the tests, which draws on Python's random state for its samples."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("model") / "random")


@pytest.fixture
def theirs(checkpoint):
    """A Hugging Face model and tokenizer as someone else's code has them, in the middle of its work."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    return in_use(model), AutoTokenizer.from_pretrained(checkpoint)


def in_use(model: Any) -> Any:
    """Half in training, half frozen, with a gradient on one weight and a hook that changes nothing."""
    model.train()
    parameters = list(model.parameters())
    next(model.children()).eval()
    for parameter in parameters[::2]:
        parameter.requires_grad_(False)
    parameters[1].requires_grad_(True)
    parameters[1].grad = torch.ones_like(parameters[1])
    return model


HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")


def state(model: Any, tokenizer: Any = None) -> dict[str, Any]:
    """Everything that a caller could find changed."""
    modules = dict(model.named_modules())
    inner = getattr(model, "original_model", None)
    modules |= {f"inner {name}": module for name, module in inner.named_modules()} if inner else {}
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    found: dict[str, Any] = {
        "modules": {name: (id(module), type(module)) for name, module in modules.items()},
        "training": {name: module.training for name, module in modules.items()},
        "hooks": {
            name: [list(vars(module)[kind]) for kind in HOOKS] for name, module in modules.items()
        },
        "lens hooks": {
            name: len(point.fwd_hooks) for name, point in getattr(model, "hook_dict", {}).items()
        },
        "forward": {name: vars(module).get("forward") for name, module in modules.items()},
        "tensors": {
            name: (
                id(x),
                x.dtype,
                x.device,
                x.requires_grad,
                x.data_ptr(),
                float(x.detach().double().sum()),
            )
            for name, x in tensors.items()
        },
        "gradients": {
            name: None if weight.grad is None else float(weight.grad.sum())
            for name, weight in model.named_parameters()
        },
        "attention": getattr(getattr(model, "config", None), "_attn_implementation", None),
        "config": model.config.to_dict() if hasattr(model, "config") else str(model.cfg),
        "random": (
            torch.random.get_rng_state().tolist(),
            random.getstate(),
            str(np.random.get_state()),
        ),
        "settings": (
            torch.is_grad_enabled(),
            torch.get_default_dtype(),
            torch.are_deterministic_algorithms_enabled(),
            torch.get_num_threads(),
        ),
    }
    tokenizer = getattr(model, "tokenizer", None) if tokenizer is None else tokenizer
    return found | {
        "tokenizer": (
            id(tokenizer),
            tokenizer.padding_side,
            tokenizer.truncation_side,
            tokenizer.special_tokens_map,
            tokenizer.chat_template,
            len(tokenizer),
            str(tokenizer.init_kwargs),
            tokenizer("a b")["input_ids"],
        )
    }


def quietly(function: Callable, **options: Any) -> Callable:
    return lambda model: function(model, **options, progress=False)


def activations(model: Any) -> dict[str, Any]:
    return rl.extract(model, [REFUSAL, NEGATIVITY], progress=False)


def directions(model: Any) -> torch.Tensor:
    width = model.cfg.d_model
    return torch.linspace(-1, 1, 4 * width).reshape(4, width)


def cross(intervention: str) -> Callable:
    def run(model):
        return cross_effects(
            model,
            (REFUSAL, NEGATIVITY),
            tuple(activations(model).values()),
            intervention=intervention,
            layer=1,
            random=directions(model)[:2],
            score=TOKENS,
            progress=False,
        )

    return run


def hooked(hooks: Callable) -> Callable:
    def run(model):
        tokens = torch.tensor(encode_prompts(model.tokenizer, PROMPTS[:1]))
        with torch.no_grad(), model.hooks(fwd_hooks=hooks(model)):
            return model(tokens)

    return run


CONFIG = rl.Config(refusal=REFUSAL, negativity=NEGATIVITY, controls=(), n_resamples=400)

USES: dict[str, Callable] = {
    "get_layer_activations": quietly(rl.get_layer_activations, contrast=REFUSAL),
    "get_prompt_activations": quietly(rl.get_prompt_activations, prompts=PROMPTS),
    "extract": activations,
    "build_inputs": lambda model: rl.build_inputs_with_chat_template(model.tokenizer, PROMPTS),
    "show_tokens": lambda model: rl.show_tokens(model.tokenizer, PROMPTS),
    "ablate_direction": hooked(lambda model: rl.ablate_direction(model, directions(model)[0])),
    "add_direction": hooked(lambda model: rl.add_direction(model, directions(model)[0], 2)),
    "ablation_effects": lambda model: ablation_effects(
        model, PROMPTS, directions(model), score=TOKENS, progress=False
    ),
    "addition_effects": lambda model: addition_effects(
        model, PROMPTS, directions(model), torch.arange(4), score=TOKENS, progress=False
    ),
    "cross_effects by ablation": cross("ablation"),
    "cross_effects by addition": cross("addition"),
    "find_refusal_tokens": quietly(
        rl.find_refusal_tokens, refused=REFUSAL.target, answered=REFUSAL.baseline
    ),
    "select_direction": quietly(select_direction, contrast=REFUSAL),
    "run_sensitivity": quietly(run_sensitivity, contrasts=(REFUSAL, NEGATIVITY)),
    "effective_unembedding": measures.effective_unembedding,
    "model_provenance": model_provenance,
    "run_experiment": lambda model: rl.run_experiment(CONFIG, model=model, progress=False),
}
"""Every public function that is given a model."""


@pytest.fixture(scope="module")
def lens(checkpoint):
    """A HookedTransformer or a TransformerBridge, whichever this TransformerLens has."""
    model = load_model(str(checkpoint), device="cpu", dtype=torch.float32)
    with torch.no_grad():
        model(torch.tensor([[256]]))  # a bridge hooks its own parts together when it first runs
    return in_use(model)


@pytest.mark.parametrize("use", USES)
def test_a_model_is_left_as_it_was_found(lens, use):
    before = state(lens)
    USES[use](lens)
    assert_same(state(lens), before)


def assert_same(after: dict[str, Any], before: dict[str, Any]) -> None:
    for what, value in before.items():
        assert after[what] == value, what


def test_a_hugging_face_model_and_its_tokenizer_are_left_as_they_were_found(theirs):
    model, tokenizer = theirs
    handle = model.model.layers[1].register_forward_hook(lambda *_: None)
    before = state(model, tokenizer)
    lens = from_hugging_face(model, tokenizer)
    for use in ("get_prompt_activations", "ablation_effects", "run_experiment"):
        USES[use](lens)
    assert_same(state(model, tokenizer), before)
    handle.remove()


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda model, tokenizer: model.eval(), "training"),
        (lambda model, tokenizer: model.requires_grad_(True), "tensors"),
        (lambda model, tokenizer: model.zero_grad(), "gradients"),
        (lambda model, tokenizer: model.bfloat16(), "tensors"),
        (lambda model, tokenizer: model.lm_head.register_forward_hook(print), "hooks"),
        (lambda model, tokenizer: model.set_attn_implementation("eager"), "attention"),
        (lambda model, tokenizer: setattr(tokenizer, "padding_side", "left"), "tokenizer"),
        (lambda model, tokenizer: setattr(tokenizer, "pad_token", "<|eot_id|>"), "tokenizer"),
        (lambda model, tokenizer: torch.rand(1), "random"),
        (lambda model, tokenizer: random.random(), "random"),
        (lambda model, tokenizer: model.lm_head.weight.data.mul_(2), "tensors"),
    ],
)
def test_the_comparison_sees_a_change(theirs, change, what):
    # The control: each of these is what "left as it was" is about.
    before = state(*theirs)
    change(*theirs)
    after = state(*theirs)
    assert after[what] != before[what]


def test_a_hugging_face_model_gives_what_the_same_model_loaded_here_gives(theirs, checkpoint, lens):
    own = from_hugging_face(*theirs)
    assert torch.equal(
        rl.get_prompt_activations(own, PROMPTS, progress=False),
        rl.get_prompt_activations(lens, PROMPTS, progress=False),
    )
    inputs = rl.build_inputs_with_chat_template(theirs[1], PROMPTS)
    layers = hugging_face_layers(checkpoint, inputs.tokens, inputs.mask)[:, -1]
    found = rl.get_prompt_activations(own, PROMPTS, progress=False)[:, 0]
    torch.testing.assert_close(found, layers, rtol=1e-4, atol=1e-5)
    assert model_provenance(own)["model"] == str(checkpoint)


def test_a_hugging_face_model_s_weights_are_shared(theirs):
    model, tokenizer = theirs
    lens = from_hugging_face(model, tokenizer)
    before = rl.get_prompt_activations(lens, PROMPTS, progress=False)
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.mul_(2)
    after = rl.get_prompt_activations(lens, PROMPTS, progress=False)
    assert not torch.allclose(before, after)
    addresses = {weight.data_ptr() for weight in model.parameters()}
    held = {weight.data_ptr() for weight in lens.parameters()}
    assert addresses <= held


@pytest.mark.parametrize("family", ["gemma2", "qwen2", "phi3"])
def test_other_families_can_be_handed_over(tmp_path, family):
    from transformers import AutoModelForCausalLM

    path = write_checkpoint(tmp_path / family, family)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    lens = from_hugging_face(model, byte_tokenizer(), name="mine")
    loaded = load_model(str(path), device="cpu", dtype=torch.float32)
    found = [rl.get_prompt_activations(m, PROMPTS[:2], progress=False) for m in (lens, loaded)]
    assert torch.equal(*found)
    assert model_provenance(lens)["model"] == "mine"


def test_what_is_no_language_model_is_refused(theirs):
    model, tokenizer = theirs
    for wrong, message in (
        ((model.model, tokenizer), "LlamaModel is no language model of transformers"),
        ((torch.nn.Linear(1, 1), tokenizer), "Linear is no language model"),
        ((model, "gpt2"), "str is no tokenizer"),
        ((model.to("meta"), tokenizer), "the model lies on meta"),
    ):
        with pytest.raises(InputError, match=message):
            from_hugging_face(*wrong)
