"""Similarities, estimators and projections, from activations alone.

`activations` and `directions` map the parts of a run, `refusal` and `negativity` first, to
activations and to mean differences.
"""

from collections.abc import Callable, Mapping
from functools import partial
from itertools import product
from typing import TYPE_CHECKING

import torch
from einops import einsum
from jaxtyping import Float
from torch import Tensor

from ..activations.extract import ContrastActivations
from ..directions import estimators, similarity
from ..directions.covariance import WithinClassCovariance
from ..directions.estimators import mean_difference
from ..directions.similarity import cosine_similarity, unit
from ..uncertainty.effects import auroc_interval
from .evidence import PARTS

if TYPE_CHECKING:
    from transformer_lens import HookedTransformer
    from transformer_lens.model_bridge import TransformerBridge

MASSIVE_DIMENSIONS = 4  # number that "without massive dimensions" leaves out
PROBE_FOLDS = 5  # cross-validation of the logistic probe

Activations = Mapping[str, ContrastActivations]
Curves = dict[str, Float[Tensor, " layer"]]
Directions = Mapping[str, Float[Tensor, "layer d_model"]]
Names = Mapping[str, tuple[str, str]]  # part -> names of its target and baseline set
Sets = Mapping[str, Float[Tensor, "_ layer d_model"]]
Projections = dict[str, dict[str, Float[Tensor, "_ layer"]]]


def depth_profile(activations: Activations, directions: Directions) -> Curves:
    """Return the published experiment's four cosines, then refusal against each control."""
    refusal, negativity = directions["refusal"], directions["negativity"]
    sides = (activations["refusal"].target, *activations["negativity"])
    harmful, negative, neutral = (side.double().mean(0).float() for side in sides)
    pairs = {
        "refusal_vs_negativity": (refusal, negativity),
        "mean_harmful_vs_mean_negative": (harmful, negative),
        "refusal_vs_mean_negative": (refusal, negative),
        "mean_negative_vs_mean_neutral": (negative, neutral),
    }
    pairs |= {f"refusal_vs_{part}": (refusal, directions[part]) for part in [*directions][2:]}
    return {name: cosine_similarity(*pair) for name, pair in pairs.items()}


def norms(activations: Activations, directions: Directions) -> Curves:
    """Return the norm of every direction, and the mean norm of the residual stream."""
    rows = torch.cat([side for sides in activations.values() for side in sides])
    found = {part: direction.norm(dim=-1) for part, direction in directions.items()}
    return found | {"residual stream": rows.norm(dim=-1).mean(0)}


def by_metric(
    activations: Activations,
    directions: Directions,
    unembedding: Float[Tensor, "d_model d_vocab"] | None = None,
) -> Curves:
    """Return refusal against negativity under every similarity of `directions.similarity`.

    The causal inner product needs `unembedding`; the covariance needs two prompts in every set.
    """
    a, b = directions["refusal"], directions["negativity"]
    classes = [*activations["refusal"], *activations["negativity"]]
    massive = similarity.massive_dimensions(
        torch.cat(classes), k=min(MASSIVE_DIMENSIONS, a.shape[-1] - 1)
    )
    found = {
        "plain": cosine_similarity(a, b),
        "without massive dimensions": similarity.cosine_without_massive(a, b, massive),
    }
    if min(map(len, classes)) > 1:
        covariance = WithinClassCovariance.of(*classes)
        found["standardised"] = similarity.standardised_cosine(a, b, covariance.variance)
        found["whitened"] = similarity.whitened_cosine(a, b, covariance)
    if unembedding is not None:
        found["causal inner product"] = similarity.causal_cosine(a, b, unembedding)
    return found


def by_estimator(activations: Activations, *, paired: bool) -> Curves:
    """Return the plain cosine of the two directions under each estimator.

    Omits the principal component unless both contrasts are `paired`, and any estimator that needs
    more prompts than the smallest set has.
    """
    pair = activations["refusal"], activations["negativity"]
    fewest = min(len(side) for sides in pair for side in sides)
    estimate_by: dict[str, Callable[..., Tensor]] = {"mean difference": mean_difference}
    if fewest > 1:
        estimate_by["whitened mean difference"] = estimators.whitened_mean_difference
    if fewest >= PROBE_FOLDS:
        estimate_by["logistic probe"] = partial(estimators.logistic_probe, folds=PROBE_FOLDS)
    if paired and fewest > 1:
        estimate_by["first component of paired differences"] = estimators.paired_principal_component
    return {
        name: cosine_similarity(*(estimate(*sides) for sides in pair))
        for name, estimate in estimate_by.items()
    }


def held_out_projections(sides: ContrastActivations) -> list[Float[Tensor, "_ layer"]]:
    """Return each prompt's projection on the unit mean difference of the other half of the prompts.

    The halves are even and odd prompts. NaN with fewer than two prompts a side.
    """
    projected = [torch.full(side.shape[:2], torch.nan) for side in sides]
    if min(map(len, sides)) > 1:
        for half, other in ((0, 1), (1, 0)):
            axis = unit(mean_difference(*(side[other::2] for side in sides)))
            for along, side in zip(projected, sides, strict=True):
                along[half::2] = _project(side[half::2], axis)
    return projected


def projections(activations: Activations, names: Names) -> Projections:
    """Return direction -> prompt set -> projection of every prompt on the unit direction.

    Projections are in units of the residual stream; for a direction's own prompts they are held out.
    """
    found: Projections = {part: {} for part in PARTS}
    for of, part in product(PARTS, PARTS):
        axis = unit(mean_difference(*activations[of]))
        along = [_project(side, axis) for side in activations[part]]
        own = held_out_projections(activations[part]) if of == part else along
        found[of] |= zip(names[part], own, strict=True)
    return found


def aurocs(projected: Projections, names: Names) -> Curves:
    """Return the AUROC of each direction on each contrast; 1/2 is chance, NaN is unknown."""
    found = {}
    for (of, sets), (part, sides) in product(projected.items(), names.items()):
        scores = (sets[side].mT for side in sides)
        found[f"{of} direction on {part}"] = auroc_interval(*scores).value.float()
    return found


def in_plane(sets: Sets, directions: Directions) -> dict[str, Float[Tensor, "_ layer 2"]]:
    """Return every prompt's projections on the unit refusal and the unit negativity direction.

    In units of the residual stream; NaN where a direction is rounding noise. The axes are oblique.
    """
    axes = [unit(directions[part]) for part in PARTS]
    return {k: torch.stack([_project(rows, axis) for axis in axes], -1) for k, rows in sets.items()}


def in_components(sets: Sets) -> dict[str, Float[Tensor, "_ layer 2"]]:
    """Return every prompt's centred scores on the first two principal components of all prompts."""
    rows = torch.cat(list(sets.values())).double().transpose(0, 1)
    rows = rows - rows.mean(1, keepdim=True)
    values, vectors = torch.linalg.eigh(rows @ rows.mT)
    scores = vectors[..., -2:].flip(-1) * values[:, None, -2:].flip(-1).clamp_min(0).sqrt()
    largest = scores.gather(1, scores.abs().argmax(1, keepdim=True))
    scores = (scores * largest.sign()).transpose(0, 1).float()  # fixes the arbitrary signs
    return dict(zip(sets, scores.split([len(side) for side in sets.values()]), strict=True))


def effective_unembedding(
    model: "HookedTransformer | TransformerBridge",
) -> Float[Tensor, "d_model d_vocab"]:
    """Return the unembedding with the final norm's weight multiplied in, on the CPU."""
    unembedding = model.W_U.detach().float().cpu()
    weight = getattr(model.ln_final, "w", getattr(model.ln_final, "weight", None))
    return unembedding if weight is None else unembedding * weight.detach().float().cpu()[:, None]


def _project(
    rows: Float[Tensor, "prompt layer d_model"], axis: Float[Tensor, "layer d_model"]
) -> Float[Tensor, "prompt layer"]:
    return einsum(rows, axis.float(), "prompt layer d_model, layer d_model -> prompt layer")
