"""The commands for files of directions: `refusal-lens compare` and `refusal-lens convert`."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

import refusal_lens as rl

from .options import Number, Text

ENDINGS = (".safetensors", ".npy", ".gguf")  # formats that `convert` writes

Hook = Annotated[
    Literal["resid_pre", "resid_post"] | None,
    tyro.conf.arg(metavar="{resid_pre,resid_post}", help_behavior_hint=""),
]
Numbers = Annotated[tuple[int, ...], tyro.conf.arg(metavar="INT ...", help_behavior_hint="")]


@dataclass(frozen=True)
class FileOptions:
    """What a file of directions does not specify."""

    key: Text = None  # Name of one of several tensors; for the folder of a run, the contrast.
    position: Text = None  # One of several positions (default: -1), or the position of the file.
    layer: Number = None  # Layer of a single direction, in the file's own count.
    hook: Hook = None  # resid_pre: layer l is the input of block l; resid_post: its output.
    model: Text = None  # Model of the directions, if the file does not name it.

    def read(self, path: Path) -> "rl.formats.Directions":
        """Return the directions in a file or in the folder of a run."""
        number = re.fullmatch(r"-?\d+", self.position or "")
        position = int(number[0]) if number else self.position
        return rl.formats.read_directions(path, **(vars(self) | {"position": position}))


@dataclass(frozen=True)
class Compare:
    """Compare two files of directions by their cosine at every layer, with a baseline.

    Reads the folder of a run (name a contrast with --a.key, --b.key) and files of other projects:
    mean_diffs.pt and direction.pt of Arditi et al., safetensors, .npy, .json and GGUF control vectors.
    Layer l is the output of block l; the output states every conversion. A file compared with itself
    shows how its direction changes from layer to layer.
    """

    first: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="A")]  # First file or run.
    second: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="B")]  # Other file or run.
    a: FileOptions = FileOptions()
    b: FileOptions = FileOptions()

    def __call__(self) -> None:
        """Run the command."""
        print(rl.formats.compare(self.a.read(self.first), self.b.read(self.second)))


@dataclass(frozen=True)
class Convert:
    """Convert a file of directions into the format that another tool loads.

    OUT ends with .safetensors or .npy, both with metadata, or with .gguf, a control vector for
    llama.cpp and repeng, without layer 0, which llama.cpp can't steer. An existing file is replaced.
    """

    source: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="IN")]
    """File of directions, or the folder of a run (name a contrast with --key)."""
    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")]  # File to write.
    file: tyro.conf.OmitArgPrefixes[FileOptions] = FileOptions()
    model_type: Text = None  # For .gguf: model_type in the Hugging Face configuration (llama).
    layers: Numbers = ()  # Layers to keep, in this package's count. Default: all.

    def __call__(self) -> None:
        """Run the command."""
        suffix = self.out.suffix.lower()
        if suffix not in ENDINGS:
            raise rl.InputError(f"{self.out}: choose {', '.join(ENDINGS)}, not this ending")
        if (suffix == ".gguf") != bool(self.model_type):
            raise rl.InputError("--model-type, such as llama, is for .gguf alone, which needs it")
        directions = self.file.read(self.source)
        if self.layers:
            directions = directions.at(*sorted(set(self.layers)))
        if suffix == ".gguf":
            rl.formats.write_control_vector(directions, self.out, model_type=str(self.model_type))
        else:
            rl.formats.write_directions(directions, self.out)
        print(rl.formats.read_directions(self.out), f"Written to {self.out}", sep="\n")
