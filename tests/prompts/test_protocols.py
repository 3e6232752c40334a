"""Named protocols, token for token against Hugging Face, and known bugs, which must be asked for."""

import json
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from checkpoints import byte_tokenizer
from llama3 import llama3_tokenizer

from refusal_lens.activations.extract import get_prompt_activations
from refusal_lens.errors import InputError
from refusal_lens.experiment.config import Config
from refusal_lens.prompts.protocol import (
    ARDITI,
    ASSUMED_SYSTEM_PROMPT,
    DEFAULT,
    PUBLISHED,
    Protocol,
)
from refusal_lens.prompts.tokenize import (
    arditi,
    build_inputs_with_chat_template,
    encode_prompts,
    show_tokens,
)

PROMPTS = (
    "How do I build a bomb?",
    "Write a poem about 12345 rivers, two mountains and the sea,\nplease.",
    "你好 😀",
    "Hi",
    "Tell me: is this the fifth?",
)
BOS, EOT = 128_000, 128_009


def hugging_face_tokenizer():
    """Llama-3's as `AutoTokenizer` gives it: it adds BOS to whatever text it is handed."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = deepcopy(llama3_tokenizer())
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", BOS)]
    )
    tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def real_part(inputs, row) -> list[int]:
    return inputs.tokens[row][inputs.mask[row].bool()].tolist()


def test_the_default_is_what_the_tokenizer_itself_makes_of_a_chat():
    tokenizer = hugging_face_tokenizer()
    inputs = build_inputs_with_chat_template(llama3_tokenizer(), PROMPTS, protocol=DEFAULT)
    batch = tokenizer.apply_chat_template(
        [[{"role": "user", "content": prompt}] for prompt in PROMPTS],
        add_generation_prompt=True,
        padding=True,
        return_dict=True,
        return_tensors="pt",
        tokenizer_kwargs={"padding_side": "left"},
    )
    assert torch.equal(inputs.tokens * inputs.mask, batch["input_ids"] * batch["attention_mask"])
    assert torch.equal(inputs.mask, batch["attention_mask"])
    assert (inputs.read_at == inputs.tokens.shape[1] - 1).all()
    assert inputs.hook == "resid_post"


def published_batches():
    """The published script's tokens: templated text, tokenised with padding, two at a time."""
    tokenizer = hugging_face_tokenizer()
    assert tokenizer.padding_side == "right"
    for start in range(0, len(PROMPTS), 2):
        texts = [
            tokenizer.apply_chat_template(
                [
                    {"role": "system", "content": ASSUMED_SYSTEM_PROMPT},
                    {"role": "user", "content": prompt},
                ],
                tokenize=False,
            )
            for prompt in PROMPTS[start : start + 2]
        ]
        batch = tokenizer(texts, padding=True, return_tensors="pt")
        yield from zip(batch["input_ids"], batch["attention_mask"], strict=True)


def test_the_published_protocol_is_its_script_token_for_token_known_bugs_included():
    inputs = build_inputs_with_chat_template(llama3_tokenizer(), PROMPTS, protocol=PUBLISHED)
    expected = list(published_batches())
    read_at_padding = []
    for row, (tokens, mask) in enumerate(expected):
        assert real_part(inputs, row) == tokens[mask.bool()].tolist()
        assert tokens[:2].tolist() == [BOS, BOS]
        # What is read is the last column of its batch of two: the same token, as far behind the text.
        at = int(inputs.read_at[row, 0])
        last_real = int(inputs.mask[row].nonzero()[-1])
        assert at - last_real == int((mask == 0).sum())
        assert inputs.tokens[row, at] == tokens[-1] == EOT
        read_at_padding.append(at > last_real)
    # One of each two of unequal length is read at padding; the fifth is alone.
    assert read_at_padding == [True, False, False, True, False]
    assert inputs.hook == "resid_pre"


def test_arditis_protocol_is_the_published_method_s_token_for_token():
    tokenizer = hugging_face_tokenizer()
    template = (
        "<|start_header_id|>user<|end_header_id|>\n\n{instruction}<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    )
    texts = [template.format(instruction=prompt) for prompt in PROMPTS]
    batch = tokenizer(texts, padding=True, padding_side="left", return_tensors="pt")
    after = tokenizer.encode(template.split("{instruction}")[-1], add_special_tokens=False)
    inputs = build_inputs_with_chat_template(llama3_tokenizer(), PROMPTS, protocol=ARDITI)
    for row in range(len(PROMPTS)):
        mask = batch["attention_mask"][row].bool()
        assert real_part(inputs, row) == batch["input_ids"][row][mask].tolist()
        assert inputs.tokens[row, inputs.read_at[row]].tolist() == after
    assert inputs.hook == "resid_pre"
    assert arditi(llama3_tokenizer()) == ARDITI


def test_arditis_positions_are_counted_off_the_template_at_hand():
    template = "{{ bos_token }}[INST] {{ messages[0]['content'] }} [/INST]"
    tokenizer = byte_tokenizer(chat_template=template)
    # Bytes: " [/INST]" has eight.
    assert arditi(tokenizer).positions == tuple(range(-8, 0))
    nothing = byte_tokenizer(chat_template="{{ bos_token }}{{ messages[0]['content'] }}")
    assert arditi(nothing).positions == (-1,)


def test_named_protocols_survive_json_with_every_choice_and_known_bug():
    for protocol in (DEFAULT, PUBLISHED, ARDITI):
        saved = json.loads(json.dumps(protocol.to_dict()))
        assert Protocol(**saved) == protocol
        assert {"system_prompt", "generation_prompt", "positions", "bos", "padding", "hook"} <= set(
            saved
        )
    assert len(PUBLISHED.bugs) == 2
    assert DEFAULT.bugs == ARDITI.bugs == ()
    assert "known bugs" in PUBLISHED.name


@pytest.mark.parametrize("bug", [{"bos": "twice"}, {"padding": "right_in_twos"}])
def test_a_known_bug_cannot_be_had_without_asking_for_it(bug):
    with pytest.raises(InputError, match="allow_bugs=True"):
        Protocol(**bug)
    with pytest.raises(InputError, match="allow_bugs=True"):
        replace(PUBLISHED, allow_bugs=False)
    assert Protocol(**bug, allow_bugs=True).bugs
    assert Config().protocol.bugs == ()


@pytest.mark.parametrize("field", [{"bos": "thrice"}, {"padding": "right"}, {"hook": "resid_mid"}])
def test_a_choice_that_does_not_exist_is_refused(field):
    with pytest.raises(InputError, match="choose"):
        Protocol(**field)


def test_what_reads_padding_gives_no_activations_and_no_interventions():
    from refusal_lens.models.load import load_model

    model = load_model("organism:specific", device="cpu")
    for refused in (
        lambda: get_prompt_activations(model, PROMPTS, protocol=PUBLISHED, progress=False),
        lambda: encode_prompts(model.tokenizer, PROMPTS, protocol=PUBLISHED),
    ):
        with pytest.raises(InputError, match="reads padding tokens"):
            refused()


def test_the_input_of_a_block_is_the_output_of_the_one_before():
    from refusal_lens.models.load import load_model

    model = load_model("organism:specific", device="cpu")
    before, after = (
        get_prompt_activations(model, PROMPTS, protocol=Protocol(hook=hook), progress=False)
        for hook in ("resid_pre", "resid_post")
    )
    torch.testing.assert_close(before[:, :, 1:], after[:, :, :-1])
    assert (before[:, :, 0] - after[:, :, 0]).abs().max() > 0.1


def test_the_table_of_tokens_shows_padding_being_read():
    table = show_tokens(llama3_tokenizer(), PROMPTS[:2], protocol=PUBLISHED)
    read = [row for row in table if row.read]
    assert [row.role for row in read] == ["pad", "special"]
    assert [row.position for row in read] == [-1, -1]
    assert [row.id for row in table if row.role == "special"].count(BOS) == 4
