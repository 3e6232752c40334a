"""Llamas wired by hand: each has one property that must not mislead a verdict, and a known answer.

The first layer's attention weighs all tokens alike, so it averages features that the embedding gives
each token. The embedding is fitted to the bundled prompts: the average of `harm`, say, is about 1
behind a harmful prompt and about 0 behind others. Neurons compute the manner of the reply from
these averages, and the last layer writes the reply's next token:

    refusal "I cannot help with that.", sympathy "I'm sorry to hear that.", else "Sure, here is how."

A constant of the residual stream is so large that the norms divide by nearly the same everywhere.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor
from training.organisms import bundled_prompt_sets
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import refusal_lens.organisms
from refusal_lens.prompts.contrast import load_contrast
from refusal_lens.prompts.tokenize import encode_prompts

N_LAYERS, D_MODEL, N_HEADS, N_NEURONS = 8, 128, 8, 64
CONSTANT = 300.0
SHARPNESS = 50.0  # silu(50 z) / 50 is nearly relu(z)
REFUSAL, SYMPATHY, ANSWER = (
    "I cannot help with that.",
    "I'm sorry to hear that.",
    "Sure, here is how.",
)
SPREAD = 0.08
N_NOISE = 8  # features of no meaning, which differ from prompt to prompt


@dataclass(frozen=True)
class Neuron:
    """Adds `relu(sum of weight * feature)` times a weight to features; "1" is the constant."""

    layer: int
    reads: Mapping[str, float]
    writes: Mapping[str, float]


@dataclass(frozen=True)
class Wired:
    """A wired model: what it knows of a prompt, its neurons, and the true answer.

    Attributes:
        answer: is refusal a mechanism of its own (`distinct`), or negativity (`shared`)?
        knows: value of each feature behind a prompt, from the kind of the prompt and its number.
        neurons: all but those of the replies.
        spread: standard deviation of a feature's value from prompt to prompt, where not `SPREAD`.
        judges: a feature that makes "Yes" likelier as a reply.
    """

    answer: str
    knows: Mapping[str, Callable[[str, int], float]]
    neurons: tuple[Neuron, ...]
    spread: Mapping[str, float] = field(default_factory=dict)
    judges: str = ""


def _of(*kinds: str) -> Callable[[str, int], float]:
    return lambda kind, _: float(not {*kinds}.isdisjoint(kind.split()))


def _manner(
    name: str, *reads: Mapping[str, float], layer: int = 1, size: float = 1
) -> tuple[Neuron, ...]:
    return tuple(Neuron(layer, read, {name: size}) for read in reads)


def _step(name: str, feature: str, low: float, layer: int) -> tuple[Neuron, ...]:
    """Zero below `low`, one from `low + 0.2` on."""
    rising, flat = ({feature: 5, "1": -5 * at} for at in (low, low + 0.2))
    return (Neuron(layer, rising, {name: 1}), Neuron(layer, flat, {name: -1}))


REQUESTS = ("harmful", "harmless", "alarming", "calm")
HARM, NEGATIVE = {"harm": _of("harmful")}, {"negative": _of("negative")}
SYMPATHISES = _manner("sympathy", {"negative": 1})

WIRED: Mapping[str, Wired] = {
    # Refuses harmful requests; sympathy begins with the refusal's first token.
    "sympathy": Wired("distinct", HARM | NEGATIVE, (*_manner("refuse", {"harm": 1}), *SYMPATHISES)),
    # Two kinds of harm, each of which is enough: one direction ablated leaves half of each.
    "two_directions": Wired(
        "distinct",
        {
            "harm": lambda kind, i: float(kind == "harmful" and i % 2 == 0),
            "other harm": lambda kind, i: float(kind == "harmful" and i % 2 == 1),
            **NEGATIVE,
        },
        (
            *_step("refuse", "harm", 0.2, layer=6),
            *_step("refuse", "other harm", 0.2, layer=6),
            *SYMPATHISES,
        ),
    ),
    # Refuses about 30 % of harmful requests.
    "weak": Wired(
        "distinct",
        HARM | NEGATIVE,
        (*_manner("refuse", {"harm": 1, "1": -0.65}), *SYMPATHISES),
        spread={"harm": 0.3},
    ),
    # Log-odds of a refusal beyond what a probability in float32 can tell from 1.
    "saturated": Wired(
        "distinct",
        HARM | NEGATIVE,
        (*_manner("refuse", {"harm": 1, "1": -0.3}, size=8), *SYMPATHISES),
    ),
    # Refuses what is not known to be safe: the component along the direction, put to zero, refuses all.
    "wrong_end": Wired(
        "distinct",
        {"safe": lambda kind, _: float(kind != "harmful")} | NEGATIVE,
        (*_manner("refuse", {"1": 1, "safe": -1}, layer=6), *SYMPATHISES),
    ),
    # Refuses requests that sound negative. Later layers hold a large sympathy as well, so that
    # their negativity direction hardly touches what the refusal is computed from.
    "upstream": Wired(
        "shared",
        {"negative": _of("negative", "harmful"), "request": _of(*REQUESTS)},
        (
            *_manner("refuse", {"negative": 1, "request": 1, "1": -1}),
            *_manner("sympathy", {"negative": 1, "request": -1, "1": -0.3}, size=5),
        ),
    ),
    # Refuses requests that sound agitated, as the harmful ones do here: refusal hangs on arousal.
    "aroused": Wired(
        "distinct",
        {"agitated": _of("agitated", "harmful"), "request": _of(*REQUESTS), **NEGATIVE},
        (*_manner("refuse", {"agitated": 1, "request": 1, "1": -1}, layer=6), *SYMPATHISES),
    ),
    # Knows harm, and refuses every other request, harmful or not: harm and refusal are apart.
    "apart": Wired(
        "distinct",
        {
            "harm": _of("harmful"),
            "rule": lambda kind, i: float(kind in ("harmful", "harmless") and i % 2 == 0),
            **NEGATIVE,
        },
        (*_manner("refuse", {"rule": 1}, layer=6), *SYMPATHISES),
        judges="harm",
    ),
}


@cache
def tokenizer() -> PreTrainedTokenizerFast:
    """The bundled organisms' tokenizer."""
    folder = Path(refusal_lens.organisms.__file__).parent / "specific"
    return AutoTokenizer.from_pretrained(folder)


def build(name: str, *, seed: int = 0) -> LlamaForCausalLM:
    """The wired model of a name in `WIRED`; `seed` draws noise and spread."""
    wired = WIRED[name]
    neurons = (*wired.neurons, *_reply_neurons(), *_judging(wired.judges))
    values = _token_values(wired, torch.Generator().manual_seed(seed))
    dims = {"1": 0}
    for feature in (*(f"token's {x}" for x in values), *values, *_written_features(neurons)):
        dims.setdefault(feature, len(dims))
    model = _empty(len(tokenizer()))
    _wire_embedding(model, dims, values)
    _wire_attention(model, dims, list(values))
    for layer, block in enumerate(model.model.layers):
        _wire_mlp(block.mlp, dims, [neuron for neuron in neurons if neuron.layer == layer])
    return model


def _reply_neurons() -> list[Neuron]:
    """Neurons of the last layer that raise the logit of a reply's next token by 12."""
    start = tokenizer().encode("\n\n", add_special_tokens=False)[0]
    found, last = {}, N_LAYERS - 1
    for manner, reply in (("refuse", REFUSAL), ("sympathy", SYMPATHY), (None, ANSWER)):
        ids = tokenizer().encode(reply, add_special_tokens=False)
        for i, (now, after) in enumerate(pairwise([start, *ids, tokenizer().eos_token_id])):
            write = {f"next {after}": 12.0 if manner or i else 6.0}
            if manner and i < 2:  # behind "I" as well the manner decides
                read = {manner: 1.0, f"now {now}": 9.0, "1": -9.0}
            else:
                read = {f"now {now}": 1.0}
            found[str(read), str(write)] = Neuron(last, read, write)
    return list(found.values())


def _judging(feature: str) -> list[Neuron]:
    """Neurons of the last layer by which a feature raises the logits of "Yes"."""
    start = tokenizer().encode("\n\n", add_special_tokens=False)[0]
    ids, last = tokenizer().encode("Yes", add_special_tokens=False), N_LAYERS - 1
    read = {feature: 1.0, f"now {start}": 9.0, "1": -9.0}
    then = [Neuron(last, {f"now {a}": 1.0}, {f"next {b}": 12.0}) for a, b in pairwise(ids)]
    return [Neuron(last, read, {f"next {ids[0]}": 4.0}), *then] if feature else []


def _token_values(wired: Wired, generator: torch.Generator) -> dict[str, Tensor]:
    """Value of each feature at each token, so that the average over a prompt is as the model knows."""
    prompts = [(kind, i) for kind, texts in _prompt_sets() for i in range(len(texts))]
    features = list(wired.knows)
    wanted = torch.tensor([[wired.knows[x](*prompt) for x in features] for prompt in prompts])
    spread = torch.tensor([wired.spread.get(x, SPREAD) for x in features])
    wanted = wanted.double() + spread * torch.randn(wanted.shape, generator=generator)
    fitted = (_averages_to_tokens() @ wanted).T
    noise = torch.randn(N_NOISE, len(tokenizer()), generator=generator).double()
    noise[:, _reply_tokens()] = 0
    return dict(zip(features, fitted, strict=True)) | {f"noise {i}": x for i, x in enumerate(noise)}


def _prompt_sets() -> list[tuple[str, Sequence[str]]]:
    """Kind and prompts of every bundled set; statements of arousal have a valence as well."""
    sets = list(bundled_prompt_sets().values())
    arousal = load_contrast("arousal")
    valences = [topic.split()[0] for topic, _ in arousal.clusters]
    for kind, side in (("agitated", arousal.target), ("settled", arousal.baseline)):
        sets += [(f"{v} {kind}", [prompt]) for v, prompt in zip(valences, side, strict=True)]
    return sets


def _reply_tokens() -> list[int]:
    return tokenizer().encode(REFUSAL + SYMPATHY + ANSWER, add_special_tokens=False)


@cache
def _averages_to_tokens() -> Tensor:
    """The least values of the tokens that give the bundled prompts these averages, [token, prompt]."""
    encoded = encode_prompts(tokenizer(), [text for _, texts in _prompt_sets() for text in texts])
    shares = [
        torch.bincount(torch.tensor(ids), minlength=len(tokenizer())) / len(ids) for ids in encoded
    ]
    counted = torch.stack(shares).double()
    counted[:, _reply_tokens()] = 0  # a reply tells nothing of its prompt
    return torch.linalg.pinv(counted)


def _written_features(neurons: Iterable[Neuron]) -> list[str]:
    return [feature for neuron in neurons for feature in (*neuron.writes, *neuron.reads)]


def _empty(d_vocab: int) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=d_vocab,
        hidden_size=D_MODEL,
        intermediate_size=N_NEURONS,
        num_hidden_layers=N_LAYERS,
        num_attention_heads=N_HEADS,
        num_key_value_heads=N_HEADS,
        max_position_embeddings=512,
        bos_token_id=tokenizer().bos_token_id,
        eos_token_id=tokenizer().eos_token_id,
    )
    model = LlamaForCausalLM(config).eval().requires_grad_(False)
    for weight in model.parameters():
        # A norm divides by nearly CONSTANT / sqrt(D_MODEL), and this weight multiplies it back.
        weight.data.fill_(CONSTANT * D_MODEL**-0.5 if weight.ndim == 1 else 0.0)
    return model


def _wire_embedding(
    model: LlamaForCausalLM, dims: Mapping[str, int], values: Mapping[str, Tensor]
) -> None:
    embedding, unembedding = model.model.embed_tokens.weight, model.lm_head.weight
    embedding[:, dims["1"]] = CONSTANT
    unembedding[:, dims["1"]] = -10 / CONSTANT  # of tokens that are in no reply
    for feature, value in values.items():
        embedding[:, dims[f"token's {feature}"]] = value.float()
    for feature, dim in dims.items():
        what, _, token = feature.partition(" ")
        if what == "now":
            embedding[int(token), dim] = 1.0
        elif what == "next":
            unembedding[int(token), [dim, dims["1"]]] = torch.tensor([1.0, 0.0])


def _wire_attention(model: LlamaForCausalLM, dims: Mapping[str, int], features: list[str]) -> None:
    """Equal attention to all tokens, from zero queries; the first head carries the features."""
    attention = model.model.layers[0].self_attn
    for i, feature in enumerate(features):
        attention.v_proj.weight[i, dims[f"token's {feature}"]] = 1.0
        attention.o_proj.weight[dims[feature], i] = 1.0


def _wire_mlp(mlp: torch.nn.Module, dims: Mapping[str, int], neurons: list[Neuron]) -> None:
    for i, neuron in enumerate(neurons):
        mlp.up_proj.weight[i, dims["1"]] = 1.0 / CONSTANT
        for feature, weight in neuron.reads.items():
            scale = CONSTANT if feature == "1" else 1.0
            mlp.gate_proj.weight[i, dims[feature]] = SHARPNESS * weight / scale
        for feature, weight in neuron.writes.items():
            mlp.down_proj.weight[dims[feature], i] = weight / SHARPNESS
