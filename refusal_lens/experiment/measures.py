"""What the activations of a run say besides the plain cosine: metrics, estimators, projections.

Nothing here runs a model. Activations come by the part they play, `refusal` and `negativity` first.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from einops import einsum, rearrange, reduce
from jaxtyping import Float
from torch import Tensor

from ..activations.extract import ContrastActivations
from ..directions.covariance import WithinClassCovariance
from ..directions.estimators import (
    logistic_probe,
    mean_difference,
    paired_principal_component,
    whitened_mean_difference,
)
from ..directions.similarity import (
    causal_cosine,
    cosine_similarity,
    cosine_without_massive,
    massive_dimensions,
    standardised_cosine,
    unit,
    whitened_cosine,
)
from ..uncertainty.effects import auroc_interval

MASSIVE_DIMENSIONS = 4
"""How many dimensions of massive activation `without massive` leaves out."""
PROBE_FOLDS = 5
"""Folds of the logistic probe's cross-validation."""

Activations = Mapping[str, ContrastActivations]
Curves = dict[str, Float[Tensor, " layer"]]


def depth_profile(
    activations: Activations, directions: Mapping[str, Float[Tensor, "layer d_model"]]
) -> Curves:
    """The published experiment's four cosines at every layer, then refusal against each control."""
    harmful = _mean(activations["refusal"].target)
    negative, neutral = (_mean(side) for side in activations["negativity"])
    profile = {
        "refusal_vs_negativity": (directions["refusal"], directions["negativity"]),
        "mean_harmful_vs_mean_negative": (harmful, negative),
        "refusal_vs_mean_negative": (directions["refusal"], negative),
        "mean_negative_vs_mean_neutral": (negative, neutral),
    }
    for part in list(directions)[2:]:
        profile[f"refusal_vs_{part}"] = (directions["refusal"], directions[part])
    return {name: cosine_similarity(*pair) for name, pair in profile.items()}


def norms(
    activations: Activations, directions: Mapping[str, Float[Tensor, "layer d_model"]]
) -> Curves:
    """Norm of every direction, and the mean norm of the residual stream over all prompts."""
    found = {part: direction.norm(dim=-1) for part, direction in directions.items()}
    rows = torch.cat([side for sides in activations.values() for side in sides])
    found["residual stream"] = reduce(rows.norm(dim=-1), "prompt layer -> layer", "mean")
    return found


def by_metric(
    activations: Activations,
    directions: Mapping[str, Float[Tensor, "layer d_model"]],
    unembedding: Float[Tensor, "d_model d_vocab"] | None = None,
) -> Curves:
    """Refusal against negativity under every similarity of `similarity`, by its name.

    With a set of one prompt there is no covariance: then only those that need none.
    """
    a, b = directions["refusal"], directions["negativity"]
    classes = [*activations["refusal"], *activations["negativity"]]
    massive = massive_dimensions(torch.cat(classes), k=min(MASSIVE_DIMENSIONS, a.shape[-1] - 1))
    found = {
        "plain": cosine_similarity(a, b),
        "without massive dimensions": cosine_without_massive(a, b, massive),
    }
    if min(map(len, classes)) > 1:
        covariance = WithinClassCovariance.of(*classes)
        found["standardised"] = standardised_cosine(a, b, covariance.variance)
        found["whitened"] = whitened_cosine(a, b, covariance)
    if unembedding is not None:
        found["causal inner product"] = causal_cosine(a, b, unembedding)
    return found


def by_estimator(activations: Activations, *, paired: bool) -> Curves:
    """Plain cosine of the two directions as each estimator finds them.

    Left out are the first principal component where `paired` is False, for it needs pairs in both
    contrasts, and those for which a set has too few prompts: two, and five for the probe's folds.
    """
    refusal, negativity = activations["refusal"], activations["negativity"]
    fewest = min(map(len, (*refusal, *negativity)))
    estimators: dict[str, Callable[..., Tensor]] = {"mean difference": mean_difference}
    if fewest > 1:
        estimators["whitened mean difference"] = whitened_mean_difference
    if fewest >= PROBE_FOLDS:
        estimators["logistic probe"] = partial(logistic_probe, folds=PROBE_FOLDS)
    if paired and fewest > 1:
        estimators["first component of paired differences"] = paired_principal_component
    return {
        name: cosine_similarity(estimate(*refusal), estimate(*negativity))
        for name, estimate in estimators.items()
    }


def held_out_projections(
    trained_on: ContrastActivations, read_from: ContrastActivations, *, same: bool
) -> ContrastActivations:
    """Projection of every prompt, `[prompt layer 1]`, on a unit mean difference it took no part in.

    Where the two contrasts are the `same`, each half of the prompts (even rows, odd rows) is
    projected on the direction of the other half; otherwise on the direction of all.
    """
    if not same:
        axis = unit(mean_difference(*trained_on))
        return ContrastActivations(*(_along(side, axis) for side in read_from))
    halves = [unit(mean_difference(*(side[start::2] for side in trained_on))) for start in (1, 0)]
    projected = []
    for side in read_from:
        along = torch.empty(*side.shape[:2], 1, dtype=torch.float32)
        for start, axis in enumerate(halves):
            along[start::2] = _along(side[start::2], axis)
        projected.append(along)
    return ContrastActivations(*projected)


def projections(
    activations: Activations, names: Mapping[str, tuple[str, str]]
) -> dict[str, dict[str, Float[Tensor, "_ layer"]]]:
    """How far every prompt lies along each of the two unit directions: direction -> set -> numbers.

    In units of the residual stream. `names` are those of each part's sides. A contrast's own
    prompts are projected on the direction of the half that they are not in; NaN with fewer than
    two prompts a side.
    """
    parts = ("refusal", "negativity")
    found: dict[str, dict[str, Tensor]] = {}
    for of in parts:
        found[of] = {}
        for read in parts:
            if min(map(len, activations[read])) > 1 or of != read:
                along = held_out_projections(activations[of], activations[read], same=of == read)
            else:
                along = ContrastActivations(
                    *(side.new_full((*side.shape[:2], 1), torch.nan) for side in activations[read])
                )
            for name, side in zip(names[read], along, strict=True):
                found[of][name] = side[..., 0]
    return found


def aurocs(
    projected: Mapping[str, Mapping[str, Float[Tensor, "_ layer"]]],
    names: Mapping[str, tuple[str, str]],
) -> Curves:
    """How well each direction tells each contrast's target from its baseline, held out.

    1/2 is chance, 1 always, 0 always the wrong way round. Named "refusal direction on negativity"
    and so on; NaN where the projections are.
    """
    found = {}
    for of, sets in projected.items():
        for read, sides in names.items():
            target, baseline = (
                rearrange(sets[side], "prompt layer -> layer prompt") for side in sides
            )
            area = auroc_interval(target, baseline).value
            found[f"{of} direction on {read}"] = area.float()
    return found


def in_plane(
    sets: Mapping[str, Float[Tensor, "_ layer d_model"]],
    directions: Mapping[str, Float[Tensor, "layer d_model"]],
) -> dict[str, Float[Tensor, "_ layer 2"]]:
    """Every prompt's projections on the unit refusal and the unit negativity direction.

    In units of the residual stream. NaN where a direction is rounding noise. The two axes are not
    orthogonal: their angle is what the cosine measures.
    """
    axes = torch.stack([unit(directions[part]) for part in ("refusal", "negativity")], dim=-1)
    return {name: _on(rows, axes) for name, rows in sets.items()}


def in_components(
    sets: Mapping[str, Float[Tensor, "_ layer d_model"]],
) -> dict[str, Float[Tensor, "_ layer 2"]]:
    """Every prompt in the first two principal components of all the sets together, layer by layer.

    Centred on the mean of all prompts; signs are set so that each component's largest projection is
    positive.
    """
    rows = rearrange(
        torch.cat(list(sets.values())).double(), "prompt layer d_model -> layer prompt d_model"
    )
    rows = rows - rows.mean(1, keepdim=True)
    gram = einsum(rows, rows, "layer p d_model, layer q d_model -> layer p q")
    values, vectors = torch.linalg.eigh(gram)
    values, vectors = values[:, -2:].flip(-1), vectors[..., -2:].flip(-1)
    scores = vectors * values.clamp_min(0).sqrt().unsqueeze(1)
    largest = scores.gather(1, scores.abs().argmax(1, keepdim=True))
    scores = rearrange(scores * largest.sign(), "layer prompt two -> prompt layer two").float()
    return dict(zip(sets, scores.split([len(side) for side in sets.values()]), strict=True))


def effective_unembedding(model: Any) -> Float[Tensor, "d_model d_vocab"]:
    """The unembedding with the final norm's weight multiplied in, on the CPU."""
    unembedding = model.W_U.detach().float().cpu()
    weight = getattr(model.ln_final, "w", getattr(model.ln_final, "weight", None))
    if weight is None:
        return unembedding
    return unembedding * rearrange(weight.detach().float().cpu(), "d_model -> d_model 1")


def _mean(rows: Float[Tensor, "prompt layer d_model"]) -> Float[Tensor, "layer d_model"]:
    return reduce(rows.double(), "prompt layer d_model -> layer d_model", "mean").float()


def _along(
    rows: Float[Tensor, "prompt layer d_model"], axis: Float[Tensor, "layer d_model"]
) -> Float[Tensor, "prompt layer 1"]:
    return _on(rows, axis.unsqueeze(-1))


def _on(
    rows: Float[Tensor, "prompt layer d_model"], units: Float[Tensor, "layer d_model n_units"]
) -> Float[Tensor, "prompt layer n_units"]:
    return einsum(
        rows, units.float(), "prompt layer d_model, layer d_model n_units -> prompt layer n_units"
    )
