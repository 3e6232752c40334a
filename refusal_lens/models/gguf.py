"""GGUF files of llama.cpp: what gguf and transformers do not check, or leave out, in reading one."""

import re
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import gguf
import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType

from ..errors import InputError

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

LONGEST_LIST = 4096  # numbers in a list that says something about the model, not about its words
_INSTEAD = "load the model's Hugging Face directory or hub name instead"


class Reader(gguf.GGUFReader):
    """The header and the tensors of a file, without lists of words and other long lists.

    gguf cuts off what a file claims beyond its end, and keeps four arrays for every word (150 MB
    for 98,000 words). This reader raises ValueError beyond the end, and skips those lists.
    """

    def _get(self, offset: Any, dtype: Any, count: Any = 1, override_order: Any = None) -> Any:
        found = super()._get(offset, dtype, count, override_order)
        if len(found) < count:
            raise ValueError("a part of it ends after the end of the file")
        return found

    def _get_field_parts(self, orig_offs: Any, raw_type: Any) -> Any:
        if raw_type != GGUFValueType.ARRAY:
            return super()._get_field_parts(orig_offs, raw_type)
        item = GGUFValueType(self._get(orig_offs, np.uint32)[0])
        length, end = int(self._get(orig_offs + 4, np.uint64)[0]), orig_offs + 12
        if item == GGUFValueType.STRING:
            content: Any = memoryview(self.data)  # type: ignore[arg-type]
            for _ in range(length):  # fails at the end of the file
                end += 8 + struct.unpack_from("<Q", content, end)[0]
        elif length <= LONGEST_LIST:
            return super()._get_field_parts(orig_offs, raw_type)
        else:
            end += self._get(end, self.gguf_scalar_to_np[item], length).nbytes
        types = [GGUFValueType.ARRAY, GGUFValueType.STRING]
        return end - orig_offs, [np.zeros(1, np.uint8)], [0] * length, types

    def _build_tensors(self, start_offs: Any, fields: Any) -> None:
        for field in fields:
            try:
                quantisation = GGMLQuantizationType(field.parts[4][0])
                block = np.zeros((1, GGML_QUANT_SIZES[quantisation][1]), np.uint8)
                gguf.quants.dequantize(block, quantisation)
            except (ValueError, NotImplementedError) as error:
                why = f"can't be read ({error}): take another file, such as Q4_K_M or Q8_0"
                raise InputError(f"the quantisation of {field.name} in {self.path} {why}") from None
        super()._build_tensors(start_offs, fields)

    @property
    def path(self) -> Path:
        """The file."""
        return Path(str(self.data.filename))

    def entry(self, key: str) -> Any:
        """A number or text of the header; `None` if there is none."""
        return self.fields[key].contents() if key in self.fields else None


def read_header(path: Path) -> Reader:
    """Read the header of a GGUF file that holds a whole model; InputError for any other file."""
    if not path.is_file():
        raise InputError(f"there is no file {path}: check the path")
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise InputError(f"{path} is no GGUF file: give one, or a Hugging Face directory")
    try:
        reader = Reader(path.absolute())
        parts = reader.entry("split.count") or 1
    except InputError:
        raise
    except Exception as error:  # whatever gguf raises on damaged bytes
        raise InputError(f"{path} is damaged ({error}): download it again") from error
    named = re.fullmatch(r".*-\d{5}-of-(\d{5})\.gguf", path.name)
    if parts > 1 or (named and int(named[1]) > 1):
        merge = "llama-gguf-split --merge FIRST_PART WHOLE.gguf"
        raise InputError(f"{path} is one part of a split model: make one file of them with {merge}")
    return reader


def complete_config(config: "PretrainedConfig", header: Reader) -> None:
    """Write the stretching of positions, which transformers leaves out, into a configuration."""
    scaled = f"{header.entry('general.architecture')}.rope.scaling"
    kind = header.entry(f"{scaled}.type")
    if kind in (None, "none") or config.rope_parameters["rope_type"] != "default":
        return
    if kind not in ("linear", "yarn"):
        raise InputError(f"{header.path} stretches positions by {kind!r}: {_INSTEAD}")
    scaling = {"rope_type": kind, "factor": header.entry(f"{scaled}.factor")}
    if kind == "yarn":
        longest = header.entry(f"{scaled}.original_context_length")
        scaling["original_max_position_embeddings"] = longest
    config.rope_parameters |= scaling


@contextmanager
def without_words() -> Iterator[None]:
    """Let transformers read a file by `Reader`, and make the table of tensor names once."""
    names = cache(gguf.get_tensor_name_map)
    with patch.multiple(gguf, GGUFReader=Reader, get_tensor_name_map=names):
        yield


def complete_model(hf_model: "PreTrainedModel", header: Reader) -> None:
    """Apply Llama 3.1's stretching of positions; InputError if transformers left out another tensor."""
    tensors = {tensor.name: tensor for tensor in header.tensors}
    factors = tensors.pop("rope_freqs.weight", None)
    if hf_model.config.tie_word_embeddings:
        tensors.pop("output.weight", None)
    held = sum(weight.numel() for weight in hf_model.parameters())
    if (stated := sum(tensor.n_elements for tensor in tensors.values())) > held:
        what = f"transformers reads {held:,} of the {stated:,} numbers in {header.path}"
        raise InputError(f"{what}: {_INSTEAD}")
    if factors is not None:
        rotary: Any = hf_model.get_decoder().rotary_emb
        for frequencies in (rotary.inv_freq, rotary.original_inv_freq):
            frequencies.div_(frequencies.new_tensor(factors.data))
