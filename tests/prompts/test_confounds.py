"""What the words of the bundled prompts give away, beside the concept they contrast."""

import math
import re
from collections import Counter
from functools import cache
from itertools import permutations
from pathlib import Path

import pytest

import refusal_lens.prompts.contrast
from refusal_lens.experiment.config import Config
from refusal_lens.prompts.contrast import BUNDLED, load_contrast

DATASHEET = Path(refusal_lens.prompts.contrast.__file__).parent / "data" / "README.md"
HARM = {"refusal", "alarm", "harmfulness"}  # the vocabulary of harm, on one side or on both
# All have plain statements as their baseline, and a valence; the negative ones share theirs.
FEELING = {"negativity", "positivity", "anger", "fear", "sadness", "disgust", "joy"}


def words(prompt: str) -> set[str]:
    return set(re.findall(r"[a-z]+(?:[-'][a-z]+)*", prompt.lower()))


@cache
def told_apart(trained_on: str, asked: str) -> float:
    """AUROC of naive Bayes on words, trained on one contrast's sides and asked for another's."""
    known, others = load_contrast(trained_on), load_contrast(asked)
    target, baseline = (
        Counter(word for prompt in side for word in words(prompt))
        for side in (known.target, known.baseline)
    )

    def log_odds(prompt: str) -> float:
        odds = (math.log((target[w] + 1) / (baseline[w] + 1)) for w in sorted(words(prompt)))
        return round(sum(odds), 9)

    scores = [[log_odds(prompt) for prompt in side] for side in (others.target, others.baseline)]
    wins = sum((one > other) + 0.5 * (one == other) for one in scores[0] for other in scores[1])
    return wins / len(scores[0]) / len(scores[1])


@pytest.mark.parametrize("trained_on", BUNDLED)
def test_the_words_of_one_concept_do_not_tell_the_sides_of_another_apart(trained_on):
    unlike = [
        asked
        for asked in BUNDLED
        if not any({trained_on, asked} <= family for family in (HARM, FEELING, {asked}))
    ]
    areas = {asked: told_apart(trained_on, asked) for asked in unlike}
    assert {asked: area for asked, area in areas.items() if abs(area - 0.5) >= 0.1} == {}


@pytest.mark.parametrize("family", [HARM, FEELING], ids=["harm", "feeling"])
def test_concepts_that_share_words_on_purpose_are_told_apart_by_far_less_than_their_own(family):
    assert all(0.5 < told_apart(*pair) < 0.75 for pair in permutations(family, 2))
    assert all(told_apart(name, name) > 0.95 for name in family)


def test_the_classifier_sees_shared_words_where_they_are():
    assert told_apart("refusal", "alarm") > 0.7
    assert told_apart("negativity", "positivity") > 0.7


@pytest.mark.parametrize("name", BUNDLED[BUNDLED.index("harmfulness") :])
def test_each_topic_of_a_concept_fills_each_of_its_frames_once(name):
    cells = Counter(load_contrast(name).clusters)
    topics, frames = ({label[way] for label in cells} for way in (0, 1))
    assert (len(topics), len(frames), len(cells)) == (8, 12, 96)
    assert {topic for topic, _ in load_contrast(name).clusters[::4]} == topics


def test_the_datasheet_tells_the_sides_and_what_words_alone_tell_of_each_contrast():
    cells = [re.split(r" *\| *", line)[1:-1] for line in DATASHEET.read_text("utf-8").splitlines()]
    rows = {row[0].strip("`"): row[1:] for row in cells if row}
    for name in BUNDLED:
        contrast = load_contrast(name)
        sides, pairs, _ = rows[f"{name}.csv"]
        assert sides.startswith(f"{contrast.target_name} / {contrast.baseline_name}")
        assert int(pairs) == len(contrast.target)
        assert rows[name] == [f"{told_apart(name, asked):.2f}" for asked in BUNDLED]


def valences(clusters: tuple[tuple[str, str], ...]) -> Counter:
    return Counter(topic.split()[0] for topic, _ in clusters)


def test_arousal_is_as_often_negative_as_positive_in_every_frame_and_domain():
    arousal = load_contrast("arousal")
    by_frame = Counter((frame, topic.split()[0]) for topic, frame in arousal.clusters)
    by_domain = Counter(topic for topic, _ in arousal.clusters)
    cells = Counter((topic.split()[1], frame) for topic, frame in arousal.clusters)
    assert (len(by_frame), set(by_frame.values())) == (24, {4})
    assert (len(by_domain), set(by_domain.values())) == (16, {6})
    assert (len(cells), set(cells.values())) == (96, {1})


def test_arousal_stays_balanced_where_a_part_of_the_pairs_is_used():
    clusters = load_contrast("arousal").clusters
    assert valences(clusters[3::4]) == {"negative": 12, "positive": 12}
    for most in range(2, 97):
        config = Config(max_prompts=most, controls=("arousal",))
        counts = valences(config.contrasts()["arousal"].clusters)
        assert abs(counts["negative"] - counts["positive"]) <= 4, most
