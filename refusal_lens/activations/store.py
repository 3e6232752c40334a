"""What was computed before, on disk: found again by everything that decides it, or not at all.

    DIR/activations/KEY/CONTENT.safetensors     one finished batch of prompts
    DIR/results/KEY/CONTENT.safetensors         one finished computation

`KEY` is the hash of everything that decides the numbers, `CONTENT` the hash of the whole file. So a
file that is torn, flipped or empty does not answer to its name, and is removed and computed again;
and two processes that write at once write different files, or the same one. A file gets its name
only when all of it is on the disk. There is no lock and no index, so a crash leaves nothing to mend.
"""

import hashlib
import json
import logging
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from uuid import uuid4

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from ..errors import InputError
from . import disk as artifacts

FOLDER_VARIABLE = "REFUSAL_LENS_CACHE"
PARTIAL = ".partial-"
ABOUT = "refusal_lens"
"""The one field of a file's metadata: JSON of what its tensors are."""
ABANDONED = 3600.0
"""Seconds after which an unfinished file is the leaving of a process that died."""
HALF = (torch.bfloat16, torch.float16)
"""What activations are stored in where that loses nothing."""
MOST_QUEUED = 8
"""Batches that may wait to be written before the model waits for the disk."""

logger = logging.getLogger(__name__)

Answer = TypeVar("Answer")


def default_folder() -> Path:
    """`$REFUSAL_LENS_CACHE`, or `refusal_lens` in the folder the system keeps caches in."""
    if own := os.environ.get(FOLDER_VARIABLE):
        return Path(own).expanduser()
    if sys.platform == "darwin":
        caches = Path.home() / "Library" / "Caches"
    elif sys.platform == "win32":
        caches = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    else:
        caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return caches / "refusal_lens"


def digest(value: Any) -> str:
    """SHA-256 of anything that `artifacts.pack` takes apart: what its JSON and tensors hold."""
    tree, tensors = artifacts.pack(value)
    found = hashlib.sha256(json.dumps(tree, sort_keys=True).encode("utf-8", "surrogatepass"))
    for path, tensor in sorted(tensors.items()):
        found.update(f"\n{path} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        flat = tensor.detach().cpu().contiguous().flatten()
        found.update(flat.view(torch.uint8).numpy().data)
    return found.hexdigest()


@dataclass(frozen=True)
class Holding:
    """What a cache holds of one model in one dtype, or of all other results together."""

    what: str
    n_files: int
    n_prompts: int
    n_bytes: int


class Cache:
    """A folder of what was computed before; `None` remembers nothing.

    Nothing is ever read that is not, byte for byte, what was written. A folder that can't be
    written to, or a disk that is full, costs one warning, and the run goes on without storing more.

    Raises:
        InputError: if the folder is a file.
    """

    def __init__(self, folder: str | Path | None):
        self.folder = None if folder is None else Path(folder).expanduser()
        if self.folder is not None and os.path.isfile(self.folder):
            raise InputError(f"the cache {self.folder} is a file: name a folder")
        self._storing = self.folder is not None

    def remember(
        self, key: Mapping[str, Any], compute: Callable[[], Answer], types: tuple[type, ...] = ()
    ) -> Answer:
        """What `compute` gives, from the disk if it was computed under an equal key before.

        `key` must hold everything that decides the answer. Both are trees of what
        `artifacts.pack` takes; `types` are the dataclasses that the answer is made of. It comes
        back bit for bit, on the CPU.
        """
        if self.folder is None:
            return compute()
        shelf = self.folder / "results" / digest(key)
        for path in _finished(shelf):
            tensors, about = self._verified(path) or ({}, {})
            if "tree" in about:
                with suppress(InputError):
                    return artifacts.unpack(about["tree"], tensors, types)
        answer = compute()
        tree, tensors = artifacts.pack(answer)
        # What shares its memory with another, as two parts of one tensor do, can't be stored.
        own = {name: tensor.clone() for name, tensor in tensors.items()}
        self._write(shelf, _packed(own, {"tree": tree}))
        return answer

    def activations(self, key: Mapping[str, Any]) -> "StoredActivations | None":
        """The activations under a key of everything but the prompts; `None` without a folder."""
        if self.folder is None:
            return None
        return StoredActivations(self, self.folder / "activations" / digest(key), dict(key))

    def holdings(self) -> list[Holding]:
        """What is there, by model and dtype, then all other results."""
        if self.folder is None:
            return []
        by_what: dict[str, Holding] = {}
        for path in sorted(self.folder.glob("activations/*/*.safetensors")):
            about = _about(path)
            key = about.get("key")
            key = key if isinstance(key, dict) else {}
            what = f"{key.get('model', 'unknown')}, {key.get('dtype', 'unknown')}"
            before = by_what.get(what, Holding(what, 0, 0, 0))
            by_what[what] = Holding(
                what,
                before.n_files + 1,
                before.n_prompts + len(_prompts(about)),
                before.n_bytes + _size(path),
            )
        results = [*self.folder.glob("results/*/*.safetensors")]
        others = Holding("other results", len(results), 0, sum(map(_size, results)))
        return [*by_what.values(), others]

    def clear(self) -> int:
        """Remove everything that a cache writes, and nothing else; returns how many bytes.

        Raises:
            InputError: if a file can't be removed.
        """
        removed = 0
        if self.folder is None:
            return removed
        for kind in ("activations", "results"):
            for shelf in [*self.folder.glob(f"{kind}/*")]:
                for path in [*shelf.glob("*.safetensors"), *shelf.glob(f"{PARTIAL}*")]:
                    size = _size(path)
                    try:
                        path.unlink(missing_ok=True)
                    except OSError as error:
                        raise InputError(f"can't remove {path}: {error.strerror}") from error
                    removed += size
                with suppress(OSError):
                    shelf.rmdir()
            with suppress(OSError):
                (self.folder / kind).rmdir()
        return removed

    def _verified(self, path: Path) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """A file's tensors and what it says about them, if its bytes are those it was named after."""
        try:
            content = path.read_bytes()
        except OSError:
            return None
        with suppress(SafetensorError):
            if hashlib.sha256(content).hexdigest() == path.stem:
                header = content[8 : 8 + int.from_bytes(content[:8], "little")]
                return load(content), _parsed(header)
        logger.warning("a damaged file in the cache is removed, and computed again: %s", path)
        with suppress(OSError):
            path.unlink()
        return None

    def _write(self, shelf: Path, content: bytes) -> None:
        """Store a file whole or not at all; a failure stops all further storing."""
        if not self._storing:
            return
        partial = shelf / f"{PARTIAL}{uuid4().hex}"
        try:
            shelf.mkdir(parents=True, exist_ok=True)
            with partial.open("xb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(shelf / f"{hashlib.sha256(content).hexdigest()}.safetensors")
            _sync_names(shelf)
        except OSError as error:
            self._storing = False
            logger.warning(
                "can't write to the cache %s (%s): this run goes on without storing",
                self.folder,
                error.strerror or error,
            )
            with suppress(OSError):
                partial.unlink()


class StoredActivations:
    """Activations under one key, prompt by prompt; a batch of prompts is a file.

    In float32, and stored in a narrower dtype where that loses nothing, as of a model in bfloat16.
    """

    def __init__(self, cache: Cache, shelf: Path, key: dict[str, Any]):
        self._cache, self._shelf, self._key = cache, shelf, key

    def read(
        self, prompts: Sequence[str]
    ) -> Iterator[tuple[list[int], Float[Tensor, "batch pos layer d_model"]]]:
        """What is there of these prompts, file by file: their rows, and what was read."""
        wanted: dict[str, list[int]] = {}
        for row, prompt in enumerate(prompts):
            wanted.setdefault(_hash(prompt), []).append(row)
        shape = None
        for path in _finished(self._shelf):
            promised = _prompts(_about(path))
            if promised and wanted.keys().isdisjoint(promised):
                continue
            tensors, about = self._cache._verified(path) or ({}, {})
            held, values = _prompts(about), tensors.get("activations")
            if values is None or len(values) != len(held):
                continue
            shape = shape or values.shape[1:]
            if values.shape[1:] != shape:
                continue
            found = [(i, row) for i, name in enumerate(held) for row in wanted.pop(name, ())]
            if found:
                yield [row for _, row in found], values[[i for i, _ in found]].float()

    @contextmanager
    def writer(self) -> Iterator[Callable[[Sequence[str], Tensor], None]]:
        """A function that stores a batch, written beside the run: leaving waits for the last one."""
        self._remove_abandoned()
        pending: deque[Future[None]] = deque()
        with ThreadPoolExecutor(max_workers=1, thread_name_prefix="cache") as thread:

            def store(prompts: Sequence[str], values: Tensor) -> None:
                if not self._cache._storing:
                    return
                # Packed here: torch, called in another thread, would start as many threads again
                # as the model runs on, and both would wait for one another's.
                content = self._content(prompts, values)
                pending.append(thread.submit(self._cache._write, self._shelf, content))
                while len(pending) > MOST_QUEUED:
                    pending.popleft().result()

            yield store
            for writing in pending:
                writing.result()

    def _content(
        self, prompts: Sequence[str], values: Float[Tensor, "batch pos layer d_model"]
    ) -> bytes:
        if values.dtype not in HALF:
            values = values.float()
            for dtype in HALF:
                # One prompt tells as a rule, and the rest are not converted for nothing.
                if all(torch.equal(part.to(dtype).float(), part) for part in (values[:1], values)):
                    values = values.to(dtype)
                    break
        about = {"key": self._key, "prompts": [_hash(prompt) for prompt in prompts]}
        return _packed({"activations": values}, about)

    def _remove_abandoned(self) -> None:
        with suppress(OSError):
            for path in self._shelf.glob(f"{PARTIAL}*"):
                if time.time() - path.stat().st_mtime > ABANDONED:
                    path.unlink()


def _packed(tensors: dict[str, Tensor], about: dict[str, Any]) -> bytes:
    """A file's content."""
    owned = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    # One field, since safetensors writes several in an order that changes.
    return save(owned, {ABOUT: json.dumps(about, sort_keys=True)})


def _finished(shelf: Path) -> list[Path]:
    return sorted(shelf.glob("*.safetensors"))


def _hash(prompt: str) -> str:
    return hashlib.sha256(prompt.encode("utf-8", "surrogatepass")).hexdigest()


def _prompts(about: Mapping[str, Any]) -> list[str]:
    """The hashes of a file's prompts, in the order of its rows."""
    held = about.get("prompts")
    return [*map(str, held)] if isinstance(held, list) else []


def _about(path: Path) -> dict[str, Any]:
    """What a file says of itself, unverified; nothing if what stands at its start is no header."""
    with suppress(OSError), path.open("rb") as file:
        n_bytes = int.from_bytes(file.read(8), "little")
        if n_bytes <= _size(path):
            return _parsed(file.read(n_bytes))
    return {}


def _parsed(header: bytes) -> dict[str, Any]:
    try:
        about = json.loads(json.loads(header)["__metadata__"][ABOUT])
    except (ValueError, RecursionError, KeyError, TypeError):
        return {}
    return about if isinstance(about, dict) else {}


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _sync_names(folder: Path) -> None:
    """Have the folder's names on the disk too; Windows does so by itself."""
    if sys.platform == "win32":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
