"""Effects of ablating or adding each of many directions on how a reply begins."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from ..errors import InputError, check_tensors
from .batched_runs import Interventions, run_interventions
from .hooks import check_directions, stream_after
from .refusal_metric import RefusalTokens, next_token_kl, refusal_log_odds
from .reply_openings import ReplyOpenings

if TYPE_CHECKING:
    from ..models import HookedModel


@dataclass(frozen=True)
class Effects:
    """How replies begin under many interventions; float32, on the CPU.

    Attributes:
        unchanged: refusal log-odds of each prompt in the unmodified model.
        log_odds: refusal log-odds under each intervention, in the shape of the directions.
        kl: next-token KL(unmodified || intervention), in nats.
    """

    unchanged: Float[Tensor, " prompt"]
    log_odds: Float[Tensor, "*intervention prompt"]
    kl: Float[Tensor, "*intervention prompt"]


def ablation_effects(
    model: "HookedModel",
    prompts: Sequence[str],
    directions: Float[Tensor, "*intervention d_model"],
    *,
    score: RefusalTokens | ReplyOpenings | tuple[int, ...],
    references: Float[Tensor, "*intervention layer"] | None = None,
    last_position: bool = False,
    **options: Any,
) -> Effects:
    """The effect of ablating each direction; equals runs with `ablate_direction` within 1e-4.

        effects = ablation_effects(model, harmful, directions, score=openings_of(model.tokenizer))
        change = effects.log_odds - effects.unchanged     # [layer prompt]

    Args:
        model, prompts: the model, and prompts as text. InputError if the model has hooks, if there
            are no prompts, or if a prompt is longer than the model's context.
        directions: for example `[layer d_model]` or `[pos layer d_model]`. A direction with a NaN
            gives NaN; a zero direction has no effect. InputError if infinite or of another width.
        score: the openings, or the first tokens, that count as a refusal.
        references: the component to which each direction is set at each layer (affine ablation,
            `affine_references`); None is 0 (directional ablation).
        last_position: intervene at the prompt's last token alone, where directions are read, rather
            than at every token of prompt and reply.
        **options: `protocol`, `batch_size` and `progress` of `run_interventions`.

    Reference: Arditi et al. 2024, arXiv:2406.11717, sections 2.4 and B.
    """
    these = Interventions(directions, None, references, last_position)
    return _effects(model, prompts, these, score, options)


def addition_effects(
    model: "HookedModel",
    prompts: Sequence[str],
    directions: Float[Tensor, "*intervention d_model"],
    layers: Int[Tensor, "..."],
    *,
    score: RefusalTokens | ReplyOpenings | tuple[int, ...],
    last_position: bool = False,
    **options: Any,
) -> Effects:
    """The effect of adding each direction; equals runs with `add_direction` within 1e-4.

    Args:
        model, prompts: the model, and prompts as text. InputError if the model has hooks, if there
            are no prompts, or if a prompt is longer than the model's context.
        directions: for example `[layer d_model]`, added with their norms. A direction with a NaN
            gives NaN; a zero direction has no effect. InputError if infinite or of another width.
        layers: the layer after which each direction is added, -1 the embedding. Broadcasts against
            the directions: `torch.arange(n_layers)` fits `[pos layer d_model]`. InputError if the
            model has no such layer.
        score: the openings, or the first tokens, that count as a refusal.
        last_position: add at the prompt's last token alone, rather than at every token.
        **options: `protocol`, `batch_size` and `progress` of `run_interventions`.

    Reference: Arditi et al. 2024, arXiv:2406.11717, sections 2.4 and B.
    """
    check_tensors(directions=(directions, "*intervention d_model"))
    try:
        each = layers.expand(directions.shape[:-1]).flatten().tolist()
    except RuntimeError as error:
        shapes = f"layers {list(layers.shape)} do not fit directions {list(directions.shape)}"
        raise InputError(f"{shapes}: give one layer to each") from error
    these = Interventions(directions, each, None, last_position)
    return _effects(model, prompts, these, score, options)


def affine_references(
    directions: Float[Tensor, "*intervention d_model"],
    baseline: Float[Tensor, "baseline layer d_model"],
    *,
    hook: str = "resid_post",
) -> Float[Tensor, "*intervention layer"]:
    """The mean component of baseline prompts along each direction, after every layer.

    Affine ablation sets the component to it (Marshall et al. 2024, arXiv:2411.09003): the stream
    gets what baseline prompts have, which is seldom 0.

    Args:
        directions: of any norm; a direction with a NaN gives NaN.
        baseline: activations of the baseline prompts.
        hook: the hook of `baseline`, "resid_post" or "resid_pre". Row `l` of "resid_pre" is the
            output of layer `l - 1`; the last layer then takes the reference of its input.
    """
    units = functional.normalize(directions.double(), dim=-1)
    means = baseline.double().mean(0).to(units.device)
    if hook == "resid_pre":
        means = torch.cat([means[1:], means[-1:]])
    return torch.einsum("...d,ld->...l", units, means).float()


def measured(
    model: "HookedModel",
    prompts: Sequence[str],
    runs: Iterable[tuple[Interventions, Sequence[int], Sequence[int]]],
    n_rows: int,
    score: RefusalTokens | ReplyOpenings | tuple[int, ...],
    options: dict[str, Any],
) -> tuple[Tensor, Tensor, Tensor]:
    """Refusal log-odds, KL and residual stream, on the CPU; NaN where nothing ran.

    A run has interventions, which of them, and on which prompts. Row 0 is the unmodified model, row
    `i + 1` the intervention `i`.
    """
    log_odds, kl = torch.full((2, n_rows, len(prompts)), torch.nan)
    size = len(options.get("read_layers", ())), model.cfg.d_model
    residual = torch.full((*kl.shape, *size), torch.nan)
    options = options | {"openings": score if isinstance(score, ReplyOpenings) else None}
    for every, which, some in runs:
        these, texts = every.at(which, every.directions.device), [prompts[i] for i in some]
        for outcome in run_interventions(model, texts, these, **options):
            rows = torch.tensor([0, *(1 + which[i] for i in outcome.interventions)])
            cells = rows[:, None], torch.tensor([some[i] for i in outcome.prompts])
            if isinstance(score, ReplyOpenings):
                log_odds[cells] = outcome.refusal.float().cpu()
            else:
                log_odds[cells] = refusal_log_odds(outcome.logits, score).cpu()
            kl[cells] = next_token_kl(outcome.logits[:1], outcome.logits).cpu()
            residual[cells] = outcome.residual.float().cpu()
    return log_odds, kl, residual


def _effects(
    model: "HookedModel",
    prompts: Sequence[str],
    these: Interventions,
    score: RefusalTokens | ReplyOpenings | tuple[int, ...],
    options: dict[str, Any],
) -> Effects:
    """The effect of each direction; NaN and zero directions are not run."""
    directions, references = these.directions, these.references
    check_tensors(directions=(directions, "*intervention d_model"))
    flat = directions.reshape(-1, directions.shape[-1])
    for layer in these.layers or ():
        stream_after(model, layer)
    unknown, zero = flat.isnan().any(-1).cpu(), (flat == 0).all(-1).cpu()
    run = (~unknown & ~zero).nonzero()[:, 0]
    check_directions(model, flat[run])
    references = None if references is None else references.reshape(len(flat), -1)
    these = these._replace(directions=flat, references=references)
    runs = [(these, run.tolist(), range(len(prompts)))]
    log_odds, kl, _ = measured(model, prompts, runs, 1 + len(flat), score, options)
    unchanged, odds, divergence = log_odds[0], log_odds[1:], kl[1:]
    odds[zero], divergence[zero] = unchanged, 0.0
    shape = (*directions.shape[:-1], len(prompts))
    return Effects(unchanged, odds.reshape(shape), divergence.reshape(shape))
