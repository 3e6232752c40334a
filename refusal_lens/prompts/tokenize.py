"""Prompts to tokens, mask and positions, in a model's own chat format."""

import html
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

from ..errors import InputError
from .chat_template import Tokens, format_prompts
from .contrast import check_text, quoted
from .protocol import ARDITI, DEFAULT, LAST_PROMPT_TOKEN, LAST_TEMPLATE_TOKEN, Protocol

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer

LLAMA3_CHAT_TEMPLATE = (  # as Llama-3-Instruct's tokenizer has it
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}"
    "{{ message['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
)


@dataclass(frozen=True)
class ChatInputs:
    """A batch of formatted prompts as token ids, padded on the left."""

    tokens: Int[Tensor, "batch pos"]
    mask: Int[Tensor, "batch pos"]  # 1 for tokens, 0 for padding
    read_at: Int[Tensor, "batch n_positions"]  # indices along `pos` of the protocol's positions
    hook: str = "resid_post"  # or "every_stream": the embedding's output, then every block's


def build_inputs_with_chat_template(
    tokenizer: "Tokenizer",
    prompts: Sequence[str],
    *,
    protocol: Protocol = DEFAULT,
    device: str | torch.device = "cpu",
) -> ChatInputs:
    """Return tokens, mask and positions of prompts in their chat format, padded on the left.

    The tokens are those of `tokenizer.apply_chat_template(messages, tokenize=True)`, BOS included:
    Llama-3's template writes one, Phi-3's none, SmolLM2's one a turn. There are two exceptions.
    Text of special tokens inside a prompt or system prompt stays text. A template that writes the
    date gets a fixed date.
    Llama-3-Instruct's template trims each message; otherwise its tokens are Meta's `ChatFormat`'s.

    Args:
        tokenizer: a fast tokenizer, which is left unchanged; its padding settings do not matter.
        prompts: texts of the user's turn.
        protocol: system prompt, template and positions.
        device: device of the tensors.

    Raises:
        InputError: for no prompts, or one that is not text; for a chat template that is missing,
            refuses or rewrites a text; for a position before a prompt's start.
    """
    rows = list(_padded(tokenizer, prompts, protocol))
    return ChatInputs(
        tokens=torch.tensor([row.ids for row, _ in rows], device=device),
        mask=torch.tensor([[int(r != "pad") for r in row.roles] for row, _ in rows], device=device),
        read_at=torch.tensor([read_at for _, read_at in rows], device=device),
        hook=protocol.hook,
    )


def encode_prompts(
    tokenizer: "Tokenizer", prompts: Sequence[str], *, protocol: Protocol = DEFAULT
) -> list[list[int]]:
    """Return the token ids of each prompt in its chat format, unpadded.

    Args:
        tokenizer: a fast tokenizer, which is left unchanged.
        prompts: texts of the user's turn.
        protocol: system prompt and template; a protocol that reads padding raises InputError.
    """
    refuse_padding(protocol)
    return [one.ids for one in _formatted(tokenizer, prompts, protocol)]


class TokenRow(NamedTuple):
    """One token: `position` from the end (-1 the last), `role` as in `Tokens`, whether it is read."""

    prompt: int
    position: int
    id: int
    role: str
    text: str
    read: bool

    def __str__(self) -> str:
        line = f"{self.prompt:>6}  {self.position:>8}  {self.id:>6}  {self.role:<8}  {self.text!r}"
        return line + "  <- read" * self.read


class TokenTable(tuple[TokenRow, ...]):
    """Every token of a batch; shown as HTML in Jupyter and as text when printed."""

    __slots__ = ()

    def __str__(self) -> str:
        return "\n".join(["prompt  position      id  role      token", *map(str, self)])

    def _repr_html_(self) -> str:
        colours = {"pad": "#eee", "special": "#f3d9fa", "template": "#d0ebff", "system": "#d3f9d8"}
        lines = ""
        for row in self:
            style = f"background: {colours.get(row.role, 'none')}"
            lines += f'<div style="{style}">{html.escape(str(row))}</div>'
        return f"<pre>{lines}</pre>"


def show_tokens(
    tokenizer: "Tokenizer", prompts: str | Sequence[str], *, protocol: Protocol = DEFAULT
) -> TokenTable:
    """Return a table of every token of a batch, with its role and whether activations are read.

    Args:
        tokenizer: a fast tokenizer, which is left unchanged.
        prompts: texts of the user's turn, or one text.
        protocol: system prompt, template and positions.
    """
    prompts = [prompts] if isinstance(prompts, str) else prompts
    return TokenTable(
        TokenRow(prompt, i - len(row.ids), token, role, _shown(tokenizer, token), i in read_at)
        for prompt, (row, read_at) in enumerate(_padded(tokenizer, prompts, protocol))
        for i, (token, role) in enumerate(zip(row.ids, row.roles, strict=True))
    )


def arditi(tokenizer: "Tokenizer") -> Protocol:
    """Return Arditi et al.'s protocol for a fast tokenizer: all template tokens after a prompt."""
    [one] = _formatted(tokenizer, ["How"], DEFAULT)
    n_after = one.roles[::-1].index("prompt")
    return Protocol(name=ARDITI.name, positions=tuple(range(-max(n_after, 1), 0)), hook=ARDITI.hook)


def refuse_padding(protocol: Protocol) -> None:
    """Raise an InputError for a protocol that reads padding; only `run_sensitivity` takes one."""
    if protocol.padding != "left":
        problem = f"the protocol {protocol.name!r} reads padding tokens"
        raise InputError(f"{problem}: choose another one, or measure this one in run_sensitivity")


def check_prompts(prompts: Sequence[object]) -> None:
    """Raise an InputError if there are no prompts, or one is not text or can't be encoded."""
    if isinstance(prompts, str):
        raise InputError("prompts is a single string: give a list of strings")
    if len(prompts) == 0:
        raise InputError("there are no prompts: give at least one")
    for row, prompt in enumerate(prompts):
        check_text(f"prompts[{row}]", prompt)


def _formatted(tokenizer: "Tokenizer", prompts: Sequence[str], protocol: Protocol) -> list[Tokens]:
    """Each prompt in its chat format, with another BOS in front if the protocol asks for two."""
    check_prompts(prompts)
    formatted = format_prompts(tokenizer, prompts, protocol)
    bos = tokenizer.bos_token_id
    # TransformerLens sets BOS to EOS where a tokenizer has no BOS.
    if protocol.bos == "once" or bos is None or bos == tokenizer.eos_token_id:
        return formatted
    return [Tokens([bos, *ids], ["special", *roles]) for ids, roles in formatted]


def _padded(
    tokenizer: "Tokenizer", prompts: Sequence[str], protocol: Protocol
) -> Iterator[tuple[Tokens, list[int]]]:
    """Yield each prompt padded to the batch's length, and the indices to read."""
    formatted = _formatted(tokenizer, prompts, protocol)
    ids = (tokenizer.pad_token_id, tokenizer.eos_token_id)
    pad = next((i for i in ids if i is not None), 0)  # any id will do: padding is masked
    ends = lengths = [len(one.ids) for one in formatted]
    if protocol.padding == "right_in_twos":
        ends = [max(lengths[i - i % 2 :][:2]) for i in range(len(lengths))]
    for row, (one, end) in enumerate(zip(formatted, ends, strict=True)):
        before, after = max(ends) - end, end - len(one.ids)
        roles = ["pad"] * before + one.roles + ["pad"] * after
        name = f"prompts[{row}] ({quoted(prompts[row])})"
        read_at = [_index(position, roles, before, name) for position in protocol.positions]
        yield Tokens([pad] * before + one.ids + [pad] * after, roles), read_at


def _index(position: int | str, roles: list[str], before: int, name: str) -> int:
    if position == LAST_PROMPT_TOKEN:
        if "prompt" not in roles:
            raise InputError(f"{name} is blank, so it has no last token of its own")
        return len(roles) - 1 - roles[::-1].index("prompt")
    index = len(roles) - 1 if position == LAST_TEMPLATE_TOKEN else len(roles) + int(position)
    if index < before:
        sizes = f"{name}, which has {len(roles) - before} tokens in its chat format"
        raise InputError(f"position {position} lies before the start of {sizes}")
    return index


def _shown(tokenizer: "Tokenizer", token: int) -> str:
    """A token's text, or the tokenizer's spelling if the token is part of a character."""
    text = str(tokenizer.decode([token], clean_up_tokenization_spaces=False))
    if "\N{REPLACEMENT CHARACTER}" in text:
        return str(tokenizer.convert_ids_to_tokens(token))
    return text
