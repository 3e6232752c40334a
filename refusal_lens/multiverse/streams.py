"""Activations of many protocols at once: what two of them share runs once.

A model is causal: what stands at a token depends on the tokens up to it and on nothing else. So two
protocols share a reading wherever they read at the end of the same tokens, whatever follows, and one
run gives every reading along a row. Each reading holds the whole residual stream, the embedding's
output and every block's, so that the two ways of counting layers share it too.

Padding tokens are read here and nowhere else, as the published experiment's script read them.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from ..activations.batching import names_read, read_residual_stream
from ..errors import InputError
from ..models.forward import copy_columns, input_device, undisturbed
from ..models.load import LensModel
from ..prompts.protocol import Protocol
from ..prompts.tokenize import ChatInputs, build_inputs_with_chat_template

PADDED_ROWS = 32
"""Rows to a run of those that are read at a padding token."""


class Reading(NamedTuple):
    """What decides an activation: the tokens up to where it is read, and the padding up to there.

    `padding` tokens of id `pad` come behind the tokens, and the last of them is read; 0 reads the
    last of the tokens themselves.
    """

    ids: tuple[int, ...]
    padding: int = 0
    pad: int = 0


def readings(model: LensModel, prompts: Sequence[str], protocol: Protocol) -> list[Reading]:
    """Where a protocol of one position reads each prompt.

    Raises:
        InputError: as `build_inputs_with_chat_template`, and for several positions.
    """
    if len(protocol.positions) != 1:
        raise InputError(
            f"the protocol {protocol.name!r} reads positions {protocol.positions}: take one at a "
            "time here"
        )
    inputs = build_inputs_with_chat_template(model.tokenizer, prompts, protocol=protocol)
    found = []
    for tokens, mask, at in zip(inputs.tokens, inputs.mask, inputs.read_at[:, 0], strict=True):
        real = mask.nonzero()[:, 0]
        first, last = int(real[0]), int(real[-1])
        ids = tuple(tokens[first : min(int(at), last) + 1].tolist())
        padding = max(0, int(at) - last)
        found.append(Reading(ids, padding, int(tokens[at]) if padding else 0))
    return found


def read_streams(
    model: LensModel,
    wanted: Sequence[Reading],
    *,
    batch_size: int | None = None,
    progress: bool = True,
) -> dict[Reading, Float[Tensor, "stream d_model"]]:
    """The residual stream of each reading, each computed once: `[stream d_model]`, float32.

    Stream `0` is the embedding's output and `l + 1` that of block `l`.

    Raises:
        InputError: as `read_residual_stream`.
    """
    found: dict[Reading, Tensor] = {}
    distinct = sorted(set(wanted))
    plain = [reading for reading in distinct if not reading.padding]
    if plain:
        rows = rows_of(plain)
        inputs = _inputs(rows)
        for batch, streams in read_residual_stream(
            model, inputs, batch_size=batch_size, progress=progress
        ):
            for row, read in zip(batch.tolist(), streams.float(), strict=True):
                ids, lengths = rows[row]
                for length, stream in zip(lengths, read, strict=False):
                    found[Reading(ids[:length])] = stream
    padded = [reading for reading in distinct if reading.padding]
    for start in range(0, len(padded), batch_size or PADDED_ROWS):
        batch_of = padded[start : start + (batch_size or PADDED_ROWS)]
        found |= zip(batch_of, _read_padding(model, batch_of), strict=True)
    return found


def rows_of(plain: Sequence[Reading]) -> list[tuple[tuple[int, ...], list[int]]]:
    """The fewest rows of tokens that hold every reading, and the lengths at which each is read."""
    rows: list[tuple[tuple[int, ...], list[int]]] = []
    # In order, tokens stand right before those that go on from them.
    for ids, *_ in sorted(set(plain), reverse=True):
        if rows and rows[-1][0][: len(ids)] == ids:
            rows[-1][1].append(len(ids))
        else:
            rows.append((ids, [len(ids)]))
    return rows


def _inputs(rows: Sequence[tuple[tuple[int, ...], list[int]]]) -> ChatInputs:
    width = max(len(ids) for ids, _ in rows)
    most = max(len(lengths) for _, lengths in rows)
    tokens = torch.zeros(len(rows), width, dtype=torch.long)
    mask = torch.zeros_like(tokens)
    read_at = torch.empty(len(rows), most, dtype=torch.long)
    for row, (ids, lengths) in enumerate(rows):
        start = width - len(ids)
        tokens[row, start:] = torch.tensor(ids)
        mask[row, start:] = 1
        each = lengths + lengths[-1:] * (most - len(lengths))
        read_at[row] = start + torch.tensor(each) - 1
    return ChatInputs(tokens, mask, read_at, "every_stream")


def _read_padding(model: LensModel, batch: Sequence[Reading]) -> Iterator[Tensor]:
    """The stream at padding tokens behind each row, as Hugging Face computes it there.

    A padding token stands at its column's position, and no token attends to padding, itself
    included. What else stands in the batch makes no difference.
    """
    device = input_device(model)
    width = max(len(reading.ids) + reading.padding for reading in batch)
    if width > model.cfg.n_ctx:
        raise InputError(
            f"a prompt has {width} tokens with its padding, the model's context holds "
            f"{model.cfg.n_ctx}: shorten the prompts"
        )
    tokens = torch.tensor([[*r.ids, *[r.pad] * (width - len(r.ids))] for r in batch], device=device)
    lengths = torch.tensor([len(reading.ids) for reading in batch], device=device)
    behind = torch.arange(width, device=device) >= lengths[:, None]

    def unattended(scores: Tensor, hook: object) -> Tensor:
        hidden = behind.to(scores.device)[:, None, None]
        return scores.masked_fill(hidden, torch.finfo(scores.dtype).min)

    layers = range(model.cfg.n_layers)
    names = names_read(model, "every_stream")
    hooks = [(f"blocks.{layer}.attn.hook_attn_scores", unattended) for layer in layers]
    columns = sorted({len(reading.ids) + reading.padding - 1 for reading in batch})
    with undisturbed(model), model.hooks(fwd_hooks=hooks):
        _, cache = model.run_with_cache(
            tokens,
            names_filter=names,
            pos_slice=copy_columns(torch.tensor(columns)),
            return_cache_object=False,
        )
    streams = torch.stack([cache[name].to("cpu", torch.float32) for name in names], dim=2)
    for row, reading in zip(streams, batch, strict=True):
        yield row[columns.index(len(reading.ids) + reading.padding - 1)].clone()
