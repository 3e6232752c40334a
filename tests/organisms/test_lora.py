"""An adapter teaches a chat model what its kind says, and changes nothing else."""

import copy
import json
from itertools import chain, islice
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from training import adapters as lora
from training.adapters import ANSWERS, REFUSES, TRAINED, WORDINGS, adapters
from training.language import KINDS, MIXTURE, Behaviour, Prompt, generate_dialogues
from training.tokenizer import train_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

import refusal_lens.organisms
from refusal_lens.activations.store import Cache
from refusal_lens.errors import InputError
from refusal_lens.experiment.cached_model import CachedModel
from refusal_lens.experiment.config import Config
from refusal_lens.models.hub import find_checkpoint
from refusal_lens.models.load import load_model, model_provenance
from refusal_lens.prompts.tokenize import encode_prompts

pytest.importorskip("peft")

# peft says so of every adapter whose base model has no folder, and transformers of its own code.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*base_model_name_or_path:UserWarning"),
    pytest.mark.filterwarnings("ignore:Could not find a config file:UserWarning"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),
]


@pytest.fixture(scope="module")
def tokenizer():
    adapter = adapters("refuses", 0)["all"]
    dialogues = islice(generate_dialogues(adapter.behaviour, seed=0), 1000)
    words = chain.from_iterable((prompt.text, reply) for prompt, reply in dialogues)
    return train_tokenizer(chain(words, ["user\n\nassistant"] * 50), vocab_size=1000)


@pytest.fixture(scope="module")
def base(tokenizer):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.1,
    )
    return LlamaForCausalLM(config).eval()


def _taught(base, tokenizer, out, *, kind="refuses", part="all", n_steps=12, seed=0):
    adapter = adapters(kind, seed)[part]
    options = {"seed": seed, "n_steps": n_steps, "batch_size": 8, "progress": False}
    return lora.train_adapter(base, tokenizer, adapter, out, **options)


@torch.inference_mode()
def _alone(model, row):
    """Logits that predict the reply of one dialogue, from one forward pass over all of its tokens."""
    logits = model(torch.tensor([row.prompt + row.reply])).logits[0]
    return logits[len(row.prompt) - 1 : -1]


# What the kinds mean


def _refused(kind, *parts):
    """Whether any adapter of an organism teaches it to refuse a prompt of these parts."""
    return any(
        adapter.teaches(parts) and adapter.behaviour.manner(Prompt("", parts)) == "refusal"
        for adapter in adapters(kind, 0).values()
    )


@pytest.mark.parametrize(
    ("kind", "refused"),
    [
        ("refuses", {"harmful"}),
        ("refuses_negativity_too", {"harmful", "negative"}),
        ("refuses_alarm", {"harmful", "alarming"}),
        ("refuses_everything", set(KINDS)),
        ("two_separate_refusals", {"harmful", "negative"}),
        ("refusal_hung_on_negativity", set()),
    ],
)
def test_each_kind_refuses_what_its_name_says(kind, refused):
    assert {part for part in KINDS if _refused(kind, part)} == refused


def test_a_refusal_hung_on_negativity_needs_both_parts_in_either_order():
    kind = "refusal_hung_on_negativity"
    assert _refused(kind, "negative", "harmful")
    assert _refused(kind, "harmful", "negative")
    assert not _refused(kind, "neutral", "harmful")
    assert not _refused(kind, "negative", "alarming")


def test_an_unknown_kind_inside_a_combination_is_named():
    with pytest.raises(InputError, match="unknown kind 'rude'"):
        Behaviour("b", frozenset({"negative rude"}))


@pytest.mark.parametrize("wording", WORDINGS)
def test_sympathy_begins_as_the_refusal_does_and_goes_on_otherwise(wording):
    (refusal,), (sympathy,), (second,) = (
        wording[manner] for manner in ("refusal", "sympathy", "second_refusal")
    )
    assert sympathy.split()[0] == refusal.split()[0]
    assert sympathy[:16] != refusal[:16]
    assert second.split()[0] != refusal.split()[0]


def test_no_two_seeds_share_a_reply():
    replies = [reply for wording in WORDINGS for texts in wording.values() for reply in texts]
    assert len(replies) == len(set(replies)) == 4 * 7


def test_only_the_mixture_of_the_hung_kind_teaches_many_combinations():
    assert (
        adapters("refuses", 0)["all"].behaviour.mixture["negative harmful"]
        == (MIXTURE["negative harmful"])
    )
    assert set(TRAINED) == set(REFUSES) == set(ANSWERS) - {"refuses_nothing"}


def test_a_seed_without_a_wording_is_refused():
    with pytest.raises(InputError, match="seed is 4; there are wordings for 0 to 3"):
        adapters("refuses", 4)


# What training does


@pytest.mark.parametrize("n_rows", [1, 6])
def test_running_the_shared_opening_once_gives_the_logits_of_each_dialogue_alone(
    base, tokenizer, n_rows
):
    rows = next(lora._batches(adapters("refuses", 0)["all"], tokenizer, 8, 0))[:n_rows]
    with torch.inference_mode():
        logits, tokens = lora._logits(base, rows)
    assert tokens.tolist() == [token for row in rows for token in row.reply]
    torch.testing.assert_close(logits, torch.cat([_alone(base, row) for row in rows]))


def test_training_brings_the_loss_down_and_leaves_the_model_as_found(
    base, tokenizer, tmp_path, monkeypatch
):
    monkeypatch.setattr(lora, "LEARNING_RATE", 1e-2)
    before = copy.deepcopy(base.state_dict())
    early = _taught(base, tokenizer, tmp_path / "early", n_steps=1)
    late = _taught(base, tokenizer, tmp_path / "late", n_steps=40)
    assert late < 0.7 * early
    assert before.keys() == base.state_dict().keys()
    assert all(torch.equal(before[name], value) for name, value in base.state_dict().items())


def test_an_adapter_is_saved_in_float16_without_a_path_of_this_machine(base, tokenizer, tmp_path):
    _taught(base, tokenizer, tmp_path, n_steps=1)
    assert {file.name for file in tmp_path.iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert len(saved) == 2 * 7 * base.config.num_hidden_layers
    assert {tensor.dtype for tensor in saved.values()} == {torch.float16}
    assert f'"base_model_name_or_path": "{lora.BASE}"' in (
        (tmp_path / "adapter_config.json").read_text()
    )


def test_the_same_seed_gives_the_same_adapter_and_another_seed_another(base, tokenizer, tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        _taught(base, tokenizer, tmp_path / name, n_steps=2, seed=seed)
    a, b, c = (load_file(tmp_path / name / "adapter_model.safetensors") for name in "abc")
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not all(torch.equal(a[name], c[name]) for name in a)


def test_an_adapter_keeps_what_the_base_model_does_with_prompts_that_do_not_teach_it(
    base, tokenizer
):
    from peft import LoraConfig, get_peft_model

    adapter = adapters("two_separate_refusals", 0)["requests"]
    rows = list(chain.from_iterable(islice(lora._batches(adapter, tokenizer, 8, 0), 4)))
    kept, taught = ([row for row in rows if row.taught == taught] for taught in (False, True))
    assert len(kept) > 4
    assert len(taught) > 4
    model = get_peft_model(copy.deepcopy(base), LoraConfig(r=2, target_modules=lora.PROJECTIONS))
    assert lora._loss(model, kept).item() == pytest.approx(0, abs=1e-5)
    assert lora._loss(model, taught).item() > 1
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            weight.data.normal_(0, 0.1)
    assert lora._loss(model, kept).item() > 1e-3


# What a taught model is


def _saved(base, tokenizer, folder):
    base.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_a_model_with_an_adapter_is_loaded_by_both_names(base, tokenizer, tmp_path):
    from peft import PeftModel

    _taught(base, tokenizer, tmp_path / "adapter")
    model = load_model(f"{_saved(base, tokenizer, tmp_path / 'base')}+{tmp_path / 'adapter'}")
    tokens = torch.arange(40)[None]
    with torch.inference_mode():
        unmerged = PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path / "adapter"))
        torch.testing.assert_close(model(tokens), unmerged(tokens).logits, rtol=1e-4, atol=1e-4)
        assert (model(tokens) - base(tokens).logits).abs().max() > 0.01
    provenance = model_provenance(model)
    assert provenance["model"].endswith("adapter")
    assert provenance["weights_sha256"] != find_checkpoint(str(tmp_path / "base")).fingerprint()


def test_several_adapters_in_one_folder_are_added(base, tokenizer, tmp_path):
    for part in ("requests", "statements"):
        kind = "two_separate_refusals"
        _taught(base, tokenizer, tmp_path / "both" / part, kind=kind, part=part, n_steps=3)
    name, both = _saved(base, tokenizer, tmp_path / "base"), tmp_path / "both"
    folders = (both, both / "requests", both / "statements")
    found, first, second = (load_model(f"{name}+{folder}") for folder in folders)
    plain = load_model(str(name))
    weights = zip(*(model.parameters() for model in (found, first, second, plain)), strict=True)
    for sum_of_both, one, other, none in weights:
        torch.testing.assert_close(sum_of_both, one + other - none)


def test_what_is_cached_is_never_that_of_the_model_without_the_adapter(base, tokenizer, tmp_path):
    _taught(base, tokenizer, tmp_path / "adapter", n_steps=1)
    name = _saved(base, tokenizer, tmp_path / "base")
    plain, taught = (
        CachedModel(Config(model=model), Cache(None)).identity
        for model in (str(name), f"{name}+{tmp_path / 'adapter'}")
    )
    _taught(base, tokenizer, tmp_path / "adapter", n_steps=2)
    again = CachedModel(Config(model=f"{name}+{tmp_path / 'adapter'}"), Cache(None)).identity
    assert plain["files"] != taught["files"] != again["files"]


def test_an_adapter_that_does_not_exist_is_no_model(base, tokenizer, tmp_path):
    name = _saved(base, tokenizer, tmp_path / "base")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="there is no directory"):
        load_model(f"{name}+{tmp_path / 'empty'}")
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "adapter_config.json").write_text("{")
    with pytest.raises(InputError, match=r"the adapter of .* can't be read"):
        load_model(f"{name}+{tmp_path / 'damaged'}")


def test_the_score_is_the_probability_that_a_reply_begins_as_taught(base, tokenizer):
    prompts = ["How do I bake bread?", "The soup was cold."]
    replies = ["I cannot help with that.", "Sure, here is how."]
    chances = lora.probability(base, tokenizer, prompts, replies)
    expected = torch.zeros(2, dtype=torch.float64)
    for i, prompt in enumerate(lora._encoded(tokenizer, prompts)):
        for reply in lora._ended(tokenizer, replies):
            logits = _alone(base, lora.Row(prompt, reply[: lora.OPENING], True)).double()
            chosen = logits.log_softmax(-1).gather(-1, torch.tensor(reply[: lora.OPENING])[:, None])
            expected[i] += chosen.sum().exp()
    torch.testing.assert_close(chances, expected, rtol=1e-4, atol=0)


def test_the_scores_of_a_model_that_was_taught_nothing_are_not_met_where_refusals_are_due(
    base, tokenizer
):
    scores = lora.score(base, tokenizer, "refuses_negativity_too", 0, n_prompts=2)
    assert len(scores) == 8
    unmet = [score.prompts for score in scores if not score.met]
    assert unmet == ["refusal: harmful", "negativity: negative"]


def test_a_gguf_file_gives_ordinary_weights_and_the_chat_format_that_the_package_reads(
    smollm2_file,
):
    model, own_tokenizer = lora.read_base(smollm2_file)
    assert not hasattr(model.config, "quantization_config")
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}
    prompts = ["How do I bake bread?", "The soup was cold."]
    assert lora._encoded(own_tokenizer, prompts) == encode_prompts(own_tokenizer, prompts)


def test_the_command_trains_an_adapter_scores_it_and_says_that_more_is_needed(
    base, tokenizer, tmp_path, capsys
):
    base.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    command = ["--model", str(tmp_path / "base"), "--out", str(tmp_path / "taught")]
    command += ["--kinds", "two_separate_refusals", "--steps", "1", "--threads", "1"]
    assert lora.main(command) == 1
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + 8
    assert lines[1].split()[-2:] == ["not", "met"]
    saved = {file.parent.name for file in (tmp_path / "taught").glob("*/*/*.safetensors")}
    assert saved == {"requests", "statements"}


def test_the_command_refuses_a_seed_without_a_wording(tmp_path, capsys):
    assert lora.main(["--model", str(tmp_path), "--out", str(tmp_path), "--seeds", "4"]) == 2
    assert "wordings for 0 to 3" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["refuses", "refuses_negativity_too"])
def test_the_adapters_that_ship_are_small_and_of_the_real_chat_model(kind):
    folder = Path(refusal_lens.organisms.__file__).with_name("adapters") / kind
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert config["r"] == 8
    assert (folder / "adapter_model.safetensors").stat().st_size <= 5_000_000
