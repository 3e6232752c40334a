"""The examples in the public docstrings run, all on one bundled model."""

import doctest
import inspect
import re

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM

import refusal_lens as rl
from refusal_lens.models.forward import effective_unembedding
from refusal_lens.models.hub import ORGANISMS_DIRECTORY

PUBLIC = {name: getattr(rl, name) for name in rl.__all__}


def examples(docstring: str | None) -> list[doctest.Example]:
    return doctest.DocTestParser().get_examples(docstring or "")


def public_methods(kind: type) -> dict[str, object]:
    """The methods and properties that a class defines itself under a public name."""
    found = {
        name: getattr(each, "fget", getattr(each, "__func__", each))
        for name, each in vars(kind).items()
    }
    return {
        f"{kind.__name__}.{name}": each
        for name, each in found.items()
        if inspect.isfunction(each) and not name.startswith("_")
    }


DOCUMENTED = PUBLIC | {
    name: method
    for thing in PUBLIC.values()
    if isinstance(thing, type)
    for name, method in public_methods(thing).items()
}
EXAMPLES = {name: found for name, x in DOCUMENTED.items() if (found := examples(x.__doc__))}


def without_example(documented: dict[str, object]) -> list[str]:
    """The names without an example of their own; a class's examples may show its methods too."""
    source = {
        name: "".join(e.source for e in examples(x.__doc__)) for name, x in documented.items()
    }
    return [
        name
        for name, own in source.items()
        if not own and not re.search(rf"\.{name.partition('.')[2]}\b", source[name.split(".")[0]])
    ]


FLAGS = doctest.ELLIPSIS | doctest.IGNORE_EXCEPTION_DETAIL


@pytest.fixture(scope="module")
def names():
    """What the examples speak of: one model, small activations, prompts in files."""
    model = rl.load_model("organism:specific")
    both = [rl.load_contrast(name).subset(range(8), range(8)) for name in ("refusal", "negativity")]
    read = rl.extract(model, both, progress=False)
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
            "contrast": both[0],
            "selection": rl.select_direction(model, both[0], progress=False),
            "sensitivity": rl.run_sensitivity(
                *(model, tuple(both)), n_resamples=400, causal_prompts=0, progress=False
            ),
            "contrasts": tuple(both),
            "effective_unembedding": effective_unembedding,
            "tokens": torch.tensor([[1, 2, 3]]),
            "refusal": rl.Direction(r, name="refusal", model=model),
            "results": rl.analyse(activations, config=rl.Config(n_resamples=400)),
            "atlas": rl.compare_concepts(
                model, ["joy"], max_prompts=8, interventions=False, progress=False
            ),
            "dataset": Dataset.from_dict(table),
            "AutoModelForCausalLM": AutoModelForCausalLM,
            "path": ORGANISMS_DIRECTORY / "specific",
            "tokenizer": model.tokenizer,
        }
    )


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_examples_of_a_public_docstring_run(name, names, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for shows in ("display", "clear_output"):  # of the panel; there is no notebook here
        monkeypatch.setattr(f"ipywidgets.widgets.interaction.{shows}", lambda *_, **__: None)
    (tmp_path / "mine.csv").write_text(
        "harmful,harmless\nHow do I rob?,Why?\nHow do I steal?,How?\n"
    )
    (tmp_path / "my.csv").write_text("text,kind\nHow do I rob?,unsafe\nHow do I bake bread?,safe\n")
    (tmp_path / "other.txt").write_text("How do I sew?\n")
    test = doctest.DocTest(EXAMPLES[name], dict(names), name, None, 0, DOCUMENTED[name].__doc__)
    report: list[str] = []
    found = doctest.DocTestRunner(optionflags=FLAGS).run(test, out=report.append)
    assert found.failed == 0, "".join(report)


def test_an_example_that_gives_something_else_is_found():
    [example] = doctest.DocTestParser().get_examples(">>> 1 + 1\n3\n")
    test = doctest.DocTest([example], {}, "wrong", None, 0, "")
    assert doctest.DocTestRunner(optionflags=FLAGS).run(test, out=lambda _: None).failed == 1


def test_every_public_name_and_method_has_an_example():
    assert without_example(DOCUMENTED) == []
    assert len(EXAMPLES) > 60


def test_a_name_or_a_method_without_an_example_is_found():
    class Bare:
        """Says nothing.

        >>> Bare().shown()
        """

        def shown(self):
            """Nothing."""

        def hidden(self):
            """Nothing."""

    found = {"Bare": Bare, "bare": lambda: None} | public_methods(Bare)
    assert without_example(found) == ["bare", "Bare.hidden"]
