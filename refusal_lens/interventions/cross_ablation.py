"""Effect of intervening on one contrast's direction on the prompts of the other contrast.

Cosines do not show whether two directions share a mechanism. Therefore each direction is ablated or
added, whole and without the other's component, and compared with random directions. Each prompt
gets a refusal score and, at later layers, the score of a linear classifier of its class.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from ..directions.estimators import mean_difference, whitened_mean_difference
from ..directions.similarity import orthogonal_part
from ..errors import InputError
from ..prompts.contrast import Contrast
from ..prompts.protocol import Protocol
from .batched_runs import Interventions
from .refusal_metric import RefusalTokens
from .reply_openings import ReplyOpenings
from .sweep import affine_references, measured

if TYPE_CHECKING:
    from ..models import HookedModel

ROUNDING = 1e-6  # an orthogonal part of at most this share of the norm is rounding noise
N_READ_LAYERS, FEWEST_PROMPTS = 4, 4
N_PARTS = 6  # the directions of an addition, but for random ones
N_VARIANTS = 6  # other ways to ablate the first two of them
CHANCE_PROMPTS = 10  # at least so many prompts, if there are, where only some run

Prompts = TypeVar("Prompts", range, tuple[str, ...])
Sides = tuple[Float[Tensor, "_ layer d_model"], Float[Tensor, "_ layer d_model"]]


class Intervention(StrEnum):
    """The direction that is ablated or added. `RANDOM` stands for every random direction.

    An ablation sets the component, at every layer, to the mean of the baseline prompts of the
    prompts' own contrast: harmless for requests. It acts at the prompt's last token, where the
    directions were read; the two `..._EVERYWHERE` act at every token, and the two `..._TO_ZERO`
    remove the component there. The two `..._RESAMPLED` set it to that of one baseline prompt, another
    for each prompt (resample ablation). What is taken out of negativity is the part along the
    unembeddings of the refusals' first tokens (its direct effect on them) and, in `..._CONTROLLED`,
    along the directions of controls as well.
    """

    NONE = "none"
    REFUSAL = "refusal"
    NEGATIVITY = "negativity"
    REFUSAL_ALONE = "refusal without negativity"
    NEGATIVITY_ALONE = "negativity without refusal"
    NEGATIVITY_INDIRECT = "negativity without the refusals' first tokens"
    NEGATIVITY_CONTROLLED = "negativity without controls"
    REFUSAL_TO_ZERO = "refusal, to zero"
    NEGATIVITY_TO_ZERO = "negativity, to zero"
    REFUSAL_EVERYWHERE = "refusal, at every token"
    NEGATIVITY_EVERYWHERE = "negativity, at every token"
    REFUSAL_RESAMPLED = "refusal, to one harmless prompt's"
    NEGATIVITY_RESAMPLED = "negativity, to one harmless prompt's"
    RANDOM = "random"


@dataclass(frozen=True)
class ContrastEffects:
    """One contrast's prompts under every intervention; float32, on the CPU.

    Attributes:
        target_log_odds, baseline_log_odds: refusal log-odds of the two prompt sets.
        target_kl, baseline_kl: next-token KL(unmodified || intervention), in nats.
        target_scores, baseline_scores: class scores (`held_out_scores`) at `read_layers`. The
            discriminant is fitted under the intervention: the score shows whether any direction
            still decodes the class.
    """

    target_log_odds: Float[Tensor, "intervention target"]
    baseline_log_odds: Float[Tensor, "intervention baseline"]
    target_kl: Float[Tensor, "intervention target"]
    baseline_kl: Float[Tensor, "intervention baseline"]
    target_scores: Float[Tensor, "intervention layer target"]
    baseline_scores: Float[Tensor, "intervention layer baseline"]


@dataclass(frozen=True)
class CrossEffects:
    """Effects of every intervention on the prompts of both contrasts.

    Attributes:
        kind, layer: "ablation" or "addition"; the layer of the directions and of the addition.
        interventions, norms: intervention of each row, `NONE` first, and the norm of its direction.
            Rows are NaN where a direction has no part orthogonal to the other, and where nothing
            ran: statements are run with the two directions ablated, whole; a random direction runs
            on some harmful and negative prompts under ablation and some harmless ones under
            addition, an ablation at every token, or to one harmless prompt's component, on some
            harmful ones; nothing is added "to zero".
        read_layers: the layers of the class scores.
        refusal, negativity: effects on the prompts of each contrast.
    """

    kind: str
    layer: int
    interventions: tuple[Intervention, ...]
    norms: Float[Tensor, " intervention"]
    read_layers: tuple[int, ...]
    refusal: ContrastEffects
    negativity: ContrastEffects

    def __post_init__(self) -> None:
        # Saved results hold strings.
        object.__setattr__(self, "interventions", tuple(map(Intervention, self.interventions)))

    @property
    def unmodified(self) -> list[Float[Tensor, " prompt"]]:
        """Log-odds in the unmodified model: target and baseline of refusal, then of negativity."""
        parts = self.refusal, self.negativity
        return [x[0] for part in parts for x in (part.target_log_odds, part.baseline_log_odds)]

    def rows(self, intervention: Intervention) -> list[int]:
        """The rows of an `intervention`; `RANDOM` has one row for each random direction."""
        return [i for i, other in enumerate(self.interventions) if other is intervention]


def cross_effects(
    model: "HookedModel",
    contrasts: tuple[Contrast, Contrast],
    activations: tuple[Sides, Sides],
    *,
    intervention: Literal["ablation", "addition"],
    layer: int,
    random: Float[Tensor, "random d_model"],
    score: RefusalTokens | ReplyOpenings,
    several: Float[Tensor, "several d_model"] | None = None,
    taken_out: Sequence[Float[Tensor, "_ d_model"]] = (),
    protocol: Protocol = Protocol(),  # noqa: B008 (frozen)
    **options: Any,
) -> CrossEffects:
    """Ablate or add each direction, and measure all prompts of both contrasts.

    Args:
        model: the model, without hooks.
        contrasts: refusal, then negativity, with at least four prompts a side; else InputError.
        activations: target and baseline of both, of any number of prompts; the directions are the
            mean differences.
        intervention: "ablation", or "addition" of the directions with their norms after `layer`.
        layer: the layer of the directions; InputError if the model has no such layer.
        random: directions to compare with (`random_directions`), added with negativity's norm.
        score: the openings, or the first tokens, that count as a refusal.
        several: orthogonal directions that are ablated together as refusal; None is its direction.
        taken_out: rows that span what `NEGATIVITY_INDIRECT` lacks, and `NEGATIVITY_CONTROLLED` too.
        protocol: how prompts are formatted.
        **options: `batch_size` and `progress` of `run_interventions`.
    """
    sides = [side for contrast in contrasts for side in (contrast.target, contrast.baseline)]
    check_sides(sides, layer, model.cfg.n_layers)
    directions = _directions(activations, layer, taken_out)
    if intervention == "addition":
        random = functional.normalize(random, dim=-1) * directions[1].norm()
    directions = torch.cat([directions, directions[:2].repeat(N_VARIANTS // 2, 1), random])
    norms = functional.pad(directions.norm(dim=-1), (1, 0))
    if intervention == "ablation" and several is not None:
        # The refusal's directions in its four rows, and zeros behind the others.
        directions = functional.pad(directions[:, None], (0, 0, 0, len(several) - 1))
        directions[[0, *range(N_PARTS, N_PARTS + N_VARIANTS, 2)]] = several
    read_layers, sizes = later_layers(layer, model.cfg.n_layers), [*map(len, sides)]
    baselines = [baseline for _, baseline in activations]
    added_after = layer if intervention == "addition" else None
    options |= {"protocol": protocol, "read_layers": read_layers}
    runs = (run for run in _runs(directions, added_after, baselines, sizes, protocol) if run[1])
    tables = measured(model, sum(sides, ()), runs, 1 + len(directions), score, options)
    by_side = [each.split(sizes, dim=1) for each in tables]
    named = [each for each in Intervention if each is not Intervention.RANDOM]
    return CrossEffects(
        kind=intervention,
        layer=layer,
        interventions=(*named, *[Intervention.RANDOM] * len(random)),
        norms=norms,
        read_layers=tuple(read_layers),
        refusal=_contrast_effects(*(each[:2] for each in by_side)),
        negativity=_contrast_effects(*(each[2:] for each in by_side)),
    )


def _runs(
    directions: Float[Tensor, "intervention *several d_model"],
    added_after: int | None,  # None for an ablation
    baselines: Sequence[Float[Tensor, "_ layer d_model"]],
    sizes: Sequence[int],
    protocol: Protocol,
) -> Iterator[tuple[Interventions, list[int], range]]:
    """Interventions, which of them, on which prompts: all on requests, two on statements."""
    n_harmful, n_harmless, n_negative, _ = sizes
    requests, statements = range(n_harmful + n_harmless), range(n_harmful + n_harmless, sum(sizes))
    known = [i for i in range(N_PARTS) if not directions[i].isnan().any()]
    random, of = [*range(N_PARTS + N_VARIANTS, len(directions))], requests[:n_harmful]
    these = Interventions(directions, last_position=True)
    if added_after is None:
        own, others = (affine_references(directions, x, hook=protocol.hook) for x in baselines)
        yield Interventions(directions), [N_PARTS, N_PARTS + 1], requests
        yield Interventions(directions, None, own), [N_PARTS + 2, N_PARTS + 3], sampled(of)
        for prompt in sampled(of):
            drawn = baselines[0][prompt % len(baselines[0]), None]
            one = affine_references(directions, drawn, hook=protocol.hook)
            alone = range(prompt, prompt + 1)
            yield these._replace(references=one), [N_PARTS + 4, N_PARTS + 5], alone
        on_statements, negative = these._replace(references=others), statements[:n_negative]
        yield on_statements, [0, 1], statements
        yield on_statements, random, sampled(negative)
        these = these._replace(references=own)
    else:
        these, of = these._replace(layers=[added_after] * len(directions)), requests[n_harmful:]
    yield these, known, requests
    yield these, random, sampled(of)


def sampled(prompts: Prompts) -> Prompts:
    """Ten or more prompts of a set, evenly spaced, for what is shown beside the effects that decide."""
    return prompts[:: max(1, len(prompts) // CHANCE_PROMPTS)]


def random_directions(
    *classes: Float[Tensor, "_ d_model"], n: int, generator: torch.Generator
) -> Float[Tensor, "random d_model"]:
    """`n` normal random directions with the covariance of activations within `classes`.

    `generator`, on the CPU, is the only source of randomness.
    """
    rows = torch.cat([(rows.double() - rows.double().mean(0)) for rows in classes])
    weights = torch.randn(n, len(rows), generator=generator, dtype=torch.float64)
    return (weights @ rows / len(rows) ** 0.5).float()


def held_out_scores(
    target: Float[Tensor, "target layer d_model"], baseline: Float[Tensor, "baseline layer d_model"]
) -> tuple[Float[Tensor, "layer target"], Float[Tensor, "layer baseline"]]:
    """Scores of every prompt on a linear discriminant fitted to the other half of the prompts.

    The halves of `target` and `baseline` are the even and the odd rows. On the scale of the scores,
    the class means of the fitted half are 1/2 and -1/2. NaN at layers where activations do not
    vary, and everywhere if an activation is NaN.
    """
    sides = (target, baseline)
    scores = [torch.full(side.shape[1::-1], torch.nan) for side in sides]
    if target.isnan().any() or baseline.isnan().any():
        return scores[0], scores[1]
    for fitted, scored in ((0, 1), (1, 0)):
        fit = target[fitted::2], baseline[fitted::2]
        axis = whitened_mean_difference(*fit).double()
        means = [side.double().mean(0) for side in fit]
        apart = ((means[0] - means[1]) * axis).sum(-1)
        middle = (means[0] + means[1]) / 2
        for side, score in zip(sides, scores, strict=True):
            along = ((side[scored::2].double() - middle) * axis).sum(-1) / apart
            score[:, scored::2] = along.T.float()
    return scores[0], scores[1]


def _contrast_effects(
    log_odds: Sequence[Tensor], kl: Sequence[Tensor], residual: Sequence[Tensor]
) -> ContrastEffects:
    scores = [held_out_scores(*pair) for pair in zip(*residual, strict=True)]
    return ContrastEffects(*log_odds, *kl, *map(torch.stack, zip(*scores, strict=True)))


def check_sides(sides: Sequence[Sequence[str]], layer: int, n_layers: int) -> None:
    """InputError if a model of so many layers lacks the layer, or a side its halves."""
    if not 0 <= layer < n_layers:
        raise InputError(f"there is no layer {layer}: choose 0 to {n_layers - 1}")
    if (fewest := min(map(len, sides))) < FEWEST_PROMPTS:
        problem = f"a side of {fewest} prompt(s) has no halves that show how a class varies"
        raise InputError(f"{problem}: give every side at least {FEWEST_PROMPTS}")


def _directions(
    activations: tuple[Sides, Sides], layer: int, taken_out: Sequence[Float[Tensor, "_ d_model"]]
) -> Float[Tensor, "6 d_model"]:
    """Refusal, negativity, each without the other's component, negativity without `taken_out`."""
    at_layer = [[side[:, layer : layer + 1] for side in sides] for sides in activations]
    whole = torch.cat([mean_difference(*sides) for sides in at_layer]).float()
    alone = [orthogonal_part(*whole), orthogonal_part(*whole.flip(0))]
    controlled = [outside(whole[1], rows) for rows in taken_out]
    controlled += [torch.full_like(whole[1], torch.nan)] * (2 - len(controlled))
    parts = torch.stack([*alone, *controlled])
    parts[parts.norm(dim=-1) <= ROUNDING * whole.norm(dim=-1).max()] = torch.nan
    return torch.cat([whole, parts])


def outside(
    direction: Float[Tensor, " d_model"], rows: Float[Tensor, "_ d_model"]
) -> Float[Tensor, " d_model"]:
    """The part of a direction that is orthogonal to all rows."""
    _, sizes, axes = torch.linalg.svd(
        functional.normalize(rows.double(), dim=-1), full_matrices=False
    )
    axes = axes[sizes > ROUNDING]
    return (direction.double() - axes.T @ (axes @ direction.double())).float()


def later_layers(layer: int, n_layers: int) -> list[int]:
    """A few later layers, evenly spaced up to the last."""
    first = min(layer + 1, n_layers - 1)
    return sorted({round(x) for x in torch.linspace(first, n_layers - 1, N_READ_LAYERS).tolist()})
