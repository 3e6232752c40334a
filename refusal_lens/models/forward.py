"""Forward passes that disturb nothing and stop before the logits, for either TransformerLens."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, partial
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

import einops
import psutil
import torch
from jaxtyping import Float, Int
from torch import Tensor

if TYPE_CHECKING:
    from . import HookedModel


def generation(model: "HookedModel") -> ModuleType:
    """The module of this package for a model's kind: `hooked_transformer` or `bridge`."""
    is_bridge = hasattr(model, "original_model")
    return import_module(".bridge" if is_bridge else ".hooked_transformer", __package__)


def input_device(model: "HookedModel") -> torch.device:
    """The device that takes the tokens: the first of a model's devices."""
    return next(model.parameters()).device


def free_memory(device: torch.device) -> int:
    """Bytes that can still be taken on a device, PyTorch's unused reserve on CUDA included."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    return psutil.virtual_memory().available


def hook_points(model: "HookedModel", hook: str) -> list[str]:
    """Hook points along the layer axis; `every_stream` adds the embedding to `resid_post`."""
    if hook == "every_stream":
        return ["blocks.0.hook_resid_pre", *hook_points(model, "resid_post")]
    return [f"blocks.{layer}.hook_{hook}" for layer in range(model.cfg.n_layers)]


def drop_earlier_positions(model: "HookedModel") -> tuple[str, Any]:
    """A hook that leaves the last position alone to the unembedding."""
    # In a bridge, Hugging Face's GPT-2 gives the stream its former shape after the last block.
    points = "unembed.hook_in", hook_points(model, "resid_post")[-1]
    return next(p for p in points if p in model.hook_dict), lambda x, hook: x[:, -1:]


def effective_unembedding(
    model: "HookedModel",
) -> Float[Tensor, "d_model d_vocab"]:
    """Return the unembedding with the final norm's weight multiplied in, on the CPU."""
    unembedding = model.W_U.detach()
    # Measured, because some norms multiply by their weight and some by one more than it.
    signs = torch.ones_like(unembedding[:, 0])
    signs[1::2] = -1
    with undisturbed(model):
        ends: Any = model.ln_final(torch.stack([signs, -signs])[:, None])
    weight = (ends[0, 0] - ends[1, 0]).float() / 2 * signs
    return unembedding.float().cpu() * weight.cpu()[:, None]


@contextmanager
def undisturbed(model: "HookedModel") -> Iterator[None]:
    """Disable gradients and dropout inside; restore the mode of every module afterwards."""
    # The module tree of a TransformerBridge lacks the Hugging Face model.
    modules = {*model.modules(), *getattr(model, "original_model", model).modules()}
    in_training = [module for module in modules if module.training]
    try:
        for module in in_training:
            module.training = False
        with torch.no_grad(), generation(model).keeping_keys(model):
            yield
    finally:
        for module in in_training:
            module.training = True


def without_logits(model: "HookedModel") -> dict[str, Any]:
    """Arguments that end a forward pass before the unembedding and keep no cache."""
    return generation(model).without_logits(model)


def must_block(device: torch.device) -> bool:
    """Whether the CPU must wait for a copy to or from a device."""
    # CUDA has taken a tensor from ordinary memory when the call returns; MPS may read it later.
    return device.type != "cuda"


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """A CPU tensor on a device, without waiting for the device's earlier work."""
    return tensor.to(device, non_blocking=not must_block(device))


def copy_columns(columns: Int[Tensor, " pos"]) -> Any:
    """A `pos_slice` for `run_with_cache` that copies these columns, counted from the first."""
    from transformer_lens.utilities.slice import Slice

    # A list would be sent to the GPU at every layer, and each transfer waits for earlier work.
    columns_on = cache(partial(sent, columns))

    class Columns(Slice):
        def apply(self, tensor: Tensor, dim: int = 0) -> Tensor:
            return tensor.index_select(dim, columns_on(tensor.device))

    return Columns(columns)


def of_rows(recorded: Tensor, rows: int | tuple[Int[Tensor, " row"], int]) -> Tensor:
    """What a prefix recorded for each row of a batch.

    `rows` is a number of repetitions of each recorded row, or the recorded rows and the number of
    prompts.
    """
    if isinstance(rows, int):
        return einops.repeat(recorded, "row ... -> (row n) ...", n=rows)
    # Rows beyond the recorded ones are still the unmodified model's at this layer.
    wanted, n_prompts = rows[0].to(recorded.device), rows[1]
    wanted = torch.where(wanted < len(recorded), wanted, wanted % n_prompts)
    return recorded.index_select(0, wanted)
