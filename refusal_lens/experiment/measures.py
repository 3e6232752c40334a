"""Similarities, estimators and projections, from activations alone.

`activations` and `directions` map the parts of a run, `refusal` and `negativity` first, to
activations and to mean differences.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import product

import torch
from einops import einsum
from jaxtyping import Float
from torch import Tensor

from ..activations.extract import ContrastActivations
from ..directions import estimators, similarity
from ..directions.covariance import WithinClassCovariance
from ..directions.estimators import mean, mean_difference
from ..directions.similarity import cosine_similarity, unit
from ..models.forward import effective_unembedding as effective_unembedding
from ..uncertainty.effects import auroc_interval
from .causal import PARTS
from .config import spread

MASSIVE_DIMENSIONS = 4  # number that "without massive dimensions" leaves out
PROBE_FOLDS = 5  # cross-validation of the logistic probe
MOST_PROMPTS = 256  # of a set, for what takes more than proportionally long with more prompts

Activations = Mapping[str, ContrastActivations]
Curves = dict[str, Float[Tensor, " layer"]]
Directions = Mapping[str, Float[Tensor, "layer d_model"]]
Names = Mapping[str, tuple[str, str]]  # part -> names of its target and baseline set
Rows = Float[Tensor, "_ layer d_model"]
Sets = Mapping[str, Rows]
Projections = dict[str, dict[str, Float[Tensor, "_ layer"]]]


def depth_profile(activations: Activations, directions: Directions) -> Curves:
    """Return the published experiment's four cosines, then refusal against each control."""
    refusal, negativity = directions["refusal"], directions["negativity"]
    sides = (activations["refusal"].target, *activations["negativity"])
    harmful, negative, neutral = (mean(side).float() for side in sides)
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
    every = [side for sides in activations.values() for side in sides]
    found = {part: direction.norm(dim=-1) for part, direction in directions.items()}
    rows = torch.cat([torch.linalg.vector_norm(side, dim=-1) for side in every])
    return found | {"residual stream": rows.mean(0)}


def by_metric(activations: Activations, directions: Directions) -> Curves:
    """Return refusal against negativity under every similarity of `directions.similarity`.

    The covariance needs two prompts in every set; the causal inner product, a model (`run.py`).
    The covariance and the massive dimensions are of at most `MOST_PROMPTS` prompts of each set,
    which the names then say.
    """
    a, b = directions["refusal"], directions["negativity"]
    sides = [*activations["refusal"], *activations["negativity"]]
    classes, note = _at_most(sides, MOST_PROMPTS)
    n_massive = min(MASSIVE_DIMENSIONS, a.shape[-1] - 1)
    massive = similarity.massive_dimensions(torch.cat(classes), k=n_massive)
    found = {
        "plain": cosine_similarity(a, b),
        f"without massive dimensions{note}": similarity.cosine_without_massive(a, b, massive),
    }
    if min(map(len, classes)) > 1:
        variance, whitened = torch.empty_like(a).double(), torch.empty(len(a))
        units = unit(a), unit(b)
        for layer in range(len(a)):
            at = slice(layer, layer + 1)
            covariance = WithinClassCovariance.of(*(rows[:, at] for rows in classes))
            variance[at] = covariance.variance
            whitened[at] = similarity.whitened_cosine(units[0][at], units[1][at], covariance)
        found[f"standardised{note}"] = similarity.standardised_cosine(a, b, variance)
        found[f"whitened{note}"] = whitened
    return found


def by_estimator(activations: Activations, *, paired: bool) -> Curves:
    """Return the plain cosine of the two directions under each estimator.

    Omits the principal component unless both contrasts are `paired`, and any estimator that needs
    more prompts than the smallest set has. All but the mean difference take at most `MOST_PROMPTS`
    prompts of each set, which their names then say.
    """
    pair = activations["refusal"], activations["negativity"]
    fewest = min(len(side) for sides in pair for side in sides)
    estimate_by: dict[str, Callable[..., Tensor]] = {}
    if fewest > 1:
        estimate_by["whitened mean difference"] = estimators.whitened_mean_difference
    if fewest >= PROBE_FOLDS:
        estimate_by["logistic probe"] = partial(estimators.logistic_probe, folds=PROBE_FOLDS)
    if paired and fewest > 1:
        estimate_by["first component of paired differences"] = estimators.paired_principal_component
    rows, note = _at_most([side for sides in pair for side in sides], MOST_PROMPTS)
    plain = cosine_similarity(*(mean_difference(*sides) for sides in pair))
    return {"mean difference": plain} | {
        f"{name}{note}": cosine_similarity(estimate(*rows[:2]), estimate(*rows[2:]))
        for name, estimate in estimate_by.items()
    }


def _at_most(sides: Sequence[Rows], most: int) -> tuple[list[Rows], str]:
    """At most so many prompts of each set, spread evenly, and what to add to a result's name."""
    fewer = [side[spread(range(len(side)), most)] for side in sides]
    return fewer, f" ({most} prompts a set)" if max(map(len, sides)) > most else ""


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
    found: Projections = {part: {} for part in names}
    for of in names:
        axis = unit(mean_difference(*activations[of]))
        for part in names:
            if part == of:
                along = held_out_projections(activations[part])
            else:
                along = [_project(side, axis) for side in activations[part]]
            found[of] |= zip(names[part], along, strict=True)
    return found


def aurocs(projected: Projections, names: Names) -> dict[str, Float[Tensor, "3 layer"]]:
    """Return the AUROC of each direction on each contrast with its interval; NaN is unknown."""
    found = {}
    for (of, sets), (part, sides) in product(projected.items(), names.items()):
        layers = zip(*(sets[side].unbind(1) for side in sides), strict=True)
        areas = [torch.stack(auroc_interval(*scores)) for scores in layers]
        found[f"{of} direction on {part}"] = torch.stack(areas, -1).float()
    return found


def in_plane(sets: Sets, directions: Directions) -> dict[str, Float[Tensor, "_ layer 2"]]:
    """Return every prompt's projections on the unit refusal and the unit negativity direction.

    In units of the residual stream; NaN where a direction is rounding noise. The axes are oblique.
    """
    axes = [unit(directions[part]) for part in PARTS]
    return {k: torch.stack([_project(rows, axis) for axis in axes], -1) for k, rows in sets.items()}


def in_components(sets: Sets) -> dict[str, Float[Tensor, "_ layer 2"]]:
    """Return every prompt's centred scores on the first two principal components of all prompts.

    The components are fitted to at most half of `MOST_PROMPTS` prompts of each set.
    """
    fewer, _ = _at_most(list(sets.values()), MOST_PROMPTS // 2)
    scores = [torch.empty(*rows.shape[:2], 2) for rows in sets.values()]
    for layer in range(scores[0].shape[1]):
        fitted = torch.cat([rows[:, layer] for rows in fewer]).double()
        middle = fitted.mean(0)
        fitted = fitted - middle
        vectors = torch.linalg.eigh(fitted @ fitted.T).eigenvectors[:, -2:].flip(-1)
        axes = torch.nn.functional.normalize(fitted.T @ vectors, dim=0)
        along = [(rows[:, layer].double() - middle) @ axes for rows in sets.values()]
        every = torch.cat(along)
        signs = every.gather(0, every.abs().argmax(0, keepdim=True)).sign()  # else arbitrary
        for score, each in zip(scores, along, strict=True):
            score[:, layer] = each * signs
    return dict(zip(sets, scores, strict=True))


def _project(
    rows: Float[Tensor, "prompt layer d_model"], axis: Float[Tensor, "layer d_model"]
) -> Float[Tensor, "prompt layer"]:
    return einsum(rows, axis.float(), "prompt layer d_model, layer d_model -> prompt layer")
