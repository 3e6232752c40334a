"""What the words of the bundled prompts give away, beside the concept they contrast."""

import math
import re
from collections import Counter
from itertools import permutations
from pathlib import Path

import pytest

import refusal_lens.prompts.contrast
from refusal_lens.experiment.config import Config
from refusal_lens.prompts.contrast import BUNDLED, load_contrast

DATASHEET = Path(refusal_lens.prompts.contrast.__file__).parent / "data" / "README.md"
SHARED_ON_PURPOSE = [
    {"refusal", "alarm"},  # alarm has the vocabulary of harm
    {"negativity", "positivity"},  # both have neutral statements as their baseline
]


def words(prompt: str) -> set[str]:
    return set(re.findall(r"[a-z]+", prompt.lower()))


def told_apart(trained_on: str, asked: str) -> float:
    """Share of pairs whose target a bag of words names: naive Bayes, trained on another contrast."""
    known, pairs = load_contrast(trained_on), load_contrast(asked)
    target, baseline = (
        Counter(word for prompt in side for word in words(prompt))
        for side in (known.target, known.baseline)
    )

    def log_odds(prompt: str) -> float:
        return sum(math.log((target[w] + 1) / (baseline[w] + 1)) for w in sorted(words(prompt)))

    gaps = [log_odds(t) - log_odds(b) for t, b in zip(pairs.target, pairs.baseline, strict=True)]
    return sum((gap > 1e-9) + 0.5 * (abs(gap) <= 1e-9) for gap in gaps) / len(gaps)


@pytest.mark.parametrize(("trained_on", "asked"), [*permutations(BUNDLED, 2)])
def test_the_words_of_one_concept_do_not_tell_the_sides_of_another_apart(trained_on, asked):
    share = told_apart(trained_on, asked)
    if {trained_on, asked} in SHARED_ON_PURPOSE:
        assert share > 0.65  # the classifier sees shared words where they are
    else:
        assert abs(share - 0.5) < 0.1


def test_the_datasheet_tells_the_sides_and_what_words_alone_tell_of_each_contrast():
    cells = [re.split(r" *\| *", line)[1:-1] for line in DATASHEET.read_text("utf-8").splitlines()]
    rows = {row[0].strip("`"): row[1:] for row in cells if row}
    for name in BUNDLED:
        contrast = load_contrast(name)
        sides, pairs, _ = rows[f"{name}.csv"]
        assert sides.startswith(f"{contrast.target_name} / {contrast.baseline_name}")
        assert int(pairs) == len(contrast.target)
        assert rows[name] == [f"{told_apart(name, asked):.2f}" for asked in BUNDLED]


def valences(topics: tuple[str, ...]) -> Counter:
    return Counter(topic.split()[0] for topic in topics)


def test_arousal_is_as_often_negative_as_positive_in_every_frame_and_domain():
    arousal = load_contrast("arousal")
    by_frame = Counter((frame, topic.split()[0]) for topic, frame in arousal.clusters)
    by_domain = Counter(arousal.topics)
    cells = Counter((topic.split()[1], frame) for topic, frame in arousal.clusters)
    assert (len(by_frame), set(by_frame.values())) == (24, {4})
    assert (len(by_domain), set(by_domain.values())) == (16, {6})
    assert (len(cells), set(cells.values())) == (96, {1})


def test_arousal_stays_balanced_where_a_part_of_the_pairs_is_used():
    topics = load_contrast("arousal").topics
    assert valences(topics[3::4]) == {"negative": 12, "positive": 12}
    for most in range(2, 97):
        config = Config(max_prompts=most, controls=("arousal",))
        counts = valences(config.contrasts()["arousal"].topics)
        assert abs(counts["negative"] - counts["positive"]) <= 4, most
