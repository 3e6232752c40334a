"""GGUF control vectors, as repeng and llama.cpp write them.

The `gguf` package reads files that one trusts: it loops as often and allocates as much as the
header says. A control vector is a flat file of few parts, so this reader takes it apart itself and
lets no count or offset reach beyond the file.

Reference: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import math
import mmap
import re
import struct
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...errors import InputError
from .known import FileMetadata

OURS = "refusal_lens."
"""Prefix of the metadata entries that this package adds; other readers pass over them."""
LONGEST_TEXT = 2**20
"""Bytes of a single text in the header; control vectors need a few dozen."""

_SCALARS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
_TEXT, _ARRAY, _SIGNED = 8, 9, 5
_DTYPES = {0: torch.float32, 1: torch.float16, 28: torch.float64, 30: torch.bfloat16}


def read_control_vector(path: Path) -> tuple[Tensor, FileMetadata]:
    """The `direction.{layer}` tensors of a control vector, `[layer d_model]`, layers ascending.

    repeng numbers a direction by the block at whose output it reads it and adds it, which is this
    package's counting. llama.cpp's own generator numbers the same output one higher (its files hold
    a signed `layer_count`, repeng's an unsigned one): such a file's layers are left unknown.

    Raises:
        InputError: if it is no control vector, or says anything that its size belies.
    """
    with path.open("rb") as file:
        if path.stat().st_size == 0:
            raise InputError(f"{path} is empty")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            return _Parser(content, path).control_vector()


class _Parser:
    """Reads from the start of a file to its end, and never past it."""

    def __init__(self, content: mmap.mmap, path: Path) -> None:
        self.content = content
        self.path = path
        self.offset = 0

    def control_vector(self) -> tuple[Tensor, FileMetadata]:
        if self.take(4) != b"GGUF":
            raise InputError(f"{self.path} is no GGUF file: it doesn't begin with GGUF")
        version = self.number("I")
        if version not in (2, 3):
            raise InputError(
                f"{self.path} is GGUF of version {version}: only 2 and 3, little-endian, are read"
            )
        n_tensors, n_entries = self.number("Q"), self.number("Q")
        types: dict[str, int] = {}
        entries: dict[str, object] = {}
        for _ in range(n_entries):
            name, types_of = self.text(), self.number("I")
            types[name] = types_of
            entries[name] = self.value(types_of)
        if entries.get("general.architecture") != "controlvector":
            found = str(entries.get("general.architecture"))[:40]
            raise InputError(
                f"{self.path} is GGUF for {found!r}, not a control vector (architecture "
                "'controlvector')"
            )
        layers, tensor = self.tensors(n_tensors, entries.get("general.alignment", 32))
        return tensor, self.said(layers, entries, types)

    def tensors(self, count: int, alignment: object) -> tuple[tuple[int, ...], Tensor]:
        """Every tensor is described before the first is read, so that all sizes can be checked."""
        described = [self.description() for _ in range(count)]
        if not described:
            raise InputError(f"{self.path} holds no direction")
        if type(alignment) is not int or alignment <= 0 or alignment & (alignment - 1):
            raise InputError(f"{self.path} asks for an alignment of {str(alignment)[:20]}: damaged")
        start = math.ceil(self.offset / alignment) * alignment
        layers = [layer for layer, *_ in described]
        widths = {width for _, width, *_ in described}
        total = sum(width * dtype.itemsize for _, width, dtype, _ in described)
        end = max(start + at + width * dtype.itemsize for _, width, dtype, at in described)
        if len(set(layers)) < len(layers):
            raise InputError(f"{self.path} gives the same layer twice: damaged")
        if len(widths) > 1:
            raise InputError(
                f"{self.path} holds directions of different widths: {sorted(widths)[:4]}"
            )
        if end > len(self.content) or total > len(self.content):
            raise InputError(
                f"{self.path} describes {max(end, total)} bytes and has {len(self.content)}: it "
                "was cut short or its header is wrong, fetch it anew"
            )
        rows = {
            layer: torch.frombuffer(
                bytearray(self.content[start + at : start + at + width * dtype.itemsize]),
                dtype=dtype,
            )
            for layer, width, dtype, at in described
        }
        return tuple(sorted(rows)), torch.stack([rows[layer] for layer in sorted(rows)])

    def description(self) -> tuple[int, int, torch.dtype, int]:
        """One tensor's layer, width, dtype and offset within the data."""
        name = self.text()
        layer = re.fullmatch(r"direction\.(\d{1,4})", name)
        n_dims = self.number("I")
        if not layer or n_dims != 1:
            raise InputError(
                f"{self.path} holds a tensor {name[:40]!r} of {n_dims} dimensions, where a control "
                "vector has direction.LAYER of one"
            )
        width, kind, offset = self.number("Q"), self.number("I"), self.number("Q")
        if kind not in _DTYPES or width == 0:
            raise InputError(
                f"{self.path}: {name} has {width} elements of GGML type {kind}, where floats are "
                "wanted, not quantised"
            )
        return int(layer[1]), width, _DTYPES[kind], offset

    def said(self, layers: tuple[int, ...], entries: dict, types: dict[str, int]) -> FileMetadata:
        ours = {k.removeprefix(OURS): v for k, v in entries.items() if k.startswith(OURS)}
        if ours:
            return FileMetadata.in_metadata(ours, str(self.path))
        hint = str(entries.get("controlvector.model_hint", "unknown"))[:80]
        notes = [f"a control vector for models of type {hint}"]
        if types.get("controlvector.layer_count") == _SIGNED:
            notes.append(
                "numbered as llama.cpp's generator does, it seems (its direction.{l + 1} is block "
                "l's output), but other writers share that mark: say hook='resid_pre' if so, "
                "'resid_post' if it is numbered as repeng does"
            )
            return FileMetadata(layers, notes=tuple(notes))
        notes.append(
            "direction.{l} is block l's output, as repeng numbers it; it reads the last layer's "
            "after the final norm"
        )
        return FileMetadata(layers, hook="resid_post", notes=tuple(notes))

    def value(self, kind: int, depth: int = 0) -> object:
        """A metadata value; lists are passed over, a control vector needs none."""
        if kind in _SCALARS:
            return self.number(_SCALARS[kind])
        if kind == _TEXT:
            return self.text()
        if kind != _ARRAY or depth > 4:
            raise InputError(f"{self.path} holds a value of unknown type {kind}: damaged")
        item, count = self.number("I"), self.number("Q")
        if item in _SCALARS:
            self.skip(count * struct.calcsize("<" + _SCALARS[item]))
        else:
            for _ in range(count):
                self.value(item, depth + 1)
        return None

    def text(self) -> str:
        length = self.number("Q")
        if length > LONGEST_TEXT:
            raise InputError(f"{self.path} claims a text of {length} bytes in its header: damaged")
        return self.take(length).decode("utf-8", "replace")

    def number(self, form: str) -> Any:
        return struct.unpack("<" + form, self.take(struct.calcsize("<" + form)))[0]

    def take(self, n: int) -> bytes:
        at = self.offset
        self.skip(n)
        return self.content[at : self.offset]

    def skip(self, n: int) -> None:
        if n > len(self.content) - self.offset:
            raise InputError(
                f"{self.path} ends {n - len(self.content) + self.offset} bytes before its header "
                "does: it was cut short or its header is wrong, fetch it anew"
            )
        self.offset += n
