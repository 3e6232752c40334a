"""Divide rows into batches, and halve the batches when memory runs out."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import torch
from jaxtyping import Int
from torch import Tensor

from ..errors import InputError
from ..models.forward import free_memory, hook_points, input_device
from ..prompts.tokenize import ChatInputs
from .shared_prefix import can_share_prefix

if TYPE_CHECKING:
    from ..models import HookedModel

WORKING_SHARE = 0.015  # of the weights' bytes, on a CPU, where no batch size is given
WORKING_FLOOR = 2**25  # bytes, so that a small model gets a few dozen prompts in a batch
PREFIX_PAYS = 256  # tokens that a shared prefix must save on a CPU to be worth a pass of its own
# The CPU takes 2.4 ms to launch a block of TransformerLens, whatever the batch holds. An H200 does
# these operations in at least 3 ms; with fewer it waits for the CPU.
OPERATIONS_IN_A_BLOCK = 2.4e12

Result = TypeVar("Result")


class Rows(NamedTuple):
    """The token rows of a run, padded on the left, and the positions to read in each row."""

    tokens: Int[Tensor, "row pos"]
    lengths: Int[Tensor, " row"]
    from_end: Int[Tensor, "row n_positions"]  # positions to read, -1 the last token
    points: Sequence[str]  # hook points to read
    labels: Sequence[str]
    prefix: Int[Tensor, " shared"]  # run once for all rows; empty where sharing does not pay
    combine: Callable[[list[Tensor]], Tensor] = partial(torch.stack, dim=2)  # what points hold


def checked_rows(model: "HookedModel", inputs: ChatInputs, labels: Sequence[str] | None) -> Rows:
    """Return the rows of a run; check that they are left-padded and fit the model's context."""
    tokens, mask = inputs.tokens.cpu(), inputs.mask.cpu()
    n_rows, width = tokens.shape
    lengths, labels = mask.sum(1), labels or [f"row {row}" for row in range(n_rows)]
    if not torch.equal(mask.bool(), torch.arange(-width, 0) >= -lengths[:, None]):
        raise InputError("the rows are not padded on the left: put the padding first")
    longest = int(lengths.argmax())
    if lengths[longest] > model.cfg.n_ctx:
        sizes = f"{lengths[longest]} tokens, the model's context holds {model.cfg.n_ctx}"
        raise InputError(f"{labels[longest]} has {sizes}: shorten the prompt")
    from_end = inputs.read_at.cpu() - width
    # The prefix ends before the first position that is read in any row.
    n_before = int((from_end + lengths[:, None]).min())
    starts = tokens.gather(1, width - lengths[:, None] + torch.arange(n_before))
    prefix = starts[0, : int((starts == starts[0]).all(0).cumprod(0).sum())]
    pays = tokens_that_fill_a_gpu(model) if input_device(model).type == "cuda" else PREFIX_PAYS
    if len(prefix) * (n_rows - 1) < pays or not can_share_prefix(model, width):
        prefix = prefix[:0]
    return Rows(tokens, lengths, from_end, hook_points(model, inputs.hook), labels, prefix)


def plan_batches(
    model: "HookedModel",
    inputs: ChatInputs,
    *,
    batch_size: int | None = None,
    labels: Sequence[str] | None = None,
    only: Sequence[int] | None = None,
) -> list[list[int]]:
    """Return the rows of each batch that `read_residual_stream` runs while memory suffices.

    Long rows come first, and a batch's size depends on its longest row alone: passing a subset of
    these batches as `only` reproduces them exactly, and a resumed run gives identical bits.
    """
    rows = checked_rows(model, inputs, labels)
    if batch_size is not None and batch_size < 1:
        raise InputError(f"batch_size is {batch_size}: at least 1, or None to find it")
    chosen = torch.tensor(sorted(range(len(rows.tokens)) if only is None else only)).long()
    pending = chosen[rows.lengths[chosen].argsort(descending=True, stable=True)].tolist()
    plan = []
    while pending:
        longest, n_positions = int(rows.lengths[pending[0]]), rows.from_end.shape[1]
        size = batch_size or _fitting(model, longest, n_positions, n_shared=len(rows.prefix))
        plan.append(pending[:size])
        pending = pending[size:]
    return plan


def tokens_that_fill_a_gpu(model: "HookedModel") -> int:
    """How many tokens keep a fast GPU busy while the CPU launches their pass, in any model."""
    weights = sum(weight.numel() for weight in model.blocks.parameters())
    return int(OPERATIONS_IN_A_BLOCK * model.cfg.n_layers / (2 * weights))


def _fitting(model: "HookedModel", width: int, n_positions: int, *, n_shared: int) -> int:
    """How many prompts of this width make a batch, from the free memory and the weights."""
    cfg, size = model.cfg, next(model.parameters()).element_size()
    device = input_device(model)
    budget, most = free_memory(device) // 2, tokens_that_fill_a_gpu(model) // (width - n_shared)
    if device.type != "cuda":
        # A few thousand tokens are as fast as more, and the C library holds on to freed memory.
        weights = sum(weight.numel() * weight.element_size() for weight in model.parameters())
        most = budget = min(budget, max(WORKING_FLOOR, int(WORKING_SHARE * weights)))
    streams = 10 * cfg.d_model + 4 * cfg.n_heads * cfg.d_head + 5 * (cfg.d_mlp or 4 * cfg.d_model)
    scores = 4 * 4 * cfg.n_heads * width
    kept = n_positions * cfg.n_layers * cfg.d_model
    # Memory holds the prefix's keys and values as recorded, and again for every query head.
    heads = (cfg.n_key_value_heads or cfg.n_heads) + cfg.n_heads
    prefix = 2 * n_shared * heads * cfg.d_head
    run = (width - n_shared) * (streams * size + scores)
    return max(1, min(most, budget // (run + (prefix + kept) * size)))


def run_halving(
    run: Callable[[list[int]], Result], plan: list[list[int]], rows: Rows, device: torch.device
) -> Iterator[Result]:
    """Yield the result of each batch; halve the remaining batches where memory runs out."""
    while plan:
        try:
            result = run(plan[0])
        except (RuntimeError, MemoryError) as error:
            is_known = isinstance(error, torch.OutOfMemoryError | MemoryError)
            if not is_known and "DefaultCPUAllocator" not in str(error):
                raise
        else:
            plan = plan[1:]
            yield result
            continue
        # The failed pass has left no frames here, so its memory can be freed.
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        row, half = plan[0][0], len(plan[0]) // 2
        if not half:
            problem = f"({rows.lengths[row]} tokens) does not fit in the free memory of {device}"
            raise InputError(f"{rows.labels[row]} {problem}: free some, or shorten the prompt")
        pending = [row for batch in plan for row in batch]
        plan = [pending[start : start + half] for start in range(0, len(pending), half)]


def one_behind(results: Iterator[Result]) -> Iterator[Result]:
    """Yield each result after the next one has started, or before the next one's error."""
    current = next(results, None)
    while current is not None:
        previous, current = current, None
        try:
            current = next(results, None)
        finally:
            yield previous
