"""Many interventions in one forward pass.

The rows of a batch are `(intervention prompt)`, the unmodified model first. The rows of an ablation
are in the batch from block 0 on. The rows of an addition join the batch after the addition's layer,
so earlier layers run once for all additions. Further savings:

- an intervention at the last position alone runs one token; the tokens before it run once for all;
- the tokens that all prompts begin with run once for each intervention;
- prompts of all lengths share a pass, padded behind their shared tokens, unless rows join later;
- only the last position is unembedded;
- a reply's openings run behind the keys and values of the prompt.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import groupby, takewhile
from math import ceil
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from einops import rearrange, repeat
from jaxtyping import Float, Int
from torch import Tensor

from ..activations.shared_prefix import SharedPrefix, can_share_prefix
from ..errors import InputError
from ..models.forward import input_device, undisturbed
from ..prompts.protocol import Protocol
from ..prompts.tokenize import encode_prompts
from .batch_rows import Interventions, hooks_by_row, joining_hooks, last_logits, most_rows
from .hooks import Hook, can_join_rows, check_interventions, stream_after
from .opening_scores import opening_scores
from .reply_openings import ReplyOpenings

if TYPE_CHECKING:
    from transformer_lens import HookedTransformer
    from transformer_lens.model_bridge import TransformerBridge

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
    model: "HookedTransformer | TransformerBridge", prompts: Sequence[str], **options: Any
) -> Float[Tensor, "prompt d_vocab"]:
    """Next-token logits of the unmodified model after each prompt, float32, on the CPU.

    `options` are `protocol`, `batch_size` and `progress` of `run_interventions`.
    """
    nothing = Interventions(torch.empty(0, model.cfg.d_model))
    outcomes = list(run_interventions(model, prompts, nothing, **options))
    order = torch.tensor([prompt for outcome in outcomes for prompt in outcome.prompts])
    return torch.cat([outcome.logits[0].float().cpu() for outcome in outcomes])[order.argsort()]


def opening_log_odds(
    model: "HookedTransformer | TransformerBridge",
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
    model: "HookedTransformer | TransformerBridge",
    prompts: Sequence[str],
    interventions: Interventions,
    *,
    openings: ReplyOpenings | None = None,
    read_layers: Sequence[int] = (),
    protocol: Protocol = Protocol(),  # noqa: B008 (frozen)
    batch_size: int | None = None,
    progress: bool = True,
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
        progress: whether to show a progress bar.
    """
    from tqdm.auto import tqdm

    if batch_size is not None and batch_size < 1:
        raise InputError(f"batch_size is {batch_size}: at least 1, or None to derive it")
    ids = _checked_ids(model, prompts, protocol)
    if n := len(interventions.directions):
        check_interventions(model)
    device, longest = input_device(model), max(map(len, ids))
    deepest = max(map(len, openings.tree)) if openings else 0
    can_share = can_join_rows(model) and can_share_prefix(model, longest + deepest)
    n_shared = _n_shared(ids) if can_share else 0
    budget = TOKENS_ON_GPU if device.type == "cuda" else TOKENS_ON_CPU
    layers = interventions.layers
    order = sorted(range(n), key=lambda i: layers[i] if layers else 0)
    most = batch_size or most_rows(model, longest)
    n_rows = max(2, batch_size or min(most, budget // max(n_shared, longest - n_shared)))
    by_length = sorted(range(len(ids)), key=lambda i: -len(ids[i]))  # memory errors come first
    with tqdm(total=len(ids) * max(1, n), desc="interventions", disable=not progress) as bar:
        for part in _even_parts(order, n_rows - 1) or [[]]:
            these = interventions.at(part, device)
            prefix = _recorded(model, ids[0][:n_shared], these) if can_share else None
            pads = can_share and (these.layers is None or these.last_position)
            for length, alike in groupby(by_length, key=lambda i: longest if pads else len(ids[i])):
                n_rows = min(most, budget // (length - n_shared))
                for group in _even_parts(list(alike), n_rows // (1 + len(part))):
                    tokens, mask = _padded([ids[i][n_shared:] for i in group], device)
                    if these.last_position and prefix:
                        found = _forward_last(model, tokens, mask, these, read_layers, prefix)
                    else:
                        found = _forward(model, tokens, mask, these, read_layers, prefix)
                    logits, residual, whole = found
                    refusal = logits.new_empty(0, 0)
                    if openings:
                        refusal = opening_scores(model, openings, tokens, these, whole, logits)
                    yield Outcome(group, part, logits, residual, refusal)
                    bar.update(len(group) * max(1, len(part)))


def _n_shared(ids: list[list[int]]) -> int:
    """How many tokens all prompts begin with; two of each prompt are left."""
    columns = zip(*(row[:-2] for row in ids), strict=False)
    return len(list(takewhile(lambda column: len(set(column)) == 1, columns)))


def _padded(
    rows: list[list[int]], device: torch.device
) -> tuple[Int[Tensor, "prompt pos"], Int[Tensor, "_ pos"]]:
    """Rows padded on the left, and their mask, which has one row if none is padded."""
    width = max(map(len, rows))
    tokens = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    mask = torch.arange(-width, 0) >= -torch.tensor([[len(row)] for row in rows])
    mask = mask[:1] if mask.all() else mask
    return tokens.to(device), mask.to(device, torch.long)


def _recorded(
    model: "HookedTransformer | TransformerBridge", shared: list[int], these: Interventions
) -> SharedPrefix:
    """The keys and values of the tokens that all prompts begin with, under each intervention."""
    prefix = SharedPrefix(model)
    if shared:
        row = torch.tensor([shared], device=input_device(model))
        first = Interventions(these.directions[:0]) if these.last_position else these
        one = torch.ones_like(row)
        _forward(model, row, one, first, (), None, prefix.recording(len(shared)))
    return prefix


def _checked_ids(
    model: "HookedTransformer | TransformerBridge", prompts: Sequence[str], protocol: Protocol
) -> list[list[int]]:
    """Token ids of the prompts, after checks of the model's hooks and context length."""
    if any(point.has_hooks(including_permanent=False) for point in model.hook_dict.values()):
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
    mask: Int[Tensor, "_ pos"],
    these: Interventions,
    read_layers: Sequence[int],
    prefix: SharedPrefix | None,
    arguments: dict[str, Any] | None = None,
) -> tuple[Tensor, Tensor, SharedPrefix | None]:
    """One pass over padded prompts: last logits, last residual stream, keys and values."""
    whole, n = None, 1 + len(these.directions)
    if arguments is None:
        arguments = {"attention_mask": mask}
        if prefix is not None:
            mask = mask if len(mask) == 1 else repeat(mask, "prompt pos -> (i prompt) pos", i=n)
            whole, arguments = prefix.extended(mask, rows=len(tokens))
    with undisturbed(model):
        every = tokens
        start = model(tokens, attention_mask=torch.ones_like(tokens), stop_at_layer=0)
        if these.layers is None or these.last_position or not can_join_rows(model):
            every, start = (repeat(x, "prompt ... -> (i prompt) ...", i=n) for x in (tokens, start))
            rows = torch.arange(n).repeat_interleave(len(tokens))
            position = -1 if these.last_position else None
            hooks = hooks_by_row(model, these, rows, position=position)
        else:
            hooks = joining_hooks(model, start, these)
        run = partial(last_logits, model, every, start, arguments=arguments)
        return *_read(model, run, hooks, read_layers, len(tokens)), whole


def _forward_last(
    model: "HookedTransformer | TransformerBridge",
    tokens: Int[Tensor, "prompt pos"],
    mask: Int[Tensor, "_ pos"],
    these: Interventions,
    read_layers: Sequence[int],
    prefix: SharedPrefix,
) -> tuple[Tensor, Tensor, SharedPrefix | None]:
    """As `_forward`, for interventions on the last token: the tokens before it run once."""
    n_prompts, last = len(tokens), mask[:1, -1:]
    before, arguments = prefix.extended(mask[:, :-1], rows=n_prompts)
    rows = torch.arange(n_prompts * (1 + len(these.directions)))
    with undisturbed(model):
        start = model(tokens, attention_mask=torch.ones_like(tokens), stop_at_layer=0)
        last_logits(model, tokens[:, :-1], start[:, :-1], [], arguments)
        whole, arguments = before.extended(last, rows=(rows % n_prompts, n_prompts))
        tokens, start = (x[rows % n_prompts, -1:] for x in (tokens, start))
        hooks = hooks_by_row(model, these, rows // n_prompts)
        run = partial(last_logits, model, tokens, start, arguments=arguments)
        return *_read(model, run, hooks, read_layers, n_prompts), whole


def _read(
    model: "HookedTransformer | TransformerBridge",
    run: Callable[..., Tensor],
    hooks: list[Hook],
    read_layers: Sequence[int],
    n_prompts: int,
) -> tuple[Float[Tensor, "row prompt d_vocab"], Float[Tensor, "row prompt layer d_model"]]:
    """The logits of a pass under hooks, and the last position's residual stream."""
    read: list[Tensor] = []

    def read_last(x: Tensor, hook: object) -> None:
        read.append(rearrange(x[:, -1].clone(), "(i prompt) d -> i prompt d", prompt=n_prompts))

    recording: list[Hook] = [(stream_after(model, layer), read_last) for layer in read_layers]
    logits = rearrange(run([*hooks, *recording]), "(i prompt) 1 v -> i prompt v", prompt=n_prompts)
    residual = logits.new_empty(*logits.shape[:2], len(read), model.cfg.d_model)
    for i, last in enumerate(read):
        # Before its layer, an addition has no rows in the batch: the model is unmodified there.
        residual[: len(last), :, i], residual[len(last) :, :, i] = last, last[0]
    return logits, residual


def _even_parts(items: list[int], at_most: int) -> list[list[int]]:
    """Consecutive parts of nearly equal size; an empty list has no parts."""
    size = ceil(len(items) / max(1, ceil(len(items) / max(1, at_most)))) or 1
    return [items[i : i + size] for i in range(0, len(items), size)]
