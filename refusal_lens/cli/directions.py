"""The commands about direction files: `refusal-lens compare` and `refusal-lens convert`."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from ..errors import InputError

if TYPE_CHECKING:
    from ..directions.formats import Directions

ENDINGS = (".safetensors", ".npy", ".gguf")
"""What `convert` writes."""

# tyro would show "{None}|STR" for an option that may be left out.
Text = Annotated[str | None, tyro.conf.arg(metavar="TEXT", help_behavior_hint="")]
Number = Annotated[int | None, tyro.conf.arg(metavar="INT", help_behavior_hint="")]
Hook = Annotated[
    Literal["resid_pre", "resid_post"] | None,
    tyro.conf.arg(metavar="{resid_pre,resid_post}", help_behavior_hint=""),
]
Numbers = Annotated[tuple[int, ...], tyro.conf.arg(metavar="INT ...", help_behavior_hint="")]


@dataclass(frozen=True)
class Compare:
    """Compare two files of directions: their cosine across layers, and what to hold against it.

    Reads what `refusal-lens run` wrote (a folder: say which contrast with --key-a, --key-b), and
    other projects' files: Arditi et al.'s mean_diffs.pt and direction.pt, safetensors, .npy, .json
    and GGUF control vectors. Layers are told in this package's counting (l is the output of block
    l), with every translation stated. A file compared with itself shows how its direction moves
    from layer to layer.
    """

    a: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="A")]
    """File of directions, or a run's folder."""
    b: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="B")]
    """The other."""
    key_a: Text = None
    """Which tensor of A, where it holds several."""
    key_b: Text = None
    """Which tensor of B."""
    position_a: Text = None
    """Position of A: which, of several (default: the last, -1), else the one it was read at."""
    position_b: Text = None
    """Position of B."""
    layer_a: Number = None
    """Layer of A, where it holds a single direction, in its own counting."""
    layer_b: Number = None
    """Layer of B."""
    hook_a: Hook = None
    """What layer l of A is: the input of block l (resid_pre) or its output (resid_post)."""
    hook_b: Hook = None
    """What layer l of B is."""
    model_a: Text = None
    """The model that A belongs to, where the file doesn't say."""
    model_b: Text = None
    """The model that B belongs to."""

    def __call__(self) -> None:
        """Run it."""
        from ..directions.formats import compare

        a = _read(self.a, self.key_a, self.position_a, self.layer_a, self.hook_a, self.model_a)
        b = _read(self.b, self.key_b, self.position_b, self.layer_b, self.hook_b, self.model_b)
        print(compare(a, b))


@dataclass(frozen=True)
class Convert:
    """Convert a file of directions into the format that another tool loads.

    The ending of OUT decides: .safetensors or .npy, with all that is known beside the numbers, or
    .gguf, a control vector as repeng and llama.cpp load it. OUT is written whole or not at all;
    what was there under that name is replaced.
    """

    source: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="IN")]
    """File of directions, or a run's folder (say which contrast with --key)."""
    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")]
    """File to write: .safetensors, .npy or .gguf."""
    key: Text = None
    """Which tensor of IN, where it holds several."""
    position: Text = None
    """Which position of IN, of several (default: the last, -1), else the one it was read at."""
    layer: Number = None
    """Layer of IN, where it holds a single direction, in its own counting."""
    hook: Hook = None
    """What layer l of IN is: the input of block l (resid_pre) or its output (resid_post)."""
    model: Text = None
    """The model that the directions belong to, where IN doesn't say."""
    model_type: Text = None
    """For .gguf: the model_type of the model's Hugging Face configuration, such as llama."""
    layers: Numbers = ()
    """Keep these layers alone, in this package's counting. Default: all."""

    def __call__(self) -> None:
        """Run it."""
        from ..directions.formats import write_control_vector, write_directions

        suffix = self.out.suffix.lower()
        if suffix not in ENDINGS:
            raise InputError(f"{self.out}: OUT is written as {', '.join(ENDINGS)}, not this ending")
        if suffix == ".gguf" and not self.model_type:
            raise InputError(
                "a control vector names the type of its model: give --model-type, such as llama"
            )
        if suffix != ".gguf" and self.model_type:
            raise InputError(f"--model-type is for .gguf, and {self.out} is none: leave it out")
        read = _read(self.source, self.key, self.position, self.layer, self.hook, self.model)
        chosen = read.at(*sorted(set(self.layers))) if self.layers else read
        if suffix == ".gguf":
            write_control_vector(chosen, self.out, model_type=str(self.model_type))
        else:
            write_directions(chosen, self.out)
        print(chosen, f"Written to {self.out}", sep="\n")


def _read(
    path: Path,
    key: str | None,
    position: str | None,
    layer: int | None,
    hook: Literal["resid_pre", "resid_post"] | None,
    model: str | None,
) -> "Directions":
    from ..directions.formats import read_directions

    return read_directions(
        path, key=key, position=_position(position), layer=layer, hook=hook, model=model
    )


def _position(text: str | None) -> int | str | None:
    if text is None:
        return None
    try:
        return int(text)
    except ValueError:
        return text
