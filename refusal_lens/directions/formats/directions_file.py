"""`Directions` with their metadata, and the files that other projects load."""

import json
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGUFWriter
from jaxtyping import Float
from torch import Tensor

from ...activations import disk
from ...errors import InputError

ROWS = "row l is blocks.{l}.hook_resid_post"  # metadata entry `layer` of this package's files
MOST_LAYERS = 10_000  # a file with a larger layer number is damaged
GGUF_PREFIX = "refusal_lens."  # of metadata entries in a control vector; other readers ignore them
FACTS = ("position", "model", "contrast", "normalisation")
FileMetadata = dict[str, Any]  # fields of `Directions`, and `hook`, the hook point in block `l`


@dataclass(frozen=True, eq=False, repr=False)
class Directions:
    """One direction per layer, and metadata; None stands for unknown metadata.

    Attributes:
        vectors: in the dtype and with the norms of the file, finite.
        layers: layer of each row, ascending: `l` for `blocks.{l}.hook_resid_post`, -1 for the
            output of the embedding (`blocks.0.hook_resid_pre`).
        source, model: the file, and the model of the directions.
        position: token position, from the end of the prompt.
        contrast, normalisation: such as "harmful - harmless", and the meaning of the norms.
        notes: every conversion that `read_directions` applied, in words.
    """

    vectors: Float[Tensor, "layer d_model"]
    layers: tuple[int, ...] | None
    source: str
    position: int | str | None = None
    model: str | None = None
    contrast: str | None = None
    normalisation: str | None = None
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.vectors.numel() == 0:
            raise InputError(f"{self.source} holds no numbers: shape {list(self.vectors.shape)}")
        if bad := (~self.vectors.isfinite().all(-1)).nonzero().flatten().tolist():
            raise InputError(f"{self.source} holds a value that is not finite in row {bad[0]}")
        layers = range(len(self.vectors)) if self.layers is None else self.layers
        ascending = all(here < after for here, after in pairwise((-2, *layers, MOST_LAYERS)))
        if len(layers) != len(self.vectors) or not ascending:
            found = f"{self.source} numbers its {len(self.vectors)} rows as layers {_short(layers)}"
            raise InputError(f"{found}: there must be one a row, ascending from -1 or above")

    def at(self, *layers: int) -> "Directions":
        """The directions of some `layers`, ascending. InputError if there is no such layer."""
        known = self.layers or ()
        if missing := [layer for layer in layers if layer not in known]:
            raise InputError(f"{self.source} has no layer {missing[0]}: {self.describe_layers()}")
        rows = [known.index(layer) for layer in layers]
        return replace(self, vectors=self.vectors[rows], layers=layers)

    def metadata(self) -> dict[str, str]:
        """The known metadata as text, for a file."""
        known = {name: getattr(self, name) for name in FACTS}
        if self.layers is not None:
            known |= {"layer": ROWS, "layers": json.dumps(self.layers)}
        if self.notes:
            known["notes"] = json.dumps(self.notes)
        return {name: str(value) for name, value in known.items() if value is not None}

    def __repr__(self) -> str:
        facts = {name: getattr(self, name) for name in FACTS}
        known = [f"{k} {'unknown' if v is None else v}" for k, v in facts.items()]
        shape = f"{self.describe_layers()}, d_model {self.vectors.shape[1]}"
        return "\n  ".join([self.source, ", ".join([shape, *known]), *self.notes])

    def describe_layers(self) -> str:
        """The layers in words, for messages."""
        if self.layers is None:
            return f"{len(self.vectors)} rows of unknown layers"
        return f"layer{'s' if len(self.layers) > 1 else ''} {_short(self.layers)}"


def parse_metadata(entries: Mapping[str, object], source: str) -> FileMetadata:
    """Invert `Directions.metadata`. InputError for an entry that `metadata` never writes."""
    known: FileMetadata = {}
    for name in {"layer", "layers", "notes", *FACTS} & entries.keys():
        value: Any = entries[name]
        sound = isinstance(value, str)
        if sound and name in ("layers", "notes"):
            kind = int if name == "layers" else str
            with suppress(ValueError, RecursionError):
                value = json.loads(value)
            sound = isinstance(value, list) and all(type(item) is kind for item in value)
        if not sound:
            raise InputError(f"{source}: its metadata entry {name!r} is damaged, write it anew")
        known[name] = tuple(value) if isinstance(value, list) else value
    if re.fullmatch(r"-?\d{1,9}", known.get("position", "")):
        known["position"] = int(known["position"])
    if known.pop("layer", None) == ROWS:
        known["hook"] = "resid_post"
    return known


def write_directions(directions: Directions, path: str | Path) -> Path:
    """Write `directions` with their metadata, atomically, for `read_directions`.

    `path` is `NAME.safetensors` with the metadata inside, or `NAME.npy` (bfloat16 as float32) with
    `NAME.npy.json` beside. InputError for another ending, or an unwritable folder.
    """
    path = Path(path)
    if path.suffix not in (".safetensors", ".npy"):
        raise InputError(f"{path}: files are written as .safetensors, .npy or a control vector")
    vectors, metadata = directions.vectors.detach().cpu(), directions.metadata()
    with disk.whole_directory(path.parent) as staging:
        if path.suffix == ".safetensors":
            disk.write_tensors(staging / path.name, {"directions": vectors}, metadata=metadata)
        else:
            numbers = vectors.float() if vectors.dtype == torch.bfloat16 else vectors
            np.save(staging / path.name, numbers.numpy(), allow_pickle=False)
            disk.write_json(staging / f"{path.name}.json", metadata)
    return path


def write_control_vector(directions: Directions, path: str | Path, *, model_type: str) -> Path:
    """Write a GGUF control vector in float32, which llama.cpp and repeng load.

    `direction.{l}` is added to the output of block `l`. llama.cpp takes none for block 0 and
    rejects a file that has one, so layer 0 is left out.

    Args:
        directions: InputError if their layers are unknown, include -1, the embedding's output, or
            are only layer 0.
        path: the file, written atomically. InputError if the folder can't be written.
        model_type: `model_type` of the model's Hugging Face configuration, such as "llama".
    """
    layers, path = directions.layers, Path(path)
    if layers is None or layers[0] < 0:
        found = f"{directions.source} has {directions.describe_layers()}"
        advice = "read it with hook=, leave layer -1 (the embedding) out with .at()"
        raise InputError(f"{found}, and must say which layers follow a block: {advice}")
    if layers == (0,):
        only = "has only layer 0, which llama.cpp can't steer: give later layers"
        raise InputError(f"{directions.source} {only}")
    if layers[0] == 0:
        layers, note = layers[1:], "layer 0 left out, which llama.cpp can't steer"
        directions = replace(directions.at(*layers), notes=(*directions.notes, note))
    with disk.whole_directory(path.parent) as staging:
        writer = GGUFWriter(staging / path.name, "controlvector")
        writer.add_string("controlvector.model_hint", model_type)
        writer.add_uint32("controlvector.layer_count", len(layers))
        for name, value in directions.metadata().items():
            writer.add_string(GGUF_PREFIX + name, value)
        for layer, vector in zip(layers, directions.vectors, strict=True):
            writer.add_tensor(f"direction.{layer}", vector.detach().cpu().float().numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return path


def _short(layers: Sequence[int]) -> str:
    if len(layers) > 1 and all(after == here + 1 for here, after in pairwise(layers)):
        return f"{layers[0]} to {layers[-1]}"
    return ", ".join(str(layer)[:9] for layer in layers[:8]) + ", ..." * (len(layers) > 8)
