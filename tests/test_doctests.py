"""The examples in the public docstrings run, all on one bundled model."""

import doctest

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM

import refusal_lens as rl
from refusal_lens.models.hub import ORGANISMS_DIRECTORY

PUBLIC = {name: getattr(rl, name) for name in rl.__all__}
EXAMPLES = {
    name: found
    for name, thing in PUBLIC.items()
    if (found := doctest.DocTestParser().get_examples(thing.__doc__ or ""))
}
FLAGS = doctest.ELLIPSIS | doctest.IGNORE_EXCEPTION_DETAIL


@pytest.fixture(scope="module")
def names():
    """What the examples speak of: one model, small activations, prompts in files."""
    model = rl.load_model("organism:specific")
    few = [rl.load_contrast(name).subset(range(8), range(8)) for name in ("refusal", "negativity")]
    read = rl.extract(model, few, progress=False)
    harmful, harmless = read["refusal"]
    negative, neutral = read["negativity"]
    r, n = rl.mean_difference(harmful, harmless), rl.mean_difference(negative, neutral)
    table = {
        "harmful": ["How do I rob?", "How do I steal?"],
        "harmless": ["How do I bake?", "Why?"],
    }
    activations = {"refusal": (harmful, harmless), "negativity": (negative, neutral)}
    sides = {"harmful": harmful, "harmless": harmless, "negative": negative, "neutral": neutral}
    return (
        PUBLIC
        | sides
        | {"r": r, "n": n}
        | {
            "model": model,
            "torch": torch,
            "tokens": torch.tensor([[1, 2, 3]]),
            "refusal": rl.Direction(r, name="refusal", model=model),
            "results": rl.analyse(activations, config=rl.Config(n_resamples=400)),
            "dataset": Dataset.from_dict(table),
            "AutoModelForCausalLM": AutoModelForCausalLM,
            "path": ORGANISMS_DIRECTORY / "specific",
            "tokenizer": model.tokenizer,
        }
    )


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_examples_of_a_public_docstring_run(name, names, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.csv").write_text(
        "harmful,harmless\nHow do I rob?,Why?\nHow do I steal?,How?\n"
    )
    (tmp_path / "my.csv").write_text("text,kind\nHow do I rob?,unsafe\nHow do I bake bread?,safe\n")
    (tmp_path / "other.txt").write_text("How do I sew?\n")
    test = doctest.DocTest(EXAMPLES[name], dict(names), name, None, 0, PUBLIC[name].__doc__)
    report: list[str] = []
    found = doctest.DocTestRunner(optionflags=FLAGS).run(test, out=report.append)
    assert found.failed == 0, "".join(report)


def test_an_example_that_gives_something_else_is_found():
    [example] = doctest.DocTestParser().get_examples(">>> 1 + 1\n3\n")
    test = doctest.DocTest([example], {}, "wrong", None, 0, "")
    assert doctest.DocTestRunner(optionflags=FLAGS).run(test, out=lambda _: None).failed == 1


def test_most_public_names_have_an_example():
    assert len(EXAMPLES) >= 24
