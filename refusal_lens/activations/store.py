"""Activations and other results on disk, without lock or index, so a crash leaves no damage.

    FOLDER/KEY/CONTENT.safetensors    the activations of one batch of prompts, or one result

`KEY` hashes everything that determines the numbers. `CONTENT` hashes the file, so a damaged file does
not match its name; the cache removes the file. Concurrent processes write different or equal files.
"""

import hashlib
import json
import logging
import os
from collections.abc import Collection, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

from platformdirs import user_cache_path
from safetensors import safe_open
from safetensors.torch import load
from torch import Tensor

from ..errors import InputError, lenient
from .disk import packed_tensors

FOLDER_VARIABLE = "REFUSAL_LENS_CACHE"
HASH = 64 * "[0-9a-f]"  # pattern of a SHA-256

logger = logging.getLogger(__name__)


def default_folder() -> Path:
    """Return `$REFUSAL_LENS_CACHE`, by default `refusal_lens` in the user's cache folder."""
    own = os.environ.get(FOLDER_VARIABLE)
    return Path(own).expanduser() if own else user_cache_path("refusal_lens", appauthor=False)


def digest(value: Any) -> str:
    """Return the SHA-256 of a value in JSON's types, independent of the order of mappings."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


@lenient
class Cache:
    """A folder of activations and results of earlier runs.

    Damaged files are never used. If writing fails, the cache warns once and stops storing.

    Args:
        folder: made on the first write; None stores nothing, and a file raises InputError.
    >>> (cache := Cache("finished")).store({"seed": 0}, {"r": r})
    >>> found, held, removed = cache.load({"seed": 0}), cache.holdings(), cache.clear()
    """

    def __init__(self, folder: str | Path | None):
        self.folder = None if folder is None else Path(folder).expanduser()
        if self.folder is not None and os.path.isfile(self.folder):
            raise InputError(f"the cache {self.folder} is a file: name a folder")
        self._storing = self.folder is not None

    def load(self, key: Mapping[str, Any], names: Collection[str] = ()) -> dict[str, Tensor]:
        """Return the tensors under a key, or only those of files that hold any of the names."""
        found: dict[str, Tensor] = {}
        for path in self._files(digest(key)):
            header = _header(path)
            if names and header and header[1].isdisjoint(names):
                continue
            with suppress(OSError):
                content = path.read_bytes()
                if hashlib.sha256(content).hexdigest() == path.stem:
                    found |= load(content)
                    continue
                logger.warning("a damaged file in the cache is removed: %s", path)
                path.unlink()
        return found

    def store(self, key: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Store named tensors under all that determines them, in JSON's types, in one whole file."""
        if self.folder is None or not self._storing:
            return
        content = packed_tensors(tensors, {"key": json.dumps(key)})
        partial = self.folder / digest(key) / f"{uuid4()}.partial"
        try:
            partial.parent.mkdir(parents=True, exist_ok=True)
            partial.write_bytes(content)
            partial.replace(partial.with_name(f"{hashlib.sha256(content).hexdigest()}.safetensors"))
        except OSError as error:
            self._storing = False
            reason = f"can't write to the cache {self.folder} ({error.strerror or error})"
            logger.warning("%s: this run continues without storing", reason)
            with suppress(OSError):
                partial.unlink()

    def holdings(self) -> dict[str, tuple[int, int, int]]:
        """Return the files, tensors (one a prompt) and bytes of each model and of "other results"."""
        found: dict[str, tuple[int, int, int]] = {}
        for path in self._files():
            key, names = _header(path) or ({}, set())
            what = "{model}, {dtype}".format(**key) if "dtype" in key else "other results"
            n_files, n_tensors, n_bytes = found.get(what, (0, 0, 0))
            found[what] = n_files + 1, n_tensors + len(names), n_bytes + path.stat().st_size
        return found

    def clear(self) -> int:
        """Remove the files of the cache and return their bytes; raise InputError if this fails."""
        removed = 0
        for path in (*self._files(), *self._files(file="*.partial")):
            removed += path.stat().st_size
            try:
                path.unlink()
            except OSError as error:
                raise InputError(f"can't remove {path}: {error.strerror}") from error
            with suppress(OSError):  # a folder that is not empty stays
                path.parent.rmdir()
        return removed

    def _files(self, key: str = HASH, file: str = f"{HASH}.safetensors") -> list[Path]:
        return sorted(self.folder.glob(f"{key}/{file}")) if self.folder else []


def _header(path: Path) -> tuple[dict[str, Any], set[str]] | None:
    """Return the key and the names of the tensors in a file; None if the header is damaged."""
    with suppress(Exception), safe_open(path, "pt") as file:  # damage raises anything
        return json.loads(file.metadata()["key"]), {*file.keys()}
    return None
