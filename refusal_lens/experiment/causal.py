"""Run the model while the two directions are ablated and added."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from ..activations.extract import ContrastActivations
from ..directions.estimators import mean_difference
from ..interventions import (
    CrossEffects,
    Effects,
    ReplyOpenings,
    ablation_effects,
    cross_effects,
    openings_of,
)
from ..interventions.batched_runs import first_token_logits, opening_log_odds
from ..interventions.cross_ablation import random_directions
from ..interventions.reply_openings import ANSWERING, REFUSAL, SYMPATHY
from ..interventions.sweep import affine_references
from ..models.load import tokenizer_of
from ..prompts.contrast import Contrast
from ..prompts.protocol import Protocol
from .distributed import divide, in_shares

if TYPE_CHECKING:
    from transformer_lens import HookedTransformer
    from transformer_lens.model_bridge import TransformerBridge

SWEEP_PROMPTS = 32  # harmful prompts on which every layer's direction is ablated
EFFECT_PROMPTS = 32  # prompts of each set on which the two directions are ablated and added
FEW_PROMPTS = (
    8  # the same where nothing is refused; and those whose sympathy and answers are scored
)
FEWEST_PROMPTS = 4  # smallest set on which interventions run
N_RANDOM = 20  # random directions, ablated and added for comparison
PARTS = ("refusal", "negativity")
SETS = ("harmful", "harmless", "negative", "neutral")


@dataclass(frozen=True)
class Causal:
    """The effects of the interventions.

    Attributes:
        openings: the openings that count as a refusal.
        n_prompts: most prompts of each set in `ablation` and `addition`: 32, or 8 without random
            directions if no harmful prompt is refused. The verdict is then inconclusive.
        requests: refusal log-odds of all harmful and of all harmless prompts, unmodified.
        replies: prompt set ("harmful", "harmless", "negative", "neutral") -> kind of reply
            ("refusal", "sympathy", "answer") -> mean probability in the unmodified model.
        sweep: part -> scores of harmful prompts under affine ablation of each layer's direction, by
            the openings' first tokens alone.
        strongest: layer whose refusal direction lowers refusal most when ablated; -1 if unknown.
        ablation, addition: effects of ablating and adding the directions of the highlighted layer.
        constant_token: text of a token, no refusal's first, with which every reply begins; or "".
    """

    openings: ReplyOpenings
    n_prompts: int
    requests: tuple[Float[Tensor, " harmful"], Float[Tensor, " harmless"]]
    replies: dict[str, dict[str, float]]
    sweep: dict[str, Effects]
    strongest: int
    ablation: CrossEffects
    addition: CrossEffects
    constant_token: str = ""


def intervene(
    model: "HookedTransformer | TransformerBridge",
    contrasts: Mapping[str, Contrast],
    activations: Mapping[str, ContrastActivations],
    *,
    layer: int,
    generator: torch.Generator,
    openings: Sequence[str] | None,
    protocol: Protocol,
    batch_size: int | None,
    progress: bool,
) -> Causal:
    """Measure refusal scores while the refusal and negativity directions are ablated and added.

    Processes divide the layers of the sweeps, and the two cross-effects.

    Args:
        model: the model.
        contrasts, activations: the prompts and activations of refusal and negativity.
        layer: the layer whose directions are cross-ablated and added.
        generator: generator of the random directions, on the CPU.
        openings: texts of refusals' openings; None takes `reply_openings.REFUSAL`.
        protocol, batch_size, progress: options of `ablation_effects` and `cross_effects`.
    """
    sides = activations["refusal"], activations["negativity"]
    score = openings_of(tokenizer_of(model), openings or REFUSAL)
    options: dict[str, Any] = {"protocol": protocol, "batch_size": batch_size}
    options |= {"progress": progress}
    requests = contrasts["refusal"].target, contrasts["refusal"].baseline
    odds = opening_log_odds(model, sum(requests, ()), score, **options)
    each_side = odds.split([*map(len, requests)])
    refuses = bool((each_side[0] > 0).any())
    n_prompts, n_random = (EFFECT_PROMPTS, N_RANDOM) if refuses else (FEW_PROMPTS, 0)
    pair = (
        some_prompts(contrasts["refusal"], n_prompts),
        some_prompts(contrasts["negativity"], n_prompts),
    )
    cross = partial(cross_effects, model, pair, sides, layer=layer, score=score, **options)
    classes = [side[:, layer] for both in sides for side in both]
    ablated, added = (random_directions(*classes, n=n_random, generator=generator) for _ in PARTS)
    sweeps = [
        sweep_layers(model, spread(pair[0].target, SWEEP_PROMPTS), each, sides[0], score, options)
        for each in sides
    ]
    random = {"ablation": ablated, "addition": added}
    ablation, addition = divide(
        [partial(cross, intervention=kind, random=each) for kind, each in random.items()]
    )
    means = sweeps[0].log_odds.mean(-1)
    return Causal(
        openings=score,
        n_prompts=n_prompts,
        requests=each_side,
        replies=_replies(model, pair, ablation, options),
        sweep=dict(zip(PARTS, sweeps, strict=True)),
        strongest=-1 if means.isnan().all() else int(means.nan_to_num(nan=torch.inf).argmin()),
        ablation=ablation,
        addition=addition,
        constant_token=_constant_token(model, pair, score, options),
    )


def sweep_layers(
    model: "HookedTransformer | TransformerBridge",
    harmful: Sequence[str],
    of: ContrastActivations,
    requests: ContrastActivations,
    refusal: ReplyOpenings,
    options: dict[str, Any],
) -> Effects:
    """The effect of ablating one contrast's direction of each layer, by openings' first tokens."""
    directions = mean_difference(*of).float()
    references = affine_references(directions, requests.baseline, hook=options["protocol"].hook)
    scored = options | {"score": refusal.first_tokens, "last_position": True}

    def effects(some: Tensor, references: Tensor) -> Effects:
        return ablation_effects(model, harmful, some, references=references, **scored)

    return divide_sweep(effects, directions, references)


def _constant_token(
    model: "HookedTransformer | TransformerBridge",
    pair: Sequence[Contrast],
    refusal: ReplyOpenings,
    options: dict[str, Any],
) -> str:
    """A token that begins every reply (probability 0.99 or more), but no refusal; else "".

    Where there is one, `<think>` for instance, the first token says nothing about refusal.
    """
    tokenizer: Any = model.tokenizer
    sets = [side for contrast in pair for side in (contrast.target, contrast.baseline)]
    least = first_token_logits(model, sum(sets, ()), **options).float().softmax(-1).amin(0)
    token = int(least.argmax())
    begins = least[token] >= 0.99 and token not in refusal.first_tokens
    return tokenizer.decode([token]) if begins else ""


def some_prompts(contrast: Contrast, at_most: int) -> Contrast:
    """The contrast with at most so many prompts a side, spread evenly, pairs kept together."""
    rows = [spread(range(len(side)), at_most) for side in (contrast.target, contrast.baseline)]
    return contrast.subset(*rows)


def _replies(
    model: "HookedTransformer | TransformerBridge",
    pair: Sequence[Contrast],
    effects: CrossEffects,
    options: dict[str, Any],
) -> dict[str, dict[str, float]]:
    """Mean probability of every kind of reply after each prompt set, in the unmodified model."""
    tokenizer: Any = model.tokenizer
    parts = effects.refusal, effects.negativity
    scores = [x[0] for part in parts for x in (part.target_log_odds, part.baseline_log_odds)]
    found = {
        name: {"refusal": float(each[spread(range(len(each)), FEW_PROMPTS)].sigmoid().mean())}
        for name, each in zip(SETS, scores, strict=True)
    }
    some = [some_prompts(contrast, FEW_PROMPTS) for contrast in pair]
    sides = [side for contrast in some for side in (contrast.target, contrast.baseline)]
    for kind, texts in (("sympathy", SYMPATHY), ("answer", ANSWERING)):
        odds = opening_log_odds(model, sum(sides, ()), openings_of(tokenizer, texts), **options)
        for name, each in zip(SETS, odds.sigmoid().split([*map(len, sides)]), strict=True):
            found[name][kind] = float(each.mean())
    return found


def divide_sweep(effects: Callable[..., Effects], *each: Tensor) -> Effects:
    """Return `effects(*each)`; the processes divide the first axis of the tensors `each`."""
    parts = in_shares(lambda share: effects(*(tensor[share] for tensor in each)))
    n, rows = len(parts), range(len(each[0]))

    def together(name: str) -> Tensor:
        return torch.stack([getattr(parts[i % n], name)[i // n] for i in rows])

    names = [field.name for field in fields(Effects) if field.name != "unchanged"]
    return replace(parts[0], **{name: together(name) for name in names})


def smallest_set(contrasts: Mapping[str, Contrast]) -> int:
    """Return the number of prompts in the smallest of the four sets."""
    return min(len(side) for p in PARTS for side in (contrasts[p].target, contrasts[p].baseline))


def can_intervene(contrasts: Mapping[str, Contrast]) -> bool:
    """Return whether each of the four sets is large enough for interventions."""
    return smallest_set(contrasts) >= FEWEST_PROMPTS


def spread(prompts: Sequence[Any], at_most: int) -> list[Any]:
    """Return `at_most` prompts, spread evenly from first to last."""
    if len(prompts) <= at_most:
        return list(prompts)
    return [prompts[i] for i in torch.linspace(0, len(prompts) - 1, at_most).round().long()]
