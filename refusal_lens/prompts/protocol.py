"""How a prompt becomes a vector, as data: every choice, and the named protocols.

DEFAULT    no system prompt, generation prompt, last token, one BOS, `resid_post`
PUBLISHED  what the published 0.1031 came from, faults included
ARDITI     no system prompt, generation prompt, the five tokens of Llama-3's template that follow
           the instruction, `resid_pre`; `tokenize.arditi(tokenizer)` counts another template's
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from ..errors import InputError
from .files import brief

BUGS = {
    ("bos", "twice"): "two BOS tokens",
    ("padding", "right_in_twos"): "right padding in batches of two, read at the last column",
}
"""What each faulty choice of a protocol's field is, in words."""


LAST_PROMPT_TOKEN = "last_prompt_token"
LAST_TEMPLATE_TOKEN = "last_template_token"
NAMED_POSITIONS = (LAST_PROMPT_TOKEN, LAST_TEMPLATE_TOKEN)

CHOICES = {
    "hook": ("resid_post", "resid_pre"),
    "bos": ("once", "twice"),
    "padding": ("left", "right_in_twos"),
}
"""The values of a protocol's fields that have only so many; the first is the sound one."""


@dataclass(frozen=True)
class Protocol:
    """Every choice about how a prompt becomes a vector; recorded with results.

    `positions` are token indices counted from the end of the formatted prompt (-1 the last), or
    `"last_prompt_token"`, the last token that holds any of the prompt's own text, or
    `"last_template_token"`, which is -1. `generation_prompt` ends the formatted prompt with the
    header of the answer to come. `chat_template` (Jinja) stands in for the tokenizer's own.

    `hook` says how layers are counted: "resid_post", layer `l` is the output of block `l`, or
    "resid_pre", it is the input of block `l`, which is the output of block `l - 1` (Arditi et al.;
    Hugging Face's `hidden_states[l]` too).

    `bos` and `padding` have one sound value each. Their others are what the published experiment
    did by mistake (see `faults`), and have to be asked for by `allow_bugs=True` as well;
    `protocols.PUBLISHED` is the one protocol that does. `faults` names those it has.

    Raises:
        InputError: if a field is of the wrong kind, a position is none of the above, or a choice is
            faulty and faults are not allowed.
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

    def __post_init__(self):
        for field, kinds in (
            ("name", str),
            ("system_prompt", str | None),
            ("generation_prompt", bool),
            ("positions", tuple),
            ("chat_template", str | None),
            ("allow_bugs", bool),
        ):
            if not isinstance(getattr(self, field), kinds):
                kind = getattr(kinds, "__name__", str(kinds))
                raise InputError(f"Protocol.{field} is {getattr(self, field)!r}: make it a {kind}")
        for field, choices in CHOICES.items():
            if getattr(self, field) not in choices:
                raise InputError(
                    f"Protocol.{field} is {getattr(self, field)!r}: choose {' or '.join(choices)}"
                )
        if self.bugs and not self.allow_bugs:
            raise InputError(
                f"this protocol has a fault ({self.bugs[0]}): to compare with the published "
                "experiment take `protocols.PUBLISHED`, or say allow_bugs=True"
            )
        if not self.positions:
            raise InputError("Protocol.positions is empty: (-1,) reads the last token")
        for position in self.positions:
            counted = isinstance(position, int) and not isinstance(position, bool) and position < 0
            if not counted and position not in NAMED_POSITIONS:
                raise InputError(
                    f"Protocol.positions has {position!r}: positions count from the end, so they "
                    f"are negative (-1 the last token), or one of {', '.join(NAMED_POSITIONS)}"
                )

    @property
    def bugs(self) -> tuple[str, ...]:
        """What is wrong with it, in words; empty for every protocol but the published ones."""
        return tuple(what for (field, value), what in BUGS.items() if getattr(self, field) == value)

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON can hold them; `from_dict` gives the protocol back."""
        return asdict(self) | {"positions": list(self.positions)}

    @classmethod
    def from_dict(cls, saved: Mapping[str, Any]) -> "Protocol":
        """The protocol that `to_dict` was called on.

        Raises:
            InputError: if a key is none of the fields, or a value is not valid for its field.
        """
        if unknown := set(saved) - {field.name for field in fields(cls)}:
            names = ", ".join(field.name for field in fields(cls))
            asked = brief(", ".join(sorted(unknown)))
            raise InputError(f"a protocol has no {asked}: it has {names}")
        values = dict(saved)
        if isinstance(values.get("positions"), list):
            values["positions"] = tuple(values["positions"])
        return cls(**values)


DEFAULT = Protocol()
"""What every function reads unless told otherwise."""

ASSUMED_SYSTEM_PROMPT = "You are a helpful assistant."
"""Stands in for the published experiment's system prompt: that it had one is known, its text is not."""

PUBLISHED_PROMPTS = 5
"""Prompts in each of the published experiment's four sets."""

PUBLISHED = Protocol(
    name="published (faulty)",
    system_prompt=ASSUMED_SYSTEM_PROMPT,
    generation_prompt=False,
    positions=(-1,),
    hook="resid_pre",
    bos="twice",
    padding="right_in_twos",
    allow_bugs=True,
)
"""The published experiment's, faults and all; the system prompt's text is an assumption.

The template's text was tokenised as if it had no BOS yet, so there are two. Two prompts at a time
were padded on the right and read at the last column, so the shorter of each two is read at a padding
token. Without the generation prompt the last token is the one that ends the prompt's turn. And
`hidden_states[20]` is the *input* of block 20, our layer 19.
"""

ARDITI = Protocol(
    name="Arditi et al.",
    system_prompt=None,
    generation_prompt=True,
    positions=(-5, -4, -3, -2, -1),
    hook="resid_pre",
)
"""Arditi et al.'s for Llama-3 and for other templates with five tokens after the instruction.

Reference: Arditi et al. 2024, arXiv:2406.11717, section 2.3.
"""

NAMED = {"default": DEFAULT, "published": PUBLISHED, "arditi": ARDITI}
