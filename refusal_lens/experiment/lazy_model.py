"""A model that is loaded only when something has to be computed, and known before it is."""

import hashlib
from functools import cache, cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from ..models.hub import (
    CONFIG_FILES,
    PICKLED_WEIGHT_FILES,
    TOKENIZER_FILES,
    WEIGHT_FILES,
    find_checkpoint,
)
from ..models.load import DEFAULT_MODEL, LensModel, load_model, placement

PACKAGES = ("refusal_lens", "transformer_lens", "transformers", "tokenizers", "torch")
NOT_DECIDING = ("cli.py", "report.py", "plotting/*.py", "organisms/*.py")
"""Of the package's own source, what can't change a number."""


class LazyModel:
    """A model by its name, as `load_model` takes it; calling this loads it, the first time.

    Raises:
        InputError: as `load_model`: a name or device that is wrong at once, the rest when called.
    """

    def __init__(
        self,
        name: str = DEFAULT_MODEL,
        *,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        revision: str | None = None,
        n_devices: int = 1,
    ):
        self.name, self._n_devices = name, n_devices
        self._device, self._dtype = placement(name, device, dtype, n_devices)
        self._checkpoint = find_checkpoint(name, revision=revision)
        self._loaded: LensModel | None = None

    def __call__(self) -> LensModel:
        """The model."""
        if self._loaded is None:
            self._loaded = load_model(
                self.name,
                device=self._device,
                dtype=self._dtype,
                revision=self._checkpoint.revision,
                n_devices=self._n_devices,
            )
        return self._loaded

    @property
    def is_loaded(self) -> bool:
        """Whether it has been called."""
        return self._loaded is not None

    @cached_property
    def identity(self) -> dict[str, Any]:
        """Everything about the model and the software that can change a number, as a key of it.

        A model of the hub is its commit. A directory is what its files hold; of weights that are
        only sampled, also when they were last written.
        """
        return {
            "model": self.name,
            "files": self._checkpoint.revision or self._files(),
            "dtype": str(self._dtype).removeprefix("torch."),
            "device": self._device.type,
            "matmul precision": torch.get_float32_matmul_precision(),
            "versions": {package: version(package) for package in PACKAGES},
            "source": _source(),
        }

    def _files(self) -> dict[str, str]:
        files = {"sample": self._checkpoint.fingerprint()}
        for pattern in (*CONFIG_FILES, *TOKENIZER_FILES):
            for path in self._checkpoint.directory.glob(pattern):
                files[path.name] = hashlib.sha256(path.read_bytes()).hexdigest()
        for pattern in (*WEIGHT_FILES, *PICKLED_WEIGHT_FILES):
            for path in self._checkpoint.directory.glob(pattern):
                files[path.name] = str(path.stat().st_mtime_ns)
        return files


@cache
def _source() -> str:
    """A hash of the package's source, so that a change of it is a new version, released or not."""
    folder = Path(__file__).parent
    left_out = {path for pattern in NOT_DECIDING for path in folder.glob(pattern)}
    found = hashlib.sha256()
    for path in sorted({*folder.rglob("*.py")} - left_out):
        found.update(path.relative_to(folder).as_posix().encode() + b"\n" + path.read_bytes())
    return found.hexdigest()
