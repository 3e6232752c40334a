"""The probability that each row's reply begins with an opening, under the row's intervention."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..activations.shared_prefix import SharedPrefix
from ..models.forward import undisturbed
from .batch_rows import Interventions, hooks_by_row, last_logits, most_rows
from .reply_openings import Mass, Node, ReplyOpenings

if TYPE_CHECKING:
    from ..models import HookedModel


def opening_scores(
    model: "HookedModel",
    openings: ReplyOpenings,
    tokens: Int[Tensor, "prompt pos"],
    these: Interventions,
    whole: SharedPrefix | None,
    logits: Float[Tensor, "intervention prompt d_vocab"],
) -> Float[Tensor, "intervention prompt"]:
    """Log-odds that the reply to each prompt begins with an opening, under each intervention.

    Args:
        model, openings: the model, and the openings in its tokens.
        tokens, these: prompts, padded on the left behind a prefix, and the interventions on them.
        whole: keys and values of every prompt under every intervention; None runs the prompts again
            with every token of an opening.
        logits: next-token logits after the prompts.
    """
    n_prompts, n_rows = logits.shape[1], logits[..., 0].numel()
    mass, rows = Mass(openings, n_rows), torch.arange(n_rows)
    mass.add((), rows, logits.flatten(0, 1))

    def children(nodes: Sequence[Node], of: Sequence[int]) -> list[tuple[Node, int, int]]:
        """Likely nodes right behind others: tokens, row of `logits`, and which the node follows."""
        found = enumerate(zip(nodes, of, strict=True))
        return [(child, row, i) for i, (node, row) in found for child in mass.likely(node, row)]

    waiting = [(whole, children([()] * n_rows, range(n_rows)))]
    while waiting:
        prefix, found = waiting.pop()
        step = most_rows(model, prefix.length + 1 if prefix else tokens.shape[1])
        for first in range(0, len(found), step):
            nodes, of, recorded = zip(*found[first : first + step], strict=True)
            rows, taken = torch.tensor(of), (torch.tensor(recorded), n_prompts)
            longer, behind = _next_token(model, tokens, these, prefix, nodes, rows, taken)
            for node in set(nodes):
                mine = torch.tensor([other == node for other in nodes])
                mass.add(node, rows[mine], behind[mine.to(behind.device)])
            waiting.append((longer, children(nodes, of)))
    return mass.log_odds().view(logits.shape[:2])


def _next_token(
    model: "HookedModel",
    tokens: Int[Tensor, "prompt pos"],
    these: Interventions,
    prefix: SharedPrefix | None,
    nodes: Sequence[Node],
    rows: Int[Tensor, " row"],
    taken: tuple[Int[Tensor, " row"], int],
) -> tuple[SharedPrefix | None, Float[Tensor, "row d_vocab"]]:
    """Run the last token of each row's node; return its recorded keys and the next logits."""
    device, n_prompts = tokens.device, len(tokens)
    if prefix is None:
        paths = torch.tensor(nodes, device=device)
        new = torch.cat([tokens[(rows % n_prompts).to(device)], paths], dim=1)
        arguments: dict[str, Any] = {"attention_mask": torch.ones_like(new[:1])}
    else:
        new = torch.tensor([[node[-1]] for node in nodes], device=device)
        prefix, arguments = prefix.extended(torch.ones_like(new[:1]), rows=taken)
    with undisturbed(model):
        start = model(new, attention_mask=torch.ones_like(new), stop_at_layer=0)
        hooks = []
        if prefix is None or not these.last_position:
            position = -1 - len(nodes[0]) if these.last_position else None
            hooks = hooks_by_row(model, these, rows // n_prompts, position=position)
        return prefix, last_logits(model, new, start, hooks, arguments)[:, 0]
