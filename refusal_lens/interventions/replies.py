"""Replies to prompts before and after an intervention, side by side; harmful prompts get scores."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from ..activations.shared_prefix import SharedPrefix, can_share_prefix
from ..errors import InputError
from ..models.forward import input_device, undisturbed
from ..prompts.contrast import BUNDLED, Contrast, load_contrast
from ..prompts.protocol import Protocol
from .batched_runs import checked_ids, padded
from .direction import Direction
from .hooks import check_interventions
from .reply_openings import Mass, ReplyOpenings, openings_of

if TYPE_CHECKING:
    import pandas as pd

    from ..models import HookedModel

ROWS = 16  # prompts in a pass
NOT_SHOWN = "[reply not shown]"


class Reply(NamedTuple):
    """One prompt with its two replies, and the log-odds that each begins with a refusal."""

    prompt: str
    before: str
    after: str
    score_before: float
    score_after: float


class Replies(tuple[Reply, ...]):
    """Rows of `compare_replies`; a table in Jupyter, text when printed."""

    def to_pandas(self) -> "pd.DataFrame":
        """The rows as a table."""
        import pandas as pd

        return pd.DataFrame(list(self), columns=Reply._fields)

    def __str__(self) -> str:
        rows = "\n\n{0}\n  before ({3:+.1f}): {1}\n  after  ({4:+.1f}): {2}"
        return "".join(rows.format(*row) for row in self).strip()

    def _repr_html_(self) -> str:
        import pandas as pd

        with pd.option_context("display.max_colwidth", None):
            return self.to_pandas().to_html(index=False, float_format="{:+.1f}".format)


def compare_replies(
    model: "HookedModel",
    prompts: str | Sequence[str] | Contrast,
    *,
    ablate: Any = None,
    add: Any = None,
    coefficient: float = 1.0,
    layer: int | None = None,
    contrast: Contrast | None = None,
    protocol: Protocol = Protocol(),  # noqa: B008 (frozen)
    max_tokens: int = 40,
) -> Replies:
    """Return each prompt's most likely reply before and after directions are ablated or added.

    >>> [reply] = compare_replies(model, "How do I bake bread?", add=refusal.at(20))
    >>> reply.score_after > reply.score_before
    True

    No harmful prompt is answered: no target of the bundled contrast, of `contrast`, of `prompts` or
    of the directions' own contrasts, and none that the unmodified model refuses unless a bundled
    contrast vouches for it. Of the reply to such a prompt only a refusal's opening is shown.

    Args:
        model: the model; InputError if it has hooks on it.
        prompts: one prompt or several, in the user's words, or the two sides of a contrast.
        ablate, add: a `Direction` of one layer, or a vector `[d_model]`, or all layers' with
            `layer`; ablated at every layer, added after its own, both at every token.
        coefficient, layer: times which `add` is added; the layer of directions that know none.
        contrast: target prompts that are harmful, besides the bundled ones.
        protocol: how prompts are formatted.
        max_tokens: tokens of a reply, at most.

    InputError for no direction, for one of several layers or another width, and past the context.
    """
    if ablate is None and add is None:
        raise InputError("there is nothing to compare: give ablate=DIRECTION or add=DIRECTION")
    sides = prompts if isinstance(prompts, Contrast) else None
    both = (*prompts.target, *prompts.baseline) if isinstance(prompts, Contrast) else prompts
    prompts = [both] if isinstance(both, str) else [*both]
    tokenizer: Any = model.tokenizer
    ids = checked_ids(model, prompts, protocol, max_tokens)
    given = [None if each is None else _at_one_layer(each, layer) for each in (ablate, add)]
    hooks = given[0].ablate(model) if given[0] else []
    hooks += given[1].add(coefficient, model) if given[1] else []
    check_interventions(model)
    openings = openings_of(tokenizer)
    scores = [_scores(model, openings, ids, each) for each in ([], hooks)]
    shown = _answerable(prompts, scores[0], [contrast, sides, *(g.contrast for g in given if g)])
    special = set(tokenizer.all_special_ids)

    def goes_on(row: int, reply: list[int]) -> bool:
        return reply[-1] not in special if shown[row] else tuple(reply) in openings.tree

    def written(reply: list[int], show: bool) -> str:
        text = tokenizer.decode(reply, skip_special_tokens=True).strip()
        return text if show else f"{text} ..." if tuple(reply) in openings.ids else NOT_SHOWN

    replies = [_continued(model, ids, each, max_tokens, goes_on) for each in ([], hooks)]
    columns = [map(written, each, shown) for each in replies]
    return Replies(map(Reply, prompts, *columns, *(each.tolist() for each in scores)))


def _at_one_layer(given: Any, layer: int | None) -> Direction:
    direction = given if isinstance(given, Direction) else Direction(given)
    if direction.vectors.ndim == 1 and not direction.layers:
        return replace(direction, layers=layer)
    return direction if layer is None else direction.at(layer)


def _answerable(
    prompts: Sequence[str], scores: Float[Tensor, " prompt"], sets: Sequence[Contrast | None]
) -> list[bool]:
    """Whether the reply to each prompt may be shown: not if the prompt may be harmful."""
    refusal, *others = map(load_contrast, BUNDLED)
    safe = {_bare(one) for each in others for one in (*each.target, *each.baseline)}
    safe |= set(map(_bare, refusal.baseline))
    harmful = {_bare(one) for each in (refusal, *sets) if each for one in each.target} - safe
    return [
        not any(one in text for one in harmful) and (text in safe or score <= 0)
        for text, score in zip(map(_bare, prompts), scores.tolist(), strict=True)
    ]


def _bare(text: str) -> str:
    """The words of a text alone, so that case and punctuation make no other prompt of it."""
    return " ".join("".join(c if c.isalnum() else " " for c in text.casefold()).split())


def _scores(
    model: "HookedModel",
    openings: ReplyOpenings,
    ids: list[list[int]],
    hooks: Any,
) -> Float[Tensor, " prompt"]:
    """Log-odds, under hooks, that the reply to each prompt begins with an opening."""
    mass = Mass(openings, len(ids))
    waiting: list[tuple[int, tuple[int, ...]]] = [(row, ()) for row in range(len(ids))]
    while waiting:
        part, waiting = waiting[:ROWS], waiting[ROWS:]
        tokens, mask = padded([ids[row] + [*node] for row, node in part], input_device(model))
        with undisturbed(model), model.hooks(fwd_hooks=hooks):
            logits = model(tokens, attention_mask=mask.expand_as(tokens))[:, -1:]
        for (row, node), behind in zip(part, logits, strict=True):
            mass.add(node, torch.tensor([row]), behind)
            waiting += [(row, child) for child in mass.likely(node, row)]
    return mass.log_odds()


def _continued(
    model: "HookedModel",
    ids: list[list[int]],
    hooks: Any,
    max_tokens: int,
    goes_on: Callable[[int, list[int]], bool],
) -> list[list[int]]:
    """The most likely tokens after each row, until `goes_on(row, reply)` is false."""
    replies: list[list[int]] = [[] for _ in ids]
    cached = can_share_prefix(model, max(map(len, ids)) + max_tokens)
    new, mask = padded(ids, input_device(model))
    mask, going = mask.expand_as(new), [*range(len(ids))]
    prefix, taken = SharedPrefix(model), len(ids)  # type: tuple[SharedPrefix, Any]
    for _ in range(max_tokens):
        arguments: dict[str, Any] = {"attention_mask": mask}
        if cached:
            prefix, arguments = prefix.extended(mask, rows=taken)
        with undisturbed(model), model.hooks(fwd_hooks=hooks):
            last = model(new, **arguments)[:, -1].argmax(-1, keepdim=True)
        for row, token in zip(going, last.flatten().tolist(), strict=True):
            replies[row].append(token)
        kept = [i for i, row in enumerate(going) if goes_on(row, replies[row])]
        taken, going = (torch.tensor(kept), len(going)), [going[i] for i in kept]
        if not going:
            break
        one = torch.ones_like(last)
        pairs = ((new, last), (mask, one)) if not cached else ((last,), (one,))
        new, mask = (torch.cat(pair, dim=1)[kept] for pair in pairs)
    return replies
