"""Types and options that several commands share."""

import re
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

import refusal_lens as rl

from ..errors import InputError
from ..experiment.distributed import own_device
from ..prompts.protocol import Protocol

if TYPE_CHECKING:
    from transformer_lens import HookedTransformer
    from transformer_lens.model_bridge import TransformerBridge

MODEL = "meta-llama/Meta-Llama-3-8B-Instruct"

# Without these annotations tyro shows "{None}|STR" for an optional value.
Text = Annotated[str | None, tyro.conf.arg(metavar="TEXT", help_behavior_hint="")]
Number = Annotated[int | None, tyro.conf.arg(metavar="INT", help_behavior_hint="")]
Folder = Annotated[Path | None, tyro.conf.arg(metavar="PATH", help_behavior_hint="")]


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """Options of every command that runs a model and writes a folder."""

    model: str = MODEL  # Hub name, directory, or organism:specific, :entangled or :oblivious.
    out: Folder = None  # Folder for the results. Default: a folder in runs/ named after the model.
    device: Text = None  # cuda, cpu, ... Default: the GPU where there is one.
    n_devices: int = 1  # GPUs over which to spread the layers of a model that exceeds one.
    quiet: bool = False  # Print nothing but the results.
    verbose: bool = False  # Log progress and problems on stderr.

    def load(self) -> "HookedTransformer | TransformerBridge":
        """Return the model, on the device of this process."""
        device = own_device(self.device, self.n_devices)
        return rl.load_model(self.model, device=device, n_devices=self.n_devices)

    def folder(self, suffix: str = "") -> Path:
        """Return the folder for the results; the default name ends with `suffix`."""
        return self.out or Path("runs") / (
            re.sub(r"[^\w.-]+", "-", self.model).strip("-.") + suffix
        )


@dataclass(frozen=True, kw_only=True)
class ProtocolOptions:
    """Options of every command that formats prompts."""

    system_prompt: Text = None  # System prompt before every prompt. Default: none.
    chat_template: Text = None  # Jinja file, or a name: the tokenizer has it, or plain.
    thinking: bool = True  # Close the block of thought that opens a thinking model's reply.
    date: str = Protocol.date  # Today, for chat templates that read the clock.

    def protocol(self, *positions: str, generation_prompt: bool = True) -> Protocol:
        """Return the protocol that reads these positions."""
        chosen: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(ProtocolOptions)}
        if (template := self.chat_template) and re.search(r"[./\\]", template):
            try:
                chosen["chat_template"] = Path(template).read_text("utf-8")
            except (OSError, UnicodeError) as error:
                raise InputError(f"--chat-template {template} can't be read: {error}") from error
        read = tuple(map(token_position, positions))
        return Protocol(**chosen, positions=read, generation_prompt=generation_prompt)


def token_position(text: str) -> int | str:
    """Return a position as a number from the end of the prompt, or as a name."""
    return int(text) if re.fullmatch(r"-?\d+", text) else text
