"""The verdict on each wired model: every one has a property that must not mislead it."""

import pytest
from wired import WIRED, build, tokenizer

import refusal_lens as rl
from refusal_lens.experiment.wording import plain_sentence

VERDICTS = {
    "sympathy": ("distinct", "adding it brings 0 %"),
    "wrong_end": ("distinct", "adding it brings 0 %"),
    "saturated": ("distinct", "adding it brings 0 %"),
    "upstream": ("shared", "Refusal rests on what layer 0 holds of negativity"),
    # Ablating one direction leaves the refusal of both kinds; three remove more than half of it.
    "two_directions": ("inconclusive", "Refusal is 3 directions of layer 5 here"),
    # Any direction, added, makes a refusal likelier by nearly the gap; the interval is too wide.
    "weak": ("inconclusive", "adding it brings 0 %"),
}


@pytest.mark.parametrize("name", VERDICTS)
def test_a_property_that_misleads_a_simpler_rule_does_not_mislead_the_verdict(name):
    model = rl.from_hugging_face(build(name), tokenizer())
    results = rl.run_experiment(rl.Config(model=name), model=model, progress=False)
    answer, words = VERDICTS[name]
    assert results.verdict.answer == answer
    assert words in plain_sentence(results.verdict)
    assert answer in (WIRED[name].answer, "inconclusive")
