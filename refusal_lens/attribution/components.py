"""What heads and MLPs write along a direction, who shares writers, and what exchanging outputs does."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import normalize
from tqdm.auto import tqdm

from .. import plotting
from ..activations.batching import plan_batches
from ..activations.extract import read_residual_stream
from ..activations.shared_prefix import SharedPrefix, can_share_prefix
from ..errors import InputError, lenient
from ..interventions.hooks import EMBEDDING, Hook, check_directions, stream_after
from ..interventions.refusal_metric import RefusalTokens, refusal_log_odds, token_ids
from ..models.forward import drop_earlier_positions, input_device, undisturbed, without_logits
from ..models.load import tokenizer_of
from ..prompts.contrast import Contrast
from ..prompts.protocol import Protocol
from ..prompts.tokenize import ChatInputs, build_inputs_with_chat_template
from ..uncertainty.effects import Interval, mean_interval, total_interval
from . import Table

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from ..models import HookedModel


@dataclass(frozen=True, repr=False, eq=False)
class Components(Table):
    """What each component writes along a direction, target less baseline; shows its top ten.

    Attributes:
        names: "L3H2" (layer 3, head 2) and "L3 MLP" up to the layer, "embedding", and the
            attention's "biases", which no prompt changes.
        writes: mean over prompts, `[component]`, in units of the residual stream.
        total: the same of the stream itself, which is the sum of the writes.
    """

    names: tuple[str, ...]
    writes: Interval
    total: Interval

    def top(self, k: int = 10) -> tuple[str, ...]:
        """The heads and MLPs that write most, whatever the sign."""
        order = self.writes.value[:-2].abs().argsort(descending=True).tolist()
        return tuple(self.names[i] for i in order[:k])

    def figure(self, k: int = 10, **theme: Any) -> "go.Figure":
        """Return what the top components write, with intervals; `theme` is "light" or "dark"."""
        where = {name: self.names.index(name) for name in self.top(k)}
        rows = {name: [float(end[i]) for end in self.writes] for name, i in where.items()}
        words: Any = {"title": "What components write", "quantity": "residual-stream units"}
        return plotting.intervals_by_name({"target less baseline": rows}, **words, **theme)

    def _rows(self) -> list[list[str]]:
        rows = [["component", "write", "share"]]
        for i in map(self.names.index, self.top()):
            share = f"{float(self.writes.value[i] / self.total.value):.0%}"
            rows.append([self.names[i], _shown(self.writes, i), share])
        return rows


class SharedWriters(NamedTuple):
    """Whether two directions are written by the same heads and MLPs.

    Spearman's correlation of the signed writes over components; how many of one's top ten, whatever
    the sign, are the other's too, and how many chance gives; how often permutations give as much.
    """

    correlation: float
    overlap: int
    expected: float
    p_correlation: float
    p_overlap: float


@dataclass(frozen=True, repr=False, eq=False)
class Interchange(Table):
    """What single components carry of the difference between the two prompts of a pair.

    Way 0 puts the target's output of a component into the baseline prompt and has the rise as its
    effect; way 1 puts the baseline's into the target prompt and has the fall.

    Attributes:
        names: the components.
        score: effect on the refusal score, `[way component]`, in nats.
        along: effect on the stream's component along the direction, `[way component layer]`.
        difference: the refusal score of the target less that of the baseline.
    """

    names: tuple[str, ...]
    score: Interval
    along: Interval
    difference: Interval

    def _rows(self) -> list[list[str]]:
        ways = [[_shown(self.score, way, i) for i in range(len(self.names))] for way in (0, 1)]
        cells = zip(self.names, *ways, strict=True)
        return [[f"of {_shown(self.difference)}", "rise", "fall"], *map(list, cells)]


def component_writes(
    model: "HookedModel",
    contrast: Contrast,
    direction: Float[Tensor, " d_model"],
    layer: int,
    *,
    confidence: float = 0.95,
    **options: Any,
) -> Components:
    """What heads and MLPs write along a direction at the token that is read, target less baseline.

    The stream after a layer is the sum of the embedding and of what all heads and MLPs up to that
    layer wrote, and so is its component along the unit direction (direct attribution). A component
    that decides what later ones write, without writing itself, is not seen; `interchange` sees it.

    Args:
        model, contrast: the model, and the two prompt sets, compared by pairs where paired.
        direction, layer: a direction of any norm, and the layer after which it was read. InputError
            if zero, not finite or of another width; if there is no such layer, or one without
            heads; if writes don't add up to the stream.
        confidence: coverage of the intervals over prompts, or over the contrast's clusters.
        **options: `protocol`, `batch_size` and `progress` of `get_layer_activations`.
    >>> most = component_writes(model, contrast, r[20], layer=20).top(3)
    """
    unit, prompts = _unit(model, direction)[None], [*contrast.target, *contrast.baseline]
    names, written = lenient(written_by_component)(model, prompts, unit, layer, **options)
    target, baseline = written[..., 0].T.double().tensor_split([len(contrast.target)], dim=1)
    samples = [target - baseline] if contrast.paired else [target, -baseline]
    clusters: Any = [contrast.clusters] if contrast.paired else contrast.clusters
    found = total_interval(samples, confidence=confidence, clusters=clusters or None)
    writes, total = (Interval(*(end[part] for end in found)) for part in (slice(-1), -1))
    return Components(names, writes, total)


def same_writers(
    first: Components, second: Components, *, k: int = 10, n_permutations: int = 10_000
) -> SharedWriters:
    """Compare the heads and MLPs that write one direction with those that write another.

    By chance, one direction's writes are permuted (seed 0) among heads and among MLPs, never
    between: that MLPs write more than heads is no evidence. Layers are not held: two directions
    that are both written late share writers for that reason too. InputError if the components are
    not the same, or fewer than `k`.
    >>> same = same_writers(*(component_writes(model, contrast, each[20], 20) for each in (r, n)))
    """
    if k < 1 or n_permutations < 1:
        raise InputError(f"k is {k} and n_permutations {n_permutations}: each is at least 1")
    if first.names != second.names or len(first.names) < k + 2:
        raise InputError(f"components differ, or are fewer than {k}: read both at one layer")
    both = torch.stack([each.writes.value[:-2] for each in (first, second)])
    order = torch.arange(both.shape[1]).repeat(n_permutations + 1, 1)
    keys = torch.rand(n_permutations, both.shape[1], generator=torch.Generator().manual_seed(0))
    for kind in "HM":
        where = torch.tensor([i for i, name in enumerate(first.names[:-2]) if kind in name])
        order[1:, where] = where[keys[:, where].argsort(-1)]
    ranks = both.argsort(-1).argsort(-1).double()
    ranks -= ranks.mean(-1, keepdim=True)
    in_top = torch.zeros_like(both).scatter(1, both.abs().topk(k).indices, 1.0)
    correlation = (ranks[0] * ranks[1][order]).sum(-1) / ranks[0].square().sum()
    overlap = (in_top[0] * in_top[1][order]).sum(-1)
    p = [(x >= x[0] - 1e-9).double().mean().item() for x in (correlation, overlap)]
    return SharedWriters(correlation[0].item(), int(overlap[0]), overlap[1:].mean().item(), *p)


def interchange(
    model: "HookedModel",
    contrast: Contrast,
    components: Sequence[str],
    direction: Float[Tensor, " d_model"],
    tokens: RefusalTokens | Iterable[int],
    *,
    protocol: Protocol = Protocol(),  # noqa: B008 (frozen)
    batch_size: int | None = None,
    progress: bool = True,
) -> Interchange:
    """Exchange what a head or an MLP puts out between the prompts of each pair, one at a time.

    It is exchanged at the token that is read, and later layers react. A component that opens a gate
    has an effect here even where it writes nothing along the direction. Reference: Geiger et al.
    2021, arXiv:2106.02997. Intervals are of 95 %, over pairs or the contrast's clusters.

    Args:
        model, contrast: the model, without hooks, and a paired contrast; InputError without pairs.
        components: names as in `Components.names`, such as `Components.top()`; InputError for others.
        direction: of any norm; InputError if zero, not finite or of another width.
        tokens: tokens that count as a refusal; `openings.first_tokens` for instance.
        protocol, batch_size, progress: as for `get_layer_activations`.
    >>> carried = interchange(model, contrast, ["L3 MLP"], r[20], tokens=[40])
    """
    if not contrast.paired:
        raise InputError(f"{contrast.name!r} has no pairs to exchange within: give paired prompts")
    n, unit = len(contrast.target), _unit(model, direction)
    known = _points(model, model.cfg.n_layers - 1)
    if wrong := [name for name in components if name not in known]:
        raise InputError(f"there is no component {wrong[0]!r}: names are 'L3H2' and 'L3 MLP'")
    points = [known[name] for name in components]
    ids = token_ids(tokens)
    prompts = [*contrast.target, *contrast.baseline]
    inputs = build_inputs_with_chat_template(tokenizer_of(model), prompts, protocol=protocol)
    found = torch.empty(1 + len(points), 2, n, 1 + model.cfg.n_layers, dtype=torch.double)
    plan = plan_batches(model, inputs, batch_size=batch_size, only=range(n))
    for batch in tqdm(plan, unit="batch", disable=not progress):
        rows = [*batch, *(i + n for i in batch)]
        found[:, :, batch] = _measured(model, inputs, rows, points, unit, ids)
    clean = found[0]
    effects = torch.stack([found[1:, 1] - clean[1], clean[0] - found[1:, 0]])
    score, along, difference = (
        mean_interval(x.movedim(-2 if x.ndim > 3 else -1, -1), clusters=contrast.clusters or None)
        for x in (effects[..., 0], effects[..., 1:], clean[0, :, 0] - clean[1, :, 0])
    )
    return Interchange(tuple(components), score, along, difference)


def written_by_component(
    model: "HookedModel",
    prompts: Sequence[str],
    units: Float[Tensor, "direction d_model"],
    layer: int,
    *,
    protocol: Protocol = Protocol(),  # noqa: B008
    **options: Any,
) -> tuple[tuple[str, ...], Float[Tensor, "prompt component direction"]]:
    """Names of components, and what each writes along unit directions; last the stream itself."""
    points = [stream_after(model, layer), stream_after(model, EMBEDDING)]
    for i in range(layer + 1):
        points += [f"blocks.{i}.{x}" for x in ("attn.hook_z", "hook_attn_out", "hook_mlp_out")]
    if missing := [name for name in points if name not in model.hook_dict]:
        raise InputError(f"this model has no {missing[0]}: choose one whose layers all have heads")

    def combine(read: list[Tensor]) -> Float[Tensor, "batch pos component direction"]:
        along = units.to(read[0].device).T
        stream, embedded, *blocks = (x.float() for x in read)
        biases, found = torch.zeros_like(stream @ along), []
        for i, (z, attention, mlp) in enumerate(zip(*[iter(blocks)] * 3, strict=True)):
            heads, bias = _scaled_heads(model.blocks[i].attn, z, attention)
            found += [heads @ along, (mlp @ along)[:, :, None]]
            biases += bias @ along
        ends = torch.stack([embedded @ along, biases, stream @ along], dim=2)
        return torch.cat([*found, ends], dim=2)

    names = (*_points(model, layer), "embedding", "biases")
    inputs = build_inputs_with_chat_template(tokenizer_of(model), prompts, protocol=protocol)
    written = torch.empty(len(prompts), len(names) + 1, len(units))
    options |= {"points": points, "combine": combine}
    for rows, batch in lenient(read_residual_stream)(model, inputs, **options):
        written[rows] = batch[:, 0]
    if (written[:, :-1].sum(1) - written[:, -1]).abs().max() > 2e-2 * written.abs().max():
        raise InputError("heads and MLPs are not all that writes to this model's stream")
    return names, written


def _scaled_heads(attention: Any, z: Tensor, written: Tensor) -> tuple[Tensor, Tensor]:
    """What each head and the bias write, behind a norm or a multiplier that may follow them."""
    bias = getattr(attention, "b_O", None)
    bias = torch.zeros_like(written[0, 0]) if bias is None else bias.detach().float().to(z.device)
    try:
        out = attention.W_O.detach().float().to(z.device)
    except ValueError as error:  # TransformerLens 4 where heads differ in size from layer to layer
        raise InputError(f"the heads of this model can't be told apart: {error}") from error
    heads = torch.einsum("bphd,hdm->bphm", z, out)
    whole = heads.sum(2) + bias
    scale = torch.where(whole == 0, 0, written / whole)
    shape = (scale / scale.median(-1, keepdim=True).values).flatten(0, 1)
    if (shape - shape[0]).abs().median() > 0.02:  # a norm's factors are in the same proportion
        raise InputError("a layer does more with its heads than a norm: they can't be told apart")
    return heads * scale[:, :, None], bias * scale


def _unit(model: Any, direction: Tensor) -> Float[Tensor, " d_model"]:
    check_directions(model, direction)
    if direction.ndim != 1:
        shape = list(direction.shape)
        raise InputError(f"the direction has shape {shape}: give one, such as direction[layer]")
    if not direction.any():
        raise InputError("the direction is zero: choose another layer")
    return normalize(direction.detach().double().cpu(), dim=0).float()


def _shown(interval: Interval, *index: int) -> str:
    return "{:+.3g} [{:.3g}, {:.3g}]".format(*(float(end[index]) for end in interval))


def _points(model: Any, layer: int) -> dict[str, tuple[str, Any]]:
    """Hook point and index of each head and MLP up to a layer, by name."""
    found: dict[str, tuple[str, Any]] = {}
    for i in range(layer + 1):
        for head in range(model.cfg.n_heads):
            found[f"L{i}H{head}"] = f"blocks.{i}.attn.hook_z", head
        found[f"L{i} MLP"] = f"blocks.{i}.hook_mlp_out", slice(None)
    return found


def _measured(
    model: "HookedModel",
    inputs: ChatInputs,
    rows: list[int],
    points: Sequence[tuple[str, Any]],
    unit: Tensor,
    ids: list[int],
) -> Float[Tensor, "point side pair measure"]:
    """Refusal score, and the component along a direction at each layer; then each point exchanged."""
    width, each = int(inputs.mask[rows].sum(1).max()), torch.arange(len(rows))
    tokens, mask = (x[rows, -width:].to(input_device(model)) for x in (inputs.tokens, inputs.mask))
    at = inputs.read_at[rows, 0] - inputs.tokens.shape[1] + width
    partner = each.roll(len(rows) // 2)
    arguments: dict[str, Any] = {"attention_mask": mask}
    read: list[Tensor] = []

    def exchange(x: Tensor, hook: object, *, head: Any) -> Tensor:
        # Up to here the pass is the unmodified model's, and so is the partner's output.
        x = x.clone()
        x[each, at, head] = x[partner, at[partner], head]
        return x

    def project(x: Tensor, hook: object) -> None:
        read.append((x[each, at].float() @ unit.to(x.device)).cpu())

    names = [stream_after(model, layer) for layer in range(model.cfg.n_layers)]
    hooks: list[Hook] = [*((name, project) for name in names), drop_earlier_positions(model)]
    changes: list[list[Hook]] = [[(name, partial(exchange, head=head))] for name, head in points]
    first = int(at.min()) if can_share_prefix(model, width) else 0
    with undisturbed(model):
        if first:  # the tokens before the exchange run once
            before, recording = SharedPrefix(model).extended(mask[:, :first], rows=len(rows))
            model(tokens[:, :first], **without_logits(model) | recording)
            arguments = before.following(mask[:, first:])
            tokens, at = tokens[:, first:], at - first
        for change in [[], *changes]:
            with model.hooks(fwd_hooks=[*change, *hooks]):
                logits = model(tokens, **arguments)
            read.append(refusal_log_odds(logits[:, -1], ids).cpu())
    found = torch.stack(read).double().unflatten(0, (len(points) + 1, -1)).roll(1, 1)
    return found.unflatten(-1, (2, -1)).movedim(1, -1)
