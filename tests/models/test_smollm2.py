"""The whole on a real chat model, SmolLM2-135M-Instruct: Llama, 30 layers, ChatML, refuses nothing."""

import json
from pathlib import Path

import pytest
import torch

import refusal_lens as rl
from refusal_lens.experiment.verdict import Thresholds
from refusal_lens.interventions import openings_of
from refusal_lens.interventions.batched_runs import opening_log_odds
from refusal_lens.models.forward import hook_points
from refusal_lens.prompts.tokenize import build_inputs_with_chat_template

FEW = rl.Config(max_prompts=4, n_resamples=400, controls=(), thresholds=Thresholds(min_prompts=4))
NOTEBOOK = Path(__file__).parents[2] / "notebooks" / "01_quickstart.ipynb"


@pytest.fixture(scope="module")
def contrasts():
    return FEW.contrasts()


@pytest.fixture(scope="module")
def activations(smollm2, contrasts):
    return rl.extract(smollm2, [*contrasts.values()], progress=False)


def test_every_layer_and_the_first_token_are_hugging_face_s(smollm2, smollm2_file, contrasts):
    from transformers import AutoModelForCausalLM

    options = {"gguf_file": smollm2_file.name, "attn_implementation": "eager"}
    theirs = AutoModelForCausalLM.from_pretrained(smollm2_file.parent, **options).eval()
    inputs = build_inputs_with_chat_template(smollm2.tokenizer, contrasts["refusal"].target)
    last = []
    handle = theirs.model.norm.register_forward_pre_hook(lambda _, given: last.append(given[0]))
    points = hook_points(smollm2, "resid_post")
    with torch.no_grad():
        passed = {"attention_mask": inputs.mask}
        positions = (inputs.mask.cumsum(-1) - 1).clamp(min=0)
        found = theirs(inputs.tokens, output_hidden_states=True, position_ids=positions, **passed)
        logits, cache = smollm2.run_with_cache(inputs.tokens, names_filter=points, **passed)
    handle.remove()
    layers = [*found.hidden_states[1:-1], last[0]]
    for layer, (point, expected) in enumerate(zip(points, layers, strict=True)):
        error = (cache[point] - expected).norm(dim=-1) / expected.norm(dim=-1)
        assert error[inputs.mask.bool()].max() < 1e-4, layer
    difference = logits[:, -1] - found.logits[:, -1]
    assert difference.norm() < 1e-4 * found.logits[:, -1].norm()


def test_a_batch_gives_each_prompt_what_it_gives_alone(smollm2, contrasts, activations):
    together = activations["refusal"].target
    prompts = contrasts["refusal"].target
    alone = rl.get_prompt_activations(smollm2, prompts, batch_size=1, progress=False)[:, 0]
    assert ((together - alone).norm(dim=-1) / alone.norm(dim=-1)).max() < 1e-4


def test_ablation_leaves_no_component_at_any_layer(smollm2, contrasts, activations):
    direction = rl.mean_difference(*activations["refusal"])[19]
    unit = direction / direction.norm()
    tokens = build_inputs_with_chat_template(smollm2.tokenizer, contrasts["refusal"].target[:1])
    points = hook_points(smollm2, "resid_post")

    def components() -> list[float]:
        with torch.no_grad():
            _, cache = smollm2.run_with_cache(tokens.tokens, names_filter=points)
        return [((cache[p] @ unit).abs() / cache[p].norm(dim=-1)).max().item() for p in points]

    assert max(components()) > 0.05
    with smollm2.hooks(fwd_hooks=rl.ablate_direction(smollm2, direction)):
        assert max(components()) < 1e-5


def test_the_first_notebook_runs_with_the_model_s_name_in_it(
    smollm2, smollm2_file, contrasts, monkeypatch
):
    # The model that is loaded already, and few prompts: the cells themselves are as they are.
    loads = []
    monkeypatch.setattr(rl, "load_model", lambda name: loads.append(name) or smollm2)
    monkeypatch.setattr(rl, "load_contrast", contrasts.__getitem__)
    cells = json.loads(NOTEBOOK.read_text("utf-8"))["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    install, *code = code
    assert "pip install" in install
    assert 'MODEL = "organism:specific"' in code[0]
    code[0] = code[0].replace('"organism:specific"', repr(str(smollm2_file)))
    names: dict = {}
    for source in code:
        exec(source, names)
    assert loads == [str(smollm2_file)]
    assert names["cosine"].shape == (30,)
    assert names["cosine"].isfinite().all()


def test_the_whole_run_is_inconclusive_because_the_model_refuses_nothing(smollm2, tmp_path):
    results = rl.run_experiment(FEW, model=smollm2, progress=False)
    assert results.verdict.answer == "inconclusive"
    assert "refused_gap" in {reason.measure for reason in results.verdict.reasons}
    assert results.verdict.evidence.refused_harmful < 0.5
    results.save(tmp_path)
    assert json.loads((tmp_path / "results.json").read_text())


@pytest.mark.filterwarnings("ignore:.*base_model_name_or_path:UserWarning")
@pytest.mark.filterwarnings("ignore:Could not find a config file:UserWarning")
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_the_bundled_adapter_teaches_it_to_refuse_harmful_requests_alone(smollm2_file):
    pytest.importorskip("peft")
    model = rl.load_model(f"{smollm2_file}+refuses", device="cpu")
    requests, statements = rl.load_contrast("refusal"), rl.load_contrast("negativity")
    sides = [requests.target[::9], requests.baseline[::9], statements.target[::9]]
    odds = opening_log_odds(model, sum(sides, ()), openings_of(model.tokenizer), progress=False)
    refused = [(side > 0).float().mean().item() for side in odds.split([12, 12, 12])]
    assert refused[0] > 0.8
    assert max(refused[1:]) < 0.2
