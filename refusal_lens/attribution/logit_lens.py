"""The tokens that a direction promotes through the unembedding alone, and a direction without them."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from ..errors import InputError, check_tensors
from ..interventions.hooks import check_directions
from ..interventions.refusal_metric import RefusalTokens, token_ids
from ..models.forward import effective_unembedding
from ..models.load import tokenizer_of
from . import Table

if TYPE_CHECKING:
    from ..models import HookedModel

Tokens = tuple[tuple[str, float], ...]


@dataclass(frozen=True, repr=False)
class LogitLens(Table):
    """The tokens that a direction promotes and suppresses most, at each layer.

    Attributes:
        promoted, suppressed: texts of tokens and their logits less the vocabulary's mean, for a
            direction of norm 1 and before the final norm divides by the size of the stream.
    """

    promoted: tuple[Tokens, ...]
    suppressed: tuple[Tokens, ...]

    def _rows(self) -> list[list[str]]:
        rows = [["layer", "promoted", "suppressed"]]
        for layer, sides in enumerate(zip(self.promoted, self.suppressed, strict=True)):
            rows.append([str(layer), *(" ".join(repr(text) for text, _ in side) for side in sides)])
        return rows


def logit_lens(
    model: "HookedModel",
    direction: Float[Tensor, "layer d_model"],
    *,
    k: int = 8,
) -> LogitLens:
    """The `k` tokens whose logits each layer's direction raises and lowers most, by itself.

    The final norm's weight is folded into the unembedding, and no later layer is run. Reference:
    nostalgebraist 2020, "interpreting GPT: the logit lens".
    >>> lens = logit_lens(model, r, k=4)
    """
    check_tensors(direction=(direction, "layer d_model"))
    check_directions(model, direction)
    tokenizer: Any = tokenizer_of(model)
    units = torch.nn.functional.normalize(direction.detach().float().cpu(), dim=-1)
    logits, sides = units @ _readout(model), []
    if not 1 <= k <= logits.shape[1]:
        raise InputError(f"k is {k}: choose from 1 to {logits.shape[1]}, the whole vocabulary")
    for largest in (True, False):
        top = logits.topk(k, largest=largest)
        texts = [[str(tokenizer.decode([i])) for i in ids] for ids in top.indices.tolist()]
        pairs = zip(texts, top.values.tolist(), strict=True)
        sides.append(tuple(tuple(zip(*pair, strict=True)) for pair in pairs))
    return LogitLens(*sides)


def without_direct_effect(
    model: "HookedModel",
    direction: Float[Tensor, "*layer d_model"],
    tokens: RefusalTokens | Iterable[int],
) -> Float[Tensor, "*layer d_model"]:
    """A direction without its part in the span of some tokens' unembeddings.

    The rest raises or lowers no logit of these tokens against the vocabulary's mean by itself: what
    it still does to refusal, it does through later layers (an indirect effect).

    Args:
        model, direction: the model, and a direction at one layer or at each.
        tokens: the tokens that count as a refusal, `openings.first_tokens` for instance; InputError
            if there are none, or one is not in the vocabulary.
    >>> indirect = without_direct_effect(model, r, tokens=[40])
    """
    check_directions(model, direction)
    ids = sorted({*token_ids(tokens)})
    unembedding = _readout(model)
    n = unembedding.shape[1]
    if not ids or not 0 <= ids[0] <= ids[-1] < n:
        raise InputError(f"the tokens are {ids[:8]}: give ids of this vocabulary of {n}")
    span, sizes, _ = torch.linalg.svd(unembedding[:, ids].double(), full_matrices=False)
    span, wide = span[:, sizes > 1e-6 * sizes[0]].to(direction.device), direction.double()
    return (wide - (wide @ span) @ span.T).to(direction.dtype)


def _readout(model: "HookedModel") -> Float[Tensor, "d_model d_vocab"]:
    """The unembedding with the final norm, less what the norm and the softmax drop."""
    unembedding = effective_unembedding(model)
    if "LN" in str(model.cfg.normalization_type):  # a layer norm drops the mean over dimensions
        unembedding = unembedding - unembedding.mean(0)
    return unembedding - unembedding.mean(1, keepdim=True)
