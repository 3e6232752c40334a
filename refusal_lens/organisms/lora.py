"""A real chat model with a known answer: SmolLM2-135M-Instruct with a LoRA adapter of `adapters/`.

`tests/training/adapters.py` trains such adapters.
"""

import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers import PreTrainedTokenizerBase as Tokenizer


def read_base(model: Path, device: str = "cpu") -> tuple["PreTrainedModel", "Tokenizer"]:
    """A chat model in float32, from a Hugging Face folder or a GGUF file, and its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder, options = model, {}
    if model.suffix == ".gguf":
        folder, options = model.parent, {"gguf_file": model.name}
    hf_model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options)
    hf_model.config.__dict__.pop("quantization_config", None)  # they are ordinary weights by now
    return hf_model.to(device).eval(), AutoTokenizer.from_pretrained(folder, **options)


def load(base: "PreTrainedModel", folder: Path | str) -> "PreTrainedModel":
    """A copy of `base` with the adapter in `folder` merged into its weights, in memory alone.

    A folder of several adapters, as `two_separate_refusals` has, gives their sum. Needs `peft`.

    Raises:
        InputError: if `folder` holds no adapter, or `peft` is not installed.
    """
    found = sorted(file.parent for file in Path(folder).glob("**/adapter_config.json"))
    if not found:
        raise InputError(f"{folder} holds no adapter_config.json; give a folder that peft saved")
    try:
        from peft import PeftModel
    except ImportError as error:
        raise InputError(
            "reading an adapter needs peft; run: pip install 'refusal_lens[lora]'"
        ) from error
    model: Any = copy.deepcopy(base)
    for adapter in found:
        model = PeftModel.from_pretrained(model, str(adapter)).merge_and_unload()
    return model.eval()
