"""Prompts to tokens and mask: the chat template, exactly one BOS, the positions to read."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Int
from torch import Tensor

from ..errors import InputError
from .chat_template import ChatTemplate, Tokens
from .files import quoted
from .protocol import ARDITI, DEFAULT, LAST_PROMPT_TOKEN, LAST_TEMPLATE_TOKEN, Protocol
from .token_table import TokenRow, TokenTable

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LLAMA3_CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}"
    "{{ message['content'] | trim + '<|eot_id|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}"
    "{% endif %}"
)
"""The chat format of Llama-3-Instruct as its published tokenizer has it (it trims what is said)."""


@dataclass(frozen=True)
class ChatInputs:
    """A batch as a model takes it, padded on the left: the last column holds the last tokens.

    `mask` is 1 on real tokens and 0 on padding; `read_at` indexes `pos`, one column for each
    of the protocol's positions, in its order. `hook` is the protocol's: what is read of each block
    (or "every_stream": the embedding's output, then every block's).
    """

    tokens: Int[Tensor, "batch pos"]
    mask: Int[Tensor, "batch pos"]
    read_at: Int[Tensor, "batch n_positions"]
    hook: str = "resid_post"


def encode_prompts(
    tokenizer: "PreTrainedTokenizerBase",
    prompts: Sequence[str],
    *,
    protocol: Protocol = Protocol(),  # noqa: B008 (frozen)
) -> list[list[int]]:
    """Token ids of each prompt in its chat format, unpadded, with exactly one BOS.

    As `build_inputs_with_chat_template`, which see, without the padding.

    Raises:
        InputError: as there, and for a protocol that reads padding, which has no place here.
    """
    refuse_padding(protocol)
    return [one.ids for one in _formatted(tokenizer, prompts, protocol)]


def refuse_padding(protocol: Protocol) -> None:
    """Raise InputError for a protocol that reads padding: only `run_sensitivity` takes one."""
    if protocol.padding != "left":
        raise InputError(
            f"the protocol {protocol.name!r} reads padding tokens, which no result should rest on: "
            "see what that does with run_sensitivity, or choose another protocol"
        )


def build_inputs_with_chat_template(
    tokenizer: "PreTrainedTokenizerBase",
    prompts: Sequence[str],
    *,
    protocol: Protocol = Protocol(),  # noqa: B008 (frozen)
    device: str | torch.device = "cpu",
) -> ChatInputs:
    """Tokens, mask and positions of prompts in their chat format, padded on the left.

    The chat template decides what is written: where a published one differs from its model's
    original encoder, the template is followed. Llama-3-Instruct's trims white space around what is
    said, which Meta's own `ChatFormat` keeps; otherwise the two agree token for token. What this
    adds to the template:

    - The tokens begin with the tokenizer's BOS exactly once: one that the template left out is
      added, a second is an error. A tokenizer without a BOS of its own (Qwen's) gets none.
    - Text of special tokens inside a prompt or the system prompt stays text.
    - A template that writes the date gets a fixed one, so that a prompt is the same tomorrow.

    The tokenizer handed in is left as it was; its padding side and padding token do not matter,
    since what the padding holds is masked.

    Raises:
        InputError: if there are no prompts, or one is not text; if the tokenizer has no chat
            template, or its template refuses or rewrites the system prompt or a prompt; if a
            position lies before the start of a prompt (names the prompt).
    """
    formatted = _formatted(tokenizer, prompts, protocol)
    behind = _padding_behind(formatted, protocol)
    longest = max(len(one.ids) + more for one, more in zip(formatted, behind, strict=True))
    tokens = torch.full((len(formatted), longest), _padding(tokenizer))
    mask = torch.zeros_like(tokens)
    read_at = torch.empty(len(formatted), len(protocol.positions), dtype=torch.long)
    for row, (one, more) in enumerate(zip(formatted, behind, strict=True)):
        start, end = longest - len(one.ids) - more, longest - more
        tokens[row, start:end] = torch.tensor(one.ids)
        mask[row, start:end] = 1
        name = f"prompts[{row}] ({quoted(prompts[row])})"
        read_at[row] = start + torch.tensor(_read_at(one, protocol, name, more))
    return ChatInputs(tokens.to(device), mask.to(device), read_at.to(device), protocol.hook)


def show_tokens(
    tokenizer: "PreTrainedTokenizerBase",
    prompts: str | Sequence[str],
    *,
    protocol: Protocol = Protocol(),  # noqa: B008 (frozen)
) -> TokenTable:
    """Every token that a model is given for some prompts, and at which the activations are read.

    One row per token and prompt, the shorter prompts padded as in a batch with the others. Raises
    what `build_inputs_with_chat_template` does.
    """
    prompts = [prompts] if isinstance(prompts, str) else prompts
    formatted = _formatted(tokenizer, prompts, protocol)
    behind = _padding_behind(formatted, protocol)
    longest = max(len(one.ids) + more for one, more in zip(formatted, behind, strict=True))
    rows = []
    for prompt, (one, more) in enumerate(zip(formatted, behind, strict=True)):
        name = f"prompts[{prompt}] ({quoted(prompts[prompt])})"
        read_at = _read_at(one, protocol, name, more)
        padding = longest - len(one.ids) - more
        ids = [_padding(tokenizer)] * padding + one.ids + [_padding(tokenizer)] * more
        roles = ["pad"] * padding + one.roles + ["pad"] * more
        rows += [
            TokenRow(
                prompt, i - longest, token, role, _shown(tokenizer, token), i - padding in read_at
            )
            for i, (token, role) in enumerate(zip(ids, roles, strict=True))
        ]
    return TokenTable(tuple(rows))


def _shown(tokenizer: "PreTrainedTokenizerBase", token: int) -> str:
    """A token's text, or the tokenizer's own spelling where it is only part of a character."""
    text = str(tokenizer.decode([token], clean_up_tokenization_spaces=False))
    if "\N{REPLACEMENT CHARACTER}" in text:
        return str(tokenizer.convert_ids_to_tokens(token))
    return text


def _formatted(
    tokenizer: "PreTrainedTokenizerBase", prompts: Sequence[str], protocol: Protocol
) -> list[Tokens]:
    """Each prompt in its chat format, with exactly one BOS."""
    check_prompts(prompts)
    template = ChatTemplate(
        tokenizer, protocol.system_prompt, protocol.generation_prompt, protocol.chat_template
    )
    formatted = template.tokenise(prompts)
    bos = _own_bos(tokenizer)
    if bos is None:
        return formatted
    formatted = [
        one if bos in one.ids else Tokens([bos, *one.ids], ["special", *one.roles])
        for one in formatted
    ]
    for row, one in enumerate(formatted):
        if one.ids[0] != bos or one.ids.count(bos) > 1:
            raise InputError(
                f"the chat template writes BOS ({tokenizer.bos_token}) {one.ids.count(bos)} times "
                f"into prompts[{row}], first as token {one.ids.index(bos)}: it should write one, "
                "at the start, or none"
            )
    if protocol.bos == "twice":
        return [with_second_bos(one, bos) for one in formatted]
    return formatted


def check_prompts(prompts: Sequence[object]) -> None:
    """Refuse what is no list of prompts.

    Raises:
        InputError: if there are none, or one is not text or can't be encoded.
    """
    if isinstance(prompts, str):
        raise InputError("prompts is a single string: hand over a list of them")
    if len(prompts) == 0:
        raise InputError("there are no prompts: give at least one")
    for row, prompt in enumerate(prompts):
        if not isinstance(prompt, str):
            raise InputError(f"prompts[{row}] is {quoted(prompt)}: make it a string")
        try:
            prompt.encode()
        except UnicodeEncodeError as error:
            raise InputError(
                f"prompts[{row}] has half a character at {error.start} (a lone surrogate, "
                f"{prompt[error.start]!r}): mend how it was decoded"
            ) from None


def _own_bos(tokenizer: "PreTrainedTokenizerBase") -> int | None:
    """The id of BOS; None where there is none or TransformerLens has put EOS in its place."""
    bos = tokenizer.bos_token_id
    return None if bos == tokenizer.eos_token_id else bos


def _padding(tokenizer: "PreTrainedTokenizerBase") -> int:
    """Any id that the model knows: it is masked."""
    ids = (tokenizer.pad_token_id, tokenizer.eos_token_id)
    return next((i for i in ids if i is not None), 0)


def _padding_behind(formatted: list[Tokens], protocol: Protocol) -> list[int]:
    """How much padding comes behind each prompt: none, unless the protocol is at fault."""
    lengths = [len(one.ids) for one in formatted]
    return [0] * len(lengths) if protocol.padding == "left" else padding_behind(lengths)


def _read_at(one: Tokens, protocol: Protocol, name: str, behind: int) -> list[int]:
    """The protocol's positions in one prompt, counted from its unpadded start."""
    return [_index(position, one, name, behind) for position in protocol.positions]


def _index(position: int | str, one: Tokens, name: str, behind: int) -> int:
    length = len(one.ids) + behind
    if position == LAST_PROMPT_TOKEN:
        if "prompt" not in one.roles:
            raise InputError(f"{name} is blank, so it has no last token of its own")
        return len(one.ids) - 1 - one.roles[::-1].index("prompt")
    offset = -1 if position == LAST_TEMPLATE_TOKEN else int(position)
    if -offset > length:
        raise InputError(
            f"position {offset} lies before the start of {name}, which has {length} tokens in its "
            "chat format"
        )
    return length + offset


def with_second_bos(one: Tokens, bos: int) -> Tokens:
    """The tokens with another BOS in front."""
    return Tokens([bos, *one.ids], ["special", *one.roles])


def padding_behind(lengths: Sequence[int]) -> list[int]:
    """How many padding tokens come behind each prompt where two at a time are padded on the right.

    The last of an odd number of prompts is alone, so it gets none.
    """
    pairs = [lengths[i : i + 2] for i in range(0, len(lengths), 2)]
    return [max(pair) - length for pair in pairs for length in pair]


def arditi(tokenizer: "PreTrainedTokenizerBase") -> Protocol:
    """Arditi et al.'s protocol for a tokenizer's own chat template.

    Its positions are all tokens that the template writes after the instruction.

    Raises:
        InputError: if the tokenizer has no chat template.
    """
    roles = [row.role for row in show_tokens(tokenizer, "How", protocol=DEFAULT)]
    n_after = roles[::-1].index("prompt")
    return Protocol(name=ARDITI.name, positions=tuple(range(-max(n_after, 1), 0)), hook=ARDITI.hook)
