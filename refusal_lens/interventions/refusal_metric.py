"""How much a model is about to refuse, from the distribution of its first token alone."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from ..errors import InputError, check_tensors
from ..models.load import LensModel
from ..prompts.protocol import Protocol
from .branches import first_token_logits

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

EPSILON = 1e-8

OPENINGS: dict[str, tuple[str, ...]] = {
    "<|start_header_id|>": ("I",),
    "<start_of_turn>": ("I",),
    "<|im_start|>": ("I", "As"),
    "[INST]": ("I",),
}
"""What refusals open with in Llama 3, Gemma, Qwen and Llama 2, by what the chat template writes.

Words and not token ids, so that the tokenizer at hand decides. (In Arditi et al.: 40; 235285; 40
and 2121; 306.)
"""


@dataclass(frozen=True)
class RefusalTokens:
    """The first tokens of a refusal, and how they are known.

    Attributes:
        ids: token ids; empty where the model has none.
        texts: their texts.
        how: one sentence that says how they were found.
        refused: mean next-token probability of the tokens over the prompts to be refused.
        answered: the same over the prompts to be answered.
    """

    ids: tuple[int, ...]
    texts: tuple[str, ...]
    how: str
    refused: float
    answered: float

    @property
    def separation(self) -> float:
        """How much likelier the tokens are where the model should refuse: 1 at best."""
        return self.refused - self.answered


def refusal_log_odds(
    logits: Float[Tensor, "*batch d_vocab"], tokens: RefusalTokens | Iterable[int]
) -> Float[Tensor, "*batch"]:
    r"""`log(p + e) - log(1 - p + e)`, `p` the summed next-token probability of the refusal tokens.

    `e = 1e-8` keeps it within +-18.4. From logits in any dtype, computed from the two
    log-sum-exps, so that `1 - p` is exact where `p` is almost 1; the answer is float32. NaN where
    there are no refusal tokens, as for a model that does not refuse.

    Raises:
        InputError: if a token id is not of the vocabulary.

    Reference: Arditi et al. 2024, arXiv:2406.11717, section B.1.
    """
    check_tensors(logits=(logits, "*batch d_vocab"))
    ids = list(tokens.ids if isinstance(tokens, RefusalTokens) else tokens)
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
    p, not_p = (refusal - rest).sigmoid(), (rest - refusal).sigmoid()
    return (p + EPSILON).log() - (not_p + EPSILON).log()


def next_token_kl(
    logits: Float[Tensor, "*#batch d_vocab"], changed: Float[Tensor, "*#batch d_vocab"]
) -> Float[Tensor, "*batch"]:
    """Kullback-Leibler divergence KL(unchanged || changed) of next-token distributions, in nats."""
    check_tensors(logits=(logits, "*batch d_vocab"), changed=(changed, "*batch d_vocab"))
    before, after = logits.float().log_softmax(-1), changed.float().log_softmax(-1)
    return torch.einsum("...v,...v->...", before.exp(), before - after).clamp_min(0)


def find_refusal_tokens(
    model: LensModel,
    refused: Sequence[str],
    answered: Sequence[str],
    *,
    protocol: Protocol = Protocol(),  # noqa: B008 (frozen)
    min_separation: float = 0.05,
    progress: bool = True,
) -> RefusalTokens:
    """The tokens with which a model begins a refusal, from its family or from what it does.

    Where the chat template is of a known family, the words its refusals open with, from Arditi et
    al. Else every second prompt of both sets is used to choose, and the others to measure: a token
    is chosen if its mean probability is higher by `min_separation` or more on the prompts to be
    refused and at least four times that on the prompts to be answered. Without any such token the
    answer has no ids, and says so.

    Either way `refused` and `answered` tell how far the tokens do separate the prompts: look there
    before reading anything into refusal log-odds.

    Raises:
        InputError: if there are fewer than two prompts in either set.
    """
    for prompts, side in ((refused, "refused"), (answered, "answered")):
        if len(prompts) < 2:
            raise InputError(f"{len(prompts)} prompt(s) to be {side}: at least two are needed")
    probabilities = [
        first_token_logits(model, prompts, protocol=protocol, progress=progress).softmax(-1)
        for prompts in (refused, answered)
    ]
    if known := _opening_tokens(model.tokenizer, protocol):
        ids, marker = known
        how = f"what refusals of chat templates with {marker} open with (Arditi et al. 2024)"
        return _measured(model.tokenizer, ids, how, *probabilities)
    p, q = (side[::2].mean(0) for side in probabilities)
    separates = (p - q >= min_separation) & (p >= 4 * q)
    ids = [i for i in (p - q).argsort(descending=True).tolist() if separates[i]]
    how = f"first tokens likelier by {min_separation} on refused prompts, chosen on half of them"
    if not ids:
        how = f"none: no first token is likelier by {min_separation} on the prompts to be refused"
    return _measured(model.tokenizer, ids, how, *(side[1::2] for side in probabilities))


def _opening_tokens(
    tokenizer: "PreTrainedTokenizerBase", protocol: Protocol
) -> tuple[list[int], str] | None:
    template = protocol.chat_template or getattr(tokenizer, "chat_template", None) or ""
    for marker, words in OPENINGS.items():
        if marker in template:
            encoded = [tokenizer.encode(word, add_special_tokens=False) for word in words]
            ids = [tokens[0] for tokens in encoded if len(tokens) == 1]
            return (ids, marker) if ids else None
    return None


def _measured(
    tokenizer: "PreTrainedTokenizerBase",
    ids: list[int],
    how: str,
    refused: Tensor,
    answered: Tensor,
) -> RefusalTokens:
    texts = tuple(str(tokenizer.decode([i])) for i in ids)
    means = (side[:, ids].sum(-1).mean().item() for side in (refused, answered))
    return RefusalTokens(tuple(ids), texts, how, *means)
