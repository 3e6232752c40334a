"""GGUF files of llama.cpp: what transformers does not check, or leaves out, when it reads one."""

import math
import re
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO
from unittest.mock import patch

import numpy as np

from ..errors import InputError

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

FORMATS = dict(enumerate(("B", "b", "<H", "<h", "<I", "<i", "<f", "?", "", "", "<Q", "<q", "<d")))
STRING, LIST = 8, 9  # numbers of the two types of value that have no format
LONGEST_LIST = 4096  # numbers in a list that says something about the model, not about its words
ROPE_FACTORS = "rope_freqs.weight"


@dataclass(frozen=True)
class Header:
    """What a GGUF file says about itself: its entries (of a list, the length) and its tensors."""

    path: Path
    entries: dict[str, Any]
    tensors: dict[str, tuple[tuple[int, ...], int, int]]  # shape, quantisation, place in the file

    def of_architecture(self, key: str) -> Any:
        """The entry of a name that begins with the architecture; `None` if there is none."""
        return self.entries.get(f"{self.entries.get('general.architecture')}.{key}")


def read_header(path: Path) -> Header:
    """Read the header of a GGUF file that holds a whole model.

    Raises:
        InputError: if the file is missing, is no GGUF file, is damaged, is a part of a split one,
            or has a quantisation that can't be read.
    """
    if not path.is_file():
        raise InputError(f"there is no file {path}: check the path")
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise InputError(f"{path} is no GGUF file: give one, or a Hugging Face directory")
        try:
            header = _header(path.absolute(), file)
        except (struct.error, ValueError, KeyError) as error:
            raise InputError(f"{path} is damaged ({error}): download it again") from error
    whole = r"(.*)-\d{5}-of-(\d{5})\.gguf"
    named, parts = re.fullmatch(whole, path.name), header.entries.get("split.count", 1)
    if parts > 1 or (named and int(named[2]) > 1):
        merge = "llama-gguf-split --merge FIRST_PART WHOLE.gguf"
        raise InputError(f"{path} is one part of a split model: make one file of them with {merge}")
    return header


def _header(path: Path, file: BinaryIO) -> Header:
    version, n_tensors, n_entries = struct.unpack("<IQQ", file.read(20))
    if version not in (2, 3):
        raise ValueError(f"it says version {version}, and 2 and 3 are known")
    entries: dict[str, Any] = {}
    size = path.stat().st_size
    for _ in range(n_entries):
        key = _string(file)
        (kind,) = struct.unpack("<I", file.read(4))
        entries[key] = _value(file, kind, size)
    infos = {}
    for _ in range(n_tensors):
        name, (n_dims,) = _string(file), struct.unpack("<I", file.read(4))
        numbers = struct.unpack(f"<{min(n_dims, 8)}QIQ", file.read(8 * min(n_dims, 8) + 12))
        infos[name] = numbers[:-2][::-1], numbers[-2], numbers[-1]
    alignment = entries.get("general.alignment", 32)
    start = math.ceil(file.tell() / alignment) * alignment
    tensors = {name: (shape, kind, start + at) for name, (shape, kind, at) in infos.items()}
    for name, (shape, kind, place) in tensors.items():
        if place + _n_bytes(path, name, shape, kind) > size:
            raise ValueError(f"its tensor {name} ends after the end of the file")
    return Header(path, entries, tensors)


def _string(file: BinaryIO) -> str:
    (length,) = struct.unpack("<Q", file.read(8))
    return file.read(min(length, 2**20)).decode(errors="replace")


def _value(file: BinaryIO, kind: int, size: int) -> Any:
    """One value, a list as its length."""
    if kind == STRING:
        return _string(file)
    if kind != LIST:
        (value,) = struct.unpack(FORMATS[kind], file.read(struct.calcsize(FORMATS[kind])))
        return value
    item, length = struct.unpack("<IQ", file.read(12))
    if item != STRING:
        file.seek(min(struct.calcsize(FORMATS[item]) * length, size), 1)
        return length
    for _ in range(length):  # ends at the end of the file, whatever length the list claims
        _string(file)
    return length


def _n_bytes(path: Path, name: str, shape: tuple[int, ...], kind: int) -> int:
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, quants

    try:
        quantisation = GGMLQuantizationType(kind)
        block, block_bytes = GGML_QUANT_SIZES[quantisation]
        quants.dequantize(np.zeros((1, block_bytes), np.uint8), quantisation)
    except (ValueError, NotImplementedError) as error:
        what = f"the quantisation of {name} in {path} can't be read ({error})"
        raise InputError(
            f"{what}: take another file of the model, such as Q4_K_M or Q8_0"
        ) from None
    return math.prod(shape) // block * block_bytes


def complete_config(config: "PretrainedConfig", header: Header) -> None:
    """Write the stretching of positions, which transformers leaves out, into a configuration."""
    kind = header.of_architecture("rope.scaling.type")
    if kind in (None, "none") or config.rope_parameters["rope_type"] != "default":
        return
    if kind not in ("linear", "yarn"):
        raise InputError(f"{header.path} stretches positions by {kind!r}: {_INSTEAD}")
    scaling = {"rope_type": kind, "factor": header.of_architecture("rope.scaling.factor")}
    if kind == "yarn":
        longest = header.of_architecture("rope.scaling.original_context_length")
        scaling["original_max_position_embeddings"] = longest
    config.rope_parameters |= scaling


@contextmanager
def without_words() -> Iterator[None]:
    """Let transformers read a file's configuration and weights without the words of its vocabulary.

    `gguf.GGUFReader` keeps four arrays for every word, 150 MB for 98,000 words, and transformers
    makes a reader for each part of a model that it reads. Neither part needs the words. The table of
    tensor names, which transformers makes anew for every module, is made once.
    """
    import gguf

    class Reader(gguf.GGUFReader):
        def _get_field_parts(self, orig_offs: Any, raw_type: Any) -> Any:
            if raw_type != LIST:
                return super()._get_field_parts(orig_offs, raw_type)
            data: Any = self.data
            content, end = memoryview(data), orig_offs + 12
            item, length = struct.unpack_from("<IQ", content, orig_offs)
            if item != STRING and length <= LONGEST_LIST:
                return super()._get_field_parts(orig_offs, raw_type)
            if item != STRING:
                end += struct.calcsize(FORMATS[item]) * length
            for _ in range(length if item == STRING else 0):
                end += 8 + struct.unpack_from("<Q", content, end)[0]
            types = [gguf.GGUFValueType.ARRAY, gguf.GGUFValueType.STRING]
            return end - orig_offs, [np.zeros(1, np.uint8)], [0] * length, types

    names = cache(gguf.get_tensor_name_map)
    with patch.multiple(gguf, GGUFReader=Reader, get_tensor_name_map=names):
        yield


def loading_options() -> dict[str, Any]:
    """Arguments of `from_pretrained` that make every weight an ordinary tensor."""
    try:
        from transformers import GgufConfig
    except ImportError:  # before transformers 5.24, which can keep weights quantised
        return {}
    return {"quantization_config": GgufConfig(dequantize=True)}


def complete_model(hf_model: "PreTrainedModel", header: Header) -> None:
    """Apply the tensor by which Llama 3.1 and later stretch positions, which transformers leaves out.

    Raises:
        InputError: if transformers left out any other tensor.
    """
    tied = hf_model.config.tie_word_embeddings
    elsewhere = {ROPE_FACTORS} | ({"output.weight"} if tied else set())
    shapes = {name: shape for name, (shape, *_) in header.tensors.items() if name not in elsewhere}
    held = sum(weight.numel() for weight in hf_model.parameters())
    if (stated := sum(map(math.prod, shapes.values()))) > held:
        what = f"transformers reads {held:,} of the {stated:,} numbers in {header.path}"
        raise InputError(f"{what}: {_INSTEAD}")
    if ROPE_FACTORS in header.tensors:
        shape, _, place = header.tensors[ROPE_FACTORS]
        factors = np.fromfile(header.path, np.float32, math.prod(shape), offset=place)
        _slow_rotation(hf_model, factors)


_INSTEAD = "load the model's Hugging Face directory or hub name instead"


def _slow_rotation(hf_model: "PreTrainedModel", factors: np.ndarray) -> None:
    import torch

    rotary: Any = hf_model.get_decoder().rotary_emb
    for name in ("inv_freq", "original_inv_freq"):
        frequencies: torch.Tensor = getattr(rotary, name)
        frequencies.div_(torch.from_numpy(factors).to(frequencies))
