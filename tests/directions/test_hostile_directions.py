"""Direction files from strangers: refused in one line, with nothing run and nothing allocated."""

import io
import json
import os
import pickle
import pickletools
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from refusal_lens.activations import disk as artifacts
from refusal_lens.directions.formats import Directions, read_directions
from refusal_lens.errors import InputError

VECTORS = torch.linspace(-1, 1, 16).reshape(2, 8)

# Builders: every file written by hand here, so that its header can lie.


def text(value: str) -> bytes:
    encoded = value.encode()
    return struct.pack("<Q", len(encoded)) + encoded


def entry(name: str, kind: int, value: bytes) -> bytes:
    return text(name) + struct.pack("<I", kind) + value


def described(name: str, offset: int, *, width=8, dims=1, kind=0) -> bytes:
    sizes = struct.pack(f"<{dims}Q", *[width] * dims)
    return text(name) + struct.pack("<I", dims) + sizes + struct.pack("<IQ", kind, offset)


ARCHITECTURE = entry("general.architecture", 8, text("controlvector"))
UNSIGNED = entry("controlvector.layer_count", 4, struct.pack("<I", 2))
SIGNED = entry("controlvector.layer_count", 5, struct.pack("<i", 2))


DATA = VECTORS.numpy().tobytes()
TENSORS = (described("direction.1", 0), described("direction.2", 32))


def gguf(
    *,
    magic=b"GGUF",
    version=3,
    entries=(ARCHITECTURE, UNSIGNED),
    n_entries=None,
    tensors=TENSORS,
    n_tensors=None,
    data=DATA,
) -> bytes:
    counts = (
        len(tensors) if n_tensors is None else n_tensors,
        len(entries) if n_entries is None else n_entries,
    )
    header = magic + struct.pack("<IQQ", version, *counts) + b"".join([*entries, *tensors])
    return header + b"\0" * (-len(header) % 32) + data


def safetensors(header: dict | bytes, data=DATA, length=None) -> bytes:
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(encoded) if length is None else length) + encoded + data


def tensor(**changes) -> dict:
    return {"v": {"dtype": "F32", "shape": [2, 8], "data_offsets": [0, 64]} | changes}


def npy(shape="(2, 8)", descr="'<f4'", data=DATA, fortran="False") -> bytes:
    header = f"{{'descr': {descr}, 'fortran_order': {fortran}, 'shape': {shape}, }}\n".encode()
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + data


def archive(parts: dict[str, bytes], compression=zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as file:
        for name, content in parts.items():
            file.writestr(f"archive/{name}", content)
    return buffer.getvalue()


def pt(pickled: bytes, data=DATA, compression=zipfile.ZIP_STORED) -> bytes:
    parts = {"data.pkl": pickled, "byteorder": b"little", "data/0": data, "version": b"3\n"}
    return archive(parts, compression)


def integer(value: int) -> bytes:
    return b"\x8a\x08" + struct.pack("<q", value)


def rebuild(elements=16, size=(2, 8), stride=(8, 1)) -> bytes:
    """The pickle of a plain float32 tensor, with whatever it claims of its size."""
    storage = b"(X\x07\0\0\0storagectorch\nFloatStorage\nX\x01\0\0\x000X\x03\0\0\0cpu"
    shape = [b"(" + b"".join(map(integer, numbers)) + b"t" for numbers in (size, stride)]
    return (
        b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n("
        + (storage + integer(elements) + b"tQ")
        + (b"K\0" + shape[0] + shape[1] + b"\x89ccollections\nOrderedDict\n)R")
        + b"tR."
    )


class RunsCode:
    """Unpickled, it makes a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


def saved(value) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


HONEST = {
    ".gguf": gguf(),
    ".safetensors": safetensors(tensor()),
    ".npy": npy(),
    ".pt": pt(rebuild()),
    ".json": json.dumps(VECTORS.tolist()).encode(),
}


@pytest.mark.parametrize("ending", HONEST)
def test_the_builders_make_files_that_are_read(tmp_path, ending):
    # The control of everything below: it is the lie that is refused, not the builder's work.
    path = tmp_path / f"d{ending}"
    path.write_bytes(HONEST[ending])
    torch.testing.assert_close(read_directions(path).vectors.float(), VECTORS)


def test_the_handmade_pickle_is_what_pytorch_writes_and_reads(tmp_path):
    path = tmp_path / "d.pt"
    path.write_bytes(HONEST[".pt"])
    assert torch.equal(torch.load(path, weights_only=True), VECTORS)


HUGE = 2**40
# One entry a way to lie; what fuzzing finds is added here, made small.
LIES: dict[str, tuple[str, bytes]] = {
    # control vectors
    "empty gguf": (".gguf", b""),
    "another magic": (".gguf", gguf(magic=b"GGML")),
    "a version of the future": (".gguf", gguf(version=4)),
    "a big-endian version": (".gguf", gguf(version=3 << 24)),
    "a model, not a control vector": (
        ".gguf",
        gguf(entries=(entry("general.architecture", 8, text("llama")),)),
    ),
    "no architecture": (".gguf", gguf(entries=(UNSIGNED,))),
    "2^60 tensors": (".gguf", gguf(n_tensors=2**60)),
    "2^60 entries": (".gguf", gguf(n_entries=2**60)),
    "no tensors": (".gguf", gguf(tensors=())),
    "a text of 2^60 bytes": (
        ".gguf",
        gguf(entries=(ARCHITECTURE, entry("x", 8, struct.pack("<Q", 2**60)))),
    ),
    "a text of 2^20 bytes in a file of fewer": (
        ".gguf",
        gguf(entries=(ARCHITECTURE, entry("x", 8, struct.pack("<Q", 2**20)))),
    ),
    "a list of 2^60 numbers": (
        ".gguf",
        gguf(entries=(ARCHITECTURE, entry("x", 9, struct.pack("<IQ", 4, 2**60)))),
    ),
    "a list of 2^60 texts": (
        ".gguf",
        gguf(entries=(ARCHITECTURE, entry("x", 9, struct.pack("<IQ", 8, 2**60)))),
    ),
    "lists in lists in lists": (
        ".gguf",
        gguf(entries=(ARCHITECTURE, entry("x", 9, struct.pack("<IQ", 9, 1) * 1000))),
    ),
    "a value of no known type": (".gguf", gguf(entries=(ARCHITECTURE, entry("x", 99, b"")))),
    "an alignment of nought": (
        ".gguf",
        gguf(entries=(ARCHITECTURE, entry("general.alignment", 4, struct.pack("<I", 0)))),
    ),
    "an alignment of 2^60": (
        ".gguf",
        gguf(entries=(ARCHITECTURE, entry("general.alignment", 10, struct.pack("<Q", 2**60)))),
    ),
    "an alignment that is a text": (
        ".gguf",
        gguf(entries=(ARCHITECTURE, entry("general.alignment", 8, text("32")))),
    ),
    "a direction of 2^40 numbers": (
        ".gguf",
        gguf(tensors=(described("direction.1", 0, width=HUGE),)),
    ),
    "a direction beyond the end": (".gguf", gguf(tensors=(described("direction.1", HUGE),))),
    "a thousand directions in the same bytes": (
        ".gguf",
        gguf(
            tensors=[described(f"direction.{i}", 0, width=8000) for i in range(1000)],
            data=b"\0" * 32000,
        ),
    ),
    "a direction of no numbers": (
        ".gguf",
        gguf(tensors=(described("direction.1", 0, width=0),)),
    ),
    "directions of two widths": (
        ".gguf",
        gguf(tensors=(described("direction.1", 0), described("direction.2", 32, width=4))),
    ),
    "one layer twice": (
        ".gguf",
        gguf(tensors=(described("direction.1", 0), described("direction.01", 32))),
    ),
    "a matrix": (".gguf", gguf(tensors=(described("direction.1", 0, width=2, dims=2),))),
    "2^32 dimensions": (
        ".gguf",
        gguf(tensors=(text("direction.1") + struct.pack("<I", 2**32 - 1),)),
    ),
    "quantised numbers": (".gguf", gguf(tensors=(described("direction.1", 0, kind=2),))),
    "another tensor": (".gguf", gguf(tensors=(described("output.weight", 0),))),
    "a negative layer": (".gguf", gguf(tensors=(described("direction.-1", 0),))),
    "an endless layer": (".gguf", gguf(tensors=(described("direction." + "9" * 5000, 0),))),
    "a damaged entry of this package": (
        ".gguf",
        gguf(entries=(ARCHITECTURE, entry("refusal_lens.layers", 8, text("[0, 0.5]")))),
    ),
    "an entry of this package that is a number": (
        ".gguf",
        gguf(entries=(ARCHITECTURE, entry("refusal_lens.model", 4, struct.pack("<I", 7)))),
    ),
    "an endless layer of this package": (
        ".gguf",
        gguf(
            entries=(
                ARCHITECTURE,
                entry("refusal_lens.layers", 8, text("[0, " + "9" * 4000 + "]")),
                entry("refusal_lens.layer", 8, text("row l is blocks.{l}.hook_resid_post")),
            )
        ),
    ),
    "layers of this package for other rows": (
        ".gguf",
        gguf(
            entries=(
                ARCHITECTURE,
                entry("refusal_lens.layers", 8, text("[0]")),
                entry("refusal_lens.layer", 8, text("row l is blocks.{l}.hook_resid_post")),
            )
        ),
    ),
    # safetensors
    "empty safetensors": (".safetensors", b""),
    "a header of 2^60 bytes": (".safetensors", safetensors(tensor(), length=2**60)),
    "a header of 2^26 bytes in a file of fewer": (
        ".safetensors",
        safetensors(tensor(), length=2**26),
    ),
    "no tensor": (".safetensors", safetensors({}, data=b"")),
    "a tensor beyond the end": (
        ".safetensors",
        safetensors(tensor(shape=[HUGE], data_offsets=[0, 4 * HUGE])),
    ),
    "a shape larger than its bytes": (".safetensors", safetensors(tensor(shape=[HUGE, 8]))),
    "a shape that overflows": (".safetensors", safetensors(tensor(shape=[2**62, 2**62]))),
    "offsets the wrong way round": (".safetensors", safetensors(tensor(data_offsets=[64, 0]))),
    "two tensors in the same bytes": (
        ".safetensors",
        safetensors(tensor() | {"w": tensor()["v"]}),
    ),
    "a deep header": (".safetensors", safetensors(b"[" * 100_000, data=b"")),
    "an unknown dtype": (".safetensors", safetensors(tensor(dtype="F31"))),
    "whole numbers": (".safetensors", safetensors(tensor(dtype="I32"))),
    "metadata of this package, damaged": (
        ".safetensors",
        safetensors({"__metadata__": {"layers": "[" * 100_000}} | tensor()),
    ),
    "metadata of this package, of another kind": (
        ".safetensors",
        safetensors({"__metadata__": {"layers": "[true, false]"}} | tensor()),
    ),
    # npy
    "empty npy": (".npy", b""),
    "npy of 2^40 rows": (".npy", npy(f"({HUGE}, 8)")),
    "npy of a size that overflows": (".npy", npy("(4294967296, 4294967296, 16)")),
    "npy of a negative size": (".npy", npy("(-2, -8)")),
    "npy of no rows": (".npy", npy("(0, 8)", data=b"")),
    "npy that was cut short": (".npy", npy()[:-1]),
    "npy with a deep header": (".npy", npy("(" * 5000)),
    "npy with a long header": (".npy", npy("(2, 8" + " " * 60_000 + ")")),
    "npy of objects": (".npy", npy(descr="'|O'", data=pickle.dumps([1.0] * 16))),
    "npy of complex numbers": (".npy", npy("(1, 8)", "'<c8'")),
    "npy of a structure": (".npy", npy("(8,)", "[('a', '<f4'), ('b', '<f4')]")),
    "npy of texts": (".npy", npy("(2, 8)", "'<U1'")),
    "an npz": (".npy", archive({"v.npy": npy()})),
    "npy of activations": (".npy", npy("(64, 4, 8)", data=b"\0" * 64 * 4 * 8 * 4)),
    "npy of four dimensions": (".npy", npy("(1, 1, 2, 8)")),
    "npy of one number": (".npy", npy("()", data=b"\0\0\0\0")),
    "npy with a nan": (".npy", npy("(1, 2)", data=np.array([1, np.nan], "<f4").tobytes())),
    # PyTorch
    "empty pt": (".pt", b""),
    "text called pt": (".pt", b"hello"),
    "pt cut short": (".pt", HONEST[".pt"][:-30]),
    "more elements than the file has": (".pt", pt(rebuild(elements=HUGE))),
    "a larger tensor than its storage": (".pt", pt(rebuild(size=(HUGE, 8)))),
    "one number repeated 2^40 times": (".pt", pt(rebuild(size=(1, HUGE), stride=(0, 0)))),
    "a negative size": (".pt", pt(rebuild(size=(-2, 8)))),
    "a bytearray of 2^40": (
        ".pt",
        pt(b"\x80\x02c__builtin__\nbytearray\n" + integer(HUGE) + b"\x85R."),
    ),
    "a compressed archive": (".pt", pt(rebuild(), bytes(2**26), zipfile.ZIP_DEFLATED)),
    "a description of 2^21 bytes": (".pt", pt(b"\x80\x02" + b"N0" * 2**20 + b"N.")),
    "no description": (".pt", archive({"version": b"3\n"})),
    "two descriptions": (".pt", archive({"data.pkl": rebuild(), "x/data.pkl": rebuild()})),
    "a name put together": (".pt", pt(pickle.dumps(os.getcwd, protocol=4))),
    "an instance of a class": (".pt", pt(b"(ios\ngetcwd\n.")),
    "a whole module": (".pt", saved(torch.nn.Linear(2, 2))),
    "a number": (".pt", saved(3.0)),
    "a list": (".pt", saved([torch.ones(2)])),
    "a dictionary of no tensors": (".pt", saved({"a": 1})),
    "pt of whole numbers": (".pt", saved(torch.ones(2, 2, dtype=torch.int64))),
    "pt of nothing": (".pt", saved(torch.ones(0, 2))),
    # found by fuzzing: rows without end that hold nothing
    "npy of 2^40 empty rows": (".npy", npy(f"({HUGE}, 0)")),
    "pt of 2^40 empty rows": (".pt", pt(rebuild(size=(HUGE, 0)))),
    "safetensors of 2^40 empty rows": (
        ".safetensors",
        safetensors(tensor(shape=[HUGE, 0], data_offsets=[0, 0]), data=b""),
    ),
    # JSON
    "empty json": (".json", b""),
    "deep json": (".json", b"[" * 100_000),
    "a json object": (".json", b'{"a": 1}'),
    "a json number": (".json", b"3.5"),
    "ragged rows": (".json", b"[[1, 2], [3]]"),
    "texts": (".json", b'["a", "b"]'),
    "nulls": (".json", b"[null, 1.0]"),
    "nan in json": (".json", b"[NaN, 1.0]"),
    "infinity in json": (".json", b"[1e999, 1.0]"),
    "a number of 5,000 digits": (".json", b"[" + b"9" * 5000 + b"]"),
    "json in another encoding": (".json", b"\xff\xfe[\x001\x00]\x00"),
    "seventy brackets": (".json", b"[" * 70 + b"1" + b"]" * 70),
}


def refused(path: Path, **options) -> str:
    with pytest.raises(InputError) as caught:
        read_directions(path, **options)
    message = str(caught.value)
    assert str(path.name) in message
    assert len(message.splitlines()) == 1
    assert len(message) < 500 + len(str(path))
    return message


@pytest.mark.parametrize("lie", LIES)
def test_a_file_that_lies_is_refused_in_one_line(tmp_path, lie):
    ending, content = LIES[lie]
    path = tmp_path / f"d{ending}"
    path.write_bytes(content)
    refused(path)
    assert path.read_bytes() == content


GROWTH = """
import sys
from pathlib import Path
from refusal_lens.directions.formats import read_directions

def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return {line.split()[0]: int(line.split()[1]) for line in lines if "kB" in line}["VmPeak:"]

def attempt(path):
    try:
        read_directions(path)
    except ValueError as error:
        return type(error).__name__
    return "read"

honest, *hostile, control = map(Path, sys.argv[1:])
for path in sorted(honest.iterdir()):
    assert attempt(path) == "read", path
before = peak()
for path in hostile:
    assert attempt(path) == "InputError", path
after = peak()
control = bytearray(2**28)
print(after - before, peak() - after)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
def test_no_lie_makes_a_process_ask_for_memory(tmp_path):
    for name, files in (("honest", HONEST), ("hostile", LIES)):
        (tmp_path / name).mkdir()
        for number, lie in enumerate(files):
            ending, content = (lie, files[lie]) if name == "honest" else files[lie]
            (tmp_path / name / f"{number}{ending}").write_bytes(content)
    hostile = sorted((tmp_path / "hostile").iterdir())
    arguments = [sys.executable, "-c", GROWTH, tmp_path / "honest", *hostile, "-"]
    done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    grown, control = (int(kilobytes) for kilobytes in done.stdout.split())
    assert grown < 2**16  # 64 MB, over a hundred files most of which claim terabytes
    assert control > 2**17  # and an allocation does show


@pytest.mark.parametrize("wrapped", ["bare", "archive", "in a dictionary", "as an object array"])
def test_a_pickle_that_runs_code_is_refused_and_not_run(tmp_path, wrapped):
    mark = tmp_path / "it ran"
    path = tmp_path / ("d.npy" if wrapped == "as an object array" else "d.pt")
    if wrapped == "bare":
        path.write_bytes(pickle.dumps(RunsCode(mark)))
    elif wrapped == "archive":
        path.write_bytes(pt(pickle.dumps(RunsCode(mark), protocol=2)))
    elif wrapped == "in a dictionary":
        torch.save({"v": VECTORS, "x": RunsCode(mark)}, path)
    else:
        np.save(path, np.array([RunsCode(mark)], dtype=object), allow_pickle=True)
    message = refused(path)
    assert not mark.exists()
    if wrapped in ("archive", "in a dictionary"):
        assert "mkdir: refused, nothing in it was run" in message
    # The control: read as it asks to be, it does run.
    if wrapped == "bare":
        pickle.loads(path.read_bytes())
    elif wrapped == "as an object array":
        np.load(path, allow_pickle=True)
    else:
        torch.load(path, weights_only=False)
    assert mark.exists()


def test_everything_a_plain_tensor_s_pickle_names_is_on_the_list(tmp_path):
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        path = tmp_path / "d.pt"
        torch.save(torch.nn.Parameter(VECTORS.to(dtype)).data, path)
        assert torch.equal(read_directions(path).vectors, VECTORS.to(dtype))
        with zipfile.ZipFile(path) as file:
            listing = io.StringIO()
            pickletools.dis(file.read("d/data.pkl"), listing)
        assert "_rebuild_tensor_v2" in listing.getvalue()


@pytest.mark.parametrize(
    ("entries", "layers"),
    [
        ((ARCHITECTURE, UNSIGNED), {None: (1, 2), "resid_post": (1, 2), "resid_pre": (0, 1)}),
        ((ARCHITECTURE, SIGNED), {None: None, "resid_post": (1, 2), "resid_pre": (0, 1)}),
    ],
)
def test_llama_cpp_s_own_numbering_is_not_guessed(tmp_path, entries, layers):
    path = tmp_path / "d.gguf"
    path.write_bytes(gguf(entries=entries))
    for hook, expected in layers.items():
        assert read_directions(path, hook=hook).layers == expected


def test_lists_and_numbers_among_the_entries_are_passed_over(tmp_path):
    numbers = entry("n", 9, struct.pack("<IQ3H", 2, 3, 1, 2, 3))
    texts = entry("t", 9, struct.pack("<IQ", 8, 2) + text("a") + text("b"))
    lists = entry("l", 9, struct.pack("<IQ", 9, 1) + struct.pack("<IQB", 0, 1, 7))
    scalars = entry("f", 6, struct.pack("<f", 0.5)) + b""
    path = tmp_path / "d.gguf"
    path.write_bytes(gguf(entries=(ARCHITECTURE, numbers, texts, lists, scalars)))
    assert torch.equal(read_directions(path).vectors, VECTORS)


@pytest.mark.parametrize(
    ("kind", "dtype"), [(0, torch.float32), (1, torch.float16), (30, torch.bfloat16)]
)
def test_every_float_of_a_control_vector_is_read(tmp_path, kind, dtype):
    rows = VECTORS.to(dtype)
    data = rows.view(torch.uint8).numpy().tobytes()
    size = 8 * dtype.itemsize
    tensors = [described(f"direction.{i}", (1 - i) * size, kind=kind) for i in range(2)]
    path = tmp_path / "d.gguf"
    path.write_bytes(gguf(tensors=tensors, data=data))
    assert torch.equal(read_directions(path).vectors, rows.flip(0))


# What is not a file at all


def test_what_is_not_there_is_said_to_be_missing(tmp_path):
    for name in ("absent.pt", "absent/d.npy", "d\0.npy"):
        with pytest.raises(InputError, match="no file"):
            read_directions(tmp_path / name)
    with pytest.raises(InputError, match="can't be opened: File name too long"):
        read_directions(tmp_path / ("x" * 300 + ".pt"))
    with pytest.raises(InputError, match=r"no file .*directions\.safetensors"):
        read_directions(tmp_path)
    (tmp_path / "loop.pt").symlink_to(tmp_path / "loop.pt")
    with pytest.raises(InputError, match=r"no file|can't be opened"):
        read_directions(tmp_path / "loop.pt")
    os.mkfifo(tmp_path / "pipe.pt")
    with pytest.raises(InputError, match="no file"):
        read_directions(tmp_path / "pipe.pt")


def test_an_unknown_ending_names_the_known_ones(tmp_path):
    (tmp_path / "d.csv").write_text("1,2")
    with pytest.raises(InputError, match=r"\.safetensors, \.pt, .*not this ending"):
        read_directions(tmp_path / "d.csv")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
@pytest.mark.parametrize("ending", HONEST)
def test_a_file_that_may_not_be_read_says_so(tmp_path, ending):
    path = tmp_path / f"d{ending}"
    path.write_bytes(HONEST[ending])
    path.chmod(0)
    assert "can't be opened: Permission denied" in refused(path)


@pytest.mark.parametrize(
    "content",
    [b"[]", b"{", b"9" * 5000, b'{"layers": 3}', b'{"layers": "[-7, 2]", "layer": 1}'],
    ids=lambda content: content[:20].decode(),
)
def test_damage_beside_an_npy_is_refused_too(tmp_path, content):
    (tmp_path / "d.npy").write_bytes(HONEST[".npy"])
    (tmp_path / "d.npy.json").write_bytes(content)
    with pytest.raises(InputError):
        read_directions(tmp_path / "d.npy", hook="resid_post")


# Fuzzing

INTERESTING = [b"\0" * 8, b"\xff" * 8, b"\xff" * 4, b"\x7f", b"\0", b"9" * 20, b"[", b"(", b"-1"]


@st.composite
def damaged(draw, content: bytes) -> bytes:
    """A file with a few of its bytes changed, dropped, doubled or replaced."""
    content = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(content)))
        to = draw(st.integers(at, min(at + 16, len(content))))
        content[at:to] = draw(
            st.binary(max_size=8)
            | st.sampled_from(INTERESTING)
            | st.just(bytes(content[at:to] * 2))
        )
    return bytes(content)


def either_reads_or_refuses(path: Path, content: bytes) -> bool:
    path.write_bytes(content)
    try:
        assert isinstance(read_directions(path), Directions)
    except InputError:
        return False
    return True


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz")


def fuzz(scratch: Path, ending: str, examples: int) -> None:
    outcomes = set()

    @settings(max_examples=examples, deadline=None, suppress_health_check=list(HealthCheck))
    @given(damaged(HONEST[ending]))
    def attempt(content):
        outcomes.add(either_reads_or_refuses(scratch / f"d{ending}", content))

    attempt()
    assert outcomes == {True, False}  # the control: damage is done, and not always to a vital part


@pytest.mark.parametrize("ending", HONEST)
def test_damaged_files_are_read_or_refused_and_nothing_else(scratch, ending):
    fuzz(scratch, ending, 60)


@pytest.mark.slow
@pytest.mark.parametrize("ending", HONEST)
def test_many_damaged_files_are_read_or_refused_and_nothing_else(scratch, ending):
    fuzz(scratch, ending, 5_000)


def test_writing_then_reading_is_not_fooled_by_its_own_metadata(tmp_path):
    # A stranger's metadata may use our keys; all of it is checked before it is believed.
    path = tmp_path / "d.safetensors"
    for damage in ({"layers": "[0]"}, {"layers": "{}"}, {"notes": "[1]"}, {"layers": '["0", "1"]'}):
        artifacts.write_tensors(
            path, {"v": VECTORS}, {"layer": "row l is blocks.{l}.hook_resid_post"} | damage
        )
        refused(path)
