"""Two directions per layer -> how similar they are, per layer.

The plain cosine is one choice of inner product among several that are just as natural; each of the
others here is the cosine under another one. Where they disagree, the plain number alone decides
nothing. All are symmetric, take values in [-1, 1], ignore the directions' norms, and are NaN at
layers where either direction is rounding noise (see `cosine_similarity`).
"""

import torch
from einops import einsum, rearrange
from jaxtyping import Float, Int
from torch import Tensor

from ..errors import InputError, check_tensors
from .covariance import WithinClassCovariance

NOISE_FLOOR = 1e-6
"""Norms below this share of the direction's largest over layers count as rounding noise."""


def cosine_similarity(
    a: Float[Tensor, "layer d_model"],
    b: Float[Tensor, "layer d_model"],
    *,
    noise_floor: float = NOISE_FLOOR,
) -> Float[Tensor, " layer"]:
    """Cosine of the angle between two directions at every layer.

    NaN at layers where the norm of either is below `noise_floor` times its largest over layers: at
    early layers the last token may have seen nothing of the prompt yet, the classes then differ by
    rounding alone, and the cosine of rounding is still a number. Computed in float64, float32 out.

    Raises:
        InputError: if the shapes differ.
    """
    a, b = _pair(a, b)
    a, b = unit(a, noise_floor=noise_floor), unit(b, noise_floor=noise_floor)
    return einsum(a, b, "layer d_model, layer d_model -> layer").clamp(-1, 1).float()


def cosine_matrix(
    a: Float[Tensor, "layer_a d_model"],
    b: Float[Tensor, "layer_b d_model"],
    *,
    noise_floor: float = NOISE_FLOOR,
) -> Float[Tensor, "layer_a layer_b"]:
    """Cosine of every layer of one direction with every layer of the other (or of itself).

    The residual stream is one space through all layers, so a direction can be compared with its
    own later self. NaN rows and columns as in `cosine_similarity`.
    """
    check_tensors(a=(a, "layer_a width_a"), b=(b, "layer_b width_b"))
    if a.shape[-1] != b.shape[-1]:
        raise InputError(
            f"directions of d_model {a.shape[-1]} and {b.shape[-1]} can't be compared: "
            "they come from different models"
        )
    a, b = unit(a, noise_floor=noise_floor), unit(b, noise_floor=noise_floor)
    return einsum(a, b, "layer_a d_model, layer_b d_model -> layer_a layer_b").clamp(-1, 1).float()


def standardised_cosine(
    a: Float[Tensor, "layer d_model"],
    b: Float[Tensor, "layer d_model"],
    variance: Float[Tensor, "layer d_model"],
) -> Float[Tensor, " layer"]:
    """Cosine after dividing each dimension by its standard deviation.

    `variance` is usually `WithinClassCovariance.variance`. Each dimension then counts by how far it
    moves compared with how much it varies anyway; a dimension that never varies is left out.
    """
    axes = "layer d_model"
    check_tensors(a=(a, axes), b=(b, axes), variance=(variance, axes))
    if (variance < 0).any():
        raise InputError("variance goes below 0: hand over variances, such as a covariance's own")
    spread = variance.double().sqrt()
    inverse = torch.where(spread > 0, 1 / spread, 0.0)
    return cosine_similarity(a.double() * inverse, b.double() * inverse)


def cosine_without_massive(
    a: Float[Tensor, "layer d_model"],
    b: Float[Tensor, "layer d_model"],
    dimensions: Int[Tensor, "layer k"],
) -> Float[Tensor, " layer"]:
    """Cosine without the dimensions of massive activation (`massive_dimensions` finds them).

    Reference: Sun et al. 2024, arXiv:2402.17762.
    """
    a, b = _pair(a, b)
    if dimensions.ndim != 2 or len(dimensions) != len(a):
        raise InputError(
            f"dimensions has shape {list(dimensions.shape)}: hand over [layer k] for {len(a)} layers"
        )
    if dimensions.is_floating_point() or ((dimensions < 0) | (dimensions >= a.shape[1])).any():
        raise InputError(f"dimensions must be whole numbers from 0 to {a.shape[1] - 1}")
    return cosine_similarity(a.scatter(1, dimensions, 0.0), b.scatter(1, dimensions, 0.0))


def massive_dimensions(
    activations: Float[Tensor, "prompt layer d_model"], *, k: int = 4
) -> Int[Tensor, "layer k"]:
    """The `k` dimensions with the largest mean magnitude at each layer, largest first.

    In Llama models a handful of dimensions carry most of the residual stream's norm, whatever the
    prompt. `k` is a choice, not a test: a model without massive dimensions has a top `k` too.

    Raises:
        InputError: unless `0 < k < d_model`.

    Reference: Sun et al. 2024, arXiv:2402.17762.
    """
    check_tensors(activations=(activations, "prompt layer d_model"))
    if not len(activations):
        raise InputError("there are no activations: hand over at least one prompt's")
    if not 0 < k < activations.shape[-1]:
        raise InputError(f"k = {k}: choose from 1 to d_model - 1 = {activations.shape[-1] - 1}")
    return activations.double().abs().mean(0).topk(k, dim=-1).indices


def whitened_cosine(
    a: Float[Tensor, "layer d_model"],
    b: Float[Tensor, "layer d_model"],
    covariance: WithinClassCovariance,
) -> Float[Tensor, " layer"]:
    """Cosine under the inverse within-class covariance: `a' S^-1 b`, normalised.

    The geometry in which linear discriminants live: both directions are measured against how much
    the activations vary within a class along them.

    Reference: Mahalanobis 1936; the covariance as in Ledoit and Wolf 2004,
    doi:10.1016/S0047-259X(03)00096-4.
    """
    a, b = _pair(a, b)
    a, b = unit(a), unit(b)
    solved_a, solved_b = covariance.solve(a), covariance.solve(b)
    inner = (a * solved_b).sum(-1)
    norms = ((a * solved_a).sum(-1) * (b * solved_b).sum(-1)).sqrt()
    return (inner / norms).clamp(-1, 1).float()


def causal_cosine(
    a: Float[Tensor, "layer d_model"],
    b: Float[Tensor, "layer d_model"],
    unembedding: Float[Tensor, "d_model d_vocab"],
) -> Float[Tensor, " layer"]:
    """Cosine under the causal inner product, read off the unembedding.

    Park et al. give unembedding vectors the inner product `u' Cov^-1 v`, with `Cov` the covariance
    of the unembedding over the vocabulary. Directions of the residual stream live in the dual
    space, where the same inner product reads `a' Cov b`: the covariance, over the vocabulary, of
    the logits the two directions write. Hand over the unembedding with the final norm's weight
    multiplied in. Derived for the last layer; at earlier ones it reads the direction as the logit
    lens would.

    Reference: Park, Choe and Veitch 2023, arXiv:2311.03658, theorem 3.2.
    """
    a, b = _pair(a, b)
    check_tensors(a=(a, "layer d_model"), unembedding=(unembedding, "d_model d_vocab"))
    u = unembedding.float() - unembedding.float().mean(-1, keepdim=True)
    a, b = unit(a).float() @ u, unit(b).float() @ u
    return cosine_similarity(a, b, noise_floor=0.0)


def orthogonal_part(
    direction: Float[Tensor, "*layer d_model"], to: Float[Tensor, "*layer d_model"]
) -> Float[Tensor, "*layer d_model"]:
    """What is left of a direction once its component along another is taken away.

    NaN where `to` is zero.
    """
    check_tensors(direction=(direction, "*layer d_model"), to=(to, "*layer d_model"))
    if direction.shape != to.shape:
        raise InputError(
            f"a direction of shape {list(direction.shape)} has no part orthogonal to one of shape "
            f"{list(to.shape)}: hand over two of one shape"
        )
    axis = torch.nn.functional.normalize(to.double(), dim=-1)
    axis = torch.where(axis.norm(dim=-1, keepdim=True) > 0, axis, torch.nan)
    along = (direction.double() * axis).sum(-1, keepdim=True)
    return (direction.double() - along * axis).to(direction.dtype)


def unit(
    direction: Float[Tensor, "layer d_model"], *, noise_floor: float = NOISE_FLOOR
) -> Float[Tensor, "layer d_model"]:
    """The direction at norm 1, in float64; NaN at layers where it is rounding noise."""
    norm = direction.double().norm(dim=-1)
    real = norm > noise_floor * norm.nan_to_num().amax() if len(norm) else norm > 0
    return direction.double() / rearrange(torch.where(real, norm, torch.nan), "layer -> layer 1")


def _pair(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    check_tensors(a=(a, "layer_a width_a"), b=(b, "layer_b width_b"))
    if a.shape != b.shape:
        raise InputError(
            f"directions of shape {tuple(a.shape)} and {tuple(b.shape)} can't be compared layer by "
            "layer: both must be [layer d_model] of one model"
        )
    return a.double(), b.double()
