"""Prompts in a tokenizer's chat template: the tokens, and the role of each token."""

import copy
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from ..errors import InputError
from .protocol import Protocol

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer

TEMPLATE_DATE = "26 Jul 2024"  # the fallback date of Llama 3.1's and 3.2's own templates

_PLACEHOLDERS = {"system": "sys3e7c1f90a2d4b586", "prompt": "usr8b41d65c7f0e92a3"}


class Tokens(NamedTuple):
    """Token ids of one formatted prompt, and the role of each token."""

    ids: list[int]
    roles: list[str]  # special, template, system, prompt (any token with text of it) or pad


def format_prompts(
    tokenizer: "Tokenizer", prompts: Sequence[str], protocol: Protocol
) -> list[Tokens]:
    """Return each prompt in its chat format; text of special tokens inside a prompt stays text.

    Raises:
        InputError: if the tokenizer is not a fast one or has no template; if the template refuses
            the system prompt or a prompt, or changes more than the white space around them.
    """
    if not getattr(tokenizer, "is_fast", False):
        kind = "there is no" if tokenizer is None else f"{type(tokenizer).__name__} is not a"
        raise InputError(f"{kind} fast tokenizer: load one from a folder with a tokenizer.json")
    if protocol.chat_template is None and not getattr(tokenizer, "chat_template", None):
        problem = f"the tokenizer of {tokenizer.name_or_path or 'this model'} has no chat template"
        raise InputError(f"{problem}: give one (Jinja) as Protocol(chat_template=...)")
    backend = tokenizer.backend_tokenizer
    controls = {i: one for i, one in backend.get_added_tokens_decoder().items() if one.special}
    longest_first = sorted((one.content for one in controls.values()), key=len, reverse=True)
    named = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
    roles, layouts = _layouts(tokenizer, prompts, protocol)
    formatted = _encode(backend, layouts, roles)
    if quoting := [i for i, one in enumerate(layouts) if _quotes_special(one, roles, named)]:
        encoded = _encode_quoting(backend, [layouts[i] for i in quoting], roles, named)
        for row, tokens in zip(quoting, encoded, strict=True):
            formatted[row] = tokens
    specials = {*tokenizer.all_special_ids, *controls}
    for ids, token_roles in formatted:
        for i, role in enumerate(token_roles):
            if role == "template" and ids[i] in specials:
                token_roles[i] = "special"
    return formatted


def _layouts(
    tokenizer: "Tokenizer", prompts: Sequence[str], protocol: Protocol
) -> tuple[list[str], list[list[str]]]:
    """The roles of the pieces, which placeholders show, and the pieces of each formatted prompt."""
    system = {} if protocol.system_prompt is None else {"system": protocol.system_prompt}
    placed = {role: _PLACEHOLDERS[role] for role in (*system, "prompt")}
    frame = re.split(f"({'|'.join(placed.values())})", _rendered(tokenizer, protocol, placed))
    role_of = {placeholder: role for role, placeholder in placed.items()}
    roles = [role_of.get(piece, "template") for piece in frame]
    for role in placed:
        if (count := roles.count(role)) != 1:
            what = "the system prompt" if role == "system" else "a prompt"
            raise InputError(f"the chat template writes {what} {count} times: it should do so once")
    if system:
        text = _rendered(tokenizer, protocol, placed | system)
        frame = _filled(frame, roles.index("system"), text, "the system prompt")
    texts = [_rendered(tokenizer, protocol, system | {"prompt": prompt}) for prompt in prompts]
    at = roles.index("prompt")
    return roles, [_filled(frame, at, text, f"prompts[{row}]") for row, text in enumerate(texts)]


def _rendered(tokenizer: "Tokenizer", protocol: Protocol, contents: dict[str, str]) -> str:
    from jinja2 import TemplateError

    names = {"system": "system", "prompt": "user"}
    messages = [{"role": names[role], "content": text} for role, text in contents.items()]
    options: Any = {"chat_template": protocol.chat_template, "date_string": TEMPLATE_DATE}
    options |= {"add_generation_prompt": protocol.generation_prompt, "tokenize": False}
    try:
        return str(tokenizer.apply_chat_template(messages, **options))
    except (TemplateError, ArithmeticError, AttributeError, LookupError, TypeError) as error:
        what = " with a system prompt (some models take none)" if "system" in contents else ""
        raise InputError(f"the chat template fails{what}: {error}") from error


def _filled(frame: list[str], at: int, text: str, what: str) -> list[str]:
    """Replace the frame's piece `at` with the text that the template wrote there."""
    pattern = "(.*)".join(re.escape("".join(part)) for part in (frame[:at], frame[at + 1 :]))
    if not (match := re.fullmatch(pattern, text, re.DOTALL)):
        raise InputError(f"the chat template writes other text around {what} than around others")
    return [*frame[:at], match[1], *frame[at + 1 :]]


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
    renamed = [list(pieces) for pieces in layouts]
    for pieces in renamed:
        for i, role in enumerate(roles):
            if role == "template":
                pieces[i] = named.sub(lambda match: alias[match[0]], pieces[i])
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
