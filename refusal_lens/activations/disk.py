"""Complete files on disk: tensors in safetensors, everything else in JSON."""

import dataclasses
import json
import math
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from ..errors import InputError


@contextmanager
def whole_directory(folder: str | Path) -> Iterator[Path]:
    """Yield a staging folder whose files move into `folder` once all of them are written.

    Each file is flushed to disk and then renamed into place, so a crash leaves every file either
    unchanged or complete. A failure inside the `with` block leaves `folder` unchanged. Files of
    other names stay. Raises InputError if the folder can't be written.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".partial-", dir=folder) as name:
            yield (staging := Path(name))
            for file in sorted(staging.iterdir()):
                with file.open("rb+") as handle:
                    os.fsync(handle.fileno())
            for file in sorted(staging.iterdir()):
                file.replace(folder / file.name)
    except (OSError, ValueError) as error:
        if isinstance(error, ValueError) and "null" not in str(error):  # a null byte in the name
            raise
        reason = getattr(error, "strerror", None) or str(error)
        raise InputError(f"can't write to {folder}: {reason}; choose another folder") from error


def check_writable(folder: str | Path) -> None:
    """Raise InputError before the work begins if a folder can't be made; leave no new one behind."""
    new = [place for place in (Path(folder), *Path(folder).parents) if not place.exists()]
    with whole_directory(folder):
        pass
    for place in new:
        place.rmdir()


def packed_tensors(
    tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> bytes:
    """Return the content of a safetensors file; `metadata` describes the tensors."""
    # safetensors rejects tensors that share memory.
    owned = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    return save(owned, dict(metadata or {}))


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write named tensors as safetensors; `metadata` describes the tensors."""
    path.write_bytes(packed_tensors(tensors, metadata))


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file onto the CPU; raise InputError if it is missing or damaged."""
    try:
        return load_file(path)
    except FileNotFoundError as error:
        raise InputError(f"no file {path}: name a folder that a run was saved to") from error
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path} can't be read as safetensors: {error}; save it anew") from error


def write_json(path: Path, value: Any) -> None:
    """Write strict JSON, which has no NaN: `plain` turns NaN into null."""
    text = json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False)
    path.write_text(text + "\n", "utf-8")


def read_json(path: Path) -> Any:
    """Read a JSON file; raise InputError, with line and column, if it is missing or not JSON."""
    try:
        return json.loads(path.read_text("utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"no file {path}: name a folder that a run was saved to") from error
    # ValueError: not UTF-8, not JSON, or a whole number of more than 4,300 digits.
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} can't be read as JSON: {error}; save it anew") from error


def plain(value: Any) -> Any:
    """Return a value in JSON's types: tensors as lists, NaN and infinities as null."""
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
