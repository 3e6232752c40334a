"""Many interventions in one forward pass.

The rows of a batch are `(intervention prompt)`, the unmodified model first. The rows of an ablation
are in the batch from block 0 on. The rows of an addition join the batch after the addition's layer,
so earlier layers run once for all additions. Further savings:

- the tokens that all prompts begin with run once for each intervention;
- only prompts of equal length share a pass, so no row is padded;
- only the last position is unembedded.
"""

from collections.abc import Iterator, Sequence
from itertools import groupby, takewhile
from math import ceil
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from einops import rearrange, repeat
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from ..activations.shared_prefix import SharedPrefix, can_share_prefix
from ..errors import InputError
from ..models.forward import input_device, undisturbed
from ..prompts.protocol import Protocol
from ..prompts.tokenize import encode_prompts
from .hooks import EMBEDDING, Hook, projection_hooks, stream_after

if TYPE_CHECKING:
    from transformer_lens import HookedTransformer
    from transformer_lens.model_bridge import TransformerBridge

TOKENS_ON_CPU, TOKENS_ON_GPU = 8192, 16384  # in one pass; more tokens take memory and save no time


class Outcome(NamedTuple):
    """The result of one pass at the last position: some prompts under some of the interventions.

    Row 0 of the tensors is the unmodified model, row `i + 1` the intervention `interventions[i]`.
    """

    prompts: list[int]
    interventions: list[int]
    logits: Float[Tensor, "intervention prompt d_vocab"]
    residual: Float[Tensor, "intervention prompt layer d_model"]


def first_token_logits(
    model: "HookedTransformer | TransformerBridge", prompts: Sequence[str], **options: Any
) -> Float[Tensor, "prompt d_vocab"]:
    """Next-token logits of the unmodified model after each prompt, float32, on the CPU.

    `options` are `protocol`, `batch_size` and `progress` of `run_interventions`.
    """
    nothing = torch.empty(0, model.cfg.d_model)
    outcomes = list(run_interventions(model, prompts, nothing, [], **options))
    order = torch.tensor([prompt for outcome in outcomes for prompt in outcome.prompts])
    return torch.cat([outcome.logits[0].float().cpu() for outcome in outcomes])[order.argsort()]


def run_interventions(
    model: "HookedTransformer | TransformerBridge",
    prompts: Sequence[str],
    directions: Float[Tensor, "intervention d_model"],
    layers: Sequence[int] | None,
    *,
    read_layers: Sequence[int] = (),
    protocol: Protocol = Protocol(),  # noqa: B008 (frozen)
    batch_size: int | None = None,
    progress: bool = True,
) -> Iterator[Outcome]:
    """Run every prompt through the unmodified model once, and once under each intervention.

    Args:
        model, prompts: the model, and prompts as text. InputError if the model has hooks, if there
            are no prompts, or if a prompt is longer than the model's context.
        directions: one for each intervention, finite.
        layers: the layer after which each direction is added; None ablates the directions.
        read_layers: layers whose residual stream is returned, in ascending order.
        protocol: how prompts are formatted.
        batch_size: maximum rows in a pass; None derives the number from the prompts' lengths.
        progress: whether to show a progress bar.
    """
    from tqdm.auto import tqdm

    if batch_size is not None and batch_size < 1:
        raise InputError(f"batch_size is {batch_size}: at least 1, or None to derive it")
    ids = _checked_ids(model, prompts, protocol)
    device, longest = input_device(model), max(map(len, ids))
    columns = zip(*(row[:-1] for row in ids), strict=False)
    shared = list(takewhile(lambda column: len(set(column)) == 1, columns))
    n_shared = len(shared) if can_share_prefix(model, longest) else 0
    budget = TOKENS_ON_GPU if device.type == "cuda" else TOKENS_ON_CPU
    order = sorted(range(len(directions)), key=lambda i: layers[i] if layers else 0)
    n_rows = max(2, batch_size or budget // max(n_shared, longest - n_shared))
    by_length = sorted(range(len(ids)), key=lambda i: -len(ids[i]))  # memory errors come first
    total = len(ids) * max(1, len(order))
    with tqdm(total=total, unit="prompt", disable=not progress) as bar:
        for part in _even_parts(order, n_rows - 1) or [[]]:
            after = None if layers is None else [layers[i] for i in part]
            these = directions[part].float().to(device), after
            prefix = SharedPrefix(model)
            if n_shared:
                row = torch.tensor([ids[0][:n_shared]], device=device)
                _forward(model, row, *these, (), prefix.recording(n_shared))
            for length, same in groupby(by_length, key=lambda i: len(ids[i])):
                n_rows = batch_size or budget // (length - n_shared)
                for group in _even_parts(list(same), n_rows // (1 + len(part))):
                    tokens = torch.tensor([ids[i][n_shared:] for i in group], device=device)
                    arguments = prefix.following(torch.ones_like(tokens[:1]), repeat=len(group))
                    found = _forward(model, tokens, *these, sorted(set(read_layers)), arguments)
                    yield Outcome(group, part, *found)
                    bar.update(len(group) * max(1, len(part)))


def _checked_ids(
    model: "HookedTransformer | TransformerBridge", prompts: Sequence[str], protocol: Protocol
) -> list[list[int]]:
    """Token ids of the prompts, after checks of the model's hooks and context length."""
    if any(point.has_hooks() for point in model.hook_dict.values()):
        raise InputError("the model has hooks on it: leave their context, or model.reset_hooks()")
    tokenizer: Any = model.tokenizer
    ids = encode_prompts(tokenizer, prompts, protocol=protocol)
    for prompt, row in enumerate(ids):
        if len(row) > model.cfg.n_ctx:
            raise InputError(
                f"prompt {prompt} has {len(row)} tokens, the model's context holds "
                f"{model.cfg.n_ctx}: shorten the prompt"
            )
    return ids


def _forward(
    model: "HookedTransformer | TransformerBridge",
    tokens: Int[Tensor, "prompt pos"],
    directions: Float[Tensor, "_ d_model"],
    layers: list[int] | None,
    read_layers: Sequence[int],
    arguments: dict[str, Any],
) -> tuple[Float[Tensor, "row prompt d_vocab"], Float[Tensor, "row prompt layer d_model"]]:
    """One pass over prompts of equal length: logits and residual stream of the last position."""
    read: list[Tensor] = []

    def read_last(x: Tensor, hook: object) -> None:
        read.append(rearrange(x[:, -1].clone(), "(i prompt) d -> i prompt d", prompt=len(tokens)))

    recording: list[Hook] = [(stream_after(model, layer), read_last) for layer in read_layers]
    last = stream_after(model, model.cfg.n_layers - 1)
    with undisturbed(model):
        start = model(tokens, attention_mask=torch.ones_like(tokens), stop_at_layer=0)
        hooks = _row_hooks(model, start, directions, layers)
        # The hooks of one point run in this order: add, read, drop all positions but the last.
        with model.hooks(fwd_hooks=[*hooks, *recording, (last, lambda x, hook: x[:, -1:])]):
            logits = model(tokens[:1], **arguments)
    logits = rearrange(logits, "(i prompt) 1 v -> i prompt v", prompt=len(tokens))
    residual = logits.new_empty(*logits.shape[:2], len(read), model.cfg.d_model)
    for i, rows in enumerate(read):
        # Before its layer, an addition has no rows in the batch: the model is unmodified there.
        residual[: len(rows), :, i], residual[len(rows) :, :, i] = rows, rows[0]
    return logits, residual


def _row_hooks(
    model: "HookedTransformer | TransformerBridge",
    start: Float[Tensor, "prompt pos d_model"],
    directions: Float[Tensor, "_ d_model"],
    layers: list[int] | None,
) -> list[Hook]:
    """Hooks that replace a single row by `start` (the embedding's output) and add other rows."""
    if layers is None:
        units = functional.pad(functional.normalize(directions, dim=-1), (0, 0, 1, 0))
        rows = repeat(start, "prompt ... -> (i prompt) ...", i=len(units))
        units = repeat(units, "i d_model -> (i prompt) d_model", prompt=len(start))
        embedded: Hook = (stream_after(model, EMBEDDING), lambda x, hook: rows)
        return [embedded, *projection_hooks(model, units)]

    def joining(layer: int, added: Float[Tensor, "new d_model"]) -> Hook:
        def join(x: Tensor, hook: object) -> Tensor:
            new = x[: len(start)] + added.to(x.device)[:, None, None]
            return torch.cat([x, new.flatten(0, 1).to(x.dtype)])

        return stream_after(model, layer), join

    hooks: list[Hook] = [(stream_after(model, EMBEDDING), lambda x, hook: start)]
    for layer, same in groupby(range(len(layers)), key=layers.__getitem__):
        hooks.append(joining(layer, directions[list(same)]))
    return hooks


def _even_parts(items: list[int], at_most: int) -> list[list[int]]:
    """Consecutive parts of nearly equal size; an empty list has no parts."""
    size = ceil(len(items) / max(1, ceil(len(items) / max(1, at_most)))) or 1
    return [items[i : i + size] for i in range(0, len(items), size)]
