"""What intervening on one direction does to the other contrast: one mechanism or two?

Two orthogonal directions can still act on one another, and two similar ones need not. So each of
them is ablated or added, whole and without the other's component, and beside them random directions
with the activations' own covariance. Each time every prompt is read twice: how much the model is
about to refuse it, and, at later layers, whether its class can still be told.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from ..directions.estimators import mean_difference, whitened_mean_difference
from ..directions.similarity import orthogonal_part
from ..errors import InputError
from ..models.load import LensModel
from ..prompts.contrast import Contrast
from ..prompts.protocol import Protocol
from .branches import run_branches
from .refusal_metric import RefusalTokens, next_token_kl, refusal_log_odds

NOTHING_LEFT = 1e-6
"""An orthogonal part with at most this share of its direction's norm is rounding."""
LAYERS_READ = 4

Sides = tuple[Float[Tensor, "_ layer d_model"], Float[Tensor, "_ layer d_model"]]


@dataclass(frozen=True)
class ContrastEffects:
    """One contrast's prompts under every intervention; float32, on the CPU.

    Attributes:
        target_log_odds: refusal log-odds of the target prompts.
        baseline_log_odds: refusal log-odds of the baseline prompts.
        target_kl: next-token KL(unchanged || intervened) of the target prompts, in nats.
        baseline_kl: the same of the baseline prompts.
        target_scores: how much like a target each target prompt looks, at each layer read.
        baseline_scores: the same of the baseline prompts.

    A score is the projection on a discriminant that was fitted, under the same intervention, to the
    half of the prompts that this one is not in; on its scale the classes of that other half have
    means 1/2 and -1/2. So it asks whether the class is still there to be read, by whatever
    direction reads it best, and not whether it is still where it was.
    """

    target_log_odds: Float[Tensor, "intervention target"]
    baseline_log_odds: Float[Tensor, "intervention baseline"]
    target_kl: Float[Tensor, "intervention target"]
    baseline_kl: Float[Tensor, "intervention baseline"]
    target_scores: Float[Tensor, "intervention layer target"]
    baseline_scores: Float[Tensor, "intervention layer baseline"]

    def auroc(self) -> Float[Tensor, "intervention layer"]:
        """How well target can be told from baseline: 1/2 is chance, 1 always."""
        target = rearrange(self.target_scores, "i layer target -> i layer target 1")
        baseline = rearrange(self.baseline_scores, "i layer baseline -> i layer 1 baseline")
        wins = (target > baseline).float() + (target == baseline).float() / 2
        unknown = (target + baseline).isnan()
        return torch.where(unknown, torch.nan, wins).mean((-1, -2))


@dataclass(frozen=True)
class CrossEffects:
    """Both contrasts' prompts under every intervention, prompt by prompt.

    Attributes:
        kind: what was done with the directions, "ablation" or "addition".
        layer: the layer the directions come from, and after which they are added.
        interventions: their names, in the order of every `intervention` axis: "none", "refusal",
            "negativity", "refusal without negativity", "negativity without refusal", then the
            "random" ones. Rows are NaN where nothing is left of a direction without the other.
        norms: the norm of each direction; 0 for "none".
        read_layers: the layers at which the classes are read.
        refusal: the refusal contrast's prompts.
        negativity: the negativity contrast's prompts.
    """

    kind: str
    layer: int
    interventions: tuple[str, ...]
    norms: Float[Tensor, " intervention"]
    read_layers: tuple[int, ...]
    refusal: ContrastEffects
    negativity: ContrastEffects


def ablation_cross_effects(
    model: LensModel,
    contrasts: tuple[Contrast, Contrast],
    activations: tuple[Sides, Sides],
    *,
    layer: int,
    refusal_tokens: RefusalTokens,
    generator: torch.Generator,
    n_random: int = 8,
    protocol: Protocol = Protocol(),  # noqa: B008 (frozen)
    batch_size: int | None = None,
    progress: bool = True,
) -> CrossEffects:
    """Ablate each direction everywhere and read all prompts of both contrasts.

    `contrasts` and `activations` are refusal's, then negativity's; the directions are the mean
    differences at `layer`. The random directions are drawn from a normal distribution with the
    covariance that the activations at that layer have within their classes. So ablating one removes
    about as much of what varies anyway as an arbitrary direction of this model does, and what
    refusal's does beyond that, it does by being refusal's.

    Raises:
        InputError: if there is no such layer, or a contrast has fewer than four prompts on a side;
            and as `ablation_effects`.
    """
    return _cross_effects(
        "ablation",
        model,
        contrasts,
        activations,
        layer=layer,
        refusal_tokens=refusal_tokens,
        generator=generator,
        n_random=n_random,
        protocol=protocol,
        batch_size=batch_size,
        progress=progress,
    )


def addition_cross_effects(
    model: LensModel,
    contrasts: tuple[Contrast, Contrast],
    activations: tuple[Sides, Sides],
    *,
    layer: int,
    refusal_tokens: RefusalTokens,
    generator: torch.Generator,
    n_random: int = 8,
    protocol: Protocol = Protocol(),  # noqa: B008
    batch_size: int | None = None,
    progress: bool = True,
) -> CrossEffects:
    """Add each direction after its layer and read all prompts of both contrasts.

    Directions are added with the norm they have: the whole ones carry the mean of the baseline
    prompts to that of the target prompts. The random ones have the refusal direction's norm.
    Otherwise as `ablation_cross_effects`.

    Raises:
        InputError: as `ablation_cross_effects`.
    """
    return _cross_effects(
        "addition",
        model,
        contrasts,
        activations,
        layer=layer,
        refusal_tokens=refusal_tokens,
        generator=generator,
        n_random=n_random,
        protocol=protocol,
        batch_size=batch_size,
        progress=progress,
    )


def random_directions(
    *classes: Float[Tensor, "_ d_model"], n: int, generator: torch.Generator
) -> Float[Tensor, "random d_model"]:
    """Normal random directions with the covariance that activations have within their classes."""
    rows = torch.cat([(rows.double() - rows.double().mean(0)) for rows in classes])
    weights = torch.randn(n, len(rows), generator=generator, dtype=torch.float64)
    return (weights @ rows / len(rows) ** 0.5).float()


def held_out_scores(
    target: Float[Tensor, "target layer d_model"], baseline: Float[Tensor, "baseline layer d_model"]
) -> tuple[Float[Tensor, "layer target"], Float[Tensor, "layer baseline"]]:
    """Scores of every prompt on the linear discriminant of the other half: even rows, odd rows.

    On its scale the means of the classes it was fitted to are 1/2 and -1/2. NaN at layers where the
    activations do not vary.
    """
    scores = torch.empty(target.shape[1], len(target)), torch.empty(target.shape[1], len(baseline))
    for fitted, read in ((0, 1), (1, 0)):
        fit = target[fitted::2], baseline[fitted::2]
        axis = whitened_mean_difference(*fit).double()
        means = [side.double().mean(0) for side in fit]
        apart = ((means[0] - means[1]) * axis).sum(-1)
        middle = (means[0] + means[1]) / 2
        for side, score in zip((target, baseline), scores, strict=True):
            along = ((side[read::2].double() - middle) * axis).sum(-1) / apart
            score[:, read::2] = rearrange(along, "prompt layer -> layer prompt").float()
    return scores


def _cross_effects(
    kind: str,
    model: LensModel,
    contrasts: tuple[Contrast, Contrast],
    activations: tuple[Sides, Sides],
    *,
    layer: int,
    refusal_tokens: RefusalTokens,
    generator: torch.Generator,
    n_random: int,
    protocol: Protocol,
    batch_size: int | None,
    progress: bool,
) -> CrossEffects:
    n_layers = model.cfg.n_layers
    if not 0 <= layer < n_layers:
        raise InputError(f"there is no layer {layer}: choose 0 to {n_layers - 1}")
    sides = [side for contrast in contrasts for side in (contrast.target, contrast.baseline)]
    if min(map(len, sides)) < 4:
        raise InputError(
            f"a side of {min(map(len, sides))} prompt(s) can't be split into halves that each show "
            "how a class varies: give every side at least 4"
        )
    named = _directions(activations, layer, n_random, generator, match_norm=kind == "addition")
    directions = torch.stack(list(named.values()))
    run = [i for i, direction in enumerate(directions) if not direction.isnan().any()]
    read_layers = _spread(min(layer + 1, n_layers - 1), n_layers - 1)
    readings = _Readings(
        len(directions), sum(map(len, sides)), len(read_layers), directions.shape[1]
    )
    for outcome in run_branches(
        model,
        [prompt for side in sides for prompt in side],
        directions[run],
        [layer] * len(run) if kind == "addition" else None,
        read_layers=read_layers,
        protocol=protocol,
        batch_size=batch_size,
        progress=progress,
    ):
        rows = [0, *(1 + run[i] for i in outcome.interventions)]
        where = torch.tensor(rows)[:, None], torch.tensor(outcome.prompts)
        readings.log_odds[where] = refusal_log_odds(outcome.logits, refusal_tokens).cpu()
        readings.kl[where] = next_token_kl(outcome.logits[:1], outcome.logits).cpu()
        readings.residual[where] = outcome.residual.float().cpu()
    read = readings.split(list(map(len, sides)))
    return CrossEffects(
        kind=kind,
        layer=layer,
        interventions=("none", *named),
        norms=torch.cat([torch.zeros(1), directions.norm(dim=-1)]),
        read_layers=tuple(read_layers),
        refusal=_contrast_effects(*read[:2]),
        negativity=_contrast_effects(*read[2:]),
    )


class _Readings:
    """What is read of every prompt under every intervention, "none" first."""

    def __init__(self, n_interventions: int, n_prompts: int, n_layers: int, d_model: int):
        shape = (1 + n_interventions, n_prompts)
        self.log_odds = torch.full(shape, torch.nan)
        self.kl = torch.full(shape, torch.nan)
        self.residual = torch.full((*shape, n_layers, d_model), torch.nan)

    def split(self, sizes: list[int]) -> list[tuple[Tensor, Tensor, Tensor]]:
        """The readings of each side."""
        every = (self.log_odds, self.kl, self.residual)
        return list(zip(*(reading.split(sizes, dim=1) for reading in every), strict=True))


def _contrast_effects(
    target: tuple[Tensor, Tensor, Tensor], baseline: tuple[Tensor, Tensor, Tensor]
) -> ContrastEffects:
    n_layers = target[2].shape[2]
    scores = [
        (
            torch.full((n_layers, t.shape[0]), torch.nan),
            torch.full((n_layers, b.shape[0]), torch.nan),
        )
        if t.isnan().any()
        else held_out_scores(t, b)
        for t, b in zip(target[2], baseline[2], strict=True)
    ]
    target_scores, baseline_scores = (torch.stack(side) for side in zip(*scores, strict=True))
    return ContrastEffects(
        target[0], baseline[0], target[1], baseline[1], target_scores, baseline_scores
    )


def _directions(
    activations: tuple[Sides, Sides],
    layer: int,
    n_random: int,
    generator: torch.Generator,
    *,
    match_norm: bool,
) -> Mapping[str, Float[Tensor, " d_model"]]:
    at_layer = [[side[:, layer : layer + 1] for side in sides] for sides in activations]
    refusal, negativity = (mean_difference(*sides)[0].float() for sides in at_layer)
    classes = [side[:, 0] for sides in at_layer for side in sides]
    random = random_directions(*classes, n=n_random, generator=generator)
    if match_norm:
        random = torch.nn.functional.normalize(random, dim=-1) * refusal.norm()
    named = {
        "refusal": refusal,
        "negativity": negativity,
        "refusal without negativity": _without(refusal, negativity),
        "negativity without refusal": _without(negativity, refusal),
    }
    return named | {f"random {i + 1}": direction for i, direction in enumerate(random)}


def _without(
    direction: Float[Tensor, " d_model"], other: Float[Tensor, " d_model"]
) -> Float[Tensor, " d_model"]:
    rest = orthogonal_part(direction, other)
    is_rounding = rest.norm() <= NOTHING_LEFT * direction.norm()
    return torch.full_like(rest, torch.nan) if is_rounding else rest


def _spread(first: int, last: int) -> list[int]:
    """A few layers, evenly spread from the first to the last."""
    return sorted({round(x) for x in torch.linspace(first, last, LAYERS_READ).tolist()})
