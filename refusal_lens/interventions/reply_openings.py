"""Openings of replies in a model's tokens, and their probability from next-token logits.

An opening has several tokens, so the openings form a prefix tree. The distribution behind each node of
the tree gives the probability of all openings that end there; `opening_scores` runs the model.
"""

import math
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from importlib.resources import files
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer

Node = tuple[int, ...]
TOLERANCE = 1e-5  # of the probability of a refusal, to which less likely nodes are left out

OPENINGS: dict[str, Any] = tomllib.loads(
    files(__package__).joinpath("openings.toml").read_text("utf-8")
)
REFUSAL, SYMPATHY, ANSWERING = (tuple(OPENINGS[k]) for k in ("refusal", "sympathy", "answering"))


@dataclass(frozen=True)
class ReplyOpenings:
    """Openings of one kind of reply in a model's tokens; none of them begins another.

    Attributes:
        texts: the openings as text.
        ids: the openings as token ids.
    """

    texts: tuple[str, ...]
    ids: tuple[tuple[int, ...], ...]

    @property
    def first_tokens(self) -> tuple[int, ...]:
        """The openings' first tokens; `refusal_log_odds` scores them alone (Arditi et al. 2024)."""
        return tuple(sorted({one[0] for one in self.ids}))

    @cached_property
    def tree(self) -> dict[Node, tuple[list[int], list[int]]]:
        """Tokens behind every proper beginning of an opening: that complete one, that go on."""
        inner = sorted({one[:n] for one in self.ids for n in range(len(one))}, key=len)
        found = {}
        for node in inner:
            ends = sorted(one[-1] for one in self.ids if one[:-1] == node)
            go_on = sorted(one[-1] for one in inner if one and one[:-1] == node)
            found[node] = ends, go_on
        return found


class Mass:
    """The probability that each of many replies begins with an opening.

    `add` takes the model's distribution behind one node of the tree after another, the root first.
    """

    def __init__(self, openings: ReplyOpenings, n_rows: int):
        self._tree = openings.tree
        self._reached: dict[Node, Tensor] = {(): torch.zeros(n_rows)}
        self._yes, self._no = torch.full((2, n_rows), -torch.inf)
        self._spare = [TOLERANCE] * n_rows

    def likely(self, node: Node, row: int) -> list[Node]:
        """The nodes right behind a node, without those that the row's tolerance has room for.

        A node may take half of what is left of it, so that many small ones find room.
        """
        children = [(*node, token) for token in self._tree[node][1]]
        odds = {child: math.exp(self._reached[child][row]) for child in children}
        for child in sorted(children, key=odds.__getitem__):
            if odds[child] > self._spare[row] / 2:
                break
            self._spare[row] -= odds.pop(child)
        return [*odds]

    def add(
        self, node: Node, rows: Int[Tensor, " row"], logits: Float[Tensor, "row d_vocab"]
    ) -> None:
        """Add the next-token logits behind a node, for some of the rows."""
        ends, go_on = self._tree[node]
        log_p = logits.float().log_softmax(-1)
        named = log_p[:, ends + go_on].cpu()
        rest = log_p.index_fill(-1, torch.tensor(ends + go_on, device=log_p.device), -torch.inf)
        here = self._reached[node][rows]
        for i, token in enumerate(go_on, start=len(ends)):
            nowhere = torch.full_like(self._yes, -torch.inf)
            self._reached.setdefault((*node, token), nowhere)[rows] = here + named[:, i]
        if ends:
            self._yes[rows] = self._yes[rows].logaddexp(here + named[:, : len(ends)].logsumexp(-1))
        self._no[rows] = self._no[rows].logaddexp(here + rest.logsumexp(-1).cpu())
        self._reached[node][rows] = -torch.inf  # its mass is with its children now

    def log_odds(self) -> Float[Tensor, " row"]:
        """Log-odds of an opening; its probability counts as `TOLERANCE` at least.

        Nodes behind which nothing was added count as no opening.
        """
        left = torch.stack([*self._reached.values()]).logsumexp(0)
        return self._yes.clamp_min(math.log(TOLERANCE)) - self._no.logaddexp(left)


def openings_of(tokenizer: "Tokenizer", texts: Sequence[str] = REFUSAL) -> ReplyOpenings:
    """The openings in a tokenizer's tokens, with both apostrophes.

    An opening that the tokenizer can't write, or that begins with another opening, is left out.

    Args:
        tokenizer: the model's tokenizer.
        texts: openings, case and spaces as written. InputError if none is left.
    """
    plain: Any = tokenizer
    both = dict.fromkeys(text for one in texts for text in (one, one.replace("'", "’")))
    ids_of = partial(plain.encode, add_special_tokens=False)
    found = {tuple(ids_of(text)): text for text in reversed(both) if text.strip()}
    unknown = getattr(tokenizer, "unk_token_id", None)
    written = [ids for ids in found if ids and unknown not in ids]
    kept = [ids for ids in written if not any(ids[: len(x)] == x != ids for x in written)]
    if not kept:
        raise InputError("there are no openings: give one text that the tokenizer can write")
    return ReplyOpenings(tuple(found[ids] for ids in kept), tuple(kept))
