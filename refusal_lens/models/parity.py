"""Does a hooked model compute what Hugging Face computes? One short prompt, at every layer."""

import math
from contextlib import ExitStack
from importlib import metadata
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ..errors import InputError
from .forward import hook_points, input_device, undisturbed

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from . import HookedModel

N_TOKENS = 8
OTHER_ROUNDING = 1e-4  # relative; sums are taken in another order, whatever the dtype


class Pass(NamedTuple):
    """What one forward pass computes from a few tokens."""

    layers: Float[Tensor, "layer pos d_model"]  # the output of every block
    logits: Float[Tensor, " d_vocab"]  # of the token after the last
    has_adapter: bool  # unmerged LoRA weights, of which converters know nothing


def hugging_face_pass(hf_model: "PreTrainedModel") -> Pass:
    """Run a few tokens through Hugging Face's own modules, before TransformerLens wraps them."""
    outputs: list[Tensor] = []

    def record(module: nn.Module, arguments: Any, output: Any) -> None:
        block_output = output if isinstance(output, Tensor) else output[0]
        outputs.append(block_output[0].cpu())

    tokens = _tokens(hf_model.config.get_text_config().vocab_size).to(hf_model.device)
    with ExitStack() as hooks, torch.no_grad():
        for block in _blocks(hf_model):
            hooks.enter_context(block.register_forward_hook(record))
        logits = hf_model(tokens, use_cache=False).logits
    has_adapter = any("lora_" in name for name, _ in hf_model.named_parameters())
    return Pass(torch.stack(outputs), logits[0, -1].cpu(), has_adapter)


def check_parity(model: "HookedModel", theirs: Pass, *, name: str) -> None:
    """Raise InputError if a model, `name` in messages, computes something else than `theirs`.

    Relative differences must be below `rounding_bound` in the median over tokens: where experts are
    chosen, rounding alone can send single tokens to another.
    """
    points = hook_points(model, "resid_post")
    tokens = _tokens(len(theirs.logits)).to(input_device(model))
    run_with_cache: Any = model.run_with_cache
    try:
        with undisturbed(model):
            logits, cache = run_with_cache(tokens, names_filter=points)
    except torch.OutOfMemoryError:
        raise
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as failure:
        why = f"can't run {name}, {str(failure).strip().splitlines()[0]}"
        raise InputError(_complaint(why, theirs.has_adapter)) from failure
    hooked = torch.stack([cache[point][0].cpu() for point in points])
    errors = _relative(hooked, theirs.layers).median(dim=1).values.tolist()
    errors.append(_relative(logits[0, -1].cpu(), theirs.logits).item())
    for layer, error in enumerate(errors):
        depth = min(layer + 1, len(points))
        if not error <= (bound := rounding_bound(theirs.layers.dtype, depth)):  # or NaN
            what = f"layer {layer}" if layer < len(points) else "the logits"
            size = f"{error:.2g} of its norm away from Hugging Face's, where rounding explains"
            why = f"computes {what} of {name} wrongly, {size} {bound:.2g}"
            raise InputError(_complaint(why, theirs.has_adapter))


def rounding_bound(dtype: torch.dtype, depth: int) -> float:
    """Largest relative difference that rounding alone is taken to give after `depth` blocks.

    Eight times a random walk of two steps a block, each of at most half an `eps`.
    """
    return OTHER_ROUNDING + 4 * torch.finfo(dtype).eps * math.sqrt(2 * depth)


def _tokens(d_vocab: int) -> Int[Tensor, "one pos"]:
    """Ids spread over the start of the vocabulary, beyond the ids of most special tokens."""
    return ((23 + 37 * torch.arange(N_TOKENS)) % d_vocab)[None]


def _blocks(hf_model: "PreTrainedModel") -> nn.ModuleList:
    """The decoder's blocks: the largest of its lists that has one module a layer."""
    n_layers = hf_model.config.get_text_config().num_hidden_layers
    lists = [part for part in hf_model.get_decoder().modules() if isinstance(part, nn.ModuleList)]
    sized = [blocks for blocks in lists if len(blocks) == n_layers]
    return max(sized, key=lambda blocks: sum(weight.numel() for weight in blocks.parameters()))


def _relative(
    hooked: Float[Tensor, "*axes d"], theirs: Float[Tensor, "*axes d"]
) -> Float[Tensor, "*axes"]:
    hooked, theirs = hooked.float(), theirs.float()
    return (hooked - theirs).norm(dim=-1) / theirs.norm(dim=-1)


def _complaint(why: str, has_adapter: bool) -> str:
    version = metadata.version("transformer_lens")
    other = ">=4" if version.startswith("3.") else "<4"
    advice = f"try another generation, pip install 'transformer_lens{other}', or another model"
    if has_adapter:
        advice = "merge the adapter into the weights first, with merge_and_unload()"
    return f"TransformerLens {version} {why}: {advice}"
