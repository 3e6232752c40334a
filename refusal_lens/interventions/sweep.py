"""Effects of ablating or adding each of many directions on how a reply begins."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from ..errors import InputError, check_tensors
from ..prompts.protocol import Protocol
from .batched_runs import Interventions, Outcome, run_interventions
from .hooks import check_directions, stream_after
from .refusal_metric import RefusalTokens, next_token_kl, refusal_log_odds
from .reply_openings import ReplyOpenings

if TYPE_CHECKING:
    from transformer_lens import HookedTransformer
    from transformer_lens.model_bridge import TransformerBridge


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
    model: "HookedTransformer | TransformerBridge",
    prompts: Sequence[str],
    directions: Float[Tensor, "*intervention d_model"],
    *,
    score: RefusalTokens | ReplyOpenings | tuple[int, ...],
    references: Float[Tensor, "*intervention layer"] | None = None,
    last_position: bool = False,
    protocol: Protocol = Protocol(),  # noqa: B008 (frozen)
    batch_size: int | None = None,
    progress: bool = True,
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
        protocol: how prompts are formatted.
        batch_size: maximum rows in a pass; None derives the number from the prompts' lengths.
        progress: whether to show a progress bar.

    Reference: Arditi et al. 2024, arXiv:2406.11717, sections 2.4 and B.
    """
    options = {"protocol": protocol, "batch_size": batch_size, "progress": progress}
    interventions = Interventions(directions, None, references, last_position)
    return _effects(model, prompts, directions, interventions, score, options)


def addition_effects(
    model: "HookedTransformer | TransformerBridge",
    prompts: Sequence[str],
    directions: Float[Tensor, "*intervention d_model"],
    layers: Int[Tensor, "..."],
    *,
    score: RefusalTokens | ReplyOpenings | tuple[int, ...],
    last_position: bool = False,
    protocol: Protocol = Protocol(),  # noqa: B008
    batch_size: int | None = None,
    progress: bool = True,
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
        protocol: how prompts are formatted.
        batch_size: maximum rows in a pass; None derives the number from the prompts' lengths.
        progress: whether to show a progress bar.

    Reference: Arditi et al. 2024, arXiv:2406.11717, sections 2.4 and B.
    """
    check_tensors(directions=(directions, "*intervention d_model"))
    try:
        each = layers.expand(directions.shape[:-1]).flatten().tolist()
    except RuntimeError as error:
        raise InputError(
            f"layers of shape {list(layers.shape)} do not fit directions of shape "
            f"{list(directions.shape)}: give one layer to each"
        ) from error
    options = {"protocol": protocol, "batch_size": batch_size, "progress": progress}
    interventions = Interventions(directions, each, None, last_position)
    return _effects(model, prompts, directions, interventions, score, options)


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


def refusal_scores(
    outcome: Outcome, score: RefusalTokens | ReplyOpenings | tuple[int, ...]
) -> Float[Tensor, "intervention prompt"]:
    """Refusal log-odds of an outcome, on the CPU; of openings, the run must have had them."""
    if isinstance(score, ReplyOpenings):
        return outcome.refusal.float().cpu()
    return refusal_log_odds(outcome.logits, score).cpu()


def _effects(
    model: "HookedTransformer | TransformerBridge",
    prompts: Sequence[str],
    directions: Float[Tensor, "*intervention d_model"],
    interventions: Interventions,
    score: RefusalTokens | ReplyOpenings | tuple[int, ...],
    options: dict[str, Any],
) -> Effects:
    """The effect of each direction; NaN and zero directions are not run."""
    check_tensors(directions=(directions, "*intervention d_model"))
    flat = directions.reshape(-1, directions.shape[-1])
    for layer in interventions.layers or ():
        stream_after(model, layer)
    unknown, zero = flat.isnan().any(-1).cpu(), (flat == 0).all(-1).cpu()
    run = (~unknown & ~zero).nonzero()[:, 0]
    check_directions(model, flat[run])
    references = interventions.references
    if references is not None:
        references = references.reshape(len(flat), -1)
    these = interventions._replace(directions=flat, references=references)
    these = these.at(run.tolist(), flat.device)
    options |= {"openings": score if isinstance(score, ReplyOpenings) else None}
    unchanged = torch.full((len(prompts),), torch.nan)
    log_odds = torch.full((len(flat), len(prompts)), torch.nan)
    kl = torch.full_like(log_odds, torch.nan)
    for outcome in run_interventions(model, prompts, these, **options):
        odds = refusal_scores(outcome, score)
        unchanged[outcome.prompts] = odds[0]
        cells = run[outcome.interventions][:, None], torch.tensor(outcome.prompts)
        log_odds[cells] = odds[1:]
        kl[cells] = next_token_kl(outcome.logits[:1], outcome.logits[1:]).cpu()
    log_odds[zero], kl[zero] = unchanged, 0.0
    shape = (*directions.shape[:-1], len(prompts))
    return Effects(unchanged, log_odds.reshape(shape), kl.reshape(shape))
