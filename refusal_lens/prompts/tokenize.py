"""Prompts to tokens, mask and positions, in a model's own chat format."""

import copy
import html
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

from ..errors import InputError
from .chat_template import format_prompts
from .contrast import check_text, quoted
from .protocol import ARDITI, DEFAULT, LAST_PROMPT_TOKEN, Protocol

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer


class Tokens(NamedTuple):
    """Token ids of one formatted prompt, and the role of each token."""

    ids: list[int]
    roles: list[str]  # special, template, system, prompt (any token with text of it) or pad


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
    Text of special tokens inside a prompt or system prompt stays text. A template that reads the
    clock reads the protocol's date.
    Llama-3-Instruct's template trims each message; otherwise its tokens are Meta's `ChatFormat`'s.
    InputError for no prompts, or one that is not text; for a chat template that is missing,
    refuses or rewrites a text; for a position before a prompt's start.

    Args:
        tokenizer: a fast tokenizer, which is left unchanged; its padding settings do not matter.
        prompts: texts of the user's turn.
        protocol: system prompt, template, date, thinking and positions.
        device: device of the tensors.
    >>> inputs = build_inputs_with_chat_template(model.tokenizer, ["How do I bake bread?"])
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
    """Return the ids of each row of `build_inputs_with_chat_template`, unpadded."""
    refuse_padding(protocol)
    return [one.ids for one in _formatted(tokenizer, prompts, protocol)]


def arditi(tokenizer: "Tokenizer") -> Protocol:
    """Return Arditi et al.'s protocol for a fast tokenizer: all template tokens after a prompt."""
    [one] = _formatted(tokenizer, ["How"], DEFAULT)
    n_after = one.roles[::-1].index("prompt")
    return Protocol(name=ARDITI.name, positions=tuple(range(-max(n_after, 1), 0)), hook=ARDITI.hook)


def refuse_padding(protocol: Protocol) -> None:
    """Raise an InputError for a protocol that reads padding; only `run_sensitivity` takes one."""
    if protocol.padding != "left":
        advice = "choose another one, or measure this one in run_sensitivity"
        raise InputError(f"the protocol {protocol.name!r} reads padding tokens: {advice}")


def check_prompts(prompts: Sequence[object]) -> None:
    """Raise an InputError if there are no prompts, or one is not text or can't be encoded."""
    if isinstance(prompts, str):
        raise InputError("prompts is a single string: give a list of strings")
    if len(prompts) == 0:
        raise InputError("there are no prompts: give at least one")
    for row, prompt in enumerate(prompts):
        check_text(f"prompts[{row}]", prompt)


def _formatted(tokenizer: "Tokenizer", prompts: Sequence[str], protocol: Protocol) -> list[Tokens]:
    """Each prompt's tokens, with another BOS in front if the protocol asks for two."""
    check_prompts(prompts)
    if not getattr(tokenizer, "is_fast", False):
        kind = "there is no" if tokenizer is None else f"{type(tokenizer).__name__} is not a"
        raise InputError(f"{kind} fast tokenizer: load one from a folder with a tokenizer.json")
    formatted = _encoded(tokenizer, *format_prompts(tokenizer, prompts, protocol))
    bos = tokenizer.bos_token_id
    # TransformerLens sets BOS to EOS where a tokenizer has no BOS.
    if protocol.bos == "once" or bos is None or bos == tokenizer.eos_token_id:
        return formatted
    return [Tokens([bos, *ids], ["special", *roles]) for ids, roles in formatted]


def _encoded(tokenizer: "Tokenizer", roles: list[str], layouts: list[list[str]]) -> list[Tokens]:
    """Each chat's tokens; text of special tokens outside the template's own text stays text."""
    backend: Any = tokenizer.backend_tokenizer
    controls = {i: one for i, one in backend.get_added_tokens_decoder().items() if one.special}
    longest_first = sorted((one.content for one in controls.values()), key=len, reverse=True)
    named = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
    encoded = _encode(backend, layouts, roles)
    if quoting := [i for i, one in enumerate(layouts) if _quotes_special(one, roles, named)]:
        quoted_ones = _encode_quoting(backend, [layouts[i] for i in quoting], roles, named)
        for row, tokens in zip(quoting, quoted_ones, strict=True):
            encoded[row] = tokens
    specials = {*tokenizer.all_special_ids, *controls}
    for ids, token_roles in encoded:
        for i, role in enumerate(token_roles):
            if role == "template" and ids[i] in specials:
                token_roles[i] = "special"
    return encoded


def _quotes_special(pieces: list[str], roles: list[str], named: re.Pattern[str]) -> bool:
    """Whether the text of a special token reaches outside the template's own text."""
    of_characters = [role for piece, role in zip(pieces, roles, strict=True) for _ in piece]
    matches = named.finditer("".join(pieces))
    return any(set(of_characters[slice(*match.span())]) != {"template"} for match in matches)


def _encode(
    backend: Any, layouts: list[list[str]], roles: list[str], *, special_as_text: bool = False
) -> list[Tokens]:
    """Encode whole texts, since a token may span template and prompt; restore the tokenizer."""
    padding, truncation = backend.padding, backend.truncation
    as_text, backend.encode_special_tokens = backend.encode_special_tokens, special_as_text
    backend.no_padding()
    backend.no_truncation()
    try:
        encodings = backend.encode_batch(list(map("".join, layouts)), add_special_tokens=False)
    finally:
        backend.encode_special_tokens = as_text
        if padding is not None:
            backend.enable_padding(**padding)
        if truncation is not None:
            backend.enable_truncation(**truncation)
    pairs = zip(encodings, layouts, strict=True)
    return [Tokens(one.ids, _roles(one.offsets, pieces, roles)) for one, pieces in pairs]


def _encode_quoting(
    backend: Any, layouts: list[list[str]], roles: list[str], named: re.Pattern[str]
) -> list[Tokens]:
    """Encode quoted names of special tokens as text, in a copy that knows the tokens by aliases."""
    written = "".join(map("".join, layouts))
    mark = next(c for c in map(chr, range(0xF0000, 0xFFFFE)) if c not in written)  # private use
    backend = copy.deepcopy(backend)
    controls = {i: one for i, one in backend.get_added_tokens_decoder().items() if one.special}
    alias = {one.content: f"{mark}{i}{mark}" for i, one in controls.items()}
    for one in controls.values():
        one.content, one.special = alias[one.content], False
    backend.add_tokens(list(controls.values()))
    real = {backend.token_to_id(one.content): i for i, one in controls.items()}

    def aliased(piece: str, role: str) -> str:
        return named.sub(lambda match: alias[match[0]], piece) if role == "template" else piece

    renamed = [[*map(aliased, pieces, roles)] for pieces in layouts]
    encoded = _encode(backend, renamed, roles, special_as_text=True)
    if taken := {i for tokens in encoded for i in tokens.ids}.intersection(real.values()):
        token = backend.id_to_token(min(taken))
        raise InputError(f"this tokenizer has no text for {token!r}: take it out of the prompts")
    return [Tokens([real.get(i, i) for i in ids], token_roles) for ids, token_roles in encoded]


def _roles(offsets: list[tuple[int, int]], pieces: list[str], roles: list[str]) -> list[str]:
    of_tokens, end = ["template"] * len(offsets), 0
    for piece, role in zip(pieces, roles, strict=True):
        start, end = end, end + len(piece)
        if role == "template" or not piece:
            continue
        # Some tokenizers count no characters for white space, so a piece's tokens run on until the
        # first token that begins beyond its text.
        first = next(i for i, (_, stop) in enumerate(offsets) if stop > start)
        beyond = (i for i, (begin, stop) in enumerate(offsets) if begin >= end and stop > end)
        last = next(beyond, len(offsets))
        of_tokens[first:last] = [role] * (last - first)
    return of_tokens


def _padded(
    tokenizer: "Tokenizer", prompts: Sequence[str], protocol: Protocol
) -> Iterator[tuple[Tokens, list[int]]]:
    """Yield each prompt padded to the batch's length, and the indices to read."""
    formatted = _formatted(tokenizer, prompts, protocol)
    # The model may have no row for the tokenizer's own padding token; it has one for EOS.
    eos = tokenizer.eos_token_id
    pad = formatted[0].ids[0] if eos is None else eos
    ends = lengths = [len(one.ids) for one in formatted]
    if protocol.padding == "right_in_twos":
        ends = [max(lengths[i - i % 2 :][:2]) for i in range(len(lengths))]
    longest = max(ends)
    for row, (one, end) in enumerate(zip(formatted, ends, strict=True)):
        before, after = longest - end, end - len(one.ids)
        roles = ["pad"] * before + one.roles + ["pad"] * after
        name = f"prompts[{row}] ({quoted(prompts[row])})"
        read_at = [_index(position, roles, before, name) for position in protocol.positions]
        yield Tokens([pad] * before + one.ids + [pad] * after, roles), read_at


def _index(position: int | str, roles: list[str], before: int, name: str) -> int:
    if position == LAST_PROMPT_TOKEN:
        if "prompt" not in roles:
            raise InputError(f"{name} is blank, so it has no last token of its own")
        return len(roles) - 1 - roles[::-1].index("prompt")
    if (index := len(roles) + int(position)) < before:
        sizes = f"which has {len(roles) - before} tokens in its chat format"
        raise InputError(f"position {position} lies before the start of {name}, {sizes}")
    return index


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

    def __str__(self) -> str:
        return "\n".join(["prompt  position      id  role      token", *map(str, self)])

    def _repr_html_(self) -> str:
        # Translucent, so that the text stays readable on a dark page.
        colours = {"pad": "#8883", "special": "#b4d3", "template": "#28e3", "system": "#4b63"}
        lines = [
            f'<div style="background: {colours.get(row.role, "none")}">{html.escape(str(row))}</div>'
            for row in self
        ]
        return f"<pre>{''.join(lines)}</pre>"


def show_tokens(
    tokenizer: "Tokenizer", prompts: str | Sequence[str], *, protocol: Protocol = DEFAULT
) -> TokenTable:
    """Return a table of every token of a batch, with its role and whether activations are read.

    >>> print(show_tokens(model.tokenizer, "Hello.")[-1])
         0        -1     269  template  '\\n\\n'  <- read

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


def _shown(tokenizer: "Tokenizer", token: int) -> str:
    """A token's text, or the tokenizer's spelling if the token is part of a character."""
    text = str(tokenizer.decode([token], clean_up_tokenization_spaces=False))
    if "\N{REPLACEMENT CHARACTER}" in text:
        return str(tokenizer.convert_ids_to_tokens(token))
    return text
