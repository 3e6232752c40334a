"""Types and options that several commands share."""

import re
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

import refusal_lens as rl

from ..activations import disk
from ..activations.store import default_folder
from ..errors import InputError
from ..experiment.distributed import is_main, own_device
from ..prompts.protocol import Protocol

if TYPE_CHECKING:
    from ..models import HookedModel

MODEL = "meta-llama/Meta-Llama-3-8B-Instruct"

# Without these annotations tyro shows "{None}|STR" for an optional value.
Text = Annotated[str | None, tyro.conf.arg(metavar="TEXT", help_behavior_hint="")]
Number = Annotated[int | None, tyro.conf.arg(metavar="INT", help_behavior_hint="")]
Flag = Annotated[bool, tyro.conf.arg(help_behavior_hint="")]
Folder = Annotated[Path | None, tyro.conf.arg(metavar="PATH", help_behavior_hint="")]


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """Options of every command that runs a model and writes a folder."""

    model: str = MODEL  # Hub name, directory, GGUF file or organism:specific; +ADAPTER may follow.
    out: Folder = None  # Folder for the results. Default: a folder in runs/ named after the model.
    device: Text = None  # cuda, cpu, ... Default: the GPU where there is one.
    n_devices: int = 1  # GPUs over which to spread the layers of a model that exceeds one.
    quiet: Flag = False  # Print nothing but the results.
    verbose: Flag = False  # Log progress and problems on stderr.

    def start(self, suffix: str = "") -> Path:
        """Return the folder for the results, after a check that it can be written to."""
        out = self.out or Path("runs") / (re.sub(r"[^\w.-]+", "-", self.model).strip("-.") + suffix)
        if is_main():
            disk.check_writable(out)
        return out

    def load(self) -> "HookedModel":
        """Return the model, on the device of this process."""
        device = own_device(self.device, self.n_devices)
        return rl.load_model(self.model, device=device, n_devices=self.n_devices)


@dataclass(frozen=True, kw_only=True)
class CacheOptions:
    """Options of every command that keeps finished work."""

    cache: Folder = None  # Finished work. Default: $REFUSAL_LENS_CACHE or among the user's caches.
    no_cache: Flag = False  # Neither store nor use finished work.

    @property
    def store(self) -> Path | None:
        """The folder of finished work; None without a cache."""
        return None if self.no_cache else self.cache or default_folder()


@dataclass(frozen=True, kw_only=True)
class RefusalOptions:
    """Options of every command that reads the prompts of refusal."""

    refusal: str = "refusal"  # Bundled contrast of refusal.
    target: Text = None
    """Your own harmful prompts instead: a text file, FILE:COLUMN of a table, or a dataset,
    OWNER/NAME@SPLIT:COLUMN. :LABEL=VALUE after the column takes the rows with this label."""
    baseline: Text = None  # Your own harmless prompts; required with --target.
    keep_duplicates: Flag = False  # Count your own prompts as often as they stand on their side.

    def own(self) -> "rl.Contrast | str":
        """Return the contrast of refusal, or the name of a bundled one."""
        return contrast("target", self.target, self.baseline, self.keep_duplicates) or self.refusal


@dataclass(frozen=True, kw_only=True)
class ContrastOptions(RefusalOptions):
    """Options of every command that compares refusal with another contrast."""

    against: str = "negativity"  # Bundled contrast to compare refusal with.
    against_target: Text = None  # Your own prompts for the other contrast, as with --target.
    against_baseline: Text = None  # Their baseline; required with --against-target.
    max_prompts: Number = None  # Use only so many prompts of every set. Default: all.

    def concepts(self) -> dict[str, Any]:
        """Return the contrasts as `Config` takes them."""
        target, baseline = self.against_target, self.against_baseline
        other = contrast("against-target", target, baseline, self.keep_duplicates)
        return {"refusal": self.own(), "negativity": other or self.against}


@dataclass(frozen=True, kw_only=True)
class ProtocolOptions:
    """Options of every command that formats prompts."""

    system_prompt: Text = None  # System prompt before every prompt. Default: none.
    chat_template: Text = None  # Jinja file, or a name: the tokenizer has it, or plain.
    thinking: Flag = True  # Close the block of thought that opens a thinking model's reply.
    date: str = Protocol.date  # Today, for chat templates that read the clock.

    def protocol(self, *positions: str, generation_prompt: bool = True) -> Protocol:
        """Return the protocol that reads these positions."""
        chosen: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(ProtocolOptions)}
        if (template := self.chat_template) and re.search(r"[./\\]", template):
            try:
                chosen["chat_template"] = Path(template).read_text("utf-8")
            except (OSError, UnicodeError) as error:
                raise InputError(f"--chat-template {template} can't be read: {error}") from error
        return Protocol(**chosen, positions=positions, generation_prompt=generation_prompt)


def contrast(
    flag: str, target: str | None, baseline: str | None, keep_duplicates: bool
) -> "rl.Contrast | None":
    """Return the contrast of a user's own prompts, if any."""
    if target and baseline:
        return rl.contrast_from_prompts(target, baseline, keep_duplicates=keep_duplicates)
    if target or baseline:
        raise InputError(f"--{flag} and its baseline go together: give both")
    return None
