"""Contrasts: what the bundled prompts promise, and what happens to files of the user's."""

import csv
import hashlib
import importlib.util
import json
import re
import subprocess
import sys
from collections import Counter
from dataclasses import FrozenInstanceError, replace
from pathlib import Path
from statistics import mean
from unittest.mock import patch

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from llama3 import meta_tokenizer

import refusal_lens.prompts.contrast
from refusal_lens.errors import READERS, InputError
from refusal_lens.prompts.contrast import BUNDLED, Contrast, load_contrast
from refusal_lens.prompts.files import (
    contrast_from_dataset,
    contrast_from_file,
    contrast_from_prompts,
    load_prompts,
)

DATA = Path(refusal_lens.prompts.contrast.__file__).with_name("data")


def as_imported_outside_tests(module):
    """The module without the type checks of the test run, which come before its own checks."""
    spec = importlib.util.spec_from_file_location(f"{module.__name__}_unchecked", module.__file__)
    plain = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    with patch.dict(READERS):  # other tests read contrasts by the checked module
        spec.loader.exec_module(plain)
    return plain


UncheckedContrast = as_imported_outside_tests(refusal_lens.prompts.contrast).Contrast


def rows_of(name: str) -> list[dict[str, str]]:
    with open(DATA / f"{name}.csv", encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def length_gaps(contrast: Contrast) -> list[int]:
    """Tokens that each target prompt has more than its partner, in Llama-3's tokenizer."""

    def length(prompt: str) -> int:
        return len(meta_tokenizer().encode(prompt, bos=False, eos=False))

    pairs = zip(contrast.target, contrast.baseline, strict=True)
    return [length(target) - length(baseline) for target, baseline in pairs]


def lengths_match(contrast: Contrast) -> bool:
    gaps = length_gaps(contrast)
    return max(map(abs, gaps)) <= 2 and abs(mean(gaps)) <= 0.3


def fits_frame(prompt: str, frame: str) -> bool:
    return re.fullmatch(".+".join(map(re.escape, frame.split("..."))), prompt) is not None


def error_of(function, *arguments, **options) -> str:
    with pytest.raises(InputError) as caught:
        function(*arguments, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


# The bundled prompts


@pytest.mark.parametrize("name", BUNDLED)
def test_a_bundled_contrast_has_96_pairs_or_more_each_with_a_topic(name):
    contrast = load_contrast(name)
    assert contrast.name == name
    assert contrast.paired
    assert len(contrast.target) == len(contrast.baseline) == len(contrast.clusters) >= 96


def test_the_bundled_sides_are_named_by_what_they_are():
    assert [(c.target_name, c.baseline_name) for c in map(load_contrast, BUNDLED)] == [
        ("harmful", "harmless"),
        ("negative", "neutral"),
        ("positive", "neutral"),
        ("alarming", "calm"),
        ("agitated", "calm"),
        ("harmful_topic", "harmless_topic"),
        ("angry", "neutral"),
        ("fearful", "neutral"),
        ("sad", "neutral"),
        ("disgusted", "neutral"),
        ("joyful", "neutral"),
        ("unknowable", "knowable"),
        ("incapable", "capable"),
        ("polite", "blunt"),
        ("order", "question"),
        ("second_person", "third_person"),
    ]


def test_no_prompt_is_in_two_bundled_sets_whatever_its_case_and_spacing():
    contrasts = [load_contrast(name) for name in BUNDLED]
    prompts = [p for c in contrasts for p in (*c.target, *c.baseline)]
    counts = Counter(" ".join(prompt.lower().split()) for prompt in prompts)
    assert [prompt for prompt, count in counts.items() if count > 1] == []
    assert len(counts) == len(prompts) >= 2 * 96 * len(BUNDLED)


@pytest.mark.parametrize("name", BUNDLED)
def test_the_two_sides_are_equally_long_under_llama_3s_tokenizer(name):
    assert lengths_match(load_contrast(name))


def test_the_length_check_sees_a_longer_side():
    refusal = load_contrast("refusal")
    politer = tuple(prompt.replace(" a ", " a very ") for prompt in refusal.target)
    assert not lengths_match(Contrast("longer", politer, refusal.baseline))


@pytest.mark.parametrize("name", BUNDLED)
def test_both_prompts_of_a_pair_fit_the_pairs_frame(name):
    for row in rows_of(name):
        _, frame, target, baseline = row.values()
        assert fits_frame(target, frame), row
        assert fits_frame(baseline, frame), row


def test_the_frame_check_sees_another_frame():
    assert not fits_frame("How do I bake a cake?", "Explain how to ....")


@pytest.mark.parametrize("name", BUNDLED)
def test_topics_and_frames_are_many_and_well_mixed(name):
    rows = rows_of(name)
    topics, frames = (Counter(row[column] for row in rows) for column in ("topic", "frame"))
    assert min(len(topics), len(frames)) >= 8
    assert max(topics.values()) <= len(rows) / 6
    assert max(frames.values()) <= len(rows) / 6
    # No topic and frame go together: each combination occurs once at most, each topic in many.
    combinations = Counter((row["topic"], row["frame"]) for row in rows)
    assert max(combinations.values()) == 1
    assert min(topics.values()) >= 6


def test_a_control_uses_the_frames_of_the_contrast_that_it_controls():
    def frames(name):
        return Counter(row["frame"] for row in rows_of(name))

    assert frames("alarm") == frames("refusal")
    assert frames("positivity") == frames("negativity")
    assert not frames("refusal").keys() & frames("negativity").keys()


@pytest.mark.parametrize("name", BUNDLED)
def test_every_bundled_prompt_is_one_plain_sentence_or_two(name):
    contrast = load_contrast(name)
    for prompt in (*contrast.target, *contrast.baseline):
        assert re.fullmatch(r"[A-Z][A-Za-z',. ?-]*[a-z][.?]", prompt), prompt
        assert "  " not in prompt
        assert ".." not in prompt


def test_no_bundled_prompt_is_copied_from_a_published_set(reference):
    published = set()
    for path in (reference / "prompts").glob("*.json"):
        records = json.loads(path.read_text("utf-8"))
        published |= {record["instruction"].strip().lower() for record in records}
    with open(reference / "prompts" / "xstest_prompts.csv", encoding="utf-8", newline="") as file:
        published |= {row["prompt"].strip().lower() for row in csv.DictReader(file)}
    assert len(published) > 1000
    bundled = {p.lower() for c in map(load_contrast, BUNDLED) for p in (*c.target, *c.baseline)}
    assert not bundled & published


def test_an_unknown_name_is_answered_with_the_names_there_are():
    message = error_of(load_contrast, "negativty")
    assert "did you mean 'negativity'" in message
    assert all(name in message for name in BUNDLED)
    assert "did you mean" not in error_of(load_contrast, "quaternion")


# The class


def test_a_contrast_takes_any_iterables_and_keeps_tuples():
    sides = ["a", "b"], (prompt for prompt in "cd")
    contrast = UncheckedContrast("c", *sides, paired=True, clusters=["x", "y"])
    assert contrast.target == ("a", "b")
    assert contrast.baseline == ("c", "d")
    assert contrast.clusters == ("x", "y")


def test_clusters_given_as_lists_are_kept_as_tuples():
    sides = {"name": "c", "target": ["a", "b"], "baseline": ["x", "y"]}
    paired = UncheckedContrast(**sides, paired=True, clusters=[["p", "q"], ["p", "r"]])
    assert paired.clusters == (("p", "q"), ("p", "r"))
    assert hash(paired) == hash(replace(paired, clusters=(("p", "q"), ("p", "r"))))
    unpaired = UncheckedContrast(**sides, clusters=[["p", "q"], iter("pr")])
    assert unpaired.clusters == (("p", "q"), ("p", "r"))


def test_a_subset_keeps_clusters_with_their_prompts():
    sides = ("c", ("a", "b", "d"), ("x", "y", "z"), "bad", "good")
    paired = Contrast(*sides, True, ("p", "q", "r"), keep_duplicates=True)
    assert paired.subset([2, 0], [2, 0]) == Contrast(
        *("c", ("d", "a"), ("z", "x"), "bad", "good", True, ("r", "p")), True
    )
    unpaired = Contrast(*sides, clusters=(("p", "q", "r"), ("p", "p", "s")))
    assert unpaired.subset(range(2), iter([2])) == Contrast(
        "c", ("a", "b"), ("z",), "bad", "good", clusters=(("p", "q"), ("s",))
    )
    assert Contrast(*sides).subset([0], [0, 1]) == Contrast("c", ("a",), ("x", "y"), "bad", "good")
    assert "'c' is paired: give the rows of whole" in error_of(paired.subset, [0, 1], [0, 2])
    assert "target set is empty" in error_of(paired.subset, [], [])


def test_contrasts_are_equal_where_their_fields_are():
    first, second = (Contrast("c", ("a",), ("b",)) for _ in range(2))
    assert len({first, second, Contrast("c", ("a",), ("d",))}) == 2


def test_a_contrast_is_frozen():
    with pytest.raises(FrozenInstanceError):
        Contrast("c", ("a",), ("b",)).name = "d"


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"target": ()}, r"the target set is empty: give"),
        ({"baseline": []}, r"the baseline set is empty: give"),
        ({"target": ("a", "")}, r"target\[1\] is empty: write"),
        ({"baseline": ("x", " \n\t")}, r"baseline\[1\] is empty: write"),
        ({"target": ("a", "b", 3)}, r"target\[2\] is 3, int, not a string: write"),
        ({"target": ("a", None)}, r"target\[1\] is empty: write"),
        ({"target": ("a", b"b")}, r"target\[1\] is b'b', bytes, not a string"),
        ({"target": ("a", "b\ud800")}, r"target\[1\] holds half a surrogate pair"),
        ({"target": "a prompt"}, r'`target` is "a prompt": give a list'),
        ({"baseline": None}, r"`baseline` is None: give a list"),
        ({"target": ("a", "b", "a")}, r"target\[2\] repeats target\[0\]: drop"),
        ({"target": ("a  b", "c", " a b\n")}, r"target\[2\] repeats target\[0\]: drop"),
        ({"baseline": ("x", "y", "x")}, r"baseline\[2\] repeats baseline\[0\]"),
        ({"baseline": ("x", "b")}, r'baseline\[1\] repeats target\[1\]: drop .* "b" can'),
        (
            {"baseline": ("x", "y", "z"), "paired": True},
            r"baseline\[2\] has no partner \(2 target and 3 b",
        ),
        ({"baseline": ("x",), "paired": True}, r"target\[1\] has no partner \(2 target and 1 b"),
        ({"clusters": "ab"}, r'`clusters` is "ab": give a list'),
        ({"clusters": ("p", "q")}, r"`clusters` is one list: give two"),
        ({"clusters": (("p", "q"), 3)}, r"`clusters` is one list: give two"),
        ({"clusters": (("p", "q"),)}, r"`clusters` are not as many .* give two lists"),
        ({"clusters": (("p", "q"), ("r",))}, r"`clusters` are not as many .* give two lists"),
        ({"clusters": ("p",), "paired": True}, r"`clusters` are not as many .* a label a pair"),
        ({"clusters": ("p", " "), "paired": True}, r"clusters\[1\] is empty: write"),
        ({"clusters": ("p", None), "paired": True}, r"clusters\[1\] is empty"),
        ({"clusters": (("p", "q"), ("r", 2))}, r"clusters\[1\]\[1\] is 2, int, not a string"),
        ({"clusters": (["p", "q"], ["r", ["s", ""]])}, r"clusters\[1\]\[1\] is empty"),
        ({"clusters": ("p", ()), "paired": True}, r"clusters\[1\] is empty"),
        ({"clusters": ("p", ("p", "q")), "paired": True}, r"`clusters` differ in form: give every"),
        ({"clusters": (("p", "q"), (("r", "s"),) * 2)}, r"`clusters` differ in form: give every"),
        ({"name": " "}, r'`name` is "": give a name'),
        ({"target_name": 5}, r"`target_name` is 5: give a name"),
        ({"baseline_name": "target"}, r"both sides are named 'target'"),
    ],
)
def test_a_contrast_that_cannot_be_one_is_refused_with_the_row_and_what_to_do(fields, expected):
    good = {"name": "c", "target": ("a", "b"), "baseline": ("x", "y")}
    assert UncheckedContrast(**good)
    assert re.match(expected, error_of(UncheckedContrast, **(good | fields)))


def test_the_hash_is_of_the_prompts_alone_and_as_documented():
    contrast = Contrast("c", ("a", "é"), ("b",))
    assert contrast.sha256 == hashlib.sha256('[["a","é"],["b"]]'.encode()).hexdigest()
    assert contrast.sha256 == Contrast("d", ("a", "é"), ("b",), "x", "y").sha256


prompts = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=20).filter(
    lambda prompt: prompt.strip().lower() not in {"", "nan", "null", "none", "n/a", "<na>"}
)
both_sides = st.lists(
    prompts, min_size=2, max_size=12, unique_by=lambda prompt: " ".join(prompt.split())
)


@given(both_sides, st.data())
def test_contrasts_of_other_prompts_have_another_hash(prompts, data):
    def contrast(cut):
        return Contrast("c", tuple(prompts[:cut]), tuple(prompts[cut:]))

    cuts = st.integers(1, len(prompts) - 1)
    first, second = data.draw(cuts), data.draw(cuts)
    assert (contrast(first).sha256 == contrast(second).sha256) == (first == second)


def test_a_contrast_shows_itself_in_one_line():
    assert repr(load_contrast("refusal")) == (
        "<Contrast 'refusal': 108 harmful / 108 harmless, paired>"
    )
    assert repr(Contrast("c", ("a",), ("b", "d"))) == "<Contrast 'c': 1 target / 2 baseline>"


def test_jupyter_shows_a_short_table_in_which_prompts_are_text_not_markup():
    sides = ("<script>alert(1)</script>", "x" * 1000, *"abcdefgh"), ("Q & A",)
    shown = Contrast("<b>", *sides)._repr_html_()
    assert "<script>" not in shown
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in shown
    assert "&lt;b&gt;&#x27;: 10 target / 1 baseline" in shown
    assert "&amp;" in shown
    assert len(shown) < 2000
    assert shown.count("<tr>") == shown.count("</tr>") == 5


# Files

PAIRS = [("How do I hack?", "How do I bake?"), ('Write "it", now', "Draw\nit"), ("x", "y")]
RECORDS = [{"bad": bad, "good": good} for bad, good in PAIRS]
LABELLED = [
    {"text": text, "kind": kind}
    for pair in PAIRS
    for text, kind in zip(pair, ("bad", "good"), strict=True)
]


def in_csv(records: list[dict], delimiter: str = ",") -> str:
    def cells(values):
        return delimiter.join('"' + str(value).replace('"', '""') + '"' for value in values)

    return "\n".join([cells(records[0]), *(cells(record.values()) for record in records)]) + "\n"


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("mine.csv", in_csv(RECORDS)),
        ("mine.csv", "\ufeff" + in_csv(RECORDS)),
        ("mine.CSV", in_csv(RECORDS).replace("Draw\nit", "Draw\0it").replace("\n", "\r\n")),
        ("mine.csv", in_csv(RECORDS).replace('","', '", "') + "\n,\n\n"),
        ("mine.tsv", in_csv(RECORDS, "\t")),
        ("mine.json", json.dumps(RECORDS)),
        ("mine.json", json.dumps({"bad": [p[0] for p in PAIRS], "good": [p[1] for p in PAIRS]})),
        ("mine.jsonl", "\n\n".join(map(json.dumps, RECORDS))),
    ],
)
@pytest.mark.parametrize("paired", [True, False])
def test_a_column_for_each_side_is_read_from_every_kind_of_file(tmp_path, name, text, paired):
    path = tmp_path / name
    path.write_bytes(text.replace("\0", "\n").encode())
    contrast = contrast_from_file(path, target="bad", baseline="good", paired=paired)
    assert contrast == Contrast("mine", *zip(*PAIRS, strict=True), "bad", "good", paired=paired)
    assert contrast_from_file(str(path), target="good", baseline="bad").target[0] == PAIRS[0][1]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("mine.csv", in_csv([*LABELLED, {"text": "z", "kind": "other"}])),
        ("mine.json", json.dumps([{"text": "z", "kind": None}, *LABELLED])),
        ("mine.jsonl", "\n".join(map(json.dumps, LABELLED))),
    ],
)
def test_prompts_and_labels_are_read_from_two_columns(tmp_path, name, text):
    path = tmp_path / name
    path.write_text(text, "utf-8")
    options = {"prompt": "text", "label": "kind", "target": "bad", "baseline": "good"}
    contrast = contrast_from_file(path, **options, name="m")
    assert contrast == Contrast("m", *zip(*PAIRS, strict=True), "bad", "good")


def test_a_label_may_be_a_number_or_a_truth_value(tmp_path):
    path = tmp_path / "mine.json"
    records = [{"p": "a", "n": 1, "t": True}, {"p": "b", "n": 0, "t": False}]
    path.write_text(json.dumps(records))
    by_number = contrast_from_file(path, prompt="p", label="n", target="1", baseline="0")
    by_truth = contrast_from_file(path, prompt="p", label="t", target="true", baseline="false")
    assert (by_number.target, by_number.baseline) == (("a",), ("b",))
    assert by_number.sha256 == by_truth.sha256


def test_one_column_may_end_early_where_the_contrast_is_not_paired(tmp_path):
    path = tmp_path / "mine.csv"
    path.write_text("bad,good\na,x\nb\nc,\n")
    contrast = contrast_from_file(path, target="bad", baseline="good")
    assert (contrast.target, contrast.baseline) == (("a", "b", "c"), ("x",))
    message = error_of(contrast_from_file, path, target="bad", baseline="good", paired=True)
    assert message.startswith("'good' in row 2 of mine.csv is empty")


def test_a_published_set_with_labels_is_read(reference):
    path = reference / "prompts" / "xstest_prompts.csv"
    options = {"prompt": "prompt", "label": "label"}
    contrast = contrast_from_file(path, target="unsafe", baseline="safe", **options)
    assert (len(contrast.target), len(contrast.baseline)) == (200, 250)
    assert contrast.name == "xstest_prompts"
    assert contrast.baseline[0] == "How can I kill a Python process?"
    message = error_of(contrast_from_file, path, target="harmful", baseline="safe", **options)
    assert message.endswith(
        """no row whose 'label' is 'harmful': its labels are "safe", "unsafe\""""
    )


def test_a_published_set_against_itself_is_refused_with_both_rows(reference):
    path = reference / "prompts" / "arditi_split_harmful_val.json"
    prompts = load_prompts(f"{path}:instruction")
    assert len(prompts) == 39
    again = error_of(contrast_from_prompts, f"{path}:instruction", f"{path}:instruction")
    assert re.match(r"'instruction' in row 1 of .* repeats 'instruction' in row 1 of", again)


def broken_csv(text: str | bytes, expected: str, **options):
    return pytest.param("mine.csv", text, options, expected, id=expected[:40])


def broken_json(text: str | bytes, expected: str, suffix: str = "json", **options):
    return pytest.param(f"mine.{suffix}", text, options, expected, id=expected[:40])


LABELS = {"prompt": "p", "label": "k"}


@pytest.mark.parametrize(
    ("name", "text", "options", "expected"),
    [
        broken_csv("", r".*mine\.csv can\'t be read: it is empty"),
        broken_csv("\ufeff \n\n", r".*mine\.csv can\'t be read: it is empty"),
        broken_csv("bad,good\n", r".*mine\.csv .* it has a header but no rows"),
        broken_csv("bad,good\n,\n \n", r".*mine\.csv .* it has a header but no rows"),
        broken_csv(
            "Bad,food,x\na,b,c\n", r"mine\.csv has no column 'bad': .*\"Bad\", \"food\", \"x\""
        ),
        broken_csv("bad,food\na,b\n", r"mine\.csv has no column 'good': did you mean 'food'\?"),
        broken_csv("bad,good,bad\na,b,c\n", r".*mine\.csv .* two columns named 'bad'; rename"),
        broken_csv("bad,good\na,b,c\n", r".*mine\.csv .* Expected 2 fields in line 2, saw 3"),
        broken_csv('bad,good\na,x\nb,"y\nc,z\n', r".*mine\.csv .* row 2; is a quotation mark"),
        broken_csv('bad,good\n"a\nb",x\n\n,y\nc,z', r"'bad' in row 2 of mine\.csv is empty"),
        broken_csv("bad,good\na,x\nNaN,y\nb,z", r"'bad' in row 2 of mine\.csv is empty"),
        broken_csv("bad,good\nx,x", r"'good' in row 1 of mine\.csv repeats 'bad' in row 1 of"),
        broken_csv(
            b"bad,good\na,\x81\n", r".*mine\.csv .* neither UTF-8 nor cp1252 text .* byte 0x81"
        ),
        broken_csv(b"\xff\xfea", r".*mine\.csv .* neither UTF-8 nor UTF-16 text .* truncated data"),
        broken_csv("p,k\na,1\nb,0\n", r"`prompt` and `label` go together", prompt="p"),
        broken_csv("p,k\na,1\nb,0\n", r".*no row whose 'k' is 'bad': .*\"0\", \"1\"", **LABELS),
        broken_csv("p,k\na,bad\n,good\n", r"'p' in row 2 of mine\.csv is empty", **LABELS),
        broken_csv("bad,good\na,b\n", r"`target` and `baseline` are both 'bad'", baseline="bad"),
        broken_json("", r".*mine\.json .* it is empty"),
        broken_json("[]", r".*mine\.json .* it holds \[\]; give a list"),
        broken_json("3", r".*mine\.json .* it holds 3; give a list"),
        broken_json(
            '[{"bad": "a",\n "good" "x"}]',
            r".*mine\.json .* Expecting ':' .* line 2 column 9",
        ),
        broken_json("[" * 100_000, r".*mine\.json .* maximum recursion depth"),
        broken_json(
            '{"bad": "a", "good": ["x"]}',
            r"mine\.json has no column 'bad': its columns are \"good\"",
        ),
        broken_json(
            '{"bad": ["a"], "bad": ["x"]}', r".*mine\.json .* it has two columns named 'bad'"
        ),
        broken_json('{"bad": [], "good": ["x"]}', r"the bad set is empty"),
        broken_json('["a", "b"]', r"mine\.json has no column 'bad': its columns are \"prompt\""),
        broken_json('[{"bad": "a"}, "b"]', r".*mine\.json .* record 2 is \"b\"; make it a record"),
        broken_json(
            '["a", {"bad": "a"}]', r".*mine\.json .* record 2 is {'bad': 'a'}; make it a string"
        ),
        broken_json(
            '[{"bad": "a", "good": 7}]', r"'good' in row 1 of mine\.json is 7, int, not a string"
        ),
        broken_json(
            '[{"bad": NaN, "good": "x"}, {"bad": "a", "good": "y"}]',
            r"'bad' in row 1 of mine\.json is empty",
        ),
        broken_json(
            '[{"bad": "a", "good": "x"}, {"good": "y"}, {"bad": "b", "good": null}]',
            r"'bad' in row 2 of mine\.json is empty",
        ),
        broken_json(
            '[{"bad": "\\ud800", "good": "x"}]', r"'bad' in row 1 of mine\.json holds half"
        ),
        broken_json(
            '{"p": ["a", "b"], "k": ["bad"]}', r"mine\.json has 2 prompts and 1 in 'k'", **LABELS
        ),
        broken_json(
            '{"bad": "a", "good": "x"}\n\n{"bad": "b"\n',
            r".*mine\.jsonl .* line 3: Expecting .* column 12",
            suffix="jsonl",
        ),
        broken_json(
            '{"bad": "a", "good": "x"}\n\n{"bad": 1, "good": "y"}',
            r"'bad' in line 3 of mine\.jsonl is 1, int",
            suffix="jsonl",
        ),
        broken_json("a\nb", r".*mine\.xlsx .* save it as a \.csv, \.tsv", suffix="xlsx"),
    ],
)
def test_a_file_that_is_no_contrast_is_refused_with_the_place(
    tmp_path, name, text, options, expected
):
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    message = error_of(
        contrast_from_file, path, **({"target": "bad", "baseline": "good"} | options)
    )
    assert re.match(expected, message), message


def test_a_file_that_cannot_be_opened_is_named(tmp_path):
    sides = {"target": "bad", "baseline": "good"}
    assert "no.csv can't be read" in error_of(contrast_from_file, tmp_path / "no.csv", **sides)
    assert "neither a `Dataset` directory" in error_of(contrast_from_file, tmp_path, **sides)
    assert "can't be read" in error_of(contrast_from_file, "a\0b.csv", **sides)


def test_a_listing_of_columns_ends_after_a_dozen(tmp_path):
    path = tmp_path / "wide.json"
    path.write_text(json.dumps({f"c{number}": ["a"] for number in range(1000)}))
    message = error_of(contrast_from_file, path, target="bad", baseline="good")
    assert message.endswith('"c11", and 988 more')


@settings(deadline=None)  # the first file imports pandas
@given(both_sides, st.data())
def test_what_is_written_to_a_file_is_what_is_read(tmp_path_factory, prompts, data):
    cut = data.draw(st.integers(1, len(prompts) - 1))
    sides = tuple(prompts[:cut]), tuple(prompts[cut:])
    written = Contrast("mine", *sides, "bad", "good")
    folder = tmp_path_factory.mktemp("files")
    records = [
        {"text": prompt, "kind": kind}
        for kind, side in zip(("bad", "good"), sides, strict=True)
        for prompt in side
    ]
    (folder / "mine.csv").write_bytes(in_csv(records).encode())
    (folder / "mine.json").write_text(json.dumps({"bad": sides[0], "good": sides[1]}), "utf-8")
    lines = [json.dumps(record, ensure_ascii=False) for record in records]
    (folder / "mine.jsonl").write_bytes("\n".join(lines).encode())
    options = {"target": "bad", "baseline": "good"}
    labels = {"prompt": "text", "label": "kind"}
    assert contrast_from_file(folder / "mine.csv", **options, **labels) == written
    assert contrast_from_file(folder / "mine.json", **options) == written
    assert contrast_from_file(folder / "mine.jsonl", **options, **labels) == written


# Prompts of one column


@pytest.mark.parametrize(
    ("name", "text", "column"),
    [
        ("mine.csv", "bad,good\na,x\nb b,y\n", ":bad"),
        ("mine.csv", "bad\na\nb b\n", ""),
        ("mine.csv", "bad,\na,1\nb b,2\n", ""),
        ("mine.json", '["a", "b b"]', ""),
        ("mine.json", '{"bad": ["a", "b b"], "good": ["x"]}', ":bad"),
        ("mine.jsonl", '"a"\n"b b"\n', ""),
        ("mine.txt", "a\n\nb b", ""),
        ("mine.txt", "\ufeffa\r\nb b\r\n", ":prompt"),
        ("it: mine.txt", "a\nb b", ""),
        ("it: mine.csv", "good,in/out\nx,a\ny,b b", ":in/out"),
    ],
)
def test_prompts_are_loaded_by_file_and_column(tmp_path, name, text, column):
    (tmp_path / name).write_bytes(text.encode())
    assert load_prompts(f"{tmp_path / name}{column}") == ("a", "b b")


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("mine.csv", r"mine\.csv has several columns, \"bad\", \"good\": .* as in mine\.csv:bad"),
        ("mine.csv:ugly", r"mine\.csv has no column 'ugly': its columns are \"bad\", \"good\""),
        ("mine.csv:", r"mine\.csv has no column ''"),
        ("none.csv:bad", r"none\.csv can't be read: No such file"),
        (r"C:\none.csv", r"C:.none\.csv can't be read"),
        ("https://none.org/a.csv", r"https://none\.org/a\.csv can't be read"),
    ],
)
def test_a_source_without_prompts_is_refused(tmp_path, monkeypatch, source, expected):
    (tmp_path / "mine.csv").write_text("bad,good\na,x\nb,x\n")
    monkeypatch.chdir(tmp_path)
    message = error_of(load_prompts, source)
    assert re.match(expected, message), message


def test_two_sources_make_a_contrast_named_after_columns_and_file(tmp_path):
    mine, other = tmp_path / "mine.csv", tmp_path / "other.csv"
    mine.write_text("bad,good\na,x\nb,y\n")
    other.write_text("bad\nb\na\n")
    contrast = contrast_from_prompts(f"{mine}:bad", f"{mine}:good", paired=True)
    assert contrast == contrast_from_file(mine, target="bad", baseline="good", paired=True)
    message = error_of(contrast_from_prompts, f"{mine}:bad", other)
    assert message.startswith(
        "'bad' in row 1 of other.csv repeats 'bad' in row 2 of mine.csv: drop one"
    )
    other.write_text("bad\nx\n")
    contrast = contrast_from_prompts(f"{mine}:bad", other, name="c")
    assert contrast == Contrast("c", ("a", "b"), ("x",))


# Datasets

datasets = pytest.importorskip("datasets")


def test_a_dataset_gives_what_the_same_file_gives():
    dataset = datasets.Dataset.from_list(RECORDS)
    contrast = contrast_from_dataset(dataset, target="bad", baseline="good", name="mine")
    assert contrast == Contrast("mine", *zip(*PAIRS, strict=True), "bad", "good")


def test_a_dataset_with_class_labels_is_asked_for_them_by_name():
    features = datasets.Features(
        {"text": datasets.Value("string"), "kind": datasets.ClassLabel(names=["good", "bad"])}
    )
    dataset = datasets.Dataset.from_list(LABELLED, features=features)
    options = {"prompt": "text", "label": "kind", "name": "mine"}
    contrast = contrast_from_dataset(dataset, target="bad", baseline="good", **options)
    assert contrast == Contrast("mine", *zip(*PAIRS, strict=True), "bad", "good")
    message = error_of(contrast_from_dataset, dataset, target="evil", baseline="good", **options)
    assert message.endswith('its labels are "bad", "good"')


def test_a_dataset_on_disk_is_loaded_by_its_name(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "train.csv").write_text(in_csv(RECORDS))
    contrast = contrast_from_dataset(str(folder), target="bad", baseline="good")
    assert contrast.target == tuple(bad for bad, _ in PAIRS)
    assert contrast.name == str(folder)


def test_a_split_is_needed_where_there_are_several():
    halves = {half: datasets.Dataset.from_list(RECORDS) for half in ("train", "test")}
    several = datasets.DatasetDict(halves)
    sides = {"target": "bad", "baseline": "good"}
    assert contrast_from_dataset(several, split="test", **sides).target_name == "bad"
    assert contrast_from_dataset(datasets.DatasetDict(train=halves["train"]), **sides)
    assert 'choose one of "train", "test"' in error_of(contrast_from_dataset, several, **sides)
    message = error_of(contrast_from_dataset, several, split="dev", **sides)
    advice = 'choose one of "train", "test", or several joined by +'
    assert message == f"dataset has no split 'dev': {advice}"


def test_a_datasets_rows_are_counted_as_the_dataset_counts_them():
    dataset = datasets.Dataset.from_dict(
        {"bad": ["a", "b", None, "c"], "good": ["w", "x", "y", "z"]}
    )
    message = error_of(contrast_from_dataset, dataset, target="bad", baseline="good")
    assert message.startswith("'bad' in row 2 of dataset is empty")
    assert dataset[2]["bad"] is None


def test_what_is_no_dataset_is_refused():
    sides = {"target": "bad", "baseline": "good"}
    assert "is no Hugging Face dataset" in error_of(contrast_from_dataset, RECORDS, **sides)
    dataset = datasets.Dataset.from_list(RECORDS)
    message = error_of(contrast_from_dataset, dataset, target="worse", baseline="good")
    assert message == 'dataset has no column \'worse\': its columns are "bad", "good"'


def test_a_dataset_that_cannot_be_loaded_is_named(tmp_path):
    nowhere = str(tmp_path / "nowhere" / "at" / "all")
    message = error_of(contrast_from_dataset, nowhere, target="bad", baseline="good")
    assert message.startswith(f"the dataset {nowhere!r} can't be loaded (")


def test_a_saved_dataset_and_a_parquet_file_give_what_the_dataset_gives(tmp_path):
    dataset = datasets.Dataset.from_list(RECORDS)
    dataset.save_to_disk(tmp_path / "saved")
    dataset.to_parquet(tmp_path / "saved.parquet")
    sides = {"target": "bad", "baseline": "good"}
    expected = contrast_from_dataset(dataset, name="saved", **sides)
    assert contrast_from_file(tmp_path / "saved", **sides) == expected
    assert contrast_from_file(tmp_path / "saved.parquet", **sides) == expected
    assert load_prompts(f"{tmp_path / 'saved'}:bad") == expected.target
    datasets.DatasetDict(train=dataset, test=dataset).save_to_disk(tmp_path / "two")
    assert 'one of "train", "test"' in error_of(contrast_from_file, tmp_path / "two", **sides)
    (tmp_path / "bad.parquet").write_bytes(b"PAR1")
    message = error_of(contrast_from_file, tmp_path / "bad.parquet", **sides)
    assert "bad.parquet can't be read" in message


def test_text_that_looks_like_a_number_or_a_missing_value_stays_text(tmp_path):
    path = tmp_path / "mine.csv"
    path.write_text("bad,good\nNA,1e5\n007,TRUE\n")
    contrast = contrast_from_file(path, target="bad", baseline="good")
    assert (contrast.target, contrast.baseline) == (("NA", "007"), ("1e5", "TRUE"))
    records = [{"bad": "x", "good": "y", "n": 1}, {"bad": "z", "good": "w", "n": None}]
    datasets.Dataset.from_list(records).to_parquet(tmp_path / "mine.parquet")
    options = {"prompt": "bad", "label": "n", "target": "1", "baseline": "null"}
    assert contrast_from_file(tmp_path / "mine.parquet", **options).target == ("x",)


def test_bundled_contrasts_are_loaded_without_torch_pandas_and_datasets():
    code = (
        "import sys, refusal_lens.prompts.contrast as c; c.load_contrast('refusal');"
        "print({'torch', 'datasets', 'pandas', 'transformers'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
