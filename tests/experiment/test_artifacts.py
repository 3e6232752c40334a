"""Saving and loading: whole or not at all, and back bit for bit."""

import dataclasses
import json
import os

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from refusal_lens.activations import disk as artifacts
from refusal_lens.errors import InputError
from refusal_lens.experiment.serialise import pack, unpack


@dataclasses.dataclass(frozen=True)
class Leaf:
    name: str
    rows: tuple
    values: torch.Tensor


scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text()
tensors = st.lists(st.floats(width=32), max_size=4).map(torch.tensor)
leaves = st.builds(Leaf, st.text(), st.lists(scalars, max_size=3).map(tuple), tensors)
trees = st.recursive(
    scalars | leaves | tensors,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(st.text(), inner, max_size=3)
    ),
    max_leaves=8,
)


def same(a, b):
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a.nan_to_num(7), b.nan_to_num(7))
    if dataclasses.is_dataclass(a):
        return type(a) is type(b) and same(vars(a), vars(b))
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and (a == b or a != a)


@given(trees)
def test_unpack_undoes_pack_through_strict_json(tree):
    packed, found = pack(tree)
    through_json = json.loads(json.dumps(packed, allow_nan=False))
    assert same(tree, unpack(through_json, found, (Leaf,)))


def test_unpack_builds_only_the_types_it_was_told_of():
    packed, found = pack(Leaf("a", (), torch.zeros(1)))
    with pytest.raises(InputError, match="unknown 'Leaf'"):
        unpack(packed, found, ())


@pytest.mark.parametrize(
    "tree",
    [
        {"tensor": "absent"},
        {"type": "Leaf", "fields": {"nonsense": 1}},
        {"nothing": "known"},
        {"tensor": ["not", "a", "path"]},
        [1, 2],
    ],
)
def test_a_tree_that_pack_did_not_make_is_refused(tree):
    with pytest.raises(InputError):
        unpack(tree, {}, (Leaf,))


def test_pack_refuses_what_it_could_not_give_back():
    with pytest.raises(TypeError, match="/deep/0: a set"):
        pack({"deep": [set()]})


def test_a_failure_half_way_leaves_the_folder_as_it_was(tmp_path):
    (tmp_path / "a.json").write_text("old")

    def fail_half_way():
        with artifacts.whole_directory(tmp_path) as staging:
            (staging / "a.json").write_text("new")
            (staging / "b.json").write_text("new")
            raise RuntimeError("half way")

    with pytest.raises(RuntimeError, match="half way"):
        fail_half_way()
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]
    assert (tmp_path / "a.json").read_text() == "old"
    with artifacts.whole_directory(tmp_path) as staging:
        (staging / "a.json").write_text("new")
    assert (tmp_path / "a.json").read_text() == "new"


def test_files_of_other_names_stay(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with artifacts.whole_directory(tmp_path) as staging:
        (staging / "new.txt").write_text("new")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mine.txt", "new.txt"]


def test_a_folder_that_is_a_file_is_an_input_error(tmp_path):
    (tmp_path / "taken").write_text("")
    for folder in (tmp_path / "taken", tmp_path / "taken" / "below"):
        with pytest.raises(InputError, match=r"can't write to .*; choose another folder"):
            artifacts.check_writable(folder)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission_is_an_input_error(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(InputError, match="can't write"):
        artifacts.check_writable(tmp_path / "runs")


def test_checking_writability_leaves_no_trace_in_the_folder(tmp_path):
    artifacts.check_writable(tmp_path / "runs" / "demo")
    artifacts.check_writable(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_tensors_come_back_with_dtype_and_values_even_from_a_view(tmp_path):
    base = torch.randn(4, 6)
    saved = {"view": base.T[1:], "half": base.bfloat16(), "empty": torch.zeros(0, 3)}
    artifacts.write_tensors(tmp_path / "t.safetensors", saved, {"layer": "of the block's output"})
    loaded = artifacts.read_tensors(tmp_path / "t.safetensors")
    for name, tensor in saved.items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name], tensor)


@pytest.mark.parametrize("content", [b"", b"\x00" * 4, b"\xff" * 64, b"{}"])
def test_a_damaged_tensor_file_is_an_input_error(tmp_path, content):
    (tmp_path / "t.safetensors").write_bytes(content)
    with pytest.raises(InputError, match=r"t\.safetensors can't be read"):
        artifacts.read_tensors(tmp_path / "t.safetensors")


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[" * 100_000])
def test_a_damaged_json_file_is_an_input_error(tmp_path, content):
    (tmp_path / "r.json").write_bytes(content)
    with pytest.raises(InputError, match=r"r\.json"):
        artifacts.read_json(tmp_path / "r.json")


def test_missing_files_say_what_to_name_instead(tmp_path):
    for read in (artifacts.read_json, artifacts.read_tensors):
        with pytest.raises(InputError, match=r"no file .*name a folder"):
            read(tmp_path / "absent")
