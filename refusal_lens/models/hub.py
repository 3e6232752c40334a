"""Find the files of a model: bundled, local, or fetched from the hub."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..errors import InputError
from . import gguf

ORGANISM = "organism:"
ORGANISMS_DIRECTORY = Path(__file__).parent.parent / "organisms"
ADAPTER = "adapter_config.json"  # the file that makes a folder an adapter of peft's
SHORT_NAMES = {"smollm2": "HuggingFaceTB/SmolLM2-135M-Instruct"}

CONFIG_FILES = ("config.json",)
TOKENIZER_FILES = ("*.json", "*.txt", "*.jinja", "*.model")
WEIGHT_FILES = ("*.safetensors",)
PICKLED_WEIGHT_FILES = ("pytorch_model*.bin",)

# Messages by the hub's exceptions, a subclass before its base class.
PROBLEMS = json.loads(Path(__file__).with_name("hub_errors.json").read_text("utf-8"))

SAMPLE_BYTES = 65_536
SAMPLES_PER_FILE = 64


@dataclass(frozen=True)
class Checkpoint:
    """A directory of model files, or the one GGUF file in it that `header` describes.

    `revision` is the hub's commit hash, if any; `adapters` are folders of LoRA weights to be added.
    """

    name: str
    directory: Path
    revision: str | None = None
    header: gguf.Reader | None = None
    adapters: tuple[Path, ...] = ()

    @property
    def source(self) -> dict[str, Any]:
        """Where the `from_pretrained` of a configuration, tokenizer or model reads."""
        source: dict[str, Any] = {"pretrained_model_name_or_path": self.directory}
        source |= {"gguf_file": self.header.path.name} if self.header else {}
        return source | {"trust_remote_code": False}

    def files(self) -> list[Path]:
        """The files that decide what the model computes, and any others of its directory."""
        folders = [*self.adapters] if self.header else [self.directory, *self.adapters]
        files = [path for folder in folders for path in sorted(folder.iterdir()) if path.is_file()]
        return [self.header.path, *files] if self.header else files

    def fingerprint(self) -> str:
        """SHA-256 of the configuration and samples of every weight file; no proof of authenticity."""
        config = self.directory / "config.json"
        digest = hashlib.sha256(b"" if self.header else config.read_bytes())
        for path in self.files():
            if path.suffix not in (".safetensors", ".bin", ".gguf"):
                continue
            size = path.stat().st_size
            digest.update(f"{path.name} {size}".encode())
            step = max(SAMPLE_BYTES, size // SAMPLES_PER_FILE)
            with path.open("rb") as file:
                for start in range(0, size, step):
                    file.seek(start)
                    digest.update(file.read(SAMPLE_BYTES))
        return digest.hexdigest()

    def holds(self, patterns: Sequence[str]) -> bool:
        """Whether any file of the directory matches any of the patterns."""
        return any(any(self.directory.glob(pattern)) for pattern in patterns)


def find_checkpoint(
    name: str, files: Sequence[str] = CONFIG_FILES, *, revision: str | None = None
) -> Checkpoint:
    """Return the directory that a name stands for, as in `load_model`.

    A folder of several adapters adds them up. Of a hub name, only files of the patterns `files` are
    downloaded. InputError if the name or revision does not exist, can't be fetched, or is gated.
    """
    model, _, adapter = name.rpartition("+")
    for folder in (ORGANISMS_DIRECTORY / "adapters" / adapter, Path(adapter).expanduser()):
        if model and (found := sorted(file.parent for file in folder.glob(f"**/{ADAPTER}"))):
            base = find_checkpoint(model, files, revision=revision)
            return replace(base, name=name, adapters=tuple(found))
    if name.startswith(ORGANISM):
        bundled = sorted(path.parent.name for path in ORGANISMS_DIRECTORY.glob("*/config.json"))
        if (organism := name.removeprefix(ORGANISM)) not in bundled:
            raise InputError(f"there is no organism {organism!r}: there are {', '.join(bundled)}")
        return Checkpoint(name, ORGANISMS_DIRECTORY / organism)
    directory = Path(name).expanduser()
    if directory.is_file() or directory.suffix == ".gguf":
        return Checkpoint(name, directory.parent, header=gguf.read_header(directory))
    if name and directory.is_dir():
        if not (directory / "config.json").is_file():
            raise InputError(f"the directory {name} holds no model: it has no config.json")
        return Checkpoint(name, directory)
    if name.startswith(("/", "./", "../", "~")) or name.count("/") > 1:
        raise InputError(f"there is no directory {name}: check the path")
    return _download(SHORT_NAMES.get(name, name), files, revision)


def _download(name: str, files: Sequence[str], revision: str | None) -> Checkpoint:
    """The checkpoint in the hub's cache; InputError if the hub does not give it."""
    from huggingface_hub import errors, hf_hub_download, snapshot_download

    try:
        # The request for a single small file gives a clear error.
        config = Path(hf_hub_download(name, "config.json", revision=revision))
        if tuple(files) != CONFIG_FILES:
            only: Any = {"allow_patterns": [*files], "ignore_patterns": ["*/*", "consolidated*"]}
            snapshot_download(name, revision=config.parent.name, **only)
        return Checkpoint(name, config.parent, config.parent.name)
    except tuple(getattr(errors, kind) for kind in PROBLEMS) as error:
        kind = next(kind for kind in PROBLEMS if isinstance(error, getattr(errors, kind)))
        status = getattr(getattr(error, "response", None), "status_code", "nothing")
    raise InputError(PROBLEMS[kind].format(name=name, revision=revision, status=status))
