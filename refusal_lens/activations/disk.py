"""Results on disk: whole files or none, tensors in safetensors, everything else in JSON."""

import dataclasses
import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from ..errors import InputError


@contextmanager
def whole_directory(folder: str | Path) -> Iterator[Path]:
    """A staging folder whose files move into `folder` only once all of them are written.

    Each file is flushed to the disk and then renamed into place, so a crash at any moment leaves
    every file of `folder` either as it was or complete, and a failure inside the `with` block
    leaves `folder` untouched. Files of other names in `folder` stay.

    Raises:
        InputError: if the folder can't be made or written to.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=".partial-", dir=folder))
    except (OSError, ValueError) as error:  # ValueError: a null byte in its name
        raise _unwritable(folder, error) from error
    try:
        yield staging
        for file in sorted(staging.iterdir()):
            with file.open("rb+") as handle:
                os.fsync(handle.fileno())
        for file in sorted(staging.iterdir()):
            file.replace(folder / file.name)
    except OSError as error:
        raise _unwritable(folder, error) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def check_writable(folder: str | Path) -> None:
    """Fail now rather than after the work: makes the folder and writes an empty file in it.

    Raises:
        InputError: if either can't be done.
    """
    with whole_directory(folder):
        pass


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write named tensors as safetensors; `metadata` says what they are."""
    owned = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    path.write_bytes(save(owned, dict(metadata or {})))


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file onto the CPU.

    Raises:
        InputError: if it is missing or is not one.
    """
    try:
        return load_file(path)
    except FileNotFoundError as error:
        raise InputError(f"no file {path}: name a folder that a run was saved to") from error
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path} can't be read as safetensors: {error}; save it anew") from error


def write_json(path: Path, value: Any) -> None:
    """Write strict JSON (no NaN token: `plain` turns NaN into null)."""
    path.write_text(
        json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n", "utf-8"
    )


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        InputError: if it is missing or is not JSON, with line and column.
    """
    try:
        return json.loads(path.read_text("utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"no file {path}: name a folder that a run was saved to") from error
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} can't be read: {error}") from error
    except json.JSONDecodeError as error:
        raise InputError(
            f"{path} is not JSON (line {error.lineno}, column {error.colno}: {error.msg})"
        ) from error
    except ValueError as error:  # Python reads no whole number of more than 4,300 digits
        raise InputError(f"{path} holds a number of thousands of digits: not ours") from error
    except RecursionError as error:
        raise InputError(f"{path} is nested too deeply to be one of ours") from error


def plain(value: Any) -> Any:
    """A value as a reader of JSON wants it: tensors as lists, NaN and infinities as null."""
    if isinstance(value, Tensor):
        return plain(value.tolist())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    return value


def pack(value: Any) -> tuple[Any, dict[str, Tensor]]:
    """Take a tree of dataclasses, mappings, tuples, tensors and scalars apart.

    Returns JSON that keeps the structure, and the tensors it names by their path in the tree.
    `unpack` puts them together again, bit for bit.

    Raises:
        TypeError: on a value of any other type.
    """
    tensors: dict[str, Tensor] = {}

    def visit(node: Any, path: str) -> Any:
        if node is None or isinstance(node, (bool, int, str)):
            return node
        if isinstance(node, float):
            return node if math.isfinite(node) else {"float": repr(node)}
        if isinstance(node, Tensor):
            tensors[path] = node
            return {"tensor": path}
        if isinstance(node, (list, tuple)):
            kind = "tuple" if isinstance(node, tuple) else "list"
            return {kind: [visit(item, f"{path}/{i}") for i, item in enumerate(node)]}
        if isinstance(node, Mapping):
            return {"dict": {str(k): visit(item, f"{path}/{k}") for k, item in node.items()}}
        if dataclasses.is_dataclass(node) and not isinstance(node, type):
            names = [f.name for f in dataclasses.fields(node) if f.init]
            items = {name: visit(getattr(node, name), f"{path}/{name}") for name in names}
            return {"type": type(node).__name__, "fields": items}
        raise TypeError(f"{path}: a {type(node).__name__} can't be saved")

    return visit(value, ""), tensors


def unpack(tree: Any, tensors: Mapping[str, Tensor], types: tuple[type, ...]) -> Any:
    """Undo `pack`. Only the dataclasses named in `types` are ever built.

    Raises:
        InputError: if the tree names a type, field or tensor that is not there.
    """
    known = {kind.__name__: kind for kind in types}

    def visit(node: Any) -> Any:
        match node:
            case {"tensor": str(path)}:
                if path not in tensors:
                    raise InputError(f"the saved results lack the tensor {path!r}: save them anew")
                return tensors[path]
            case {"float": str(text)}:
                if text not in ("nan", "inf", "-inf"):
                    raise InputError(f"the saved results hold {text[:60]!r} for a number: not ours")
                return float(text)
            case {"tuple": list(items)}:
                return tuple(visit(item) for item in items)
            case {"list": list(items)}:
                return [visit(item) for item in items]
            case {"dict": dict(items)}:
                return {key: visit(item) for key, item in items.items()}
            case {"type": str(name), "fields": dict(items)}:
                if name not in known:
                    raise InputError(
                        f"the saved results hold an unknown {name!r}: update the package"
                    )
                fields = {key: visit(item) for key, item in items.items()}
                try:
                    return known[name](**fields)
                except TypeError as error:
                    raise InputError(
                        f"the saved {name} does not fit this version of the package: {error}"
                    ) from error
            case None | bool() | int() | float() | str():
                return node
        raise InputError(f"the saved results hold something that is not ours: {str(node)[:60]!r}")

    try:
        return visit(tree)
    except RecursionError:
        raise InputError("the saved results nest too deeply to be ours: save them anew") from None


def write_summary(path: Path, summary: Mapping[str, Any]) -> None:
    """Write the published experiment's summary file; loads with `torch.load(weights_only=True)`."""
    torch.save(dict(summary), path)


def _unwritable(folder: Path, error: OSError | ValueError) -> InputError:
    reason = getattr(error, "strerror", None) or str(error)
    return InputError(f"can't write to {folder}: {reason}; choose another folder")
