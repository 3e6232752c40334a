"""Interventions and verdicts for the directions of every specification."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from ..experiment.causal import divide_sweep, some_prompts, spread
from ..experiment.evidence import Earlier, Responses, compute_evidence
from ..experiment.verdict import Evidence, Thresholds, Verdict, judge
from ..interventions import (
    Effects,
    ablation_effects,
    addition_effects,
    openings_of,
    refusal_log_odds,
)
from ..interventions.batched_runs import first_token_logits
from ..interventions.cross_ablation import random_directions
from ..interventions.reply_openings import REFUSAL
from ..interventions.sweep import affine_references
from ..models.load import tokenizer_of
from ..prompts.contrast import Contrast
from ..uncertainty import CosineEstimate, Gram

if TYPE_CHECKING:
    from transformer_lens import HookedTransformer
    from transformer_lens.model_bridge import TransformerBridge


N_RANDOM = 8  # random directions at each layer


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
    least: int,
    batch_size: int | None,
    progress: bool,
) -> dict[int, list[Responses]]:
    """Return the responses to the directions at each layer, by specification.

    Uses `n_prompts` of each set under the default protocol. `activations` are the four sides' under
    that protocol: for the references of affine ablations and the covariance of random directions.
    Replies are scored by the refusal openings' first tokens alone, which is fast and counts sympathy
    that begins alike. Specifications of less than `least` prompts, without a verdict, are left out.
    """
    judged = [i for i, each in enumerate(measured) if each.evidence[0].n_prompts >= least]
    if not n_prompts or not judged:
        return {}
    score = openings_of(tokenizer_of(model), REFUSAL).first_tokens
    sides = [side for each in contrasts for side in (each.target, each.baseline)]
    harmful, harmless, negative, neutral = (spread(side, n_prompts) for side in sides)
    by_layer = zip(*(side.unbind(1) for side in activations), strict=True)
    drawn = [random_directions(*rows, n=N_RANDOM, generator=generator) for rows in by_layer]
    random = torch.stack(drawn)  # with the covariance of the activations at each layer
    requests, n = harmful + harmless, len(harmful)
    parts = zip(*(measured[i][2:5] for i in judged), strict=True)
    by_refusal, by_negativity, layers = map(torch.stack, parts)
    options: dict[str, Any] = {"score": score, "last_position": True}
    options |= {"batch_size": batch_size, "progress": progress}

    def ablated(prompts: list[str], directions: Tensor, baseline: Tensor) -> Effects:
        def sweep(some: Tensor, references: Tensor) -> Effects:
            return ablation_effects(model, prompts, some, references=references, **options)

        return _once(sweep, directions, affine_references(directions, baseline))

    add = partial(addition_effects, model, harmless, **options)
    both = by_refusal, by_negativity
    refusal, negativity = (ablated(requests, each, activations[1]) for each in both)
    clean = first_token_logits(model, neutral, batch_size=batch_size, progress=False)
    as_long = functional.normalize(random, dim=-1) * by_negativity[-1].norm(dim=-1)[:, None, None]
    every = torch.arange(len(random))[:, None].expand(-1, N_RANDOM)
    measures = _Measures(
        refusal=refusal,
        negativity=negativity,
        on_statements=[ablated(negative, each, activations[3]) for each in (*both, random)],
        chance=ablated(harmful, random, activations[1]),
        added=_once(add, by_negativity, layers),
        chance_added=divide_sweep(add, as_long, every),
        neutral=refusal_log_odds(clean, score),
    )
    found = {}
    for row, (i, at) in enumerate(zip(judged, layers.clamp_min(0).tolist(), strict=True)):
        found[i] = [_responses(measures, (row, layer), own, n) for layer, own in enumerate(at)]
    return found


def _once(effects: Callable[..., Effects], *each: Tensor) -> Effects:
    """Return `divide_sweep(effects, *each)`, `[row layer prompt]`; equal cells run once."""
    flat = [tensor.flatten(0, 1) for tensor in each]
    cells = [b"".join(x.numpy().tobytes() for x in cell) for cell in zip(*flat, strict=True)]
    rows = {cell: i for i, cell in enumerate(cells)}
    found = divide_sweep(effects, *(tensor[[*rows.values()]] for tensor in flat))
    place = {cell: i for i, cell in enumerate(rows)}
    at = torch.tensor([place[cell] for cell in cells]).view(each[0].shape[:2])
    return replace(found, log_odds=found.log_odds[at], kl=found.kl[at])


class _Measures(NamedTuple):
    """Effects of ablating and adding; neutral prompts' scores in the unmodified model."""

    refusal: Effects
    negativity: Effects
    on_statements: list[Effects]  # of ablating refusal, negativity and random directions
    chance: Effects
    added: Effects  # of adding negativity
    chance_added: Effects
    neutral: Float[Tensor, " neutral"]


def _responses(m: _Measures, cell: tuple[int, int], at: int, n_harmful: int) -> Responses:
    """Responses to one specification's directions at one layer; random ones are of layer `at`."""
    both = torch.stack([m.refusal.unchanged, m.refusal.log_odds[cell], m.negativity.log_odds[cell]])
    clean = both[:1, n_harmful:]
    # Adding refusal decides nothing, so it is not run.
    added = [clean, torch.nan * clean, m.added.log_odds[cell][None], m.chance_added.log_odds[at]]
    kl = [float(each.kl[cell][n_harmful:].mean()) for each in (m.refusal, m.negativity)]
    row, layer = cell
    on_refusal, on_negativity = (
        Effects(both[0, :n_harmful], each.log_odds[row][:, :n_harmful], each.kl[row][:, :n_harmful])
        for each in (m.refusal, m.negativity)
    )
    by_refusal, by_negativity, by_chance = m.on_statements
    statements = [by_refusal.unchanged, by_refusal.log_odds[cell], by_negativity.log_odds[cell]]
    return Responses(
        harmful=torch.cat([both[:, :n_harmful], m.chance.log_odds[at]]),
        harmless=both[:, n_harmful:],
        negative=torch.cat([torch.stack(statements), by_chance.log_odds[at]]),
        neutral=m.neutral[None],
        added=torch.cat(added),
        requests=(both[0, :n_harmful], both[0, n_harmful:]),
        earlier=Earlier.of(on_refusal, on_negativity, layer),
        kl=(kl[0], kl[1]),
    )


def judge_all(
    measured: list[Measured],
    responses: dict[int, list[Responses]],
    contrasts: tuple[Contrast, Contrast],
    n_prompts: int,
    confidence: float,
    thresholds: Thresholds | None,
) -> tuple[tuple[Verdict, ...], ...]:
    """Return the verdict of every specification at every layer; inconclusive without responses."""
    evidence = [each.evidence for each in measured]
    for i, of_layers in responses.items():
        pair = [some_prompts(contrast, n_prompts) for contrast in contrasts]
        complete = partial(compute_evidence, contrasts=[pair[0], *pair], confidence=confidence)
        evidence[i] = [*map(complete, evidence[i], of_layers)]
    return tuple(tuple(judge(each, thresholds) for each in row) for row in evidence)
