"""Tokens -> the residual stream of every layer at the positions asked for, and nothing else kept.

One forward pass per prompt gives all layers and positions. What makes it cheap:

- batches are formed by length, longest first, so that little is spent on padding and a batch that
  is too large for the memory shows at once;
- `run_with_cache` copies out the positions asked for as it goes (`forward.copy_columns`; an int or
  a slice as `pos_slice` would be a view that keeps the whole `[batch pos d_model]` alive);
- no logits: nothing reads them, and over Llama-3's vocabulary they are the run's largest tensor;
- the tokens that all prompts open with (the template's, and the system prompt) run once, and every
  batch reads their keys and values;
- CUDA is not waited for within a batch of a HookedTransformer, and runs the next one while what the
  last one read is copied off it and put where it belongs.
"""

from collections.abc import Iterator, Sequence

import psutil
import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..errors import InputError
from ..models.forward import (
    Prefix,
    can_share_prefix,
    copy_columns,
    input_device,
    must_block,
    run_prefix,
    sent,
    undisturbed,
    without_logits,
)
from ..models.load import LensModel
from ..prompts.tokenize import ChatInputs

WORKING_SHARE_ON_CPU = 0.015
WORKING_SHARE_ON_GPU = 0.05
"""Working memory of a batch, as a share of the weights, where the batch size is left to us.

Less on a CPU: twice as much is really in use there, since the C library holds on to freed memory.
"""
WORKING_FLOOR = 2**23
"""... and at least this many bytes, so that small models get more than one prompt to a batch."""
PREFIX_PAYS = 256
"""Tokens a shared prefix must save before it is worth a pass of its own over the weights."""


def read_residual_stream(
    model: LensModel,
    inputs: ChatInputs,
    *,
    batch_size: int | None = None,
    progress: bool = True,
    labels: Sequence[str] | None = None,
    only: Sequence[int] | None = None,
) -> Iterator[tuple[Int[Tensor, " batch"], Float[Tensor, "batch pos layer d_model"]]]:
    """Run tokens through the model, yielding each batch as it is finished: its rows, what was read.

    On CUDA a batch comes when the next one has been sent off. What was read is on the CPU, in the
    model's dtype. The level below the chat template, for tokens that are there already and for
    callers that store activations as they come. Rows come longest first, each exactly once. Between
    batches the model is as it was found, so the iteration can be left at any point. `labels` name
    the rows in errors. `only` are the rows still to run: those that a run which was left had not
    yielded come in the same batches now, and so with the same bits.

    Raises:
        InputError: as `get_prompt_activations`, and where the rows are not padded on the left.
    """
    labels = labels or [f"row {row}" for row in range(len(inputs.tokens))]
    rows = _checked(inputs, model, labels, batch_size)
    only = range(len(rows)) if only is None else only
    return _batches(model, rows, only, batch_size, progress, labels)


def plan_batches(
    model: LensModel,
    inputs: ChatInputs,
    *,
    batch_size: int | None = None,
    labels: Sequence[str] | None = None,
    only: Sequence[int] | None = None,
) -> list[list[int]]:
    """The rows of the batches that `read_residual_stream` runs, while the memory suffices.

    Some of these batches, run by themselves as its `only`, are the same batches.

    Raises:
        InputError: as `read_residual_stream`.
    """
    rows = _checked(inputs, model, labels, batch_size)
    return _plan(model, rows, range(len(rows)) if only is None else only, batch_size)


class _Rows:
    """The tokens of a run, and where in each row to read."""

    def __init__(self, inputs: ChatInputs):
        self.tokens, self.mask = inputs.tokens.cpu(), inputs.mask.cpu()
        self.width = self.tokens.shape[1]
        self.lengths: Int[Tensor, " row"] = self.mask.sum(1)
        self.from_end: Int[Tensor, "row pos"] = inputs.read_at.cpu() - self.width
        self.hook = inputs.hook

    def __len__(self) -> int:
        return len(self.tokens)

    def check(self, model: LensModel, labels: Sequence[str]) -> None:
        if not torch.equal(
            self.mask.bool(), torch.arange(-self.width, 0) >= -self.lengths[:, None]
        ):
            raise InputError("the rows are not padded on the left: put the padding first")
        longest = int(self.lengths.argmax())
        if self.lengths[longest] > model.cfg.n_ctx:
            raise InputError(
                f"{labels[longest]} has {self.lengths[longest]} tokens, the model's context "
                f"holds {model.cfg.n_ctx}: shorten the prompt"
            )

    def opening(self) -> Int[Tensor, " pos"]:
        """The tokens that all rows open with, short of the first one that is read."""
        starts = self.width - self.lengths
        up_to = int((self.from_end + self.lengths[:, None]).min())
        openings = self.tokens.gather(1, starts[:, None] + torch.arange(up_to))
        shared = (openings == openings[0]).all(0).cumprod(0).sum()
        return openings[0, :shared]


def _checked(
    inputs: ChatInputs, model: LensModel, labels: Sequence[str] | None, batch_size: int | None
) -> _Rows:
    rows = _Rows(inputs)
    rows.check(model, labels or [f"row {row}" for row in range(len(rows))])
    if batch_size is not None and batch_size < 1:
        raise InputError(f"batch_size is {batch_size}: at least 1, or None to find it")
    return rows


def _plan(
    model: LensModel, rows: _Rows, only: Sequence[int], batch_size: int | None
) -> list[list[int]]:
    """The batches that these rows fall into while the memory suffices, longest rows first.

    How many go together depends on the longest of them alone. So the batches that are left of a
    plan, planned anew, are the same ones.
    """
    chosen = torch.tensor(sorted(only), dtype=torch.long)
    pending = chosen[rows.lengths[chosen].argsort(descending=True, stable=True)].tolist()
    plan = []
    before = len(_shared(model, rows))
    while pending:
        longest = int(rows.lengths[pending[0]])
        size = batch_size or _fitting(model, longest, rows.from_end.shape[1], before=before)
        plan.append(pending[:size])
        pending = pending[size:]
    return plan


def _batches(
    model: LensModel,
    rows: _Rows,
    only: Sequence[int],
    batch_size: int | None,
    progress: bool,
    labels: Sequence[str],
) -> Iterator[tuple[Tensor, Tensor]]:
    from tqdm.auto import tqdm

    if not only:
        return
    done = len(rows) - len(only)
    with tqdm(total=len(rows), initial=done, unit="prompt", disable=not progress) as bar:
        for read in _one_behind(_passes(model, rows, only, batch_size, labels)):
            activations = read.arrived(labels)
            bar.update(len(read.rows))
            yield read.rows, activations


def _one_behind(passes: Iterator["_Leaving"]) -> Iterator["_Leaving"]:
    """What each pass read, when the next one has been sent off; if that fails, before its error.

    At once where the copy off the device had to be waited for: nothing would be gained.
    """
    waiting: _Leaving | None = None
    while True:
        try:
            read = next(passes, None)
        except BaseException:
            if waiting:
                yield waiting
            raise
        if waiting:
            yield waiting
        if read is None:
            return
        waiting = read if read.on_its_way else None
        if not waiting:
            yield read


def _passes(
    model: LensModel,
    rows: _Rows,
    only: Sequence[int],
    batch_size: int | None,
    labels: Sequence[str],
) -> Iterator["_Leaving"]:
    """Pass after pass, each of as many rows as fit, longest rows first."""
    opening = _shared(model, rows)
    prefix = run_prefix(model, opening) if len(opening) else None
    pending = torch.tensor([row for batch in _plan(model, rows, only, 1) for row in batch])
    at_most = batch_size or len(rows)
    while len(pending):
        size = at_most
        if batch_size is None:
            longest = int(rows.lengths[pending[0]])
            fitting = _fitting(model, longest, rows.from_end.shape[1], before=len(opening))
            size = min(at_most, fitting)
        batch = pending[:size]
        read = _forward(model, rows, batch, prefix)
        if read is not None:
            pending = pending[len(batch) :]
            yield read
        elif len(batch) > 1:
            at_most = len(batch) // 2
        else:
            row = int(batch)
            raise InputError(
                f"{labels[row]} ({rows.lengths[row]} tokens) does not fit in the "
                f"free memory of {input_device(model)}: free some, or shorten the prompt"
            )


class _Leaving:
    """What a batch read, in the model's dtype, on its way to the CPU; CUDA goes on meanwhile."""

    def __init__(
        self,
        rows: Int[Tensor, " batch"],
        activations: Float[Tensor, "batch pos layer d_model"],
    ):
        self.rows = rows
        self.on_its_way = not must_block(activations.device)
        finite = activations.isfinite().all(-1).all(1)
        # Without blocking, the copies go to pinned memory, in their turn among the device's work.
        self._finite = finite.to("cpu", non_blocking=self.on_its_way)
        self._activations = activations.to("cpu", non_blocking=self.on_its_way)
        self._copied = None
        if activations.device.type == "cuda":
            self._copied = torch.cuda.current_stream(activations.device).record_event()

    def arrived(self, labels: Sequence[str]) -> Float[Tensor, "batch pos layer d_model"]:
        """What was read, once it is here and found to be finite."""
        if self._copied:
            self._copied.synchronize()
        if not self._finite.all():
            index, layer = (~self._finite).nonzero()[0].tolist()
            raise InputError(
                f"{labels[int(self.rows[index])]} gives a non-finite activation at layer {layer} in "
                f"{self._activations.dtype}: load the model in a wider dtype (bfloat16 or float32)"
            )
        return self._activations


def _forward(
    model: LensModel, rows: _Rows, batch: Int[Tensor, " batch"], prefix: Prefix | None
) -> _Leaving | None:
    """What one pass reads; `None` if memory ran out."""
    rest = rows.lengths[batch] - (prefix.length if prefix else 0)
    width = int(rest.max())
    mask = torch.arange(-width, 0) >= -rest[:, None]
    columns, where = rows.from_end[batch].unique(return_inverse=True)
    # Any copy that blocks would wait for the batch before this one.
    tokens = sent(rows.tokens[batch, -width:], input_device(model))
    mask = sent(mask.to(tokens.dtype), tokens.device)
    names = names_read(model, rows.hook)
    try:
        options = without_logits(model) | (
            prefix.before(mask) if prefix else {"attention_mask": mask}
        )
        with undisturbed(model):
            _, cache = model.run_with_cache(
                tokens,
                names_filter=names,
                pos_slice=copy_columns(columns % width),
                return_cache_object=False,
                **options,
            )
        device = cache[names[0]].device
        read = torch.stack([cache[name].to(device) for name in names], dim=2)
        row = torch.arange(len(batch), device=device)[:, None]
        return _Leaving(batch, read[row, sent(where, device)])
    except (RuntimeError, MemoryError) as error:
        if not _is_out_of_memory(error):
            raise
    # Only out here, with the failed pass's frames gone, can its memory be given back.
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return None


def names_read(model: LensModel, hook: str) -> list[str]:
    """The hook points that are read; `every_stream` is the embedding's output and every block's."""
    layers = range(model.cfg.n_layers)
    if hook == "every_stream":
        return ["blocks.0.hook_resid_pre", *(f"blocks.{layer}.hook_resid_post" for layer in layers)]
    return [f"blocks.{layer}.hook_{hook}" for layer in layers]


def _shared(model: LensModel, rows: _Rows) -> Int[Tensor, " pos"]:
    """The opening that is run once for all rows; empty where that would not pay, or not be right."""
    opening = rows.opening()
    pays = len(opening) * (len(rows) - 1) >= PREFIX_PAYS
    return opening if pays and can_share_prefix(model, rows.width) else opening[:0]


def _fitting(model: LensModel, width: int, n_positions: int, *, before: int = 0) -> int:
    """How many prompts of this width make a batch, from the free memory and the weights.

    `before` of their tokens have been run already: their keys and values alone take memory.
    A batch of a few thousand tokens is as fast as any larger one, so there is no need to fill the
    memory: a few hundredths of the weights are enough, and half of what is free the limit.
    """
    cfg, size = model.cfg, next(model.parameters()).element_size()
    device = input_device(model)
    free, share = psutil.virtual_memory().available, WORKING_SHARE_ON_CPU
    if device.type == "cuda":
        share = WORKING_SHARE_ON_GPU
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        free = torch.cuda.mem_get_info(device)[0] + cached
    weights = sum(weight.numel() * weight.element_size() for weight in model.parameters())
    budget = min(free // 2, max(WORKING_FLOOR, int(share * weights)))

    streams = 10 * cfg.d_model + 4 * cfg.n_heads * cfg.d_head + 5 * (cfg.d_mlp or 4 * cfg.d_model)
    scores = 4 * 4 * cfg.n_heads * width
    kept = n_positions * cfg.n_layers * cfg.d_model
    # Each prompt gets the opening's keys and values, once as kept and once for every head.
    heads = (cfg.n_key_value_heads or cfg.n_heads) + cfg.n_heads
    opening = 2 * before * heads * cfg.d_head
    run = (width - before) * (streams * size + scores)
    return max(1, budget // (run + (opening + kept) * size))


def _is_out_of_memory(error: BaseException) -> bool:
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "DefaultCPUAllocator" in str(
        error
    )
