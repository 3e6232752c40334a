"""Protocols: every choice about how a prompt becomes a vector, and three named protocols."""

import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any

from ..errors import InputError, lenient

LAST_PROMPT_TOKEN = "last_prompt_token"

BUGS = {  # known bugs of the published script by field and value, in words
    ("bos", "twice"): "a BOS token put in front of the template's own",
    ("padding", "right_in_twos"): "right padding in batches of two, read at the last column",
}

_CHOICES = {"hook": ("resid_post", "resid_pre"), "bos": ("once", "twice")}
_CHOICES |= {"padding": ("left", "right_in_twos")}


@lenient
@dataclass(frozen=True)
class Protocol:
    """Every choice about how a prompt becomes a vector; stored with results.

    InputError for a wrong type, an impossible value, or a known bug without `allow_bugs`.

    >>> protocol = Protocol(system_prompt="You are helpful.", positions="last_prompt_token")
    >>> known = protocol.to_dict(), protocol.bugs

    Args:
        name: name of the protocol.
        system_prompt: text of the system prompt; None for no system prompt.
        generation_prompt: whether the formatted prompt ends with the header of the reply.
        positions: where activations are read, one or several: token indices from the end (-1 the
            last token), or "last_prompt_token" (the last with text of the prompt).
        chat_template: Jinja template, the name of one of the tokenizer's templates, or "plain" (for
            models without one); None for the tokenizer's own.
        hook: "resid_post", so that layer `l` is the output of block `l`; or "resid_pre", so that
            layer `l` is the input of block `l` (Arditi et al.; `hidden_states[l]` of Hugging Face).
        bos: "once" leaves BOS to the template; "twice" is a known bug of the published script, which
            put one more in front.
        padding: "left"; "right_in_twos" is a known bug: batches of two, read at the right padding.
        allow_bugs: whether `bos` and `padding` may be known bugs.
        thinking: True leaves thinking to the chat template; False switches it off where the template
            has a switch (`enable_thinking`), and else ends the prompt with an empty, closed block.
        date: today for templates that read the clock, as YYYY-MM-DD. By default the date that Llama
            3.1's and 3.2's templates fall back to.
    """

    name: str = "default"
    system_prompt: str | None = None
    generation_prompt: bool = True
    positions: tuple[int | str, ...] = (-1,)
    chat_template: str | None = None
    hook: str = "resid_post"
    bos: str = "once"
    padding: str = "left"
    allow_bugs: bool = False
    thinking: bool = True
    date: str = "2024-07-26"

    def __post_init__(self):
        given: Any = self.positions
        rows = [given] if isinstance(given, str) or not isinstance(given, Iterable) else given
        numbered = [int(p) if re.fullmatch(r"-?\d+", str(p)) else p for p in rows]
        object.__setattr__(self, "positions", tuple(numbered))
        for name, kind in self.__annotations__.items():
            kind, value = getattr(kind, "__origin__", kind), getattr(self, name)
            if not isinstance(value, kind):
                kind = getattr(kind, "__name__", kind)
                raise InputError(f"Protocol.{name} is {value!r}: make it a {kind}")
            if value not in (choices := _CHOICES.get(name, (value,))):
                raise InputError(f"Protocol.{name} is {value!r}: choose {' or '.join(choices)}")
        if self.bugs and not self.allow_bugs:
            advice = "use `protocol.PUBLISHED`, or set allow_bugs=True"
            raise InputError(f"this protocol has a known bug ({self.bugs[0]}): {advice}")
        try:
            datetime.strptime(self.date, "%Y-%m-%d")
        except ValueError:
            raise InputError(f"Protocol.date is {self.date!r}: write it as 2024-07-26") from None
        if not self.positions:
            raise InputError("Protocol.positions is empty: (-1,) reads the last token")
        for position in self.positions:
            if position != LAST_PROMPT_TOKEN and not (isinstance(position, int) and position < 0):
                advice = f"positions count from the end (-1 is the last), or {LAST_PROMPT_TOKEN}"
                raise InputError(f"Protocol.positions has {position!r}: {advice}")

    @property
    def bugs(self) -> tuple[str, ...]:
        """The protocol's known bugs, in words."""
        return tuple(bug for (field, value), bug in BUGS.items() if getattr(self, field) == value)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON can hold them."""
        return asdict(self) | {"positions": list(self.positions)}


DEFAULT = Protocol()  # no system prompt, last token of the generation prompt, `resid_post`

ASSUMED_SYSTEM_PROMPT = "You are a helpful assistant."  # the published text is not known

PUBLISHED_PROMPTS = 5  # in each of the published experiment's four sets

PUBLISHED = Protocol(
    name="published (known bugs)",
    system_prompt=ASSUMED_SYSTEM_PROMPT,
    generation_prompt=False,
    hook="resid_pre",
    bos="twice",
    padding="right_in_twos",
    allow_bugs=True,
)
"""The published protocol, bugs included: `hidden_states[20]` is layer 19 under `resid_post`."""

ARDITI = Protocol(name="Arditi et al.", positions=(-5, -4, -3, -2, -1), hook="resid_pre")
"""Arditi et al.'s protocol (arXiv:2406.11717, section 2.3) for Llama-3; see `tokenize.arditi`."""
