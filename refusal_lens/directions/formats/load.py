"""Read `Directions` from untrusted files: no code in a file runs, and every size is checked."""

import math
import pickletools
import re
import warnings
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFValueType
from safetensors import safe_open
from torch import Tensor

from ...activations import disk
from ...errors import InputError, lenient
from ...models.gguf import Reader
from .directions_file import GGUF_PREFIX, Directions, FileMetadata, parse_metadata

MOST_POSITIONS = 32  # a longer first axis of three is an axis of prompts
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_PLAIN = {"collections OrderedDict", "torch._utils _rebuild_tensor_v2"}  # in a tensor's pickle
_PLAIN |= {f"torch {k}Storage" for k in ("Double", "Float", "Half", "BFloat16", "Long", "Int")}
Contents = tuple[Mapping[str, Tensor], FileMetadata]  # tensors by name ("" if nameless), metadata


@lenient
def read_directions(
    path: str | Path,
    *,
    key: str | None = None,
    position: int | str | None = None,
    layer: int | None = None,
    hook: Literal["resid_pre", "resid_post"] | None = None,
    model: str | None = None,
) -> Directions:
    """Read directions that this or another project saved, in this package's layer numbers.

    - a folder: `directions.safetensors` of a saved run
    - `.safetensors`, `.pt`: a tensor, or several of which `key` chooses one
    - `mean_diffs.pt`, `direction.pt`: of Arditi et al., with `direction_metadata.json` beside
    - `.npy`: numbers, with the `.npy.json` of `write_directions` beside
    - `.json`: a list of numbers or of rows, such as `..._das_layer3.json` of Tigges et al.
    - `.gguf`: a control vector of repeng or llama.cpp

    A tensor is `[d_model]`, `[layer d_model]` or `[pos layer d_model]` with positions up to -1.
    Arditi et al. (2024, arXiv:2406.11717) and Tigges et al. (2023, arXiv:2310.15154) use block
    inputs: their layer `l` is layer `l - 1` here, their layer 0 the embedding's output. Arguments
    override the file. InputError if the file is missing, damaged, unsafe or without directions.

    Args:
        path: the file.
        key: name of the tensor, in a file of several.
        position: which of several positions (default -1); for a file of one, its position.
        layer: number of the layer of a single direction, as the file counts.
        hook: what the file's layer `l` is: `blocks.{l}.hook_resid_pre` (`hidden_states[l]` of
            Hugging Face) or `blocks.{l}.hook_resid_post`.
        model: the model that the directions belong to.
    """
    path = Path(path)
    tensor, found = _read_file(path, key)
    stated = {"position": position, "hook": hook, "model": model}
    found |= {name: value for name, value in stated.items() if value is not None}
    if tensor.ndim == 3:
        tensor = _choose_position(tensor, found, path)
    rows = torch.atleast_2d(tensor)
    if layer is not None:
        if len(rows) > 1:
            raise InputError(f"{path} holds {len(rows)} layers: layer= is for a single direction")
        found["layers"] = (layer,)
    elif tensor.ndim == 2:
        found.setdefault("layers", tuple(range(len(rows))))
    _translate_layers(found, path)
    if ((rows.double().norm(dim=-1) - 1).abs() < 1e-3).all():
        found.setdefault("normalisation", "unit norm")
    return Directions(rows, source=str(path) if key is None else f"{path}:{key}", **found)


def _choose_position(tensor: Tensor, found: FileMetadata, path: Path) -> Tensor:
    """The rows at one position; records the position in `found`."""
    n, position = len(tensor), found.setdefault("position", -1)
    if n > MOST_POSITIONS:
        raise InputError(f"{path}: {n} rows are prompts, not positions; save their mean_difference")
    if not isinstance(position, int) or not -n <= position < 0:
        raise InputError(f"{path} holds the positions {-n} to -1, not {position}")
    if n > 1:
        found["notes"] += (f"position {position} of its positions {-n} to -1",)
    return tensor[position]


def _translate_layers(found: FileMetadata, path: Path) -> None:
    """Convert the file's layer numbers in `found` to this package's, and note the conversion."""
    hook, layers = found.pop("hook", None), found.pop("layers", None)
    in_name = re.search(r"layer[_-]?(\d{1,4})(?!\d)", path.name)
    if layers is None and in_name:
        layers = (int(in_name[1]),)
        found["notes"] += (f"layer {layers[0]} in its own counting, from its name",)
    if hook == "resid_pre" and layers is not None:
        layers = tuple(number - 1 for number in layers)
        note = "its layer l is layer l - 1 here, its layer 0 the embedding's output (-1)"
        found["notes"] += (f"read before the block: {note}",)
    found["layers"] = None if hook is None else layers


def _read_file(path: Path, key: str | None) -> tuple[Tensor, FileMetadata]:
    """One floating-point tensor of a file, and its metadata."""
    try:
        path = path / "directions.safetensors" if path.is_dir() else path
        suffix = path.suffix.lower()
        if not path.is_file():
            raise InputError(f"no file {path}: name a file of directions or a run's folder")
        if suffix not in READERS:
            endings = ", ".join(READERS)
            raise InputError(f"{path}: directions are read from {endings}, not this ending")
        with path.open("rb"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tensors, found = READERS[suffix](path)
    except InputError:
        raise
    except OSError as error:
        raise InputError(f"{path} can't be opened: {error.strerror or error}") from error
    except Exception as error:  # whatever a library raises on damaged bytes
        why = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise InputError(f"{path} can't be read as {suffix[1:]}: {why}; fetch it anew") from error
    name = _choose_tensor(tensors, key, path)
    if name and found.get("hook") == "resid_post" and "layers" not in found:
        found["contrast"] = name  # a run's file names each tensor by its contrast
    return tensors[name].detach().clone().contiguous(), {"notes": ()} | found


def _choose_tensor(tensors: Mapping[str, Tensor], key: str | None, path: Path) -> str:
    """The name of the tensor to read, among floating-point tensors of one to three axes."""
    floats = {name: tensor for name, tensor in tensors.items() if tensor.dtype in FLOATS}
    names = sorted(name for name, t in floats.items() if 1 <= t.ndim <= 3 and t.numel())
    if not names:
        raise InputError(f"{path} holds no floats [d_model], [layer d_model], [pos layer d_model]")
    name = names[0] if key is None and len(names) == 1 else key
    if name is None or name not in names:
        listed = ", ".join(repr(known)[:40] for known in names[:10])
        advice = "leave key= out" if "" in names else f"{listed}: name one with key="
        problem = "several tensors" if key is None else f"no tensor named {str(key)[:40]!r}"
        raise InputError(f"{path} has {problem}: {advice}")
    return name


def _published_metadata(path: Path) -> FileMetadata:
    """Metadata that the file names of published directions imply."""
    difference: FileMetadata = {"hook": "resid_pre", "contrast": "harmful - harmless"}
    difference["normalisation"] = "none: mean(harmful) - mean(harmless)"
    if "mean_diffs" in path.stem:
        return difference
    beside = path.with_name(f"{path.stem.replace('direction', 'direction_metadata', 1)}.json")
    if beside != path and beside.is_file():
        match disk.read_json(beside):
            case {"pos": int(position), "layer": int(layer)}:
                note = f"position {position} and layer {layer} as it counts, from {beside.name}"
                return difference | {"layers": (layer,), "position": position, "notes": (note,)}
        raise InputError(f"{beside} doesn't give a pos and a layer: mend it or move it away")
    if re.search(r"das_.*layer\d", path.stem):
        return {"hook": "resid_pre", "contrast": "sentiment"}
    return {}


def _read_safetensors(path: Path) -> Contents:
    # safetensors checks every size in its header, and maps tensors into memory.
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return tensors, parse_metadata(file.metadata() or {}, str(path))


def _read_npy(path: Path) -> Contents:
    mapped = np.lib.format.open_memmap(path, mode="r")  # a map can't be longer than its file
    tensor = torch.from_numpy(mapped.astype(mapped.dtype.newbyteorder("="), order="C"))
    beside = path.with_name(f"{path.name}.json")
    entries = disk.read_json(beside) if beside.is_file() else {}
    return {"": tensor}, parse_metadata(entries, str(beside))


def _read_json(path: Path) -> Contents:
    return {"": torch.tensor(disk.read_json(path), dtype=torch.float64)}, _published_metadata(path)


def _read_pt(path: Path) -> Contents:
    """A tensor, or a dictionary of tensors, from an archive that contains nothing else."""
    # weights_only=True runs no code. A small file can still allocate gigabytes (a compressed
    # archive, bytearray(10**11), a tensor that repeats one number), hence the checks.
    if not zipfile.is_zipfile(path):
        raise ValueError("it is no archive, but damaged or older than PyTorch 1.6")
    with zipfile.ZipFile(path) as archive:
        if any(part.compress_type != zipfile.ZIP_STORED for part in archive.infolist()):
            raise ValueError("it is a compressed archive, which PyTorch never writes")
        [pickle] = [name for name in archive.namelist() if name.endswith("/data.pkl")]
        operations = pickletools.genops(archive.read(pickle))
        naming = ("GLOBAL", "INST", "STACK_GLOBAL", "EXT1", "EXT2", "EXT4")
        names = {str(argument or op.name) for op, argument, _ in operations if op.name in naming}
    if names - _PLAIN:
        more = f"is more than tensors, it asks for {', '.join(sorted(names - _PLAIN))[:80]}"
        advice = "refused, nothing in it was run; ask for it as safetensors"
        if any(name.startswith("numpy") for name in names):  # Zhao et al. 2025 published such files
            convert = "numpy.save('NEW.npy', torch.load('FILE', weights_only=False))"
            advice += f", or, if you trust its author with your machine, convert it: {convert}"
        raise InputError(f"{path} {more}: {advice}")
    value: Any = torch.load(path, weights_only=True, map_location="cpu")
    named = value.items() if isinstance(value, Mapping) else [("", value)]
    tensors = {str(name): item for name, item in named if isinstance(item, Tensor)}
    for tensor in tensors.values():
        if math.prod(tensor.shape) * tensor.element_size() > path.stat().st_size:
            raise ValueError(f"it has too few bytes for {list(tensor.shape)}")
    return tensors, _published_metadata(path)


def _read_control_vector(path: Path) -> Contents:
    """repeng numbers directions by block; llama.cpp one higher, with a signed `layer_count`."""
    reader = Reader(path)
    entries = {name: field.contents() for name, field in reader.fields.items()}
    kind = str(entries.get("general.architecture"))
    if kind != "controlvector":
        raise ValueError(f"it is for {kind[:40]!r}, not for 'controlvector'")
    rows: dict[int, Tensor] = {}
    for tensor in reader.tensors:
        layer = re.fullmatch(r"direction\.(0|[1-9]\d{0,3})", tensor.name)
        row = torch.from_numpy(tensor.data)
        row = row.view(torch.bfloat16) if tensor.tensor_type == GGMLQuantizationType.BF16 else row
        # gguf lets an offset near 2^64 wrap to before the data.
        inside = tensor.data_offset >= reader.data_offset
        if not (layer and inside and row.is_floating_point() and row.ndim == 1):
            raise ValueError(f"its tensor {tensor.name[:40]!r} is no direction.LAYER of floats")
        rows[int(layer[1])] = row
    if sum(row.nbytes for row in rows.values()) > path.stat().st_size:
        raise ValueError("it holds fewer bytes than it says")
    layers = tuple(sorted(rows))
    tensors = {"": torch.stack([rows[layer] for layer in layers])}
    own = {k.removeprefix(GGUF_PREFIX): v for k, v in entries.items() if k.startswith(GGUF_PREFIX)}
    if own:
        return tensors, parse_metadata(own, str(path))
    hint = f"for models of type {str(entries.get('controlvector.model_hint', 'unknown'))[:80]}"
    count = reader.fields.get("controlvector.layer_count")
    if count is not None and count.types == [GGUFValueType.INT32]:
        note = "if llama.cpp numbered them, direction.{l + 1} is block l's output: say hook='resid_pre'"
        return tensors, {"layers": layers, "notes": (f"{hint}; {note}",)}
    note = "direction.{l} is block l's output, as repeng numbers (the last: after the final norm)"
    return tensors, {"layers": layers, "hook": "resid_post", "notes": (f"{hint}; {note}",)}


READERS: dict[str, Callable[[Path], Contents]] = {".safetensors": _read_safetensors}
READERS |= {".pt": _read_pt, ".pth": _read_pt}
READERS |= {".npy": _read_npy, ".json": _read_json, ".gguf": _read_control_vector}
