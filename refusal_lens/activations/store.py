"""Activations and other results on disk, without lock or index, so a crash leaves no damage.

    FOLDER/{activations,results}/KEY/CONTENT.safetensors    one batch of prompts, or one result

`KEY` hashes everything that determines the numbers. `CONTENT` hashes the file, so a damaged file does
not match its name; the cache removes the file. Concurrent processes write different or equal files.
"""

import hashlib
import json
import logging
import os
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from uuid import uuid4

from platformdirs import user_cache_path
from safetensors import SafetensorError, safe_open
from safetensors.torch import load
from torch import Tensor

from ..errors import InputError
from .disk import packed_tensors

FOLDER_VARIABLE = "REFUSAL_LENS_CACHE"
SUFFIX, PARTIAL = ".safetensors", ".partial-"
ABOUT = "refusal_lens"  # the metadata field whose JSON describes a file's tensors
ABANDONED = 3600.0  # seconds after which an unfinished file counts as left by a dead process

Kind = Literal["activations", "results"]

logger = logging.getLogger(__name__)


def default_folder() -> Path:
    """Return `$REFUSAL_LENS_CACHE`, by default `refusal_lens` in the user's cache folder."""
    own = os.environ.get(FOLDER_VARIABLE)
    return Path(own).expanduser() if own else user_cache_path("refusal_lens", appauthor=False)


def digest(key: Mapping[str, Any]) -> str:
    """Return the SHA-256 of a key, independent of the order of its items."""
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class Holding:
    """Size of the cache for one model in one dtype, or for all other results together."""

    what: str
    n_files: int
    n_prompts: int
    n_bytes: int


class Cache:
    """A folder of activations and results of earlier runs.

    Damaged files are never used. If writing fails, the cache warns once and stops storing.

    Args:
        folder: made on the first write; None stores nothing, and a file raises InputError.
    """

    def __init__(self, folder: str | Path | None):
        self.folder = None if folder is None else Path(folder).expanduser()
        if self.folder is not None and os.path.isfile(self.folder):
            raise InputError(f"the cache {self.folder} is a file: name a folder")
        self._storing = self.folder is not None

    def load(
        self, kind: Kind, key: Mapping[str, Any], rows: Collection[str] = ()
    ) -> Iterator[tuple[dict[str, Tensor], dict[str, Any]]]:
        """Yield the tensors and the description of each file under a key.

        Args:
            kind, key: the arguments of `store`.
            rows: names of rows; files without any of these rows are skipped.
        """
        for path in self._files(f"{kind}/{digest(key)}/*"):
            with suppress(OSError):
                if path.name.startswith(PARTIAL) and time.time() - path.stat().st_mtime > ABANDONED:
                    path.unlink()
            elsewhere = set(_about(path).get("rows", rows)).isdisjoint(rows) if rows else False
            if path.suffix == SUFFIX and not elsewhere and (found := self._verified(path)):
                yield found

    def store(
        self,
        kind: Kind,
        key: Mapping[str, Any],
        tensors: Mapping[str, Tensor],
        about: Mapping[str, Any],
    ) -> None:
        """Store tensors and their description in one complete file.

        Args:
            kind, key: kind of result, and everything that determines its numbers, in JSON's types.
            tensors, about: the numbers by name, and their description in JSON's types.
        """
        if self.folder is None or not self._storing:
            return
        content = packed_tensors(tensors, {ABOUT: json.dumps(about, sort_keys=True)})
        shelf = self.folder / kind / digest(key)
        partial = shelf / f"{PARTIAL}{uuid4().hex}"
        try:
            shelf.mkdir(parents=True, exist_ok=True)
            partial.write_bytes(content)
            partial.replace(shelf / f"{hashlib.sha256(content).hexdigest()}{SUFFIX}")
        except OSError as error:
            self._storing = False
            reason = f"can't write to the cache {self.folder} ({error.strerror or error})"
            logger.warning("%s: this run continues without storing", reason)
            with suppress(OSError):
                partial.unlink()

    def holdings(self) -> list[Holding]:
        """Return the sizes of the cache by model and dtype, then of all other results."""
        files: dict[str, list[tuple[int, int]]] = {}
        for path in self._files(f"activations/*/*{SUFFIX}"):
            about = _about(path)
            key, rows = about.get("key", {}), about.get("rows", [])
            what = f"{key.get('model', 'unknown')}, {key.get('dtype', 'unknown')}"
            files.setdefault(what, []).append((len(rows), _size(path)))
        if self.folder is not None:
            results = self._files(f"results/*/*{SUFFIX}")
            files["other results"] = [(0, _size(path)) for path in results]
        return [
            Holding(what, len(sizes), sum(n for n, _ in sizes), sum(size for _, size in sizes))
            for what, sizes in files.items()
        ]

    def clear(self) -> int:
        """Remove the files of the cache and return their bytes; raise InputError if this fails."""
        removed = 0
        for path in self._files("activations/*/*") + self._files("results/*/*"):
            if path.suffix != SUFFIX and not path.name.startswith(PARTIAL):
                continue
            size = _size(path)
            try:
                path.unlink(missing_ok=True)
            except OSError as error:
                raise InputError(f"can't remove {path}: {error.strerror}") from error
            removed += size
            with suppress(OSError):  # a folder that is not empty stays
                path.parent.rmdir()
                path.parent.parent.rmdir()
        return removed

    def _files(self, pattern: str) -> list[Path]:
        return sorted(self.folder.glob(pattern)) if self.folder else []

    def _verified(self, path: Path) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """Return the tensors and the description of a file if its bytes match its name."""
        with suppress(OSError):
            content = path.read_bytes()
            if hashlib.sha256(content).hexdigest() == path.stem:
                return load(content), _about(path)
            logger.warning("a damaged file in the cache is removed and computed again: %s", path)
            path.unlink()
        return None


def _about(path: Path) -> dict[str, Any]:
    """Return the description in a file's header; empty if the header is damaged."""
    damage = (OSError, SafetensorError, ValueError, KeyError, TypeError, AttributeError)
    with suppress(*damage, RecursionError), safe_open(path, "pt") as file:
        about = json.loads(file.metadata()[ABOUT])
        if isinstance(about.get("key", {}), dict) and isinstance(about.get("rows", []), list):
            return about
    return {}


def _size(path: Path) -> int:
    with suppress(OSError):
        return path.stat().st_size
    return 0
