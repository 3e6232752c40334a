"""A small Llama with nothing between its matrix products, for runs of many interventions on a CPU.

In a small model on a CPU, what TransformerLens does between the products (hooks, checks, masks, one
operation at a time over all rows) takes several times as long as the products themselves. This room
computes the same numbers from the same weights without it. It is only ever a faster way: a model
that is not exactly of this kind, or whose logits it does not reproduce, runs through TransformerLens.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from einops import rearrange
from jaxtyping import Complex, Float, Int
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 (torch's own convention)

from ..models.load import LensModel
from .prompt_tree import Group, PromptTree

MOST_WEIGHTS = 2**28
"""Above this many weights the products take most of the time, and a second copy too much memory."""
SAME = 1e-4
"""Largest difference of two logits, relative to the largest logit, that is rounding."""
SAFE_SCORE = 40.0
"""Up to here exponentials of scores, their sums, and their products with values that any model has are
normal numbers of float32."""


@runtime_checkable
class Interventions(Protocol):
    """Directions to ablate everywhere or, where there are layers, to add after these, in order."""

    @property
    def directions(self) -> Float[Tensor, "intervention d_model"]:
        """What to ablate, or to add."""
        ...

    @property
    def layers(self) -> list[int] | None:
        """After which layer each is added; None where they are ablated."""
        ...


class Block(NamedTuple):
    """The weights of one block as `linear` takes them, those of the norms multiplied in."""

    qk: Float[Tensor, "qk d_model"]
    v: Float[Tensor, "v d_model"]
    o: Float[Tensor, "d_model z"]
    gate: Float[Tensor, "d_mlp d_model"]
    up: Float[Tensor, "d_mlp d_model"]
    down: Float[Tensor, "d_model d_mlp"]


class Located(NamedTuple):
    """A `Group` among the rows `[(branch node head), d_head]`, branch by branch."""

    queries: Int[Tensor, "branch at"]
    keys: Int[Tensor, "branch at"]
    values: Int[Tensor, "branch at"]
    seen: Float[Tensor, "prompt 1 query key"]
    kept: Int[Tensor, " kept"] | None


@dataclass(frozen=True)
class BareLlama:
    """A Llama's weights and shape. Pairs of rotated dimensions stand next to one another."""

    embedding: Float[Tensor, "d_vocab d_model"]
    blocks: list[Block]
    unembedding: Float[Tensor, "d_vocab d_model"]
    turn: Complex[Tensor, "pos half"]
    n_heads: int
    n_key_value_heads: int
    epsilon: float

    @torch.no_grad()
    def run(
        self, interventions: Interventions, tree: PromptTree, read_layers: Sequence[int] = ()
    ) -> tuple[Float[Tensor, "branch prompt d_vocab"], list[Float[Tensor, "_ prompt d_model"]]]:
        """Logits of each prompt's last position in every branch, and the stream there after layers.

        The unchanged model is branch 0. The stream is of as many branches as have begun by then.
        """
        directions, layers = interventions.directions, interventions.layers
        x = self.embedding[tree.tokens][None]
        units = None
        if layers is None and len(directions):
            units = F.normalize(directions, dim=-1)
            units = torch.cat([torch.zeros_like(units[:1]), units])[:, None]
            x = _without(x.expand(len(units), -1, -1).clone(), units)
        x = _begun(x, directions, layers, -1)
        read = [x[:, tree.ends]] if -1 in read_layers else []
        # Of every head, so that one long product turns them all.
        turn = self.turn[tree.positions].tile(self.n_heads + self.n_key_value_heads)
        n_branches = 1 + len(directions)
        groups = [self._located(group, tree, n_branches) for group in tree.groups]
        ends = self._located(tree.ends_only(), tree, n_branches)
        # Kept over the layers: their memory would be handed back and fetched anew at each.
        d_mlp = len(self.blocks[0].gate)
        gate, up = x.new_empty(2, n_branches * len(tree.tokens), d_mlp)
        for layer, block in enumerate(self.blocks):
            at_end = layer == len(self.blocks) - 1
            rows = self._normed(x)
            qk, v = F.linear(rows, block.qk), F.linear(rows, block.v)
            z = self._attention(qk, v, turn, [ends] if at_end else groups)
            if at_end:
                # Nothing reads the other positions any more.
                x = x[:, tree.ends]
            x = _written(x, z, block.o, units)
            rows = self._normed(x).flatten(0, 1)
            hidden = torch.mm(rows, block.gate.T, out=gate[: len(rows)])
            F.silu(hidden, inplace=True).mul_(torch.mm(rows, block.up.T, out=up[: len(rows)]))
            x = _written(x, hidden.view(*x.shape[:2], -1), block.down, units)
            x = _begun(x, directions, layers, layer)
            if layer in read_layers:
                read.append(x if at_end else x[:, tree.ends])
        return F.linear(self._normed(x), self.unembedding), read

    def _located(self, group: Group, tree: PromptTree, n_branches: int) -> Located:
        """Where a group's queries, keys and values stand among the rows of all heads and branches."""
        n_kv = self.n_key_value_heads
        n_qk = self.n_heads + n_kv
        head = rearrange(torch.arange(self.n_heads), "(kv h) -> kv 1 h 1", kv=n_kv)
        kv_head = rearrange(torch.arange(n_kv), "kv -> kv 1 1")
        queries = group.queries[:, None] * n_qk + head
        keys = group.keys * n_qk + self.n_heads + kv_head
        values = group.keys * n_kv + kv_head
        branch = torch.arange(n_branches)[:, None] * len(tree.tokens)
        return Located(
            queries=branch * n_qk + queries.flatten(),
            keys=branch * n_qk + keys.flatten(),
            values=branch * n_kv + values.flatten(),
            seen=group.seen[:, None],
            kept=group.kept,
        )

    def _attention(
        self,
        qk: Float[Tensor, "branch node qk"],
        v: Float[Tensor, "branch node v"],
        turn: Complex[Tensor, "node turned"],
        groups: Sequence[Located],
    ) -> Float[Tensor, "branch kept z"]:
        """What the heads gather at the groups' queries, one group after another."""
        n_branches, n_kv = len(qk), self.n_key_value_heads
        d_head = v.shape[-1] // n_kv
        turned = torch.view_as_complex(qk.unflatten(-1, (-1, 2))).mul_(turn)
        qk, v = torch.view_as_real(turned).view(-1, d_head), v.view(-1, d_head)
        gathered = []
        for group in groups:
            n_prompts, _, n_queries, n_keys = group.seen.shape
            rows = n_branches * n_kv * n_prompts
            queries, keys, values = (
                source.index_select(0, at[:n_branches].flatten()).view(rows, -1, d_head)
                for source, at in ((qk, group.queries), (qk, group.keys), (v, group.values))
            )
            scores = torch.bmm(queries, keys.mT)
            shape = (n_branches * n_kv, n_prompts, -1, n_queries, n_keys)
            z = _attended(scores, group.seen, shape, values)
            z = rearrange(
                z,
                "(b kv p) (h q) d -> b (p q) (kv h d)",
                b=n_branches,
                kv=n_kv,
                q=n_queries,
            )
            gathered.append(z if group.kept is None else z.index_select(1, group.kept))
        return torch.cat(gathered, dim=1) if len(gathered) > 1 else gathered[0]

    def _normed(self, x: Float[Tensor, "*rows d"]) -> Float[Tensor, "*rows d"]:
        square = torch.linalg.vecdot(x, x).unsqueeze(-1)
        return x * square.div_(x.shape[-1]).add_(self.epsilon).rsqrt_()


def _attended(
    scores: Float[Tensor, "row asked key"],
    seen: Float[Tensor, "prompt 1 query key"],
    shape: tuple[int, ...],
    values: Float[Tensor, "row key d_head"],
) -> Float[Tensor, "row asked d_head"]:
    """Softmax of the scores over the keys that are seen, times the values. Overwrites the scores.

    Where no exponential can overflow or vanish, none needs its row's largest taken off first, and
    a row can be divided by its sum after the product: over so few keys that is twice as fast.
    """
    least, most = scores.aminmax()
    if least > -SAFE_SCORE and most < SAFE_SCORE:
        weights = scores.exp_()
        weights.view(shape).mul_(seen)
        return torch.bmm(weights, values).div_(weights.sum(-1, keepdim=True))
    scores.view(shape).masked_fill_(seen == 0, -torch.inf)
    return torch.bmm(scores.softmax(-1), values)


def _written(
    x: Float[Tensor, "branch row d_model"],
    hidden: Float[Tensor, "branch row z"],
    weight: Float[Tensor, "d_model z"],
    units: Float[Tensor, "branch 1 d_model"] | None,
) -> Float[Tensor, "branch row d_model"]:
    """The stream with what a layer writes, each branch's direction projected out of that."""
    written = torch.addmm(x.flatten(0, 1), hidden.flatten(0, 1), weight.mT).view_as(x)
    # The stream has had none of the direction before, so it can be taken off the sum.
    return written if units is None else _without(written, units)


def _without(
    x: Float[Tensor, "branch row d_model"], units: Float[Tensor, "branch 1 d_model"]
) -> Float[Tensor, "branch row d_model"]:
    """Project each branch's direction out, in place."""
    return x.baddbmm_(torch.bmm(x, units.mT), units, alpha=-1)


def _begun(
    x: Float[Tensor, "branch row d"],
    directions: Float[Tensor, "intervention d"],
    layers: list[int] | None,
    layer: int,
) -> Float[Tensor, "more row d"]:
    """The branches that there are, and those that begin after this layer."""
    new = [i for i, at in enumerate(layers or ()) if at == layer]
    return torch.cat([x, x[:1] + directions[new][:, None]]) if new else x


def bare_llama(model: LensModel, ids: Sequence[int]) -> BareLlama | None:
    """The model as a bare Llama; None unless it is one, small, on the CPU and gives the same logits.

    `ids` is a prompt to compare the two by.
    """
    weights = list(model.parameters())
    if any(w.dtype != torch.float32 or w.device.type != "cpu" for w in weights):
        return None
    if sum(w.numel() for w in weights) > MOST_WEIGHTS:
        return None
    try:
        bare = _of_bridge(model) if hasattr(model, "original_model") else _of_hooked(model)
    except (AttributeError, RuntimeError):
        return None
    return bare if bare is not None and _reproduces(bare, model, ids) else None


@dataclass(frozen=True)
class _Nothing:
    """No intervention in a model of some width."""

    d_model: int
    layers: list[int] | None = None

    @property
    def directions(self) -> Float[Tensor, "intervention d_model"]:
        return torch.empty(0, self.d_model)


@torch.no_grad()
def _reproduces(bare: BareLlama, model: LensModel, ids: Sequence[int]) -> bool:
    from ..models.forward import undisturbed

    row = torch.tensor([list(ids)])
    with undisturbed(model):
        expected = model(row, attention_mask=torch.ones_like(row))[0, -1]
    found, _ = bare.run(_Nothing(model.cfg.d_model), PromptTree.of([ids]))
    apart = (found[0, 0] - expected).abs().max()
    return bool(apart <= SAME * expected.abs().max().clamp_min(1.0))


def _of_hooked(model: Any) -> BareLlama | None:
    cfg = model.cfg
    if not (
        cfg.original_architecture == "LlamaForCausalLM"
        and cfg.positional_embedding_type == "rotary"
        and cfg.rotary_dim == cfg.d_head
        and not cfg.rotary_adjacent_pairs
    ):
        return None
    groups = cfg.n_key_value_heads or cfg.n_heads
    half = cfg.d_head // 2
    attention = model.blocks[0].attn
    turn = torch.complex(attention.rotary_cos[:, :half], attention.rotary_sin[:, :half])
    blocks = []
    for block in model.blocks:
        a, mlp = block.attn, block.mlp
        keys, values = (getattr(a, "_W_K", a.W_K), getattr(a, "_W_V", a.W_V))
        blocks.append(
            _block(
                (block.ln1.w, block.ln2.w),
                (a.W_Q.mT, keys.mT, values.mT),
                rearrange(a.W_O, "head d_head d -> d (head d_head)"),
                (mlp.W_gate.T, mlp.W_in.T, mlp.W_out.T),
            )
        )
    return BareLlama(
        embedding=model.embed.W_E.detach(),
        blocks=blocks,
        unembedding=model.unembed.W_U.detach().T * model.ln_final.w.detach(),
        turn=turn,
        n_heads=cfg.n_heads,
        n_key_value_heads=groups,
        epsilon=cfg.eps,
    )


def _of_bridge(model: Any) -> BareLlama | None:
    hf = model.original_model
    if type(hf).__name__ != "LlamaForCausalLM":
        return None
    config = hf.config
    parts = _parts(hf)
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    d_head = getattr(config, "head_dim", None) or config.hidden_size // heads
    positions = torch.arange(config.max_position_embeddings)[None]
    cos, sin = hf.model.rotary_emb(torch.zeros(1, 1), positions)
    half = d_head // 2
    blocks = []
    for i in range(config.num_hidden_layers):
        at = f"model.layers.{i}."
        qkv = [
            parts[f"{at}self_attn.{name}_proj.weight"].unflatten(0, (-1, d_head)) for name in "qkv"
        ]
        norms = [parts[f"{at}{name}_layernorm.weight"] for name in ("input", "post_attention")]
        mlp = [parts[f"{at}mlp.{name}_proj.weight"] for name in ("gate", "up", "down")]
        blocks.append(_block(norms, qkv, parts[f"{at}self_attn.o_proj.weight"], mlp))
    return BareLlama(
        embedding=parts["model.embed_tokens.weight"],
        blocks=blocks,
        unembedding=parts["lm_head.weight"] * parts["model.norm.weight"],
        turn=torch.complex(cos[0, :, :half], sin[0, :, :half]),
        n_heads=heads,
        n_key_value_heads=groups,
        epsilon=config.rms_norm_eps,
    )


def _parts(hf: Any) -> dict[str, Tensor]:
    """The weights by Hugging Face's names, without what TransformerLens wraps around them."""
    named = {
        name.replace("_original_component.", ""): weight.detach()
        for name, weight in hf.named_parameters(remove_duplicate=False)
    }
    return {"lm_head.weight": named["model.embed_tokens.weight"]} | named


def _block(
    norms: Sequence[Float[Tensor, " d_model"]],
    qkv: Sequence[Float[Tensor, "_ d_head d_model"]],
    o: Float[Tensor, "d_model z"],
    mlp: Sequence[Tensor],
) -> Block:
    def paired(weight: Tensor) -> Tensor:
        return rearrange(weight, "head (part half) d -> head (half part) d", part=2)

    (q, k, v), (gate, up, down) = qkv, mlp
    qk = torch.cat([paired(q) / q.shape[1] ** 0.5, paired(k)]).flatten(0, 1)
    parts = (qk * norms[0], v.flatten(0, 1) * norms[0], o, gate * norms[1], up * norms[1], down)
    return Block(*(part.detach().contiguous() for part in parts))
