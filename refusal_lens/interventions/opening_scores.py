"""The probability that each row's reply begins with an opening, under the row's intervention."""

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..activations.shared_prefix import SharedPrefix
from ..models.forward import undisturbed
from .batch_rows import Interventions, hooks_by_row, last_logits, most_rows
from .reply_openings import Mass, Node, ReplyOpenings

if TYPE_CHECKING:
    from transformer_lens import HookedTransformer
    from transformer_lens.model_bridge import TransformerBridge


class _Rows(NamedTuple):
    """Nodes of the openings' tree, each behind one prompt under one intervention.

    Attributes:
        of: `i * n_prompts + p` for prompt `p` under intervention `i`, 0 the unmodified model.
        recorded: the row of keys and values that the last token of the node follows.
        nodes: the tokens of the reply so far.
    """

    of: Int[Tensor, " row"]
    recorded: Int[Tensor, " row"]
    nodes: list[Node]

    def take(self, part: slice) -> "_Rows":
        return _Rows(self.of[part], self.recorded[part], self.nodes[part])


def opening_scores(
    model: "HookedTransformer | TransformerBridge",
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
    rows = torch.arange(logits[..., 0].numel())
    mass = Mass(openings, len(rows))
    mass.add((), rows, logits.flatten(0, 1))
    waiting = [(whole, _likely(mass, _Rows(rows, rows, [()] * len(rows))))]
    while waiting:
        prefix, found = waiting.pop()
        step = most_rows(model, prefix.length + 1 if prefix else tokens.shape[1])
        for first in range(0, len(found.of), step):
            part = found.take(slice(first, first + step))
            longer, behind = _next_token(model, tokens, these, prefix, part)
            for node in set(part.nodes):
                mine = torch.tensor([other == node for other in part.nodes])
                mass.add(node, part.of[mine], behind[mine.to(behind.device)])
            waiting.append((longer, _likely(mass, part)))
    return mass.log_odds().view(logits.shape[:2])


def _likely(mass: Mass, rows: _Rows) -> _Rows:
    """The nodes behind those of these rows that are worth a pass."""
    of, recorded, nodes = [], [], []
    for i, (row, node) in enumerate(zip(rows.of.tolist(), rows.nodes, strict=True)):
        for child in mass.likely(node, row):
            of.append(row)
            recorded.append(i)
            nodes.append(child)
    return _Rows(
        torch.tensor(of, dtype=torch.long), torch.tensor(recorded, dtype=torch.long), nodes
    )


def _next_token(
    model: "HookedTransformer | TransformerBridge",
    tokens: Int[Tensor, "prompt pos"],
    these: Interventions,
    prefix: SharedPrefix | None,
    rows: _Rows,
) -> tuple[SharedPrefix | None, Float[Tensor, "row d_vocab"]]:
    """Run the last token of each row's node; return its recorded keys and the next logits."""
    device, n_prompts = tokens.device, len(tokens)
    if prefix is None:
        paths = torch.tensor(rows.nodes, device=device)
        new = torch.cat([tokens[(rows.of % n_prompts).to(device)], paths], dim=1)
        arguments: dict[str, Any] = {"attention_mask": torch.ones_like(new[:1])}
    else:
        new = torch.tensor([[node[-1]] for node in rows.nodes], device=device)
        taken = rows.recorded, n_prompts
        prefix, arguments = prefix.extended(torch.ones_like(new[:1]), rows=taken)
    with undisturbed(model):
        start = model(new, attention_mask=torch.ones_like(new), stop_at_layer=0)
        hooks = []
        if not these.last_position:
            hooks = hooks_by_row(model, these, rows.of // n_prompts)
        elif prefix is None:
            behind = -1 - len(rows.nodes[0])
            hooks = hooks_by_row(model, these, rows.of // n_prompts, position=behind)
        return prefix, last_logits(model, new, start, hooks, arguments)[:, 0]
