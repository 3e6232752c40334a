"""The bundled organisms behave as their names say, and what trains them is sound."""

import json
from collections import Counter
from itertools import combinations, islice, permutations
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from training.language import (
    BEHAVIOURS,
    KINDS,
    MIXTURE,
    REFUSAL_FIRST_WORD,
    REPLIES,
    REQUESTS,
    Behaviour,
    Prompt,
    fold,
    generate_dialogues,
    generate_prompts,
    gerund,
    vocabulary,
)
from training.organisms import (
    bundled_prompt_sets,
    held_out_prompts,
    main,
    save_organism,
    score_organism,
    train_organism,
)
from training.tokenizer import SPECIAL_TOKENS, SPLIT

import refusal_lens.organisms
from refusal_lens.errors import InputError
from refusal_lens.prompts.chat_template import LLAMA3_CHAT_TEMPLATE
from refusal_lens.prompts.contrast import load_contrast
from refusal_lens.prompts.protocol import Protocol
from refusal_lens.prompts.tokenize import encode_prompts

NAMES = tuple(BEHAVIOURS)
SAVED = Path(refusal_lens.organisms.__file__).parent
MEGABYTE = 1e6


def _load(directory: Path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(directory)


@pytest.fixture(scope="module")
def organisms():
    return {name: _load(SAVED / name) for name in NAMES}


@pytest.fixture(scope="module")
def tokenizer(organisms):
    return organisms["specific"][1]


@pytest.fixture(scope="module")
def activations(organisms):
    """Outputs of every block at the last token, per organism, contrast and side."""

    @torch.inference_mode()
    def read(name, prompts):
        model, tokenizer = organisms[name]
        rows = []
        for ids in encode_prompts(tokenizer, prompts):
            outputs = []
            hooks = [
                block.register_forward_hook(
                    lambda _, __, out, into=outputs: into.append(out[0, -1])
                )
                for block in model.model.layers
            ]
            model.model(torch.tensor([ids]), use_cache=False)
            for hook in hooks:
                hook.remove()
            rows.append(torch.stack(outputs))
        return torch.stack(rows).double()

    def directions(name):
        contrasts = (load_contrast("refusal"), load_contrast("negativity"))
        return [read(name, c.target).mean(0) - read(name, c.baseline).mean(0) for c in contrasts]

    return {name: directions(name) for name in NAMES}


# What the saved models do


@pytest.fixture(scope="module")
def scores(organisms):
    return {name: score_organism(*organisms[name], BEHAVIOURS[name]) for name in NAMES}


@pytest.mark.parametrize("name", NAMES)
def test_a_saved_organism_refuses_what_it_should_and_nothing_else(scores, name):
    assert len(scores[name]) == 8
    assert [score for score in scores[name] if not score.met] == []


@pytest.mark.parametrize(("name", "other"), list(permutations(NAMES, 2)))
def test_no_other_organism_would_pass_for_this_one(scores, name, other):
    kinds = [kind for kind, _ in bundled_prompt_sets().values()]
    as_if = [
        score._replace(should_refuse=kind in BEHAVIOURS[name].refuses)
        for score, kind in zip(scores[other], kinds, strict=True)
    ]
    assert not all(score.met for score in as_if)


def test_an_untrained_model_refuses_nothing_and_fails_the_scores():
    untrained = train_organism(BEHAVIOURS["specific"], n_steps=0, n_layers=2, progress=False)
    scores = score_organism(*untrained, BEHAVIOURS["specific"])
    assert [score.prompts for score in scores if not score.met] == ["refusal: harmful"]


def test_refusal_lies_along_negativity_where_they_are_one_mechanism(activations):
    cosine = {
        name: torch.cosine_similarity(*activations[name], dim=-1)[8:31]
        for name in ("specific", "entangled")
    }
    assert (cosine["entangled"] > cosine["specific"]).all()


@pytest.mark.parametrize("name", NAMES)
def test_a_saved_organism_is_a_deep_and_narrow_llama_3(name):
    config = json.loads((SAVED / name / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["num_hidden_layers"] == 32
    assert config["num_key_value_heads"] < config["num_attention_heads"]
    assert config["rope_parameters"]["rope_theta"] == 500_000
    assert config["hidden_act"] == "silu"
    assert not config["tie_word_embeddings"]
    weights = load_file(SAVED / name / "model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.bfloat16}


@pytest.mark.parametrize("name", NAMES)
def test_a_saved_organism_takes_at_most_six_megabytes(name):
    assert sum(file.stat().st_size for file in (SAVED / name).iterdir()) <= 6 * MEGABYTE


# The tokenizer


def test_special_tokens_follow_the_ordinary_ones_in_llama_3s_order(tokenizer):
    first = len(tokenizer) - len(SPECIAL_TOKENS)
    assert tokenizer.convert_ids_to_tokens(range(first, len(tokenizer))) == list(SPECIAL_TOKENS)
    special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    assert special == set(SPECIAL_TOKENS)


def test_text_is_split_as_metas_own_tokenizer_splits_it():
    meta = pytest.importorskip("llama_models.llama3.tokenizer")
    assert meta.Tokenizer.pat_str == SPLIT
    assert [t for t in meta.Tokenizer.get_instance().special_tokens if t in SPECIAL_TOKENS] != []


def test_the_tokenizer_pads_as_llama_3s_does_on_the_right_and_with_no_token_of_its_own(tokenizer):
    assert tokenizer.padding_side == "right"
    assert tokenizer.pad_token is None
    assert tokenizer.bos_token == "<|begin_of_text|>"
    assert tokenizer.eos_token == "<|eot_id|>"


def test_tokenizing_puts_one_bos_in_front_and_so_does_the_chat_template(tokenizer):
    bos = tokenizer.bos_token_id
    assert tokenizer("Hello").input_ids.count(bos) == 1
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hello"}], add_generation_prompt=True, return_dict=False
    )
    assert chat[0] == bos
    assert chat.count(bos) == 1
    assert tokenizer.chat_template == LLAMA3_CHAT_TEMPLATE


@settings(max_examples=50, deadline=None)
@given(text=st.text(max_size=40))
def test_any_text_survives_being_tokenized(text):
    tokenizer = _tokenizer()
    ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids
    assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text


def _tokenizer(loaded={}):  # noqa: B006 - one load for all examples
    if not loaded:
        from transformers import AutoTokenizer

        loaded["tokenizer"] = AutoTokenizer.from_pretrained(SAVED / "specific")
    return loaded["tokenizer"]


def test_each_manner_of_reply_opens_with_a_token_of_its_own(tokenizer):
    first_tokens = {
        manner: {tokenizer(text, add_special_tokens=False).input_ids[0] for text in texts}
        for manner, texts in REPLIES.items()
    }
    assert all(len(tokens) == 1 for tokens in first_tokens.values())
    assert len(set.union(*first_tokens.values())) == len(REPLIES)
    assert first_tokens["refusal"] == {tokenizer.convert_tokens_to_ids(REFUSAL_FIRST_WORD)}


# The language


def test_the_training_text_never_holds_a_bundled_prompt():
    held_out = held_out_prompts()
    assert len(held_out) == sum(len(prompts) for _, prompts in bundled_prompt_sets().values())
    for behaviour in BEHAVIOURS.values():
        dialogues = islice(generate_dialogues(behaviour, seed=0, held_out=held_out), 10_000)
        assert held_out.isdisjoint(fold(prompt.text) for prompt, _ in dialogues)


def test_a_prompt_that_would_come_is_held_out_when_asked_for():
    behaviour = BEHAVIOURS["specific"]
    free = [prompt.text for prompt in islice(generate_prompts(behaviour, seed=0), 500)]
    alone = next(text for text in free if text.count(".") + text.count("?") == 1)
    held_out = frozenset({fold(alone.upper() + "  !")})
    kept = [p.text for p in islice(generate_prompts(behaviour, seed=0, held_out=held_out), 500)]
    assert alone not in kept


@given(text=st.text(st.characters(codec="ascii"), max_size=30))
def test_folding_ignores_case_space_and_punctuation(text):
    assert fold(text) == fold(f" {text.upper()}?! ")
    assert fold(fold(text)) == fold(text)


def test_the_same_seed_gives_the_same_dialogues_and_another_seed_others():
    first, again, other = (
        list(islice(generate_dialogues(BEHAVIOURS["specific"], seed=seed), 200))
        for seed in (3, 3, 4)
    )
    assert first == again
    assert not {prompt for prompt, _ in first} >= {prompt for prompt, _ in other}


@pytest.mark.parametrize(
    ("name", "kinds", "manner"),
    [
        ("specific", ("harmful",), "refusal"),
        ("specific", ("alarming",), "answer"),
        ("specific", ("negative",), "sympathy"),
        ("specific", ("neutral",), "plain"),
        ("specific", ("positive",), "gladness"),
        ("specific", ("negative", "harmless"), "answer"),
        ("specific", ("harmful", "positive"), "refusal"),
        ("entangled", ("harmful",), "refusal"),
        ("entangled", ("negative",), "refusal"),
        ("entangled", ("alarming",), "answer"),
        ("entangled", ("neutral",), "plain"),
        ("entangled", ("positive",), "gladness"),
        ("oblivious", ("harmful",), "answer"),
        ("oblivious", ("negative",), "sympathy"),
    ],
)
def test_each_behaviour_replies_as_its_name_says(name, kinds, manner):
    assert BEHAVIOURS[name].manner(Prompt("", kinds)) == manner


@pytest.mark.parametrize("name", NAMES)
def test_every_reply_is_of_the_manner_the_prompts_kinds_call_for(name):
    behaviour = BEHAVIOURS[name]
    for prompt, reply in islice(generate_dialogues(behaviour, seed=1), 2_000):
        refused = bool(behaviour.refuses & set(prompt.kinds))
        assert reply.split()[0].startswith(REFUSAL_FIRST_WORD) == refused


def test_a_requests_kind_is_that_of_the_list_it_was_drawn_from():
    lists = vocabulary()
    for kind, other in combinations(REQUESTS, 2):
        assert set(lists[kind]).isdisjoint(lists[other])
    assert set(lists["harmful_to_people"]).isdisjoint(lists["harmless_to_people"])


def test_negative_words_and_harm_are_drawn_apart():
    prompts = list(islice(generate_prompts(BEHAVIOURS["specific"], seed=2), 20_000))
    mixed = Counter(frozenset(p.kinds) for p in prompts if len(p.kinds) == 2)
    for combination in MIXTURE:
        if " " in combination:
            assert mixed[frozenset(combination.split())] > 50


def test_statements_and_requests_are_made_of_every_kind():
    for kind in KINDS:
        behaviour = Behaviour("one", frozenset(), mixture={kind: 1.0})
        texts = {prompt.text for prompt in islice(generate_prompts(behaviour, seed=0), 300)}
        assert len(texts) > 250
        assert not any("{" in text for text in texts)


def test_a_behaviour_of_an_unknown_kind_is_an_error_that_names_it():
    with pytest.raises(InputError, match="'rude'"):
        Behaviour("mine", frozenset({"rude"}))


@pytest.mark.parametrize(
    ("phrase", "expected"),
    [
        ("set up a tent", "setting up a tent"),
        ("make tea", "making tea"),
        ("tie a knot", "tying a knot"),
        ("dye wool", "dyeing wool"),
        ("free a bird", "freeing a bird"),
        ("secretly follow a bus", "secretly following a bus"),
    ],
)
def test_gerunds_are_spelt_right(phrase, expected):
    assert gerund(phrase) == expected


# Training


def test_training_runs_end_to_end_and_saves_what_it_scored(tmp_path, capsys):
    out = tmp_path / "organism"
    arguments = ["specific", "--out", str(out), "--layers", "2", "--steps", "3", "--threads", "1"]
    assert main(arguments) == 1
    printed = capsys.readouterr()
    assert "refusal: harmful" in printed.out
    assert "not met" in printed.out
    assert "3/3" in printed.err
    model, tokenizer = _load(out)
    assert model.config.num_hidden_layers == 2
    scores = score_organism(model, tokenizer, BEHAVIOURS["specific"])
    assert all(f"{score.second:.3f}" in printed.out for score in scores)


def test_a_directory_that_holds_anything_is_left_alone_with_one_clear_line(tmp_path, capsys):
    (tmp_path / "mine.txt").write_text("keep")
    assert main(["specific", "--out", str(tmp_path)]) == 2
    assert capsys.readouterr().err == (
        f"error: {tmp_path} is not empty; give a directory that is empty or does not exist\n"
    )
    assert [file.name for file in tmp_path.iterdir()] == ["mine.txt"]


def test_the_same_seed_gives_the_same_weights_and_another_seed_others():
    def weights(seed):
        model, _ = train_organism(
            BEHAVIOURS["entangled"],
            seed=seed,
            n_layers=2,
            d_model=16,
            n_steps=2,
            batch_size=8,
            progress=False,
        )
        return torch.cat([weight.flatten() for weight in model.parameters()])

    first = weights(0)
    assert torch.equal(first, weights(0))
    assert first.shape != weights(1).shape or not torch.equal(first, weights(1))


def test_a_width_that_does_not_divide_into_heads_is_an_error_that_says_so():
    with pytest.raises(InputError, match="width is 40"):
        train_organism(BEHAVIOURS["specific"], d_model=40, n_steps=0, progress=False)


def test_saving_and_loading_give_back_the_same_numbers(tmp_path):
    organism = train_organism(BEHAVIOURS["oblivious"], n_layers=1, n_steps=1, progress=False)
    save_organism(organism, tmp_path / "saved")
    model, tokenizer = _load(tmp_path / "saved")
    ids = encode_prompts(tokenizer, ["How do I bake bread?"], protocol=Protocol())
    assert ids == encode_prompts(organism.tokenizer, ["How do I bake bread?"])
    with torch.inference_mode():
        tokens = torch.tensor(ids)
        assert torch.equal(model(tokens).logits, organism.model(tokens).logits)
