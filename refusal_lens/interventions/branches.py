"""Many interventions in one run: the batch branches where each of them begins.

The rows of the batch are `(branch prompt)`. Branch 0 is the model as it is; every other branch is
one intervention. An ablation changes what the embedding writes, so its branch begins there; an
addition branches off after its own layer, and the layers before are not computed again. Besides:

- prompts of one length share a run, so nothing is spent on padding (and since no row is masked, one
  row of tokens and of mask can drive a run whose batch grows);
- the tokens that all prompts open with run once a branch, not once a branch and prompt;
- only the last position is unembedded.

A small Llama on the CPU runs as a `BareLlama` instead, on prompts of any length together, and there
whatever tokens *some* of them open with run once for these.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from math import ceil
from typing import Any

import torch
from einops import rearrange, repeat
from jaxtyping import Float, Int
from torch import Tensor

from ..errors import InputError
from ..models.forward import can_share_prefix, input_device, undisturbed
from ..models.load import LensModel
from ..prompts.protocol import Protocol
from ..prompts.tokenize import encode_prompts
from .bare import BareLlama, bare_llama
from .hooks import EMBEDDING, Hook, projection_hooks, stream_after
from .prefix import Prefix, empty_prefix, without_prefix
from .prompt_tree import PromptTree, new_tokens

TOKENS_ON_CPU = 8192
TOKENS_ON_GPU = 16384
"""Tokens to a run: enough to keep the device busy, and more would only take memory."""
BRANCHES_TOGETHER = 32
"""Branches for which a part of the prompts leaves room, where there are so many, in a `BareLlama`.

Every run does the unchanged model once more, so few interventions to a run would be a waste."""
KEYS_TO_A_NODE = 4
"""Keys and values that the prompts of a run may read, as a multiple of the nodes it may have."""


@dataclass(frozen=True)
class Outcome:
    """What one run gives, of some of the prompts under some of the interventions.

    `logits` are the first token's of the reply; branch 0 is the unchanged model, branch `i + 1` the
    intervention `interventions[i]`. `residual` is the last position after each layer asked for.
    """

    prompts: list[int]
    interventions: list[int]
    logits: Float[Tensor, "branch prompt d_vocab"]
    residual: Float[Tensor, "branch prompt layer d_model"]


def first_token_logits(
    model: LensModel,
    prompts: Sequence[str],
    *,
    protocol: Protocol = Protocol(),  # noqa: B008 (frozen)
    batch_size: int | None = None,
    progress: bool = True,
) -> Float[Tensor, "prompt d_vocab"]:
    """Logits of the first token of the reply to each prompt, float32, on the CPU."""
    nothing = torch.empty(0, model.cfg.d_model)
    outcomes = run_branches(
        model, prompts, nothing, protocol=protocol, batch_size=batch_size, progress=progress
    )
    batches = [(outcome.prompts, outcome.logits[0].float().cpu()) for outcome in outcomes]
    order = torch.tensor([prompt for rows, _ in batches for prompt in rows])
    return torch.cat([logits for _, logits in batches])[order.argsort()]


def run_branches(
    model: LensModel,
    prompts: Sequence[str],
    directions: Float[Tensor, "intervention d_model"],
    layers: Sequence[int] | None = None,
    *,
    read_layers: Sequence[int] = (),
    protocol: Protocol = Protocol(),  # noqa: B008
    batch_size: int | None = None,
    progress: bool = True,
) -> Iterator[Outcome]:
    """Run prompts under each of many interventions, and unchanged beside them.

    Without `layers` each direction is ablated (one of zeros changes nothing); with them each is
    added after its layer. `batch_size` is the largest number of rows, prompts times branches, to a
    run. Every prompt meets every intervention once, in any order.

    Raises:
        InputError: if there are no prompts, or one is longer than the model's context; if there is
            no such layer; if there are hooks on the model already.
    """
    if any(point.has_hooks() for point in model.hook_dict.values()):
        raise InputError("the model has hooks on it: leave their context, or model.reset_hooks()")
    ids = encode_prompts(model.tokenizer, prompts, protocol=protocol)
    longest = max(range(len(ids)), key=lambda prompt: len(ids[prompt]))
    if len(ids[longest]) > model.cfg.n_ctx:
        raise InputError(
            f"prompt {longest} has {len(ids[longest])} tokens, the model's context holds "
            f"{model.cfg.n_ctx}: shorten the prompt"
        )
    read_layers = sorted(set(read_layers))
    for layer in (*(layers or ()), *read_layers):
        stream_after(model, layer)
    asked = _Asked(ids, directions, layers, read_layers, batch_size, input_device(model))
    bare = bare_llama(model, ids[0])
    outcomes = _run_bare(bare, asked) if bare else _run_hooked(model, asked)
    return _shown(outcomes, asked, progress)


def _shown(outcomes: Iterator[Outcome], asked: "_Asked", progress: bool) -> Iterator[Outcome]:
    from tqdm.auto import tqdm

    total = len(asked.ids) * max(1, len(asked.order))
    with tqdm(total=total, unit="prompt", disable=not progress) as bar:
        for found in outcomes:
            yield found
            bar.update(len(found.prompts) * max(1, len(found.interventions)))


@dataclass(frozen=True)
class _Asked:
    """What is to be run: prompts as token ids, under interventions."""

    ids: list[list[int]]
    directions: Float[Tensor, "intervention d_model"]
    layers: Sequence[int] | None
    read_layers: Sequence[int]
    batch_size: int | None
    device: torch.device

    @property
    def order(self) -> list[int]:
        """The interventions, additions in the order of layers."""
        layers = self.layers
        return sorted(range(len(self.directions)), key=lambda i: layers[i] if layers else 0)

    def branches(self, chunk: list[int]) -> "_Branches":
        """Some of the interventions, beside the unchanged model."""
        after = None if self.layers is None else [self.layers[i] for i in chunk]
        return _Branches(self.directions[chunk].float().to(self.device), after)


def _run_hooked(model: LensModel, asked: _Asked) -> Iterator[Outcome]:
    """Part by part of the interventions on all prompts, those of one length together."""
    ids, device = asked.ids, asked.device
    longest = max(map(len, ids))
    n_shared = _shared_opening(ids) if can_share_prefix(model, longest) else 0
    budget = TOKENS_ON_GPU if device.type == "cuda" else TOKENS_ON_CPU
    n_rows = max(2, asked.batch_size or budget // (longest - n_shared))
    opening = torch.tensor([ids[0][:n_shared]], device=device)
    for chunk in _even_parts(asked.order, n_rows - 1) or [[]]:
        run = _Hooked(model, asked.branches(chunk))
        if n_shared:
            run.open(opening)
        for group in _by_length(ids, n_rows // run.branches.count):
            tokens = torch.tensor([ids[i][n_shared:] for i in group], device=device)
            yield Outcome(group, chunk, *run(tokens, asked.read_layers))
        del run  # and with it the opening's keys


def _run_bare(bare: BareLlama, asked: _Asked) -> Iterator[Outcome]:
    """Part by part of the prompts, those that open alike together, under all interventions."""
    ids, order = asked.ids, asked.order
    together = min(1 + len(order), BRANCHES_TOGETHER)
    n_rows = asked.batch_size or len(ids) * together
    for part in _by_opening(ids, TOKENS_ON_CPU // together, at_most=n_rows // together):
        tree = PromptTree.of([ids[i] for i in part])
        n_branches = TOKENS_ON_CPU // len(tree.tokens)
        if asked.batch_size:
            n_branches = min(n_branches, asked.batch_size // len(part))
        for chunk in _even_parts(order, n_branches - 1) or [[]]:
            branches = asked.branches(chunk)
            logits, begun = bare.run(branches, tree, asked.read_layers)
            residual = _residual(logits, begun, branches.directions.shape[1])
            yield Outcome(part, chunk, logits, residual)


class _Branches:
    """The unchanged model and some interventions of one kind; additions in the order of layers."""

    def __init__(self, directions: Float[Tensor, "intervention d_model"], layers: list[int] | None):
        self.directions = directions
        self.layers = layers
        self.count = 1 + len(directions)

    def hooks(self, model: LensModel, start: Float[Tensor, "prompt pos d_model"]) -> list[Hook]:
        """Hooks that put the prompts in at block 0, for one row of tokens, and branch off there on.

        `start` is what the embedding writes for each prompt.
        """
        if self.layers is None:
            units = torch.nn.functional.normalize(self.directions, dim=-1)
            units = torch.cat([torch.zeros_like(units[:1]), units]) if len(units) else units
            rows = repeat(units, "branch d_model -> (branch prompt) d_model", prompt=len(start))
            enter = repeat(start, "prompt ... -> (branch prompt) ...", branch=self.count)
            ablating = projection_hooks(model, rows) if len(units) else []
            return [(stream_after(model, EMBEDDING), lambda x, hook: enter), *ablating]
        hooks: list[Hook] = [(stream_after(model, EMBEDDING), lambda x, hook: start)]
        for layer, same in groupby(range(len(self.layers)), key=self.layers.__getitem__):
            hooks.append((stream_after(model, layer), self._branch_off(list(same), len(start))))
        return hooks

    def _branch_off(self, interventions: list[int], n_prompts: int) -> Callable[..., Tensor]:
        added = rearrange(self.directions[interventions], "new d_model -> new 1 1 d_model")

        def branch_off(x: Tensor, hook: object) -> Tensor:
            new = (x[:n_prompts] + added.to(x.device)).to(x.dtype)
            return torch.cat([x, rearrange(new, "new prompt ... -> (new prompt) ...")])

        return branch_off


class _Hooked:
    """Runs the tokens after the opening, of prompts of one length, through TransformerLens."""

    def __init__(self, model: LensModel, branches: _Branches):
        self.model, self.branches = model, branches
        self.prefix: Prefix | None = None

    def open(self, tokens: Int[Tensor, "1 pos"]) -> None:
        """Keep the keys and values of the opening that all prompts share, in every branch."""
        self.prefix = empty_prefix(self.model)
        options = self.prefix.options(tokens.shape[1], None)
        _forward(self.model, self.branches, tokens, [], options)

    def __call__(
        self, tokens: Int[Tensor, "prompt pos"], read_layers: Sequence[int]
    ) -> tuple[
        Float[Tensor, "branch prompt d_vocab"], Float[Tensor, "branch prompt layer d_model"]
    ]:
        n_prompts, n_tokens = tokens.shape
        read: list[Tensor] = []

        def read_last(x: Tensor, hook: object) -> Tensor:
            read.append(x[:, -1].clone())
            return x

        model = self.model
        hooks = [(stream_after(model, layer), read_last) for layer in read_layers]
        options = without_prefix(model, n_tokens)
        if self.prefix:
            options = self.prefix.options(n_tokens, n_prompts)
        logits = _forward(model, self.branches, tokens, hooks, options)
        logits = rearrange(logits, "(branch prompt) 1 v -> branch prompt v", prompt=n_prompts)
        begun = [
            rearrange(x, "(branch prompt) d -> branch prompt d", prompt=n_prompts) for x in read
        ]
        return logits, _residual(logits, begun, model.cfg.d_model)


def _residual(
    logits: Float[Tensor, "branch prompt d_vocab"],
    read: Sequence[Float[Tensor, "_ prompt d_model"]],
    d_model: int,
) -> Float[Tensor, "branch prompt layer d_model"]:
    """What was read in every branch; one that had not begun is as the unchanged model."""
    residual = logits.new_empty(*logits.shape[:2], len(read), d_model)
    for i, begun in enumerate(read):
        residual[: len(begun), :, i] = begun
        residual[len(begun) :, :, i] = begun[0]
    return residual


def _forward(
    model: LensModel,
    branches: _Branches,
    tokens: Int[Tensor, "prompt pos"],
    hooks: list[Hook],
    options: dict[str, Any],
) -> Float[Tensor, "row 1 d_vocab"]:
    """Logits of the last position, the only one that is unembedded."""
    everywhere = torch.ones_like(tokens)
    last = stream_after(model, model.cfg.n_layers - 1)
    with undisturbed(model):
        start = model(tokens, attention_mask=everywhere, stop_at_layer=0)
        hooks = [*branches.hooks(model, start), *hooks, (last, lambda x, hook: x[:, -1:])]
        with model.hooks(fwd_hooks=hooks):
            return model(tokens[:1], **options)


def _shared_opening(ids: list[list[int]]) -> int:
    """How many tokens all prompts open with, short of the last one of any."""
    if len(ids) < 2:
        return 0
    columns = zip(*(row[:-1] for row in ids), strict=False)
    n_shared = 0
    for column in columns:
        if len(set(column)) > 1:
            break
        n_shared += 1
    return n_shared


def _by_length(ids: list[list[int]], at_most: int) -> Iterator[list[int]]:
    """Prompts of one length together, longest first, so that a run too large shows at once."""
    order = sorted(range(len(ids)), key=lambda prompt: -len(ids[prompt]))
    for _, same in groupby(order, key=lambda prompt: len(ids[prompt])):
        yield from _even_parts(list(same), at_most)


def _by_opening(ids: list[list[int]], n_nodes: int, *, at_most: int) -> Iterator[list[int]]:
    """Prompts in the order of their tokens, as many as make a tree of so many nodes, or one.

    Every prompt reads as many keys as the longest of its part has tokens.
    """
    order = sorted(range(len(ids)), key=ids.__getitem__)
    part: list[int] = []
    size = longest = 0
    for prompt, new in zip(order, new_tokens([ids[i] for i in order]), strict=True):
        length = len(ids[prompt])
        n_keys = (len(part) + 1) * max(longest, length)
        if part and (
            size + new > n_nodes or n_keys > KEYS_TO_A_NODE * n_nodes or len(part) >= at_most
        ):
            yield part
            part, size, longest, new = [], 0, 0, length
        part.append(prompt)
        size, longest = size + new, max(longest, length)
    yield part


def _even_parts(items: list[int], at_most: int) -> list[list[int]]:
    n_parts = ceil(len(items) / max(1, at_most))
    size = ceil(len(items) / n_parts) if n_parts else 1
    return [items[i : i + size] for i in range(0, len(items), size)]
