"""Directions -> files and objects that other projects load."""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from ...activations import disk as artifacts
from ...errors import InputError
from .gguf import OURS
from .known import Directions

if TYPE_CHECKING:
    from steering_vectors import SteeringVector


def write_directions(directions: Directions, path: str | Path) -> Path:
    """Write directions with all that is known of them, whole or not at all.

    `NAME.safetensors` carries what is known as its metadata; `NAME.npy` holds the numbers alone
    (bfloat16 as float32, which loses nothing) and `NAME.npy.json` the rest. `read_directions` gives
    back the same either way.

    Raises:
        InputError: on any other ending, and if the folder can't be written.
    """
    path = Path(path)
    vectors = directions.vectors.detach().cpu()
    if path.suffix == ".safetensors":
        with artifacts.whole_directory(path.parent) as staging:
            artifacts.write_tensors(
                staging / path.name, {"directions": vectors}, metadata=directions.metadata()
            )
    elif path.suffix == ".npy":
        if vectors.dtype == torch.bfloat16:
            vectors = vectors.float()
        with artifacts.whole_directory(path.parent) as staging:
            np.save(staging / path.name, vectors.numpy(), allow_pickle=False)
            artifacts.write_json(staging / f"{path.name}.json", directions.metadata())
    else:
        raise InputError(
            f"{path}: directions are written as .safetensors or .npy (and by write_control_vector "
            "as .gguf)"
        )
    return path


def write_control_vector(directions: Directions, path: str | Path, *, model_type: str) -> Path:
    """Write a GGUF control vector, which repeng loads; float32.

    `model_type` is the `model_type` of the model's Hugging Face configuration ("llama", "qwen2");
    repeng compares it before it adds two vectors. llama.cpp steers no layer 0 and refuses a file
    that names it: leave it out there, `directions.at(*directions.layers[1:])`. Needs the package
    `gguf` (the extra of that name).

    Raises:
        InputError: if the layers are unknown or include the embedding's output, if the folder
            can't be written, and where `gguf` is missing.
    """
    layers = _block_layers(directions, "a control vector")
    try:
        import gguf
    except ImportError as error:
        raise InputError(
            "writing control vectors needs the package gguf: pip install 'refusal_lens[gguf]'"
        ) from error
    path = Path(path)
    with artifacts.whole_directory(path.parent) as staging:
        writer = gguf.GGUFWriter(staging / path.name, "controlvector")
        writer.add_string("controlvector.model_hint", model_type)
        writer.add_uint32("controlvector.layer_count", len(layers))
        for name, value in directions.metadata().items():
            writer.add_string(OURS + name, value)
        for layer, vector in zip(layers, directions.vectors, strict=True):
            writer.add_tensor(f"direction.{layer}", vector.detach().cpu().float().numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return path


def to_steering_vector(directions: Directions) -> "SteeringVector":
    """The directions as a `steering_vectors.SteeringVector` on the outputs of the blocks.

    That package counts layers as this one does. It knows no embedding's output: there -1 is the
    last block, so it is refused here.

    Raises:
        InputError: if the layers are unknown or include the embedding's output, and where the
            package steering-vectors is missing.
    """
    layers = _block_layers(directions, "a steering vector")
    try:
        from steering_vectors import SteeringVector
    except ImportError as error:
        raise InputError(
            "this needs the package steering-vectors, whose own requirements ask for an older "
            "transformers than it needs: pip install --no-deps steering-vectors"
        ) from error
    vectors = directions.vectors.detach().clone()
    return SteeringVector(
        layer_activations=dict(zip(layers, vectors, strict=True)), layer_type="decoder_block"
    )


def _block_layers(directions: Directions, what: str) -> tuple[int, ...]:
    if directions.layers is None:
        raise InputError(
            f"{directions.source} doesn't say which layers its rows are, and {what} must: read it "
            "with hook='resid_post' or 'resid_pre'"
        )
    if directions.layers[0] < 0:
        raise InputError(
            f"{what} has no place for the embedding's output (layer -1) of {directions.source}: "
            "leave it out with .at(...)"
        )
    return directions.layers
