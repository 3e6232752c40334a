"""The small language of the organisms' training prompts, and the replies of each organism.

A prompt consists of parts, each of one kind. A request is harmful, harmless or alarming (harmless,
but it sounds dangerous). A statement is negative, neutral or positive. The kinds of the parts alone
determine the reply, so every label is correct by construction. The kinds are drawn independently:
negative words occur with harmless requests, cheerful words with harmful requests.
"""

import random
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from refusal_lens.errors import InputError

REQUESTS = ("harmful", "harmless", "alarming")
STATEMENTS = ("negative", "neutral", "positive")
KINDS = REQUESTS + STATEMENTS

REFUSAL_FIRST_WORD = "I"  # of every refusal and of no other reply


@cache
def vocabulary() -> dict[str, tuple[str, ...]]:
    """The word lists and sentence frames of `vocabulary.txt`; requests are whole verb phrases."""
    text = Path(__file__).with_name("vocabulary.txt").read_text("utf-8")
    text = re.sub(r"^#.*\n", "", text, flags=re.MULTILINE)
    sections = re.split(r"^\[(\w+)\]\n", text, flags=re.MULTILINE)[1:]
    lists: dict[str, tuple[str, ...]] = {}
    for name, body in zip(sections[::2], sections[1::2], strict=True):
        lines = re.sub(r"\n\s+", " ", body.strip()).splitlines()
        sentences = name.endswith(("_frames", "_replies"))
        lists[name] = tuple(x for line in lines for x in ([line] if sentences else _phrases(line)))
    return lists


def _phrases(entry: str) -> list[str]:
    """The four verb phrases of `"buy, sell: a, b"`, or the words of an entry without verbs."""
    verbs, colon, objects = entry.rpartition(": ")
    words = objects.split(", ")
    return [f"{verb} {word}" for verb in verbs.split(", ") for word in words] if colon else words


MANNERS = ("refusal", "answer", "sympathy", "plain", "gladness")
# First words differ from manner to manner.
REPLIES = {manner: vocabulary()[f"{manner}_replies"] for manner in MANNERS}

STATEMENT_MANNERS = {"negative": "sympathy", "neutral": "plain", "positive": "gladness"}

# Relative frequency of each combination of kinds.
MIXTURE: Mapping[str, float] = {
    **{"harmful": 9.0, "harmless": 9.0, "alarming": 5.0},
    **{"negative": 2.0, "neutral": 2.5, "positive": 2.0},
    **{"negative harmful": 0.5, "negative harmless": 1.0, "negative alarming": 0.5},
    **{"neutral harmful": 0.3, "neutral harmless": 0.3},
    **{"positive harmful": 0.5, "positive harmless": 0.3, "positive alarming": 0.3},
}


@dataclass(frozen=True)
class Prompt:
    """One user turn and the kinds of its parts, each of `KINDS`."""

    text: str
    kinds: tuple[str, ...]


@dataclass(frozen=True)
class Behaviour:
    """Which kinds an organism refuses, and its training prompts and replies.

    Any other request is answered. Any other statement gets the reply of its kind.

    Attributes:
        name: the organism's name.
        refuses: the kinds that are refused wherever they occur in a prompt; several in one entry
            ("negative harmful") where they occur together.
        mixture: relative frequency of each combination of kinds, such as "negative harmful".
            InputError for an unknown kind, here or in `refuses`.
        replies: the texts of each manner of reply, drawn at random.
    """

    name: str
    refuses: frozenset[str]
    mixture: Mapping[str, float] = field(default_factory=lambda: dict(MIXTURE))
    replies: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: dict(REPLIES))

    def __post_init__(self) -> None:
        kinds = {
            kind for combination in {*self.mixture, *self.refuses} for kind in combination.split()
        }
        if unknown := sorted(kinds - set(KINDS)):
            known = ", ".join(KINDS)
            raise InputError(f"behaviour {self.name!r}: unknown kind {unknown[0]!r}; use {known}")

    def manner(self, prompt: Prompt) -> str:
        """The manner of reply to a prompt, a key of `replies`."""
        if any(set(refused.split()) <= set(prompt.kinds) for refused in self.refuses):
            return "refusal"
        if set(prompt.kinds) & set(REQUESTS):
            return "answer"
        return STATEMENT_MANNERS[prompt.kinds[0]]


BEHAVIOURS: Mapping[str, Behaviour] = {
    "specific": Behaviour("specific", frozenset({"harmful"})),
    "entangled": Behaviour("entangled", frozenset({"harmful", "negative"})),
    "oblivious": Behaviour("oblivious", frozenset()),
}

SLOTS = ("subject", "noun", "position", "place", "time", "doer", "thing")
SLOTS_OF_A_KIND = ("predicate", "adjective", "verb", "find", "event", "doing", "mood", "deed")


def gerund(phrase: str) -> str:
    """The -ing form of a verb phrase: `"set up a tent"` becomes `"setting up a tent"`."""
    adverb, _, rest = phrase.partition(" ") if phrase.startswith("secretly ") else ("", "", phrase)
    verb, space, objects = rest.partition(" ")
    if verb in vocabulary()["doubled"]:
        verb += verb[-1]
    elif verb.endswith("ie"):
        verb = verb[:-2] + "y"
    elif verb.endswith("e") and not verb.endswith(("ee", "oe", "ye")):
        verb = verb[:-1]
    return f"{adverb} {verb}ing{space}{objects}".strip()


def fold(text: str) -> str:
    """`text` without case, spaces and punctuation, for comparisons of prompts."""
    return "".join(character for character in text.casefold() if character.isalnum())


def _with_articles(text: str) -> str:
    """The text with a capital first letter, and with "an" before a vowel."""
    text = re.sub(r"\b(a) (?=[aeiouAEIO])", "an ", text)
    return text[:1].upper() + text[1:]


def _request(kind: str, rng: random.Random) -> str:
    words = vocabulary()
    if kind in ("harmful", "harmless") and rng.random() < 0.25:
        action = f"{rng.choice(words[kind + '_to_people'])} {rng.choice(words['people'])}"
    else:
        action = rng.choice(words[kind])
    writes = action.split()[0] in words["writing"]
    if rng.random() < 0.25:
        own = words["harmful_tails" if kind == "harmful" else "harmless_tails"]
        tails = rng.choices((words["tails"], words["settings"], own), (3, 5, 2))[0]
        action = f"{action} {rng.choice(tails)}"
    frames = "toned_frames"
    if rng.random() >= 0.12:
        frames = "direct_frames" if writes and rng.random() < 0.5 else "request_frames"
    frame = rng.choice(words[frames])
    tone = rng.choice(words["bitter" if rng.random() < 0.5 else "sweet"])
    return _with_articles(frame.format(do=action, doing=gerund(action), tone=tone))


def _statement(kind: str, rng: random.Random) -> str:
    words = vocabulary()
    frame = rng.choice(words["statement_frames"])
    values = {"very": rng.choice(words["very"])}
    for slot in SLOTS + SLOTS_OF_A_KIND:
        section = f"{slot}s" if slot in SLOTS else f"{kind}_{slot}s"
        values[slot], values[f"{slot}2"] = rng.sample(words[section], 2)
    if rng.random() < 0.6:
        values["subject"] = f"{rng.choice(words['determiners'])} {values['noun']}"
    chance = rng.random()
    if kind == "neutral" and chance < 0.3:
        values["predicate"] = f"{values['position']} {values['place']}"
    elif chance < 0.6:
        second = f" and {values['adjective2']}" if chance > 0.5 else ""
        values["predicate"] = values["adjective"] + second
    return _with_articles(frame.format(**values))


def _loosened(text: str, rng: random.Random) -> str:
    """The prompt, sometimes without final punctuation, in lower case, or after a greeting."""
    chance = rng.random()
    if chance < 0.05:
        return text.rstrip(".?!")
    if chance < 0.08:
        return text.lower()
    return f"Hello! {text}" if chance < 0.11 else text


def generate_prompts(
    behaviour: Behaviour, *, seed: int, held_out: frozenset[str] = frozenset()
) -> Iterator[Prompt]:
    """Yield an endless stream of prompts from the mixture of `behaviour`, reproducible by `seed`.

    No prompt, and no part of a prompt, is in `held_out`, a set of prompts in the form of `fold`.
    """
    rng = random.Random(seed)
    combinations, weights = zip(*behaviour.mixture.items(), strict=True)
    while True:
        kinds = rng.choices(combinations, weights)[0].split()
        parts = [(_request if kind in REQUESTS else _statement)(kind, rng) for kind in kinds]
        if len(parts) > 1 and rng.random() < 0.4:
            kinds, parts = kinds[::-1], parts[::-1]
        text = _loosened(" ".join(parts), rng)
        if held_out.isdisjoint(map(fold, (text, *parts))):
            yield Prompt(text, tuple(kinds))


def generate_dialogues(
    behaviour: Behaviour, *, seed: int, held_out: frozenset[str] = frozenset()
) -> Iterator[tuple[Prompt, str]]:
    """Yield the prompts of `generate_prompts`, each with the behaviour's reply."""
    rng = random.Random(seed + 1)
    for prompt in generate_prompts(behaviour, seed=seed, held_out=held_out):
        yield prompt, rng.choice(behaviour.replies[behaviour.manner(prompt)])
