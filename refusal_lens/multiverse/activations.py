"""Activations under many protocols; tokens that protocols share run once.

An activation of a causal model depends on the tokens up to its position alone. Each activation holds
the outputs of the embedding and of every block, for both ways to count layers. Only this module
extracts activations at padding, as the published script does.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ..activations.extract import read_residual_stream
from ..activations.store import digest
from ..errors import InputError
from ..models.forward import copy_columns, hook_points, input_device, undisturbed
from ..prompts.contrast import Contrast
from ..prompts.protocol import Protocol
from ..prompts.tokenize import ChatInputs, build_inputs_with_chat_template
from .specifications import Specification

if TYPE_CHECKING:
    from ..models import HookedModel

PADDED_ROWS = 32  # default batch size of prompts whose position is padding


class Context(NamedTuple):
    """The tokens that determine an activation: `ids`, then `padding` tokens of id `pad`."""

    ids: tuple[int, ...]
    padding: int = 0
    pad: int = 0


Streams = dict[Context, Float[Tensor, "stream d_model"]]


def read_specifications(
    model: "HookedModel",
    contrasts: tuple[Contrast, Contrast],
    specifications: list[Specification],
    *,
    remember: Callable[..., Any] = lambda what, key, run: run(),
    **options: Any,
) -> tuple[Callable[[Specification], list[Float[Tensor, "prompt layer d_model"]]], dict[str, str]]:
    """Run all prompts of every specification that the model's chat template allows.

    Returns a function from a specification to its four sets of activations, and the reasons of the
    specifications that the template refuses, by name. InputError if the default is one of them.
    """
    sides = [side for each in contrasts for side in (each.target, each.baseline)]
    places: dict[str, list[list[Context]]] = {}
    skipped: dict[str, str] = {}
    for each in specifications:
        try:
            places[each.name] = [
                contexts(model, [side[row] for row in rows], each.protocol)
                for side, rows in zip(sides, each.rows, strict=True)
            ]
        except InputError as error:
            if each.is_default:
                raise
            skipped[each.name] = str(error)
    wanted = {context for sets in places.values() for one in sets for context in one}
    distinct = sorted(wanted)

    def read() -> Float[Tensor, "context stream d_model"]:
        found = read_contexts(model, distinct, **options)
        return torch.stack([found[context] for context in distinct])

    streams = dict(zip(distinct, remember("activations", digest(distinct), read), strict=True))

    def activations(specification: Specification) -> list[Tensor]:
        counted = slice(1, None) if specification.protocol.hook == "resid_post" else slice(-1)
        sets = places[specification.name]
        return [torch.stack([streams[context][counted] for context in one]) for one in sets]

    return activations, skipped


def contexts(model: "HookedModel", prompts: Sequence[str], protocol: Protocol) -> list[Context]:
    """Return the context of each prompt under a protocol of one position."""
    tokenizer: Any = model.tokenizer
    inputs = build_inputs_with_chat_template(tokenizer, prompts, protocol=protocol)
    found = []
    for tokens, mask, at in zip(inputs.tokens, inputs.mask, inputs.read_at[:, 0], strict=True):
        ids = tokens[: int(at) + 1][mask[: int(at) + 1].bool()]
        padding = max(0, int(at) - int(mask.nonzero()[-1]))
        found.append(Context(tuple(ids.tolist()), padding, int(tokens[at]) if padding else 0))
    return found


def read_contexts(
    model: "HookedModel",
    wanted: Iterable[Context],
    *,
    batch_size: int | None = None,
    progress: bool = True,
) -> Streams:
    """Return each context's activations in float32: the embedding, then the output of every block."""
    found: Streams = {}
    distinct = sorted(set(wanted))
    if rows := shared_rows([context.ids for context in distinct if not context.padding]):
        options: dict[str, Any] = {"batch_size": batch_size, "progress": progress}
        for batch, streams in read_residual_stream(model, _inputs(rows), **options):
            for row, stream in zip(batch.tolist(), streams.float(), strict=True):
                ids, lengths = rows[row]
                found |= {Context(ids[:n]): s for n, s in zip(lengths, stream, strict=False)}
    padded, size = [each for each in distinct if each.padding], batch_size or PADDED_ROWS
    for start in range(0, len(padded), size):
        found |= _read_padding(model, padded[start : start + size])
    return found


def shared_rows(wanted: Iterable[tuple[int, ...]]) -> list[tuple[tuple[int, ...], list[int]]]:
    """Return the fewest token rows that have all of `wanted` as prefixes, and the prefix lengths."""
    rows: list[tuple[tuple[int, ...], list[int]]] = []
    # In descending order, a prefix directly follows the rows that begin with it.
    for ids in sorted(set(wanted), reverse=True):
        if rows and rows[-1][0][: len(ids)] == ids:
            rows[-1][1].append(len(ids))
        else:
            rows.append((ids, [len(ids)]))
    return rows


def _inputs(rows: list[tuple[tuple[int, ...], list[int]]]) -> ChatInputs:
    """Pad the rows on the left; a row with fewer lengths repeats its last length."""
    options: dict[str, Any] = {"batch_first": True, "padding_side": "left"}
    tokens = pad_sequence([torch.tensor(ids) for ids, _ in rows], **options)
    mask = pad_sequence([torch.ones(len(ids), dtype=torch.long) for ids, _ in rows], **options)
    most = max(len(lengths) for _, lengths in rows)
    lengths = torch.tensor([each + each[-1:] * (most - len(each)) for _, each in rows])
    starts = tokens.shape[1] - mask.sum(1, keepdim=True)
    return ChatInputs(tokens, mask, starts + lengths - 1, "every_stream")


def _read_padding(model: "HookedModel", batch: list[Context]) -> Streams:
    """Return the activation at each context's last padding token, which no token attends to."""
    device = input_device(model)
    last = [len(each.ids) + each.padding - 1 for each in batch]
    if (width := max(last) + 1) > (limit := model.cfg.n_ctx):
        raise InputError(f"a padded prompt has {width} tokens, the context {limit}: shorten it")
    tokens = torch.tensor([[*c.ids, *[c.pad] * (width - len(c.ids))] for c in batch], device=device)
    lengths = torch.tensor([[len(each.ids)] for each in batch], device=device)
    is_padding = torch.arange(width, device=device) >= lengths

    def unattended(scores: Tensor, hook: object) -> Tensor:
        hidden = is_padding.to(scores.device)[:, None, None]
        return scores.masked_fill(hidden, torch.finfo(scores.dtype).min)

    names = hook_points(model, "every_stream")
    scores = [f"blocks.{layer}.attn.hook_attn_scores" for layer in range(model.cfg.n_layers)]
    columns = sorted(set(last))
    with undisturbed(model), model.hooks(fwd_hooks=[(name, unattended) for name in scores]):
        _, cache = model.run_with_cache(
            tokens,
            names_filter=names,
            pos_slice=copy_columns(torch.tensor(columns)),
            return_cache_object=False,
        )
    streams = torch.stack([cache[name].to("cpu", torch.float32) for name in names], dim=2)
    rows = zip(batch, streams, last, strict=True)
    return {each: stream[columns.index(at)].clone() for each, stream, at in rows}
