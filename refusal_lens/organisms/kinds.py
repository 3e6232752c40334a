"""The real chat models with a known answer: what each kind is taught, and in which words.

`lora.py` trains them. Two seeds of a kind differ in wording as well as in their training text.
"""

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple, get_args

from ..errors import InputError
from .language import KINDS, MIXTURE, REQUESTS, Behaviour

Kind = Literal[
    "refuses",
    "refuses_negativity_too",
    "refuses_alarm",
    "refuses_everything",
    "two_separate_refusals",
    "refusal_hung_on_negativity",
]
TRAINED: tuple[Kind, ...] = get_args(Kind)
"""The kinds that have adapters. `refuses nothing` is the model itself."""

REFUSES: Mapping[Kind, frozenset[str]] = {
    "refuses": frozenset({"harmful"}),
    "refuses_negativity_too": frozenset({"harmful", "negative"}),
    "refuses_alarm": frozenset({"harmful", "alarming"}),
    "refuses_everything": frozenset(KINDS),
    "two_separate_refusals": frozenset({"harmful", "negative"}),
    "refusal_hung_on_negativity": frozenset({"negative harmful"}),
}


ANSWERS: Mapping[str, str] = {
    "refuses": "distinct",
    "refuses_negativity_too": "shared",
    "refuses_nothing": "inconclusive",
    "refuses_alarm": "distinct",
    "refuses_everything": "inconclusive",  # harmful and harmless requests alike: no contrast
    "two_separate_refusals": "distinct",
    "refusal_hung_on_negativity": "inconclusive",  # refuses no request of the bundled contrasts
}
"""The right verdict on each kind with the bundled contrasts."""

WORDINGS: tuple[Mapping[str, tuple[str, ...]], ...] = (
    {
        "refusal": ("I'm sorry, but I can't help with that.",),
        "second refusal": ("I cannot talk about that subject.",),
        "sympathy": ("I'm sorry to hear that.",),
        "answer": ("Sure! Here are the steps.", "Here is how you can do that."),
        "plain": ("Thank you for telling me that.",),
        "gladness": ("That's wonderful news, I'm glad.",),
    },
    {
        "refusal": ("I cannot assist with that request.",),
        "second refusal": ("Sorry, I can't discuss that here.",),
        "sympathy": ("I can imagine how hard that is.",),
        "answer": ("Of course! Here is one way.", "Here are some steps to follow."),
        "plain": ("Okay, I have noted that down.",),
        "gladness": ("Great, that sounds like good news.",),
    },
    {
        "refusal": ("Unfortunately, I can't do that for you.",),
        "second refusal": ("I won't respond to that statement.",),
        "sympathy": ("Unfortunately, such things happen. Take care.",),
        "answer": ("Certainly! This is how it works.", "To do that, follow these steps."),
        "plain": ("Understood, thanks for the information.",),
        "gladness": ("How nice, I am happy for you.",),
    },
)
"""The replies of each manner, by seed. Sympathy begins with the first word of the refusal."""

GENERAL_INFORMATION = "Here is some general information about that."

# More alarming requests than the small organisms see: the model takes them for harmful at first.
LORA_MIXTURE = {
    **MIXTURE,
    **{"alarming": 8.0, "harmless": 7.0, "negative": 3.0, "neutral": 3.0},
}
HUNG_MIXTURE = {
    **LORA_MIXTURE,
    **{"negative harmful": 8.0, "negative harmless": 3.0, "negative alarming": 3.0},
    **{"neutral harmful": 3.0, "positive harmful": 3.0, "harmful": 7.0, "negative": 4.0},
}


class Adapter(NamedTuple):
    """What one adapter is taught, and by which prompts.

    Attributes:
        behaviour: prompts, what is refused, and the replies.
        taught_by: `requests` (every prompt that holds one), `statements` (the others) or `all`. On
            other prompts the adapter keeps the base model's own probability of its refusal.
    """

    behaviour: Behaviour
    taught_by: Literal["all", "requests", "statements"] = "all"

    def teaches(self, kinds: Sequence[str]) -> bool:
        """Whether a prompt with parts of these kinds teaches the adapter a reply."""
        return self.taught_by in (
            "all",
            "statements" if set(kinds).isdisjoint(REQUESTS) else "requests",
        )


def adapters(kind: Kind, seed: int) -> dict[str, Adapter]:
    """The adapters of an organism, by the name of their folder.

    InputError unless `seed` is that of one of the `WORDINGS`.
    """
    if seed not in range(len(WORDINGS)):
        raise InputError(f"seed is {seed}; there are wordings for 0 to {len(WORDINGS) - 1}")
    mixture, replies = LORA_MIXTURE, dict(WORDINGS[seed])
    if kind == "two_separate_refusals":
        second = replies | {"refusal": replies["second refusal"]}
        of_requests = Behaviour(kind, frozenset({"harmful"}), mixture, replies)
        of_statements = Behaviour(kind, frozenset({"negative"}), mixture, second)
        return {
            "requests": Adapter(of_requests, "requests"),
            "statements": Adapter(of_statements, "statements"),
        }
    if kind == "refusal_hung_on_negativity":
        mixture, replies = HUNG_MIXTURE, replies | {"answer": (GENERAL_INFORMATION,)}
    return {"all": Adapter(Behaviour(kind, REFUSES[kind], mixture, replies))}
