"""Direction files of any origin -> `Directions`. Nothing in a file is run or believed unchecked."""

import math
import pickletools
import re
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from ...activations import disk as artifacts
from ...errors import InputError
from .gguf import read_control_vector
from .known import Directions, FileMetadata

MOST_POSITIONS = 32
"""Rows of a three-dimensional file's first axis that can still be positions, not prompts."""
LONGEST_DESCRIPTION = 2**20
"""Bytes in which a `.pt` file describes its tensors; the numbers themselves lie elsewhere."""

Hook = Literal["resid_pre", "resid_post"]
_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_PLAIN = {"collections OrderedDict", "torch._utils _rebuild_tensor_v2"} | {
    f"torch {kind}Storage" for kind in ("Double", "Float", "Half", "BFloat16", "Long", "Int")
}
"""All that the description of a plain tensor, or of a dictionary of them, ever names."""


def read_directions(
    path: str | Path,
    *,
    key: str | None = None,
    position: int | str | None = None,
    layer: int | None = None,
    hook: Hook | None = None,
    model: str | None = None,
) -> Directions:
    """Read directions that this or another project saved, in this package's counting.

    What is read, by its ending:

    - a folder: a saved run's `directions.safetensors`;
    - `.safetensors`, and a `.pt` dictionary of tensors: `key` says which, if there are several;
    - `.pt`: a plain tensor, or Arditi et al.'s `mean_diffs.pt` `[pos layer d_model]` and
      `direction.pt` `[d_model]` with its `direction_metadata.json` beside it. Both were read
      *before* the block: their layer `l` is layer `l - 1` here, their row 0 the embedding's output;
    - `.npy`: numbers, and what `write_directions` put beside them;
    - `.json`: a list of numbers, or of rows of them. The sentiment directions of Tigges et al.
      (`..._das_layer3.json`) were read before the block too;
    - `.gguf`: a control vector of repeng's or llama.cpp's.

    A tensor is `[d_model]`, `[layer d_model]` or `[pos layer d_model]` with the positions up to -1.
    A `path` whose name holds `{layer}` stands for one file a layer. Where a file leaves something
    open, the caller may state it, and what is stated goes before what the file says:

    Args:
        path: the file.
        key: which tensor of several.
        position: which position of several (default -1); else the position they were read at.
        layer: number of the layer of a single direction, in the file's own counting.
        hook: what that counting is: `l` means `blocks.{l}.hook_resid_pre` (Hugging Face's
            `hidden_states[l]` too) or `blocks.{l}.hook_resid_post`.
        model: the model they belong to.

    Raises:
        InputError: if the file is missing, damaged, hostile or holds no directions.

    References: Arditi et al. 2024, arXiv:2406.11717; Tigges et al. 2023, arXiv:2310.15154.
    """
    if "{layer}" in Path(path).name:
        tensor, said = _read_family(Path(path), key)
    else:
        tensor, said = _read_file(Path(path), key)
    source = str(path)
    notes = list(said.notes)
    vectors, said_position = _rows(tensor, position, said.position, source, notes)
    numbers = _numbers(len(vectors), tensor.ndim, said, layer, source, notes)
    counting = hook or said.hook
    if numbers is None or counting is None:
        layers = None
    elif counting == "resid_pre":
        layers = tuple(number - 1 for number in numbers)
        notes.append(
            "read before the block: its layer l is layer l - 1 here, its layer 0 the embedding's "
            "output (-1)"
        )
    else:
        layers = tuple(numbers)
    normalisation = said.normalisation
    norms = vectors.double().norm(dim=-1)
    if normalisation is None and bool(((norms - 1).abs() < 1e-3).all()):
        normalisation = "unit norm"
    return Directions(
        vectors=vectors,
        layers=layers,
        source=source if key is None else f"{source}:{key}",
        position=said_position,
        model=said.model if model is None else model,
        contrast=said.contrast,
        normalisation=normalisation,
        notes=tuple(notes),
    )


def _read_file(path: Path, key: str | None) -> tuple[Tensor, FileMetadata]:
    try:
        if path.is_dir():
            path = path / "directions.safetensors"
        if not path.is_file():
            raise InputError(f"no file {path}: name a file of directions or a run's folder")
        path.open("rb").close()
    except OSError as error:
        raise InputError(f"{path} can't be opened: {error.strerror}") from error
    readers: Mapping[str, Callable[[Path, str | None], tuple[Tensor, FileMetadata]]] = {
        ".safetensors": _read_safetensors,
        ".pt": _read_pt,
        ".pth": _read_pt,
        ".npy": lambda path, _: _read_npy(path),
        ".json": lambda path, _: (_read_json(path), _published(path)),
        ".gguf": lambda path, _: read_control_vector(path),
    }
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise InputError(f"{path}: directions are read from {', '.join(readers)}, not this ending")
    if key is not None and reader not in (_read_safetensors, _read_pt):
        raise InputError(f"{path} holds one set of directions: leave key={key!r} out")
    tensor, said = reader(path, key)
    if tensor.dtype not in _FLOATS:
        raise InputError(f"{path} holds {tensor.dtype}, and directions are floating-point numbers")
    if tensor.numel() == 0:
        raise InputError(f"{path} holds no numbers: its shape is {list(tensor.shape)}")
    if not 1 <= tensor.ndim <= 3:
        raise InputError(
            f"{path} holds a tensor of shape {list(tensor.shape)}: directions are [d_model], "
            "[layer d_model] or [pos layer d_model]"
        )
    return tensor, said


@contextmanager
def _at_fault(path: Path) -> Iterator[None]:
    """Whatever another library throws at a stranger's bytes is the file's fault, told in one line.

    Only around calls of such libraries: a fault of our own must stay visible.
    """
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise InputError(
            f"{path} can't be read as {path.suffix[1:]}: {reason}; fetch it anew"
        ) from error


def _read_family(pattern: Path, key: str | None) -> tuple[Tensor, FileMetadata]:
    before, _, after = pattern.name.partition("{layer}")
    name = re.compile(re.escape(before) + r"(\d{1,4})" + re.escape(after))
    files: dict[int, Path] = {}
    for file in sorted(pattern.parent.iterdir()) if pattern.parent.is_dir() else ():
        if match := name.fullmatch(file.name):
            number = int(match[1])
            if number in files:
                raise InputError(f"{files[number]} and {file} are both of layer {number}: keep one")
            files[number] = file
    if not files:
        raise InputError(f"no file like {pattern} with a number for {{layer}}")
    read = {number: _read_file(files[number], key) for number in sorted(files)}
    shapes = {tuple(tensor.shape) for tensor, _ in read.values()}
    if len(shapes) > 1 or len(next(iter(shapes))) != 1:
        raise InputError(
            f"{pattern}: every file must hold one [d_model], found {sorted(shapes)[:4]}"
        )
    said = next(said for _, said in read.values())
    layers = tuple(read)
    note = f"{len(layers)} files, their layers from their names"
    joined = torch.stack([tensor for tensor, _ in read.values()])
    return joined, replace(said, layers=layers, notes=(*said.notes, note))


def _rows(
    tensor: Tensor,
    asked: int | str | None,
    said: int | str | None,
    source: str,
    notes: list[str],
) -> tuple[Tensor, int | str | None]:
    """The rows at one position, and that position."""
    if tensor.ndim < 3:
        return torch.atleast_2d(tensor), said if asked is None else asked
    n_positions = len(tensor)
    if n_positions > MOST_POSITIONS:
        raise InputError(
            f"{source} is {list(tensor.shape)}: {n_positions} rows are prompts, not positions; "
            "hand activations to mean_difference and save its answer"
        )
    position = -1 if asked is None else asked
    if not isinstance(position, int) or not -n_positions <= position < 0:
        raise InputError(f"{source} holds the positions {-n_positions} to -1, not {position}")
    if n_positions > 1:
        notes.append(f"position {position} of its positions {-n_positions} to -1")
    return tensor[position], position


def _numbers(
    n_rows: int, ndim: int, said: FileMetadata, layer: int | None, source: str, notes: list[str]
) -> tuple[int, ...] | None:
    """The rows' layers in the file's own counting."""
    if layer is not None and n_rows > 1:
        raise InputError(f"{source} holds {n_rows} layers: layer= is for a single direction")
    if layer is not None:
        return (layer,)
    if said.layers is not None:
        return said.layers
    in_name = re.search(r"layer[_-]?(\d{1,4})(?!\d)", Path(source).name)
    if ndim == 1 and in_name:
        notes.append(f"layer {int(in_name[1])} in its own counting, from its name")
        return (int(in_name[1]),)
    return tuple(range(n_rows)) if ndim > 1 else None


def _published(path: Path) -> FileMetadata:
    """What the names of published files tell to those who know the project."""
    difference = FileMetadata(
        hook="resid_pre",
        contrast="harmful - harmless",
        normalisation="none: mean(harmful) - mean(harmless)",
    )
    if "mean_diffs" in path.stem:
        return difference
    beside = path.with_name(f"{path.stem.replace('direction', 'direction_metadata', 1)}.json")
    if beside != path and beside.is_file():
        match _json_object(beside):
            case {"pos": int(position), "layer": int(layer)}:
                note = (
                    f"position {position} and layer {layer} in its own counting, from {beside.name}"
                )
                return replace(difference, layers=(layer,), position=position, notes=(note,))
        raise InputError(f"{beside} doesn't give a pos and a layer: mend it or move it away")
    if re.search(r"das_.*layer\d", path.stem):
        return FileMetadata(hook="resid_pre", contrast="sentiment")
    return FileMetadata()


def _read_safetensors(path: Path, key: str | None) -> tuple[Tensor, FileMetadata]:
    # safetensors checks every size in its header against the file before it reads a tensor.
    with _at_fault(path), safe_open(path, "pt") as file:
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        name = _choose(shapes, key, path)
        tensor, metadata = file.get_tensor(name).clone(), file.metadata()
    said = FileMetadata.in_metadata(metadata or {}, str(path))
    if said.hook is not None and said.layers is None:
        said = replace(said, contrast=name)  # a run's file names each tensor by its contrast
    return tensor, said


def _read_npy(path: Path) -> tuple[Tensor, FileMetadata]:
    with _at_fault(path), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # A map of the file, which can't be made longer than the file is.
        mapped = np.lib.format.open_memmap(path, mode="r")
    if mapped.dtype.kind != "f" or mapped.dtype.itemsize > 8:
        raise InputError(f"{path} holds {mapped.dtype}, and directions are floating-point numbers")
    tensor = torch.from_numpy(mapped.astype(mapped.dtype.newbyteorder("="), order="C"))
    beside = path.with_name(f"{path.name}.json")
    if not beside.is_file():
        return tensor, FileMetadata()
    return tensor, FileMetadata.in_metadata(_json_object(beside), str(beside))


def _read_json(path: Path) -> Tensor:
    with _at_fault(path):
        return torch.tensor(artifacts.read_json(path), dtype=torch.float64)


def _json_object(path: Path) -> dict[str, Any]:
    with _at_fault(path):
        value = artifacts.read_json(path)
    if not isinstance(value, dict):
        raise InputError(f"{path} is no JSON object: mend it or move it away")
    return value


def _read_pt(path: Path, key: str | None) -> tuple[Tensor, FileMetadata]:
    """A tensor, or one of a dictionary of tensors, from a file that may name nothing else.

    `weights_only=True` keeps a file from running code of its own. It still lets a few kilobytes ask
    for gigabytes (a compressed archive, `bytearray(10**11)`, a tensor that repeats one number), so
    what a file names and how large it says it is are looked at first.
    """
    with _at_fault(path):
        if not zipfile.is_zipfile(path):
            raise InputError(
                f"{path} is no PyTorch archive: if you trust it and it is older than PyTorch 1.6, "
                "load and save it anew"
            )
        with zipfile.ZipFile(path) as archive:
            _check_archive(archive, path)
        value: Any = torch.load(path, weights_only=True, map_location="cpu")
    if isinstance(value, Mapping):
        tensors = {str(k): v for k, v in value.items() if isinstance(v, Tensor)}
        name = _choose({k: tuple(v.shape) for k, v in tensors.items()}, key, path)
        value = tensors[name]
    elif key is not None:
        raise InputError(f"{path} holds one set of directions: leave key={key!r} out")
    if not isinstance(value, Tensor):
        raise InputError(f"{path} holds a {type(value).__name__}, not a tensor")
    size = path.stat().st_size
    if math.prod(value.shape) * value.element_size() > size:
        raise InputError(
            f"{path} describes {list(value.shape)} numbers and has {size} bytes: damaged"
        )
    return value.detach().clone(memory_format=torch.contiguous_format), _published(path)


def _check_archive(archive: zipfile.ZipFile, path: Path) -> None:
    """What PyTorch would unpack and build, looked at without doing either."""
    parts = archive.infolist()
    if any(part.compress_type != zipfile.ZIP_STORED for part in parts):
        raise InputError(f"{path} is a compressed archive, which PyTorch never writes: refused")
    described = [part for part in parts if part.filename.endswith("/data.pkl")]
    if len(described) != 1 or described[0].file_size > LONGEST_DESCRIPTION:
        raise InputError(f"{path} doesn't describe its tensors as PyTorch does: damaged")
    strange = sorted(_names_in(archive.read(described[0])) - _PLAIN)
    if strange:
        raise InputError(
            f"{path} is more than tensors, it asks for {', '.join(strange)[:80]}: refused, nothing "
            "in it was run; ask for it as safetensors"
        )


def _names_in(pickle: bytes) -> set[str]:
    """Everything a pickle names, found without running it."""
    names = set()
    for operation, argument, _ in pickletools.genops(pickle):
        if operation.name in ("GLOBAL", "INST"):
            names.add(str(argument))
        elif operation.name in ("STACK_GLOBAL", "EXT1", "EXT2", "EXT4"):
            names.add("a name that it puts together")
    return names


def _choose(shapes: Mapping[str, tuple[int, ...]], key: str | None, path: Path) -> str:
    """The tensor that is meant, of those that could be directions."""
    possible = sorted(name for name, shape in shapes.items() if 1 <= len(shape) <= 3)
    if key is None and len(possible) == 1:
        return possible[0]
    if key not in possible:
        listed = ", ".join(repr(name)[:40] for name in possible[:10]) or "nothing of the kind"
        asked = "name one with key=" if key is None else f"no {key[:40]!r} among them"
        raise InputError(f"{path} holds {listed}: {asked}")
    return str(key)
