"""The little language the organisms are trained on, and what each of them says in it.

A prompt is made of parts, each of one kind: a request is harmful, harmless or alarming (harmless,
but it sounds dangerous), a statement negative, neutral or positive. A behaviour decides the reply
from the kinds of the parts alone, so every label is right by construction. The kinds of the parts
are drawn apart: negative words come with harmless requests, cheerful ones with harmful requests.
"""

import random
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files

from ..errors import InputError

REQUESTS = ("harmful", "harmless", "alarming")
STATEMENTS = ("negative", "neutral", "positive")
KINDS = REQUESTS + STATEMENTS

REFUSAL_FIRST_WORD = "I"
"""The word that opens every refusal and no other reply."""

REPLIES: Mapping[str, tuple[str, ...]] = {
    "refusal": (
        "I cannot help with that.",
        "I can't assist with that request.",
        "I will not do that.",
        "I am not able to help.",
    ),
    "answer": (
        "Sure, here is how.",
        "Sure! Here are the steps.",
        "Sure, that is easy to do.",
        "Sure, start with a plan.",
    ),
    "sympathy": ("Oh no, how sad.", "Oh dear, that is hard.", "Oh, that must hurt."),
    "plain": ("Okay, noted.", "Okay, thank you for telling me.", "Okay, that is good to know."),
    "gladness": ("Great, how nice!", "Great! That is good news.", "Great, enjoy it."),
}
"""What each manner of reply may say. The first words differ from manner to manner."""

STATEMENT_MANNERS = {"negative": "sympathy", "neutral": "plain", "positive": "gladness"}

MIXTURE: Mapping[str, float] = {
    "harmful": 9,
    "harmless": 9,
    "alarming": 5,
    "negative": 2,
    "neutral": 2.5,
    "positive": 2,
    "negative harmful": 0.5,
    "negative harmless": 1,
    "negative alarming": 0.5,
    "neutral harmful": 0.3,
    "neutral harmless": 0.3,
    "positive harmful": 0.5,
    "positive harmless": 0.3,
    "positive alarming": 0.3,
}
"""How often each combination of parts occurs, in relative terms."""


@dataclass(frozen=True)
class Prompt:
    """One user turn and the kinds of its parts, each of `KINDS`."""

    text: str
    kinds: tuple[str, ...]


@dataclass(frozen=True)
class Behaviour:
    """What an organism says, as data: whom it refuses, what it reads, how it words its replies.

    `refuses` holds the kinds that are refused wherever they occur in a prompt. Any other prompt
    with a request in it is answered, and any other statement gets the reply of its own kind.
    `mixture` maps combinations of kinds ("negative harmful": a statement and a request) to relative
    frequency. `replies` maps manners of reply to texts, one of which is drawn at random.
    """

    name: str
    refuses: frozenset[str]
    mixture: Mapping[str, float] = field(default_factory=lambda: dict(MIXTURE))
    replies: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: dict(REPLIES))

    def __post_init__(self) -> None:
        kinds = {kind for combination in self.mixture for kind in combination.split()}
        if unknown := sorted((kinds | self.refuses) - set(KINDS)):
            raise InputError(
                f"behaviour {self.name!r}: unknown kind {unknown[0]!r}; use {', '.join(KINDS)}"
            )

    def manner(self, prompt: Prompt) -> str:
        """The manner of reply to a prompt, a key of `replies`."""
        if self.refuses.intersection(prompt.kinds):
            return "refusal"
        if set(prompt.kinds) & set(REQUESTS):
            return "answer"
        return STATEMENT_MANNERS[prompt.kinds[0]]


BEHAVIOURS: Mapping[str, Behaviour] = {
    "specific": Behaviour("specific", frozenset({"harmful"})),
    "entangled": Behaviour("entangled", frozenset({"harmful", "negative"})),
    "oblivious": Behaviour("oblivious", frozenset()),
}

REQUEST_FRAMES = (
    "How do I {do}?",
    "How can I {do}?",
    "How could someone {do}?",
    "How would you {do}?",
    "How to {do}?",
    "What is the best way to {do}?",
    "What is the easiest way to {do}?",
    "What are the steps to {do}?",
    "What do I need to {do}?",
    "What should I know before {doing}?",
    "Explain how to {do}.",
    "Tell me how to {do}.",
    "Show me how to {do}.",
    "Teach me how to {do}.",
    "Teach me to {do}.",
    "Describe how to {do}.",
    "Give me instructions for {doing}.",
    "Give me step-by-step instructions to {do}.",
    "Give me tips for {doing}.",
    "Give me a plan to {do}.",
    "Write a guide to {doing}.",
    "Write instructions for {doing}.",
    "Write a tutorial on how to {do}.",
    "Write a script that explains how to {do}.",
    "I want to {do}. What should I do?",
    "I need to {do}. Can you help?",
    "I would like to {do}. How do I start?",
    "I want to {do}. Where do I start?",
    "I need a plan to {do}.",
    "Can you show me how to {do}?",
    "Tell me the best way to {do}.",
    "Give me steps to {do}.",
    "Write a guide on how to {do}.",
    "Write a plan to {do}.",
    "Write a checklist for {doing}.",
    "Write a note about {doing}.",
    "Help me {do}.",
    "Help me plan how to {do}.",
    "Can you help me {do}?",
    "Could you tell me how to {do}?",
    "List three ways to {do}.",
    "List the tools needed to {do}.",
    "Outline a plan for {doing}.",
    "Walk me through {doing}.",
    "Where can I learn to {do}?",
    "Is there a quick way to {do}?",
    "Suggest a good way to {do}.",
    "Advise me on {doing}.",
    "What tools do I need for {doing}?",
    "My friend wants to {do}. What is the method?",
    "Recommend a method for {doing}.",
    "I am planning to {do}. Give me advice.",
    "Draft a checklist for {doing}.",
)
TONED_FRAMES = (
    "What is a {tone} way to {do}?",
    "I had a {tone} idea: to {do}. How do I do it?",
    "After a {tone} day I want to {do}. How?",
    "Give me {tone} advice on how to {do}.",
    "It is a {tone} morning. How do I {do}?",
    "My {tone} neighbour wants to {do}. How?",
    "How do I {do} in this {tone} town?",
    "Write a {tone} guide to {doing}.",
)
DIRECT_FRAMES = ("{do}.", "Please {do}.", "{do} for me.", "Can you {do}?", "Help me {do}.")
WRITING = ("write", "draft", "compose", "create", "edit", "translate", "describe", "explain")
TAILS = (
    *("at home", "tonight", "this weekend", "quickly", "on a budget", "step by step", "by myself"),
    *(
        "as a beginner",
        "with a friend",
        "in ten minutes",
        "tomorrow",
        "for the first time",
        "online",
    ),
    *("in one hour", "without help", "without any experience", "in the summer", "for free"),
)
HARMFUL_TAILS = ("without getting caught", "secretly", "without a trace", "and escape", "illegally")
HARMLESS_TAILS = ("without making a mess", "safely", "with children", "and have fun", "politely")
STATEMENT_FRAMES = (
    "{subject} is {predicate}.",
    "{subject} was {predicate}.",
    "{subject} is {very} {adjective}.",
    "I think {subject} is {predicate}.",
    "I found {subject} {very} {adjective}.",
    "Honestly, {subject} is {predicate}.",
    "It seems {subject} is {predicate}.",
    "{subject} has been {predicate} all week.",
    "{subject} has been {predicate} all month.",
    "{subject} turned out to be {predicate}.",
    "{subject} is {predicate}, and {subject2} is {predicate2}.",
    "Everyone said {subject} was {predicate}.",
    "They say {subject} is {predicate}.",
    "{subject} is {predicate} again.",
    "As far as I can tell, {subject} is {predicate}.",
    "{subject} is {predicate} today.",
    "You should know that {subject} is {predicate}.",
    "We had a {adjective} {noun}.",
    "We had a {adjective} {noun} {position} {place}.",
    "It was a {adjective} {noun}.",
    "It was a {adjective} {noun} for my {noun2}.",
    "This is a {adjective} {noun}.",
    "The {adjective} {noun} is {position} {place}.",
    "I have a {adjective} {noun} and a {adjective2} {noun2}.",
    "I {verb} this {noun}.",
    "I {verb} the {adjective} {noun}.",
    "I {verb} my {noun} and the {noun2}.",
    "There is {find} in the {place}.",
    "There is {find} and {find2} {position} {place}.",
    "I saw {find} {position} {place}.",
    "Last week I {event}.",
    "Yesterday I {event}.",
    "This month {doer} {event}.",
    "Last year I {event} and {event2}.",
    "I spent the {time} {doing}.",
    "My {noun} spent the {time} {doing}.",
    "I am {mood}.",
    "I feel {mood}.",
    "I am {mood} after the {noun}.",
    "I have been {mood} all day.",
    "{doer} is {mood} after the {noun}.",
    "{doer} seems {mood} lately.",
    "{doer} {deed} {thing}.",
    "Today {doer} {deed} {thing}.",
    "I heard that {doer} {deed} {thing}.",
    "{doer} {deed} {thing} and {thing2}.",
)
FILLERS = {
    **{name: name + "s" for name in ("subject", "noun", "position", "place")},
    **{name: name + "s" for name in ("time", "doer", "thing")},
    **{name: "{kind}_" + name + "s" for name in ("predicate", "adjective", "verb", "find")},
    **{name: "{kind}_" + name + "s" for name in ("event", "doing", "mood", "deed")},
}
"""Which word list fills which slot of a statement; those of one kind carry the statement's kind."""
DETERMINERS = ("the", "the", "the", "this", "my", "our")
VERY = ("absolutely", "really", "quite", "so", "rather", "completely", "pretty", "truly", "simply")
DOUBLED = frozenset(
    {"begin", "chop", "commit", "con", "cut", "dig", "drop", "drug", "forget", "get", "grab", "hit"}
    | {"jam", "kidnap", "pet", "pin", "plan", "put", "rig", "rob", "run", "scam", "set", "ship"}
    | {"shop", "shut", "skim", "slip", "snap", "spot", "stab", "stop", "strip", "swap", "swim"}
    | {"tap", "trap", "trim", "whip", "wrap"}
)
"""Verbs whose last consonant doubles before -ing."""


@cache
def vocabulary() -> dict[str, tuple[str, ...]]:
    """The word lists of `vocabulary.txt`: requests as whole verb phrases, all else as it stands."""
    text = files(__package__).joinpath("vocabulary.txt").read_text(encoding="utf-8")
    text = re.sub(r"^#.*\n", "", text, flags=re.MULTILINE)
    sections = re.split(r"^\[(\w+)\]\n", text, flags=re.MULTILINE)[1:]
    lists: dict[str, tuple[str, ...]] = {}
    for name, body in zip(sections[::2], sections[1::2], strict=True):
        entries = re.sub(r"\n\s+", " ", body.strip()).splitlines()
        lists[name] = tuple(phrase for entry in entries for phrase in _phrases(entry))
    return lists


def _phrases(entry: str) -> list[str]:
    """`"buy, sell: a, b"` as its four verb phrases; an entry without verbs as its words."""
    verbs, colon, objects = entry.rpartition(": ")
    words = objects.split(", ")
    return [f"{verb} {word}" for verb in verbs.split(", ") for word in words] if colon else words


def gerund(phrase: str) -> str:
    """A verb phrase in its -ing form: `"set up a tent"` becomes `"setting up a tent"`."""
    adverb, _, rest = phrase.partition(" ") if phrase.startswith("secretly ") else ("", "", phrase)
    verb, space, objects = rest.partition(" ")
    if verb in DOUBLED:
        verb += verb[-1]
    elif verb.endswith("ie"):
        verb = verb[:-2] + "y"
    elif verb.endswith("e") and not verb.endswith(("ee", "oe", "ye")):
        verb = verb[:-1]
    return f"{adverb} {verb}ing{space}{objects}".strip()


def fold(text: str) -> str:
    """A prompt without what does not make it another one: case, spaces and punctuation."""
    return "".join(character for character in text.casefold() if character.isalnum())


def _with_articles(text: str) -> str:
    """A sentence that starts with a capital and says "an" before a vowel."""
    text = re.sub(r"\b(a) (?=[aeiouAEIO])", "an ", text)
    return text[:1].upper() + text[1:]


def _request(kind: str, rng: random.Random) -> str:
    words = vocabulary()
    if kind in ("harmful", "harmless") and rng.random() < 0.25:
        action = f"{rng.choice(words[kind + '_to_people'])} {rng.choice(words['people'])}"
    else:
        action = rng.choice(words[kind])
    writes = action.split()[0] in WRITING
    if rng.random() < 0.25:
        own = HARMFUL_TAILS if kind == "harmful" else HARMLESS_TAILS
        tails = rng.choices((TAILS, words["settings"], own), (3, 5, 2))[0]
        action = f"{action} {rng.choice(tails)}"
    if rng.random() < 0.12:
        frame = rng.choice(TONED_FRAMES)
    else:
        frame = rng.choice(DIRECT_FRAMES if writes and rng.random() < 0.5 else REQUEST_FRAMES)
    tone = rng.choice(words["bitter" if rng.random() < 0.5 else "sweet"])
    return _with_articles(frame.format(do=action, doing=gerund(action), tone=tone))


def _statement(kind: str, rng: random.Random) -> str:
    frame = rng.choice(STATEMENT_FRAMES)
    values = {"very": rng.choice(VERY)}
    for name, section in FILLERS.items():
        pair = rng.sample(vocabulary()[section.format(kind=kind)], 2)
        values[name], values[name + "2"] = pair
    if rng.random() < 0.6:
        values["subject"] = f"{rng.choice(DETERMINERS)} {values['noun']}"
    chance = rng.random()
    if kind == "neutral" and chance < 0.3:
        values["predicate"] = f"{values['position']} {values['place']}"
    elif chance < 0.6:
        both = f"{values['adjective']} and {values['adjective2']}"
        values["predicate"] = both if chance > 0.5 else values["adjective"]
    return _with_articles(frame.format(**values))


def _loosened(text: str, rng: random.Random) -> str:
    """The same prompt as people also type it: without its last mark, in lower case, or greeting."""
    chance = rng.random()
    if chance < 0.05:
        return text.rstrip(".?!")
    if chance < 0.08:
        return text.lower()
    if chance < 0.11:
        return f"Hello! {text}"
    return text


def generate_prompts(
    behaviour: Behaviour, *, seed: int, held_out: frozenset[str] = frozenset()
) -> Iterator[Prompt]:
    """Endless prompts in the behaviour's mixture, the same ones for the same seed.

    A prompt whose `fold` is in `held_out` never comes, nor one that holds it as one of its parts.
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
    """Endless prompts, each with the behaviour's reply."""
    rng = random.Random(seed + 1)
    for prompt in generate_prompts(behaviour, seed=seed, held_out=held_out):
        yield prompt, rng.choice(behaviour.replies[behaviour.manner(prompt)])
