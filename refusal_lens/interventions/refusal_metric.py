"""Refusal log-odds, from the distribution of the reply's first token."""

import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from ..errors import InputError, check_tensors
from ..prompts.protocol import Protocol
from .batched_runs import first_token_logits
from .reply_openings import OPENINGS

if TYPE_CHECKING:
    from ..models import HookedModel

EPSILON = 1e-8
FIRST_WORDS: dict[str, list[str]] = OPENINGS["first_words"]  # by a marker in the chat template


@dataclass(frozen=True)
class RefusalTokens:
    """The first tokens that count as a refusal, and how they were found.

    Attributes:
        ids, texts: token ids and their texts; empty if the model has no such tokens.
        how: one sentence on how the tokens were found.
        refused, answered: mean probability of the tokens after prompts to be refused, answered;
            their difference is 1 at perfect separation, 0 at none.
    """

    ids: tuple[int, ...]
    texts: tuple[str, ...]
    how: str
    refused: float
    answered: float


def token_ids(tokens: RefusalTokens | Iterable[int]) -> list[int]:
    """The ids of tokens; InputError for what is no whole number."""
    ids = [*(tokens.ids if isinstance(tokens, RefusalTokens) else tokens)]
    try:
        return [*map(operator.index, ids)]
    except TypeError:
        raise InputError(f"tokens are {ids[:8]}: give ids, such as openings.first_tokens") from None


def refusal_log_odds(
    logits: Float[Tensor, "*batch d_vocab"], tokens: RefusalTokens | Iterable[int]
) -> Float[Tensor, "*batch"]:
    r"""`log(p + e) - log(1 - p + e)`, `p` the summed next-token probability of the refusal tokens.

    In nats, float32; `e = 1e-8` bounds the log-odds to +-18.4 (Arditi et al. 2024,
    arXiv:2406.11717, section B.1).

    Args:
        logits: next-token logits of any dtype.
        tokens: the tokens that count as a refusal, or their ids. Without tokens the result is NaN.
            InputError if an id is not in the vocabulary.
    >>> refusal_log_odds(torch.tensor([1.0, 1.0]), tokens=[0])
    tensor(0.)
    """
    check_tensors(logits=(logits, "*batch d_vocab"))
    ids = token_ids(tokens)
    d_vocab = logits.shape[-1]
    if bad := [i for i in ids if not 0 <= i < d_vocab]:
        raise InputError(f"{bad[0]} is no token of this vocabulary of {d_vocab}")
    if not ids:
        return torch.full(logits.shape[:-1], torch.nan, device=logits.device)
    is_refusal = torch.zeros(d_vocab, dtype=torch.bool, device=logits.device)
    is_refusal[ids] = True
    wide = logits.float()
    refusal = wide[..., is_refusal].logsumexp(-1)
    rest = wide.masked_fill(is_refusal, -torch.inf).logsumexp(-1)
    # 1 - p is computed from the log-sum-exps too, so it is exact where p is almost 1.
    p, not_p = (refusal - rest).sigmoid(), (rest - refusal).sigmoid()
    return (p + EPSILON).log() - (not_p + EPSILON).log()


def next_token_kl(
    logits: Float[Tensor, "*#batch d_vocab"], changed: Float[Tensor, "*#batch d_vocab"]
) -> Float[Tensor, "*batch"]:
    """KL(softmax of `logits` || softmax of `changed`), in nats, float32."""
    check_tensors(logits=(logits, "*batch d_vocab"), changed=(changed, "*batch d_vocab"))
    before, after = logits.float().log_softmax(-1), changed.float().log_softmax(-1)
    return torch.einsum("...v,...v->...", before.exp(), before - after).clamp_min(0)


def find_refusal_tokens(
    model: "HookedModel",
    refused: Sequence[str],
    answered: Sequence[str],
    *,
    protocol: Protocol = Protocol(),  # noqa: B008 (frozen)
    min_separation: float = 0.05,
    progress: bool = True,
) -> RefusalTokens:
    """The first tokens of a model's refusals, from its chat template or from its behaviour.

    The chat template of a known family determines the first words (Arditi et al.). Otherwise, even
    prompts of both sets select tokens and odd prompts measure them. A token is selected if its mean
    probability after prompts to be refused is higher by `min_separation` and at least four times as
    high; `ids` may be empty. Check `refused - answered` before you interpret refusal log-odds.

    Args:
        model: the model, without hooks.
        refused, answered: prompts to be refused and to be answered; InputError below two each.
        protocol: how prompts are formatted.
        min_separation: least difference of mean probabilities.
        progress: whether to show progress bars.
    >>> tokens = find_refusal_tokens(model, contrast.target, contrast.baseline)
    """
    if (fewest := min(len(refused), len(answered))) < 2:
        raise InputError(f"a set of {fewest} prompt(s): give at least two to be refused, answered")
    read = partial(first_token_logits, model, protocol=protocol, progress=progress)
    probabilities = [read(prompts).softmax(-1) for prompts in (refused, answered)]
    tokenizer: Any = model.tokenizer
    ids: list[int] = []
    template = protocol.chat_template or getattr(tokenizer, "chat_template", None) or ""
    if marker := next((mark for mark in FIRST_WORDS if mark in template), None):
        words = [tokenizer.encode(word, add_special_tokens=False) for word in FIRST_WORDS[marker]]
        ids = [word[0] for word in words if len(word) == 1]
        how = f"first words of refusals under chat templates with {marker} (Arditi et al. 2024)"
    if not ids:
        p, q = (side[::2].mean(0) for side in probabilities)
        separates = (p - q >= min_separation) & (p >= 4 * q)
        ids = [i for i in (p - q).argsort(descending=True).tolist() if separates[i]]
        how = f"first tokens likelier by {min_separation} on half of the refused prompts"
        how = how if ids else f"none: there are no {how}"
        probabilities = [side[1::2] for side in probabilities]
    texts = tuple(str(tokenizer.decode([i])) for i in ids)
    means = (side[:, ids].sum(-1).mean().item() for side in probabilities)
    return RefusalTokens(tuple(ids), texts, how, *means)
