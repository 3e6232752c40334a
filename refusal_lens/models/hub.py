"""A model's name becomes a directory of its files: bundled, local, or fetched from the hub."""

import getpass
import hashlib
import json
import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import InputError

ORGANISM = "organism:"
ORGANISMS_DIRECTORY = Path(__file__).parent.parent / "organisms"

CONFIG_FILES = ("config.json",)
TOKENIZER_FILES = ("*.json", "*.txt", "*.jinja", "*.model")
WEIGHT_FILES = ("*.safetensors",)
PICKLED_WEIGHT_FILES = ("pytorch_model*.bin",)

SAMPLE_BYTES = 65_536
SAMPLES_PER_FILE = 64

logger = logging.getLogger(__name__)

_typed: dict[str, str] = {}
"""Tokens that were typed in, by the model that each opened: in memory alone, for this process."""


@dataclass(frozen=True)
class Checkpoint:
    """A directory of model files, and how to find the same again.

    `revision` is the hub's commit hash; of a directory of one's own it is `None`, and
    `fingerprint` tells its versions apart.
    """

    name: str
    directory: Path
    revision: str | None = None

    def fingerprint(self) -> str:
        """SHA-256 of the configuration and of samples of every weight file.

        64 stretches of 64 KiB, evenly spread over each file: any training changes some byte of
        them, and 16 GB take milliseconds. Not proof against a forger.
        """
        digest = hashlib.sha256((self.directory / "config.json").read_bytes())
        weights = [*self.directory.glob("*.safetensors"), *self.directory.glob("*.bin")]
        for path in sorted(weights):
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

    def names_bos(self) -> bool:
        """Whether its tokenizer's files name a BOS token that can be put first; False if unknown."""
        try:
            text = (self.directory / "tokenizer_config.json").read_text("utf-8")
            bos = json.loads(text).get("bos_token")
        except (OSError, ValueError, AttributeError):
            return False
        bos = bos.get("content") if isinstance(bos, dict) else bos
        return isinstance(bos, str) and ":" not in bos


def find_checkpoint(
    name: str, files: Sequence[str] = CONFIG_FILES, *, revision: str | None = None
) -> Checkpoint:
    """The directory a name stands for, with at least those of the named files that there are.

    `name` is `organism:NAME`, a local directory, or a hub name. Only the last is downloaded,
    into the hub's own cache, and only what matches `files` and lies at the repository's top.

    Raises:
        InputError: if there is no such organism, directory, hub name or revision; if the hub can't
            be reached and the files were not fetched before; if the model is gated and no token
            opens it.
    """
    if name.startswith(ORGANISM):
        return _organism(name)
    directory = Path(name).expanduser()
    if name and directory.is_dir():
        if not (directory / "config.json").is_file():
            raise InputError(f"the directory {name} holds no model: it has no config.json")
        return Checkpoint(name, directory)
    if name.startswith(("/", "./", "../", "~")) or name.count("/") > 1:
        raise InputError(f"there is no directory {name}: check the path")
    return _fetched(name, files, revision)


def _organism(name: str) -> Checkpoint:
    there = sorted(path.parent.name for path in ORGANISMS_DIRECTORY.glob("*/config.json"))
    organism = name.removeprefix(ORGANISM)
    if organism not in there:
        raise InputError(
            f"there is no organism {organism!r}: there are {', '.join(there) or 'none'}"
        )
    return Checkpoint(name, ORGANISMS_DIRECTORY / organism)


def _fetched(name: str, files: Sequence[str], revision: str | None) -> Checkpoint:
    """Download from the hub, asking for a token where a gated model needs one."""
    from huggingface_hub import get_token

    fetched = _download(name, files, revision, _typed.get(name) or get_token())
    if fetched is None and (token := _ask_for_token(name)):
        fetched = _download(name, files, revision, token)
        if fetched is not None:
            _typed[name] = token
    if fetched is None:
        raise InputError(_gate(name))
    return fetched


def _download(
    name: str, files: Sequence[str], revision: str | None, token: str | None
) -> Checkpoint | None:
    """The checkpoint in the hub's cache; `None` if it is gated and the token does not open it."""
    from huggingface_hub import hf_hub_download, snapshot_download
    from huggingface_hub.errors import GatedRepoError

    try:
        # Asked for first and alone: of one small file the hub says clearly why it can't be had.
        config = Path(hf_hub_download(name, "config.json", revision=revision, token=token))
        commit = config.parent.name
        if tuple(files) != CONFIG_FILES:
            snapshot_download(
                name,
                revision=commit,
                token=token,
                allow_patterns=list(files),
                ignore_patterns=["*/*", "consolidated*"],
            )
    except GatedRepoError:
        return None
    except Exception as error:
        raise _as_input_error(error, name, revision) from None
    return Checkpoint(name, config.parent, commit)


def _ask_for_token(name: str) -> str | None:
    """A token typed by someone who is there to type it; never written down by us."""
    from huggingface_hub import get_token, notebook_login
    from huggingface_hub.utils import is_notebook

    if is_notebook():
        try:
            notebook_login(skip_if_logged_in=False)
        except Exception as error:  # the box is the hub's own, and so is whatever stops it
            why = f"{type(error).__name__}: {error}"
            logger.warning("the hub's login box can't be shown (%s)", why)
        return get_token()
    if sys.stdin is not None and sys.stdin.isatty():
        logger.warning(_gate(name))
        return getpass.getpass("Hugging Face token (hidden as you type; empty to stop): ") or None
    return None


def _gate(name: str) -> str:
    from huggingface_hub.utils import is_notebook

    log_in = (
        "run huggingface_hub.login() in a cell of its own, and this one again"
        if is_notebook()
        else "run: hf auth login"
    )
    return (
        f"{name} is gated: accept its conditions at https://huggingface.co/{name}, make a token at "
        "https://huggingface.co/settings/tokens, and set the environment variable HF_TOKEN to it "
        f"(or {log_in})"
    )


def _as_input_error(error: Exception, name: str, revision: str | None) -> Exception:
    """What a failed download means to the user; a failure that is none of theirs stays as it is."""
    from huggingface_hub.errors import (
        EntryNotFoundError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    if isinstance(error, HFValidationError):
        return InputError(
            f"{name!r} is no model: give organism:NAME, a directory, or a hub name (owner/model)"
        )
    if isinstance(error, RevisionNotFoundError):
        return InputError(
            f"{name} has no revision {revision!r} on the hub: give a branch, tag or commit"
        )
    if isinstance(error, RepositoryNotFoundError):
        return InputError(
            f"the hub has no model {name!r}, or it is private and HF_TOKEN does not open it: check "
            "the name (there is no such directory here either)"
        )
    if isinstance(error, (LocalEntryNotFoundError, OfflineModeIsEnabled)):
        return InputError(
            f"{name} has not been downloaded before and the hub can't be reached: check the "
            "network and HF_HUB_OFFLINE, or the name (there is no such directory here)"
        )
    if isinstance(error, EntryNotFoundError):
        return InputError(f"{name} on the hub holds no model: it has no config.json")
    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code if error.response is not None else "nothing"
        return InputError(f"the hub answers {status} when asked for {name}: try again later")
    return error
