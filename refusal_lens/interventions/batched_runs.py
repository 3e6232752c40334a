"""Many interventions in one forward pass.

The rows of a batch are `(intervention prompt)`, the unmodified model first. The rows of an addition
join the batch after its layer, so earlier layers run once for all additions. Further savings:

- an intervention at the last position alone runs one token; the tokens before it run once for all;
- the tokens that all prompts begin with run once for each intervention;
- prompts of all lengths share a pass, padded behind their shared tokens, unless rows join later;
- only the last position is unembedded, and openings run behind the prompt's keys and values.
"""

from collections.abc import Iterator, Sequence
from itertools import groupby, takewhile
from math import ceil
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor

from ..activations.progress import RunBar, bar_of
from ..activations.shared_prefix import SharedPrefix, can_share_prefix
from ..errors import InputError
from ..models.forward import input_device, undisturbed
from ..models.load import tokenizer_of
from ..prompts.protocol import Protocol
from ..prompts.tokenize import encode_prompts
from .batch_rows import Interventions, hooks_by_row, joining_hooks, last_logits, most_rows
from .hooks import can_join_rows, check_interventions, stream_after
from .opening_scores import opening_scores
from .reply_openings import ReplyOpenings

if TYPE_CHECKING:
    from ..models import HookedModel

TOKENS_ON_CPU, TOKENS_ON_GPU = 8192, 16384  # in one pass; more tokens take memory and save no time


class Outcome(NamedTuple):
    """The result of one pass at the last position: some prompts under some of the interventions.

    Row 0 of the tensors is the unmodified model, row `i + 1` the intervention `interventions[i]`.
    `refusal` is the log-odds that the reply begins with an opening; empty without openings.
    """

    prompts: list[int]
    interventions: list[int]
    logits: Float[Tensor, "intervention prompt d_vocab"]
    residual: Float[Tensor, "intervention prompt layer d_model"]
    refusal: Float[Tensor, "intervention prompt"]


def first_token_logits(
    model: "HookedModel", prompts: Sequence[str], **options: Any
) -> Float[Tensor, "prompt d_vocab"]:
    """Next-token logits of the unmodified model after each prompt, float32, on the CPU.

    `options` are `protocol`, `batch_size` and `progress` of `run_interventions`.
    """
    nothing = Interventions(torch.empty(0, model.cfg.d_model))
    outcomes = list(run_interventions(model, prompts, nothing, **options))
    order = torch.tensor([prompt for outcome in outcomes for prompt in outcome.prompts])
    return torch.cat([outcome.logits[0].float().cpu() for outcome in outcomes])[order.argsort()]


def opening_log_odds(
    model: "HookedModel",
    prompts: Sequence[str],
    openings: ReplyOpenings,
    **options: Any,
) -> Float[Tensor, " prompt"]:
    """Log-odds that the unmodified model's reply to each prompt begins with an opening.

    `options` are `protocol`, `batch_size` and `progress` of `run_interventions`.
    """
    nothing = Interventions(torch.empty(0, model.cfg.d_model))
    found = torch.full((len(prompts),), torch.nan)
    for outcome in run_interventions(model, prompts, nothing, openings=openings, **options):
        found[outcome.prompts] = outcome.refusal[0]
    return found


def run_interventions(
    model: "HookedModel",
    prompts: Sequence[str],
    interventions: Interventions,
    *,
    openings: ReplyOpenings | None = None,
    read_layers: Sequence[int] = (),
    protocol: Protocol = Protocol(),  # noqa: B008 (frozen)
    batch_size: int | None = None,
    progress: bool | RunBar = True,
) -> Iterator[Outcome]:
    """Run every prompt through the unmodified model once, and once under each intervention.

    Args:
        model, prompts: the model, and prompts as text. InputError if the model has hooks, if there
            are no prompts, if a prompt is longer than the model's context, or if interventions do
            not do in this model what they should (`hooks.check_interventions`).
        interventions: finite directions that are all ablated or all added.
        openings: score each reply's beginning; `Outcome.refusal`.
        read_layers: layers whose residual stream is returned, in ascending order.
        protocol: how prompts are formatted.
        batch_size: maximum rows in a pass; None derives the number from the prompts' lengths.
        progress: whether to show a progress bar; or the bar of a whole run.
    """
    if batch_size is not None and batch_size < 1:
        raise InputError(f"batch_size is {batch_size}: at least 1, or None to derive it")
    ids = checked_ids(model, prompts, protocol)
    if n := len(interventions.directions):
        check_interventions(model)
    device, longest = input_device(model), max(map(len, ids))
    deepest = max(map(len, openings.tree)) if openings else 0
    can_share = can_join_rows(model) and can_share_prefix(model, longest + deepest)
    columns = zip(*(row[:-2] for row in ids), strict=False)  # the last two tokens are not shared
    n_shared = len([*takewhile(lambda column: len({*column}) == 1, columns)]) if can_share else 0
    budget = TOKENS_ON_GPU if device.type == "cuda" else TOKENS_ON_CPU
    layers = interventions.layers
    order = sorted(range(n), key=lambda i: layers[i] if layers else 0)
    most = batch_size or most_rows(model, longest)
    n_rows = max(2, batch_size or min(most, budget // max(n_shared, longest - n_shared)))
    by_length = sorted(range(len(ids)), key=lambda i: -len(ids[i]))  # memory errors come first
    with bar_of(progress, total=len(ids) * max(1, n), desc="interventions") as bar:
        for part in _even_parts(order, n_rows - 1) or [[]]:
            these = interventions.at(part, device)
            prefix = _recorded(model, ids[0][:n_shared], these) if can_share else None
            pads = can_share and (these.layers is None or these.last_position)
            for length, alike in groupby(by_length, key=lambda i: longest if pads else len(ids[i])):
                n_rows = min(most, budget // (length - n_shared))
                for group in _even_parts(list(alike), n_rows // (1 + len(part))):
                    tokens, mask = padded([ids[i][n_shared:] for i in group], device)
                    logits, stream, keys = _forward(model, tokens, mask, these, read_layers, prefix)
                    refusal = logits.new_empty(0, 0)
                    if openings:
                        refusal = opening_scores(model, openings, tokens, these, keys, logits)
                    yield Outcome(group, part, logits, stream, refusal)
                    bar.update(len(group) * max(1, len(part)))


def padded(
    rows: list[list[int]], device: torch.device
) -> tuple[Int[Tensor, "prompt pos"], Int[Tensor, "_ pos"]]:
    """Rows padded on the left, and their mask, which has one row if none is padded."""
    width = max(map(len, rows))
    tokens = torch.tensor([row[:1] * (width - len(row)) + row for row in rows])
    mask = torch.arange(-width, 0) >= -torch.tensor([[len(row)] for row in rows])
    mask = mask[:1] if mask.all() else mask
    return tokens.to(device), mask.to(device, torch.long)


def _recorded(model: "HookedModel", shared: list[int], these: Interventions) -> SharedPrefix:
    """The keys and values of the tokens that all prompts begin with, under each intervention."""
    prefix = SharedPrefix(model)
    if shared:
        row = torch.tensor([shared], device=input_device(model))
        first = Interventions(these.directions[:0]) if these.last_position else these
        _forward(model, row, torch.ones_like(row), first, (), None, prefix.recording(len(shared)))
    return prefix


def checked_ids(
    model: "HookedModel",
    prompts: Sequence[str],
    protocol: Protocol,
    max_tokens: int = 0,
) -> list[list[int]]:
    """Token ids of the prompts, where the model has no hooks and its context holds the replies."""
    points = model.hook_dict.values()
    if any(point.has_hooks(including_permanent=False) for point in points):
        raise InputError("the model has hooks on it: leave their context, or model.reset_hooks()")
    ids = encode_prompts(tokenizer_of(model), prompts, protocol=protocol)
    for prompt, row in enumerate(ids):
        if len(row) + max_tokens > model.cfg.n_ctx:
            problem = f"prompt {prompt} has {len(row)} tokens, the context holds {model.cfg.n_ctx}"
            advice = f", or lower max_tokens, {max_tokens}" if max_tokens else ""
            raise InputError(f"{problem}: shorten the prompt{advice}")
    return ids


def _forward(
    model: "HookedModel",
    tokens: Int[Tensor, "prompt pos"],
    mask: Int[Tensor, "_ pos"],
    these: Interventions,
    read_layers: Sequence[int],
    prefix: SharedPrefix | None,
    arguments: dict[str, Any] | None = None,
) -> tuple[Tensor, Tensor, SharedPrefix | None]:
    """One pass over padded prompts: last logits, last residual stream, keys and values."""
    n_prompts, n = len(tokens), 1 + len(these.directions)
    whole, arguments = None, arguments or {"attention_mask": mask}
    read: list[Tensor] = []

    def read_last(x: Tensor, hook: object) -> None:
        read.append(rearrange(x[:, -1].clone(), "(i prompt) d -> i prompt d", prompt=n_prompts))

    with undisturbed(model):
        start = model(tokens, attention_mask=torch.ones_like(tokens), stop_at_layer=0)
        if prefix and these.last_position:  # the tokens before the last run once
            prefix, arguments = prefix.extended(mask[:, :-1], rows=n_prompts)
            last_logits(model, tokens[:, :-1], start[:, :-1], [], arguments)
            tokens, start = tokens[:, -1:], start[:, -1:]
            of = torch.arange(n_prompts).repeat(n), n_prompts
            whole, arguments = prefix.extended(mask[:1, -1:], rows=of)
        elif prefix:
            mask = mask if len(mask) == 1 else mask.repeat(n, 1)
            whole, arguments = prefix.extended(mask, rows=n_prompts)
        if these.layers is None or these.last_position or not can_join_rows(model):
            tokens, start = tokens.repeat(n, 1), start.repeat(n, 1, 1)
            rows = torch.arange(n).repeat_interleave(n_prompts)
            hooks = hooks_by_row(model, these, rows, position=-1 if these.last_position else None)
        else:
            hooks = joining_hooks(model, start, these)
        hooks += [(stream_after(model, layer), read_last) for layer in read_layers]
        logits = last_logits(model, tokens, start, hooks, arguments)
    logits = rearrange(logits, "(i prompt) 1 v -> i prompt v", i=n)
    residual = logits.new_empty(n, n_prompts, len(read), model.cfg.d_model)
    for i, last in enumerate(read):
        # Before its layer, an addition has no rows in the batch: the model is unmodified there.
        residual[: len(last), :, i], residual[len(last) :, :, i] = last, last[0]
    return logits, residual, whole


def _even_parts(items: list[int], at_most: int) -> list[list[int]]:
    """Consecutive parts of nearly equal size; an empty list has no parts."""
    size = ceil(len(items) / max(1, ceil(len(items) / max(1, at_most)))) or 1
    return [items[i : i + size] for i in range(0, len(items), size)]
