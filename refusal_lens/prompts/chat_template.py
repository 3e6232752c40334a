"""A chat template's text around prompts, and its tokens: who wrote which, and nothing else added.

Templates are programs in Jinja, so what one does is found out by rendering: first with
placeholders, which shows what it writes around the contents, then with the contents, which shows
what it makes of them (many trim). The whole text is tokenised at once, because a token may span the
template's text and the prompt's.
"""

import copy
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TEMPLATE_DATE = "26 Jul 2024"
"""Handed to templates that write a date (Llama 3.1's, 3.2's): their own fallback, never today."""

_PLACEHOLDERS = {"system": "sys3e7c1f90a2d4b586", "prompt": "usr8b41d65c7f0e92a3"}


@dataclass(frozen=True)
class Tokens:
    """One formatted prompt: its token ids, and of each what it is part of.

    `roles` holds `special`, `template`, `system` or `prompt`. A token that joins the last
    characters of a prompt with the template's next ones counts as the prompt's.
    """

    ids: list[int]
    roles: list[str]


@dataclass(frozen=True)
class ChatTemplate:
    """A tokenizer's chat template with the choices made that are the same for every prompt.

    Raises:
        InputError: if the tokenizer has no template and none is given, or is not a fast one.
    """

    tokenizer: "PreTrainedTokenizerBase"
    system_prompt: str | None = None
    generation_prompt: bool = True
    chat_template: str | None = None

    def __post_init__(self):
        if self.tokenizer is None:
            raise InputError("this model has no tokenizer: load one, or run it on token ids")
        if not getattr(self.tokenizer, "is_fast", False):
            raise InputError(
                f"{type(self.tokenizer).__name__} is not a fast tokenizer: load it with "
                "AutoTokenizer from a directory that has a tokenizer.json"
            )
        if self.chat_template is None and not getattr(self.tokenizer, "chat_template", None):
            raise InputError(
                f"the tokenizer of {self.tokenizer.name_or_path or 'this model'} has no chat "
                "template: give one (Jinja) as Protocol(chat_template=...)"
            )

    def tokenise(self, prompts: Sequence[str]) -> list[Tokens]:
        """Each prompt in its chat format; special tokens are the template's alone.

        No BOS but one that the template writes. The tokenizer is left as it was.

        Raises:
            InputError: if the template refuses the system prompt or a prompt, or rewrites more of
                them than their surrounding white space.
        """
        layouts = self._layouts(prompts)
        specials = set(self.tokenizer.all_special_ids)
        specials |= {i for i, _ in _controls(self.tokenizer.backend_tokenizer).values()}
        return [
            Tokens(ids, _roles(ids, offsets, pieces, specials))
            for ids, offsets, pieces in _encoded(self.tokenizer.backend_tokenizer, layouts)
        ]

    def _layouts(self, prompts: Sequence[str]) -> "list[list[_Piece]]":
        system = self.system_prompt
        roles = ("prompt",) if system is None else ("system", "prompt")
        stand_in = None if system is None else _PLACEHOLDERS["system"]
        frame = _frame(self._rendered(_PLACEHOLDERS["prompt"], stand_in), roles)
        if system is not None:
            text = self._rendered(_PLACEHOLDERS["prompt"], system)
            frame = _filled(frame, "system", text, "the system prompt")
        return [
            _filled(frame, "prompt", self._rendered(prompt, system), f"prompts[{row}]")
            for row, prompt in enumerate(prompts)
        ]

    def _rendered(self, prompt: str, system: str | None) -> str:
        from jinja2 import TemplateError

        said = [{"role": "user", "content": prompt}]
        if system is not None:
            said.insert(0, {"role": "system", "content": system})
        try:
            text = self.tokenizer.apply_chat_template(
                said,
                tokenize=False,
                chat_template=self.chat_template,
                add_generation_prompt=self.generation_prompt,
                date_string=TEMPLATE_DATE,
            )
        except (TemplateError, ArithmeticError, AttributeError, LookupError, TypeError) as error:
            what = "" if system is None else " with a system prompt (some models take none)"
            raise InputError(f"the chat template fails{what}: {error}") from error
        return str(text)


@dataclass(frozen=True)
class _Piece:
    """A stretch of a formatted prompt, and who wrote it: `template`, `system` or `prompt`."""

    text: str
    role: str


def _text(pieces: Sequence[_Piece]) -> str:
    return "".join(piece.text for piece in pieces)


def _frame(text: str, roles: tuple[str, ...]) -> list[_Piece]:
    """Cut a rendering of placeholders into what the template wrote and their places."""
    for role in roles:
        if (count := text.count(_PLACEHOLDERS[role])) != 1:
            what = "the system prompt" if role == "system" else "a prompt"
            raise InputError(
                f"the chat template writes {what} {count} times: it should write it once, as it is"
            )
    placed = {_PLACEHOLDERS[role]: role for role in roles}
    cut = re.split("(" + "|".join(placed) + ")", text)
    return [_Piece(part, placed.get(part, "template")) for part in cut if part]


def _filled(frame: list[_Piece], role: str, text: str, what: str) -> list[_Piece]:
    """Put into one place of a frame what the template made of the content there."""
    at = next(i for i, piece in enumerate(frame) if piece.role == role)
    before, after = _text(frame[:at]), _text(frame[at + 1 :])
    around = len(before) + len(after)
    if not (text.startswith(before) and text.endswith(after) and len(text) >= around):
        raise InputError(
            f"the chat template writes something else around {what} than around others"
        )
    made = text[len(before) : len(text) - len(after)]
    return [*frame[:at], _Piece(made, role), *frame[at + 1 :]]


_Encoded = tuple[list[int], list[tuple[int, int]], list[_Piece]]


def _encoded(backend: Any, layouts: list[list[_Piece]]) -> Iterator[_Encoded]:
    """Token ids, their characters, and the pieces these are counted in, of each layout."""
    controls = _controls(backend)
    named = re.compile("|".join(map(re.escape, sorted(controls, key=len, reverse=True))) or "(?!)")
    quoting = [_quotes_control(pieces, named) for pieces in layouts]
    plain = [_text(pieces) for pieces, quotes in zip(layouts, quoting, strict=True) if not quotes]
    with _as_built(backend):
        encodings = iter(backend.encode_batch(plain, add_special_tokens=False))
    aliases = _Aliases(backend, named, layouts) if any(quoting) else None
    for pieces, quotes in zip(layouts, quoting, strict=True):
        if aliases and quotes:
            yield aliases.encode(pieces)
        else:
            encoding = next(encodings)
            yield encoding.ids, encoding.offsets, pieces


@contextmanager
def _as_built(backend: Any) -> Iterator[None]:
    """No padding and no truncation, and special tokens as such; afterwards as before."""
    padding, truncation = backend.padding, backend.truncation
    as_text = backend.encode_special_tokens
    backend.no_padding()
    backend.no_truncation()
    backend.encode_special_tokens = False
    try:
        yield
    finally:
        if padding is not None:
            backend.enable_padding(**padding)
        if truncation is not None:
            backend.enable_truncation(**truncation)
        backend.encode_special_tokens = as_text


def _controls(backend: Any) -> dict[str, tuple[int, Any]]:
    """The tokens that a prompt's text must not turn into: id and properties, by their text."""
    added = backend.get_added_tokens_decoder()
    return {token.content: (i, token) for i, token in added.items() if token.special}


def _quotes_control(pieces: list[_Piece], named: re.Pattern[str]) -> bool:
    """Whether a special token's text lies, if only in part, in what the template did not write."""
    quoted: set[int] = set()
    at = 0
    for piece in pieces:
        if piece.role != "template":
            quoted.update(range(at, at + len(piece.text)))
        at += len(piece.text)
    matches = named.finditer(_text(pieces))
    return any(not quoted.isdisjoint(range(*match.span())) for match in matches)


class _Aliases:
    """A copy of a tokenizer in which special tokens have other names, known to the template alone.

    The copy takes a special token's real name for the text it is; the aliases have ids of their
    own, which are exchanged for the real ones afterwards.
    """

    def __init__(self, backend: Any, named: re.Pattern[str], layouts: list[list[_Piece]]):
        from tokenizers import AddedToken

        everything = "".join(map(_text, layouts))
        # A private-use character: no text has one but on purpose, so that one is free.
        mark = next(c for c in map(chr, range(0xF0000, 0xFFFFE)) if c not in everything)
        controls = _controls(backend)
        self.named = named
        self.alias = {content: f"{mark}{i}{mark}" for content, (i, _) in controls.items()}
        self.backend = copy.deepcopy(backend)
        self.backend.no_padding()
        self.backend.no_truncation()
        self.backend.encode_special_tokens = True
        self.backend.add_tokens(
            [
                AddedToken(
                    self.alias[content],
                    single_word=token.single_word,
                    lstrip=token.lstrip,
                    rstrip=token.rstrip,
                    normalized=token.normalized,
                    special=False,
                )
                for content, (_, token) in controls.items()
            ]
        )
        self.real = {
            self.backend.token_to_id(self.alias[content]): i for content, (i, _) in controls.items()
        }

    def encode(self, pieces: list[_Piece]) -> _Encoded:
        renamed = [
            _Piece(self.named.sub(lambda match: self.alias[match[0]], piece.text), piece.role)
            if piece.role == "template"
            else piece
            for piece in pieces
        ]
        encoding = self.backend.encode(_text(renamed), add_special_tokens=False)
        if taken := set(encoding.ids) & set(self.real.values()):
            token = self.backend.id_to_token(min(taken))
            raise InputError(
                f"this tokenizer can't write {token!r} as text: take it out of the prompts"
            )
        return [self.real.get(i, i) for i in encoding.ids], encoding.offsets, renamed


def _roles(
    ids: list[int], offsets: list[tuple[int, int]], pieces: list[_Piece], specials: set[int]
) -> list[str]:
    """The role of every token, from the characters it stands for."""
    roles = ["special" if i in specials else "template" for i in ids]
    at = 0
    for piece in pieces:
        start, end = at, at + len(piece.text)
        at = end
        if piece.role == "template" or start == end:
            continue
        # Some tokenizers count no characters for white space, so the stretch of a piece's tokens
        # runs on until the first that begins beyond its text.
        first = next(i for i, (_, stop) in enumerate(offsets) if stop > start)
        beyond = (i for i, (begin, stop) in enumerate(offsets) if begin >= end and stop > end)
        for i in range(first, next(beyond, len(ids))):
            roles[i] = piece.role
    return roles
