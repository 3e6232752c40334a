"""Interventions and verdicts for the directions of every specification."""

from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..experiment.evidence import (
    N_RANDOM,
    TOKEN_PROMPTS,
    Responses,
    compute_evidence,
    divide_sweep,
    spread,
)
from ..experiment.verdict import Evidence, Thresholds, Verdict, judge
from ..interventions import ablation_effects, addition_effects, find_refusal_tokens
from ..interventions.cross_ablation import random_directions
from ..prompts.contrast import Contrast
from ..uncertainty import CosineEstimate, Gram

if TYPE_CHECKING:
    from transformer_lens import HookedTransformer
    from transformer_lens.model_bridge import TransformerBridge


class Measured(NamedTuple):
    """Results from the activations of one specification; `evidence` lacks interventions."""

    gram: Gram
    estimate: CosineEstimate
    refusal: Float[Tensor, "layer d_model"]
    negativity: Float[Tensor, "layer d_model"]
    layers: Int[Tensor, " layer"]  # where the directions are added; -1 is the embedding
    evidence: list[Evidence]


def measure_responses(
    model: "HookedTransformer | TransformerBridge",
    contrasts: tuple[Contrast, Contrast],
    measured: list[Measured],
    *,
    activations: list[Float[Tensor, "_ layer d_model"]],
    generator: torch.Generator,
    n_prompts: int,
    batch_size: int | None,
    progress: bool,
) -> list[list[Responses]] | None:
    """Return the responses to each specification's directions at each layer, if measurable.

    Uses `n_prompts` of each set under the default protocol, and random directions with the covariance
    of `activations`. Returns None without prompts or refusal tokens.
    """
    if not n_prompts:
        return None
    sides = [side for each in contrasts for side in (each.target, each.baseline)]
    asked = [spread(side, TOKEN_PROMPTS) for side in sides[:2]]
    tokens = find_refusal_tokens(model, *asked, progress=False)
    if not tokens.ids:
        return None
    harmful, harmless, negative, neutral = (spread(side, n_prompts) for side in sides)
    by_layer = zip(*(side.unbind(1) for side in activations), strict=True)
    random = [random_directions(*rows, n=N_RANDOM, generator=generator) for rows in by_layer]
    requests, n, m = harmful + harmless, len(harmful), len(harmful) + len(harmless)
    by_refusal = torch.stack([each.refusal for each in measured])
    by_negativity = torch.stack([each.negativity for each in measured])
    layers = torch.stack([each.layers for each in measured])
    options: dict[str, Any] = {"refusal_tokens": tokens, "batch_size": batch_size}
    ablate = partial(ablation_effects, model, progress=progress, **options)
    add = partial(addition_effects, model, harmless, progress=progress, **options)
    refusal = divide_sweep(partial(ablate, requests + negative), by_refusal)
    negativity = divide_sweep(partial(ablate, requests), by_negativity)
    chance = divide_sweep(partial(ablate, requests), torch.stack(random))
    unmodified = divide_sweep(partial(ablate, neutral), torch.zeros(1, model.cfg.d_model))
    added = [divide_sweep(add, each, layers) for each in (by_refusal, by_negativity)]

    def responses(row: int, layer: int) -> Responses:
        own, clean = refusal.log_odds[row, layer], refusal.unchanged
        ablated = torch.stack([clean[:m], own[:m], negativity.log_odds[row, layer]])
        ablated = torch.cat([ablated, chance.log_odds[max(0, int(layers[row, layer]))]])
        return Responses(
            harmful=ablated[:, :n],
            harmless=ablated[:, n:],
            negative=torch.stack([clean[m:], own[m:]]),
            neutral=unmodified.unchanged[None],
            added=torch.stack([clean[n:m], *(each.log_odds[row, layer] for each in added)]),
        )

    rows, n_layers = layers.shape
    return [[responses(row, layer) for layer in range(n_layers)] for row in range(rows)]


def judge_all(
    measured: list[Measured],
    responses: list[list[Responses]] | None,
    contrasts: tuple[Contrast, Contrast],
    confidence: float,
    thresholds: Thresholds | None,
) -> tuple[tuple[Verdict, ...], ...]:
    """Return the verdict of every specification at every layer; inconclusive without responses."""
    evidence = [each.evidence for each in measured]
    if responses is not None:
        paired = (contrasts[0].paired, contrasts[1].paired)
        complete = partial(compute_evidence, paired=paired, confidence=confidence)
        evidence = [list(map(complete, *rows)) for rows in zip(evidence, responses, strict=True)]
    return tuple(tuple(judge(each, thresholds) for each in row) for row in evidence)
