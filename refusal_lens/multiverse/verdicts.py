"""Interventions and verdicts for the directions of every specification."""

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from ..activations.progress import RunBar
from ..experiment.causal import divide_sweep, sweep_ablations
from ..experiment.config import some_prompts, spread
from ..experiment.distributed import is_main
from ..experiment.evidence import Earlier, Responses, compute_evidence
from ..experiment.verdict import Evidence, Thresholds, Verdict, judge
from ..interventions import Effects, addition_effects, openings_of, refusal_log_odds
from ..interventions.batched_runs import first_token_logits
from ..interventions.cross_ablation import random_directions
from ..interventions.reply_openings import REFUSAL
from ..models.load import tokenizer_of
from ..prompts.contrast import Contrast
from ..prompts.protocol import DEFAULT
from ..uncertainty import CosineEstimate, Gram

if TYPE_CHECKING:
    from ..models import HookedModel


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
    model: "HookedModel",
    contrasts: tuple[Contrast, Contrast],
    measured: list[Measured],
    *,
    activations: list[Float[Tensor, "_ layer d_model"]],
    generator: torch.Generator,
    n_prompts: int,
    least: int,
    batch_size: int | None,
    progress: bool,
    remember: Callable[..., Any],
) -> dict[int, list[Responses]]:
    """Return the responses to the directions at each layer, by specifications of `least` prompts.

    `n_prompts` of each set run under the default protocol, which gave the four sides' `activations`.
    Replies are scored by openings' first tokens alone: fast, but sympathy may begin alike.
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
    parts = zip(*(measured[i][2:5] for i in judged), strict=True)
    by_refusal, by_negativity, layers = map(torch.stack, parts)
    both = torch.stack([by_refusal, by_negativity])
    as_long = functional.normalize(random, dim=-1) * by_negativity[-1].norm(dim=-1)[:, None, None]
    own = torch.arange(len(random))[:, None].expand(-1, N_RANDOM)
    runs: dict[str, tuple[Any, ...]] = {  # prompts, directions, then references or layers
        "requests": (harmful + harmless, both, activations[1]),
        "statements": (negative, both, activations[3]),
        "chance": (harmful, random, activations[1]),
        "chance_statements": (negative, random, activations[3]),
        "added": (harmless, by_negativity, layers),
        "chance_added": (harmless, as_long, own),
    }
    planned = {k: len(prompts) * each[..., 0].numel() for k, (prompts, each, _) in runs.items()}
    clean = first_token_logits(model, neutral, batch_size=batch_size, progress=False)
    effects = {}
    with RunBar(planned, shown=progress and is_main()) as bar:
        options: Any = {"batch_size": batch_size, "progress": bar, "protocol": DEFAULT}
        options |= {"score": score, "last_position": True}
        for what, (prompts, directions, at) in runs.items():
            bar.begin(what)
            kept: Any = {"remember": partial(remember, what)}
            sweep = partial(sweep_ablations, model, prompts, options=options)
            if what.endswith("added"):
                sweep = partial(divide_sweep, partial(addition_effects, model, prompts, **options))
            effects[what] = sweep(directions, at, **kept)
        bar.update(bar.total - bar.n)
    measures = _Measures(**effects, neutral=refusal_log_odds(clean, score))
    found, n = {}, len(harmful)
    for row, (i, at) in enumerate(zip(judged, layers.clamp_min(0).tolist(), strict=True)):
        found[i] = [_responses(measures, row, layer, own, n) for layer, own in enumerate(at)]
    return found


class _Measures(NamedTuple):
    """Effects `[direction specification layer prompt]` of the two directions, refusal's first."""

    requests: Effects  # of ablating each, on harmful, then harmless prompts
    statements: Effects  # of ablating each, on negative prompts
    chance: Effects  # of ablating random directions `[layer direction prompt]`, on harmful prompts
    chance_statements: Effects
    added: Effects  # of adding negativity `[specification layer prompt]`
    chance_added: Effects
    neutral: Float[Tensor, " neutral"]  # scores in the unmodified model


def _responses(m: _Measures, row: int, layer: int, at: int, n: int) -> Responses:
    """Responses to one specification's directions at one layer; random ones are of layer `at`."""
    odds, kl = m.requests.log_odds[:, row], m.requests.kl[:, row]
    here = torch.cat([m.requests.unchanged[None], odds[:, layer]])
    harmful, harmless = here[:, :n], here[:, n:]  # the first n requests are harmful
    of_refusal, of_negativity = (Effects(harmful[0], odds[i, :, :n], kl[i, :, :n]) for i in (0, 1))
    statements = [m.statements.unchanged[None], m.statements.log_odds[:, row, layer]]
    # Adding refusal decides nothing, so it is not run.
    added = [harmless[:1], torch.nan * harmless[:1], m.added.log_odds[row, layer][None]]
    return Responses(
        harmful=torch.cat([harmful, m.chance.log_odds[at]]),
        harmless=harmless,
        negative=torch.cat([*statements, m.chance_statements.log_odds[at]]),
        neutral=m.neutral[None],
        added=torch.cat([*added, m.chance_added.log_odds[at]]),
        requests=(harmful[0], harmless[0]),
        earlier=Earlier.of(of_refusal, of_negativity, layer),
        kl=tuple(kl[:, layer, n:].mean(-1).tolist()),
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
