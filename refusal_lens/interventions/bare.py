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

from ..model import LensModel

MOST_WEIGHTS = 2**28
"""Above this many weights the products take most of the time, and a second copy too much memory."""
SAME = 1e-4
"""Largest difference of two logits, relative to the largest logit, that is rounding."""


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

    qkv: Float[Tensor, "qkv d_model"]
    o: Float[Tensor, "d_model z"]
    gate: Float[Tensor, "d_mlp d_model"]
    up: Float[Tensor, "d_mlp d_model"]
    down: Float[Tensor, "d_model d_mlp"]


Opening = list[tuple[Tensor, Tensor]]
"""Keys and values of the tokens that all prompts open with, `[branch head pos d_head]`, by layer."""


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
    def opening(self, interventions: Interventions, tokens: Int[Tensor, "1 pos"]) -> Opening:
        """Run the tokens that all prompts open with, once in every branch."""
        kept: Opening = []
        self._walk(interventions, tokens, None, (), keep=kept)
        return kept

    @torch.no_grad()
    def run(
        self,
        interventions: Interventions,
        tokens: Int[Tensor, "prompt pos"],
        opening: Opening | None,
        read_layers: Sequence[int] = (),
    ) -> tuple[Float[Tensor, "branch prompt d_vocab"], list[Float[Tensor, "_ prompt d_model"]]]:
        """Logits of the last position in every branch, and the stream there after some layers.

        The unchanged model is branch 0. The stream is of as many branches as have begun by then.
        """
        last, read = self._walk(interventions, tokens, opening, read_layers)
        return F.linear(self._normed(last), self.unembedding), read

    def _walk(
        self,
        interventions: Interventions,
        tokens: Int[Tensor, "prompt pos"],
        opening: Opening | None,
        read_layers: Sequence[int],
        keep: Opening | None = None,
    ) -> tuple[Float[Tensor, "branch prompt d_model"], list[Tensor]]:
        directions, layers = interventions.directions, interventions.layers
        n_prompts, n_tokens = tokens.shape
        x = rearrange(self.embedding[tokens], "prompt pos d -> 1 (prompt pos) d")
        units = None
        if layers is None and len(directions):
            units = F.normalize(directions, dim=-1)
            units = torch.cat([torch.zeros_like(units[:1]), units])[:, None]
            x = x - (x @ units.mT) * units
        x = _begun(x, directions, layers, -1)
        start = opening[0][0].shape[2] if opening else 0
        turn = self.turn[start : start + n_tokens, None]
        ahead = torch.ones(n_tokens, start + n_tokens, dtype=torch.bool).triu(start + 1)
        mask = torch.zeros(ahead.shape).masked_fill(ahead, -torch.inf)
        read = []
        for layer, block in enumerate(self.blocks):
            before = opening[layer] if opening else None
            z, keys, values = self._attention(
                block,
                self._normed(x).view(-1, n_tokens, x.shape[-1]),
                before,
                n_prompts,
                turn,
                mask,
            )
            if keep is not None:
                keep.append((keys, values))
            x = _written(x, z.view(*x.shape[:2], -1), block.o, units)
            rows = self._normed(x)
            hidden = F.silu(F.linear(rows, block.gate)).mul_(F.linear(rows, block.up))
            x = _written(x, hidden, block.down, units)
            x = _begun(x, directions, layers, layer)
            if layer in read_layers:
                read.append(x.view(len(x), n_prompts, n_tokens, -1)[:, :, -1].clone())
        return x.view(len(x), n_prompts, n_tokens, -1)[:, :, -1], read

    def _attention(
        self,
        block: Block,
        x: Float[Tensor, "row pos d_model"],
        before: tuple[Tensor, Tensor] | None,
        n_prompts: int,
        turn: Complex[Tensor, "pos 1 half"],
        mask: Float[Tensor, "pos key"],
    ) -> tuple[Float[Tensor, "row pos z"], Tensor, Tensor]:
        """What the heads gather, and the keys and values."""
        heads, groups = self.n_heads, self.n_key_value_heads
        n_rows, n_tokens, _ = x.shape
        qkv = F.linear(x, block.qkv).unflatten(-1, (heads + 2 * groups, -1))
        turned = torch.view_as_complex(qkv[..., : heads + groups, :].unflatten(-1, (-1, 2))) * turn
        qk = torch.view_as_real(turned).flatten(-2)
        keys = qk[..., heads:, :].transpose(1, 2)
        values = qkv[..., heads + groups :, :].transpose(1, 2)
        if before is not None:
            keys, values = (
                torch.cat([_for_prompts(opening, n_prompts), new], dim=2)
                for opening, new in zip(before, (keys, values), strict=True)
            )
        queries = rearrange(qk[..., :heads, :], "r pos (g h) d -> r g (h pos) d", g=groups)
        scores = (queries @ keys.mT).view(n_rows, groups, -1, n_tokens, mask.shape[1])
        pattern = scores.add_(mask).softmax(-1).flatten(2, 3)
        z = rearrange(pattern @ values, "r g (h pos) d -> r pos (g h d)", pos=n_tokens)
        return z, keys, values

    def _normed(self, x: Float[Tensor, "*rows d"]) -> Float[Tensor, "*rows d"]:
        square = torch.linalg.vecdot(x, x).unsqueeze(-1)
        return x * square.div_(x.shape[-1]).add_(self.epsilon).rsqrt_()


def _written(
    x: Float[Tensor, "branch row d_model"],
    hidden: Float[Tensor, "branch row z"],
    weight: Float[Tensor, "d_model z"],
    units: Float[Tensor, "branch 1 d_model"] | None,
) -> Float[Tensor, "branch row d_model"]:
    """The stream with what a layer writes, each branch's direction projected out of that."""
    written = torch.addmm(x.flatten(0, 1), hidden.flatten(0, 1), weight.mT).view_as(x)
    if units is None:
        return written
    along = torch.bmm(hidden, (units @ weight).mT)
    return written.baddbmm_(along, units, alpha=-1)


def _begun(
    x: Float[Tensor, "branch row d"],
    directions: Float[Tensor, "intervention d"],
    layers: list[int] | None,
    layer: int,
) -> Float[Tensor, "more row d"]:
    """The branches that there are, and those that begin after this layer."""
    new = [i for i, at in enumerate(layers or ()) if at == layer]
    return torch.cat([x, x[:1] + directions[new][:, None]]) if new else x


def _for_prompts(rows: Float[Tensor, "branch ..."], n_prompts: int) -> Float[Tensor, "row ..."]:
    return rows[:, None].expand(-1, n_prompts, *rows.shape[1:]).flatten(0, 1)


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
    from ..forward import undisturbed

    row = torch.tensor([list(ids)])
    with undisturbed(model):
        expected = model(row, attention_mask=torch.ones_like(row))[0, -1]
    found, _ = bare.run(_Nothing(model.cfg.d_model), row, None)
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
    heads = torch.cat([paired(q) / q.shape[1] ** 0.5, paired(k), v]).flatten(0, 1)
    parts = (heads * norms[0], o, gate * norms[1], up * norms[1], down)
    return Block(*(part.detach().contiguous() for part in parts))
