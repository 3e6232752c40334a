"""Readers of files from outside, given damage: each reads it or refuses it in one line.

Direction files are fuzzed in test_hostile_directions.py; here are tables of prompts, saved runs,
tensors and protocols. `CORPUS` is what was found, made small; it is tried before anything random.
"""

import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from refusal_lens.activations import disk as artifacts
from refusal_lens.errors import InputError
from refusal_lens.experiment.serialise import pack, unpack
from refusal_lens.experiment.verdict import Estimate
from refusal_lens.prompts.contrast import Contrast
from refusal_lens.prompts.files import contrast_from_file, load_prompts
from refusal_lens.prompts.protocol import Protocol

MOST_BYTES = 64 * 2**20
"""Most memory that a reader may take for a file of a few hundred bytes."""

ROWS = [{"a": "one", "b": "two"}, {"a": "three, four", "b": 'fi"ve'}, {"a": "é\u202e", "b": "\0"}]
VALUE = {"x": (1, 2.5, float("nan")), "y": Estimate(0.1, 0.0, 0.2), "t": torch.arange(6.0)}


def packed() -> bytes:
    return json.dumps(pack(VALUE)[0]).encode()


def tensors(folder: Path) -> bytes:
    path = folder / "t.safetensors"
    artifacts.write_tensors(path, {"/t": torch.arange(6.0), "b": torch.ones(2, 2).bfloat16()})
    return path.read_bytes()


HONEST: dict[str, Callable[[Path], bytes]] = {
    "m.csv": lambda _: 'a,b\none,two\n"three, four","fi""ve"\né,x\n'.encode(),
    "m.tsv": lambda _: b"\xef\xbb\xbfa\tb\r\none\ttwo\r\nthree\tfour\r\n",
    "m.json": lambda _: json.dumps(ROWS).encode(),
    "columns.json": lambda _: json.dumps({"a": ["x", None], "b": ["y", "z"]}).encode(),
    "m.jsonl": lambda _: "\n".join(map(json.dumps, ROWS)).encode(),
    "m.txt": lambda _: b"one\n\ntwo\n",
    "packed.json": lambda _: packed(),
    "protocol.json": lambda _: json.dumps(Protocol(system_prompt="x").to_dict()).encode(),
    "t.safetensors": tensors,
}


def read(path: Path) -> Any:
    """What the package does with a file of this name."""
    if path.name == "packed.json":
        tree = artifacts.read_json(path)
        return unpack(tree, pack(VALUE)[1], (Estimate,))
    if path.name == "protocol.json":
        saved = artifacts.read_json(path)
        if not isinstance(saved, dict):
            raise InputError("no protocol")
        return Protocol(**saved)
    if path.suffix == ".safetensors":
        return artifacts.read_tensors(path)
    if path.suffix == ".txt":
        return load_prompts(path)
    contrast = contrast_from_file(path, target="a", baseline="b")
    assert isinstance(contrast, Contrast)
    return contrast.sha256


CORPUS: list[tuple[str, bytes]] = [
    # A number that Python won't turn into an int, which is a ValueError of no JSON decoder's.
    ("m.json", b'[{"a": ' + b"9" * 5000 + b', "b": "y"}]'),
    ("m.jsonl", b"9" * 5000),
    ("packed.json", b"9" * 5000),
    ("protocol.json", b'{"name": ' + b"9" * 5000 + b"}"),
    # A text where a number's name should be.
    ("packed.json", b'{"float": "ran"}'),
    ("packed.json", b'{"float": "1_0"}'),
    ("m.json", b"[" * 100_000),
    ("m.json", b'{"a":' * 100_000),
    ("packed.json", b'{"list":[' * 30_000),
    # Too deep to be unpacked, not too deep to be parsed.
    ("packed.json", b'{"list":[' * 400 + b"]}" * 400),
    ("m.json", b'[{"a": "x\\ud800", "b": "y"}]'),
    ("m.json", b'[{"a": Infinity, "b": -Infinity}]'),
    ("m.csv", b"a,b\n\0,\0x\n"),
    ("m.csv", b'a,b\n"' + b"x" * 200_000 + b'",y\n'),
    ("m.csv", b"a,b\r\rx,y\r"),
    ("m.csv", b"\xff\xfea\0,\0b\0\n\0"),
    ("t.safetensors", b"\xff" * 8),
    ("t.safetensors", b"\0" * 7 + b"\x10{}"),
    (
        "t.safetensors",
        b"\x40\0\0\0\0\0\0\0"
        b'{"t":{"dtype":"F32","shape":[9999999999],"data_offsets":[0,8]}}\x20',
    ),
    # The delimiter in our one line, and names of a stranger's.
    (
        "packed.json",
        b'{"type": "Estimate", "fields": {"\xe2\x80\xa8value": 0.1, "lower": 0, "upper": 0.2}}',
    ),
    ("m.tsv", b'""a\tb\nx\ty\n'),
    ("protocol.json", b'{"a\\nb\\u001b[31m": 1}'),
    ("m.json", b'{"a\\nb": 1}'),
    ("m.json", b'[{"a\\nb": "x"}]'),
    ("protocol.json", b'{"positions": [true]}'),
    ("protocol.json", b'{"positions": [[-1]]}'),
    ("protocol.json", b'{"hook": ["resid_post"]}'),
    ("protocol.json", b'{"padding": {}}'),
]  # fmt: skip

INTERESTING = [b"\0", b"\xff", b'"', b"\n", b"\r", b",", b"[", b"{", b"}", b"NaN", b"9" * 30]
INTERESTING += [b"\xef\xbb\xbf", b"\\ud800", b"\xed\xa0\x80", b"null", b"\xe2\x80\xa8", b"true"]


@st.composite
def damaged(draw, content: bytes) -> bytes:
    """A file with a few of its bytes changed, dropped, doubled or replaced."""
    changed = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(changed)))
        to = draw(st.integers(at, min(at + 12, len(changed))))
        changed[at:to] = draw(
            st.binary(max_size=6)
            | st.sampled_from(INTERESTING)
            | st.just(bytes(changed[at:to] * 2))
        )
    return bytes(changed)


def is_read(path: Path, content: bytes) -> bool:
    """Whether a file is read; anything but an InputError of one line goes through."""
    path.write_bytes(content)
    try:
        read(path)
    except InputError as error:
        if not str(error).isprintable():
            raise AssertionError(f"no line: {error!r}") from error
        return False
    return True


@pytest.fixture(autouse=True)
def as_users_run_it(monkeypatch):
    """Without the type checker of the tests, which would refuse in our stead."""
    monkeypatch.setattr("jaxtyping.config.jaxtyping_disable", True)


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz")


@pytest.mark.parametrize("name", HONEST)
def test_the_undamaged_file_is_read(scratch, name):
    # The control of all below.
    assert is_read(scratch / name, HONEST[name](scratch))


@pytest.mark.parametrize("number", range(len(CORPUS)))
def test_what_once_broke_a_reader_is_read_or_refused_in_little_memory(scratch, number):
    name, content = CORPUS[number]
    tracemalloc.start()
    try:
        is_read(scratch / name, content)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < MOST_BYTES


def test_the_measure_of_memory_sees_an_allocation():
    tracemalloc.start()
    taken = bytearray(2 * MOST_BYTES)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak >= len(taken) > MOST_BYTES


def fuzz(scratch: Path, name: str, examples: int) -> None:
    outcomes = set()
    honest = HONEST[name](scratch)

    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(damaged(honest))
    @example(b"")
    @example(honest[: len(honest) // 2])
    @example(honest * 2)
    def attempt(content):
        outcomes.add(is_read(scratch / name, content))

    attempt()
    assert outcomes == {True, False}  # the control: not all damage hits a vital part


@pytest.mark.parametrize("name", HONEST)
def test_damaged_files_are_read_or_refused_and_nothing_else(scratch, name):
    fuzz(scratch, name, 60)


@pytest.mark.slow
@pytest.mark.parametrize("name", HONEST)
def test_many_damaged_files_are_read_or_refused_and_nothing_else(scratch, name):
    fuzz(scratch, name, 5_000)
