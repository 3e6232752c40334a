"""Files as people have them: other separators, encodings, splits, labels, nests and repeats."""

import json
import logging

import datasets
import pytest

import refusal_lens as rl
from refusal_lens.prompts.contrast import Contrast
from refusal_lens.prompts.files import (
    contrast_from_dataset,
    contrast_from_file,
    contrast_from_prompts,
    load_prompts,
)

SIDES = {"target": "bad", "baseline": "good"}
ROWS = "bad,good\nCafé?,x\nb; c,y\n"
EXPECTED = Contrast("mine", ("Café?", "b; c"), ("x", "y"), "bad", "good")


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("mine.csv", ROWS.encode(), None),
        ("mine.csv", 'bad;good\nCafé?;x\n"b; c";y\n'.encode(), None),
        ("mine.csv", "bad\tgood\nCafé?\tx\nb; c\ty\n".encode(), None),
        ("mine.tsv", ROWS.encode(), None),
        ("mine.csv", '"bad";"good";"a,b"\nCafé?;x;1\n"b; c";y;2\n'.encode(), None),
        ("mine.csv", ROWS.encode("utf-16"), "read as UTF-16:"),
        ("mine.csv", ROWS.encode("utf-16-le"), "read as UTF-16-LE:"),
        ("mine.csv", ROWS.encode("utf-16-be"), "read as UTF-16-BE:"),
        ("mine.csv", ROWS.encode("cp1252"), "mine.csv is not UTF-8, read as cp1252:"),
        ("mine.json", json.dumps({"v": 1, "bad": ["Café?", "b; c"], "good": ["x", "y"]}), None),
    ],
)
def test_a_file_is_read_whatever_separates_and_encodes_it(tmp_path, caplog, name, content, says):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert contrast_from_file(path, **SIDES) == EXPECTED
    assert [says in message for message in caplog.messages] == [True] * bool(says)


def test_the_separator_of_the_suffix_wins_where_the_header_has_both(tmp_path):
    path = tmp_path / "mine.csv"
    path.write_text("bad;worse,good\na,x\n")
    assert contrast_from_file(path, target="bad;worse", baseline="good").target == ("a",)


@pytest.mark.parametrize(
    ("content", "target", "baseline"),
    [
        ({"data": {"train": [{"bad": "a", "good": "x"}]}}, "data.train.bad", "data.train.good"),
        ({"name": "set", "data": {"bad": ["a"], "good": ["x"]}}, "data.bad", "data.good"),
        ([{"m": [{"t": "x"}, {"t": "a"}]}], "m.1.t", "m.0.t"),
        ([{"m": {"bad": "a"}, "m.good": "x"}], "m.bad", "m.good"),
    ],
)
def test_prompts_inside_json_are_found_by_their_path(tmp_path, content, target, baseline):
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(content))
    contrast = contrast_from_file(path, target=target, baseline=baseline)
    assert (contrast.target, contrast.baseline) == (("a",), ("x",))
    assert load_prompts(f"{path}:{target}") == ("a",)


def test_a_path_that_leads_nowhere_is_no_column(tmp_path):
    path = tmp_path / "mine.json"
    path.write_text(json.dumps([{"m": [{"t": "x"}]}]))
    for target in ("m.1.t", "m.t", "m.0.t.t", "n.0"):
        with pytest.raises(rl.InputError, match=f'no column {target!r}: .*its columns are "m"'):
            contrast_from_file(path, target=target, baseline="m.0.t")


REPEATS = "cluster,bad,good\n1,a,x\n2,b,y\n3, a,z\n4,x,w\n5,c,y\n"


@pytest.mark.parametrize(
    ("options", "target", "baseline", "clusters", "dropped"),
    [
        ({}, "abc", "yzw", (("1", "2", "5"), ("2", "3", "4")), "dropped 4 of 10 prompts: 1 stand"),
        ({"keep_duplicates": True}, "abac", "yzwy", None, "dropped 2 of 10 prompts: 1 stand"),
        ({"paired": True}, "b", "y", ("2",), "dropped 8 of 10 prompts"),
    ],
)
def test_repeated_prompts_are_dropped_with_a_count(
    tmp_path, caplog, options, target, baseline, clusters, dropped
):
    path = tmp_path / "mine.csv"
    path.write_text(REPEATS)
    contrast = contrast_from_file(path, **SIDES, **options)
    assert ("".join(contrast.target), "".join(contrast.baseline)) == (target, baseline)
    if clusters:
        assert contrast.clusters == clusters
    [message] = caplog.messages
    assert message.startswith(dropped)
    assert "keep_duplicates keeps" in message
    if "paired" not in options:
        by_source = contrast_from_prompts(f"{path}:bad", f"{path}:good", name="mine", **options)
        assert by_source == contrast


def test_a_prompt_may_repeat_within_its_side_where_this_is_asked_for(tmp_path):
    path = tmp_path / "mine.csv"
    path.write_text("bad,good\na,x\na,y\n")
    kept = contrast_from_file(path, **SIDES, keep_duplicates=True)
    assert kept.target == ("a", "a")
    with pytest.raises(rl.InputError, match=r"target\[1\] repeats target\[0\]"):
        Contrast("c", kept.target, kept.baseline)
    with pytest.raises(rl.InputError, match=r"baseline\[0\] repeats target\[0\]"):
        Contrast("c", ("a", "a"), ("a",), keep_duplicates=True)


def test_clusters_go_with_their_rows(tmp_path):
    path = tmp_path / "mine.csv"
    path.write_text("cluster,text,kind\nq,a,bad\nr,x,good\nq,b,bad\nr,b,bad\n")
    contrast = contrast_from_file(path, prompt="text", label="kind", **SIDES)
    assert contrast.clusters == (("q", "q"), ("r",))
    path.write_text("cluster,bad,good\nq,a,x\n,b,y\n")
    with pytest.raises(rl.InputError, match=r"'cluster' in row 2 of mine\.csv is empty"):
        contrast_from_file(path, **SIDES)
    nested = tmp_path / "mine.json"
    nested.write_text('{"bad": ["a", "b"], "good": ["x", "y"], "cluster": ["q"]}')
    with pytest.raises(rl.InputError, match="2 prompts and 1 in 'cluster': give each"):
        contrast_from_file(nested, **SIDES)
    nested.write_text('{"bad": ["a", "b"], "good": ["x", "y"], "cluster": [["q", 1], ["r", 2]]}')
    crossed = contrast_from_file(nested, **SIDES, paired=True)
    assert crossed.clusters == (("q", "1"), ("r", "2"))


@pytest.fixture
def labelled():
    names = datasets.ClassLabel(names=["good", "bad"])
    features = datasets.Features({"text": datasets.Value("string"), "kind": names})
    splits = {"train": {"text": ["x", "a"], "kind": [0, 1]}, "test": {"text": ["b"], "kind": [1]}}
    return datasets.DatasetDict(
        {name: datasets.Dataset.from_dict(rows, features=features) for name, rows in splits.items()}
    )


@pytest.mark.parametrize("sides", [("bad", "good"), ("1", "0"), (1, 0)])
def test_a_class_label_is_asked_for_by_name_or_number(tmp_path, labelled, sides):
    labelled["train"].to_parquet(tmp_path / "mine.parquet")
    labelled.save_to_disk(tmp_path / "saved")
    options = {"prompt": "text", "label": "kind", "target": sides[0], "baseline": sides[1]}
    expected = Contrast("mine", ("a",), ("x",), "bad", "good")
    both = Contrast("mine", ("a", "b"), ("x",), "bad", "good")
    assert contrast_from_file(tmp_path / "mine.parquet", **options) == expected
    assert contrast_from_dataset(labelled, split="train", name="mine", **options) == expected
    assert contrast_from_dataset(labelled, split="train+test", name="mine", **options) == both
    assert (
        contrast_from_file(tmp_path / "saved", split="train+test", name="mine", **options) == both
    )


def test_a_source_names_split_column_and_label(tmp_path, labelled, monkeypatch):
    labelled.save_to_disk(tmp_path / "saved")
    with pytest.raises(rl.InputError, match=r"^saved has several splits: choose one of"):
        load_prompts(f"{tmp_path / 'saved'}:text")
    source = f"{tmp_path / 'saved'}@train+test:text:kind"
    assert load_prompts(f"{source}=bad") == load_prompts(f"{source}=1") == ("a", "b")
    asked = []

    def pretend(name, subset, *, revision):
        asked.append((name, subset, revision))
        return labelled

    monkeypatch.setattr(datasets, "load_dataset", pretend)
    monkeypatch.chdir(tmp_path)
    name = "owner/some.name/subset@train+test:text:kind"
    contrast = contrast_from_prompts(f"{name}=1", f"{name}=good")
    assert contrast == Contrast("subset", ("a", "b"), ("x",), "bad", "good")
    assert asked == [("owner/some.name", "subset", None)] * 2
    assert load_prompts("owner/name@test:text") == ("b",)
    with pytest.raises(rl.InputError, match=r"several splits: choose one of .*, or several joined"):
        load_prompts("owner/name:text")


def test_a_parquet_file_of_categories_and_an_index_is_read(tmp_path):
    import pandas

    frame = pandas.DataFrame({"text": ["a", "x"], "kind": pandas.Categorical(["bad", "good"])})
    frame.iloc[[1, 0]].to_parquet(tmp_path / "mine.parquet")
    contrast = contrast_from_file(tmp_path / "mine.parquet", prompt="text", label="kind", **SIDES)
    assert contrast == Contrast("mine", ("a",), ("x",), "bad", "good")
    frame[["text"]].iloc[[1, 0]].to_parquet(tmp_path / "one.parquet")
    assert load_prompts(tmp_path / "one.parquet") == ("x", "a")


def test_arditi_s_harmful_training_prompts_are_read_whole(reference, caplog):
    path = reference / "prompts" / "arditi_split_harmful_train.json"
    caplog.set_level(logging.WARNING)
    assert len(load_prompts(f"{path}:instruction")) == 260
    assert caplog.messages == []
