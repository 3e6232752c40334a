"""Similarity of two directions at every layer: cosines under several inner products.

The arguments `a` and `b` hold one direction per layer. A similarity is symmetric, lies in [-1, 1],
ignores norms, and is NaN at layers where either direction is rounding noise. InputError if shapes
differ.
"""

import torch
from einops import einsum
from jaxtyping import Float, Int
from torch import Tensor

from ..errors import InputError, check_tensors
from .covariance import WithinClassCovariance

Direction = Float[Tensor, "layer d_model"]
Vectors = Float[Tensor, "*layer d_model"]
Curve = Float[Tensor, " layer"]
NOISE_FLOOR = 1e-6  # share of a direction's largest norm over layers; below is rounding noise


def cosine_similarity(
    a: Vectors, b: Vectors, *, noise_floor: float = NOISE_FLOOR
) -> Float[Tensor, "*layer"]:
    """Cosine of the angle between two directions at every layer, in [-1, 1], computed in float64.

    >>> cosine_similarity(r, n)[20], cosine_similarity(r[20], n[20])
    (tensor(-0.0877), tensor(-0.0877))

    Args:
        a, b: two directions of one model, `[layer d_model]`, or of one layer, `[d_model]`;
            InputError if the shapes differ.
        noise_floor: share of a direction's largest norm over layers. Layers where a norm is below
            it give NaN: before the last token attends to the prompt, the classes differ by rounding.
    """
    if getattr(a, "ndim", 0) == getattr(b, "ndim", 0) == 1:
        return cosine_similarity(a[None], b[None], noise_floor=noise_floor)[0]
    check_tensors(a=(a, "layer d_model"), b=(b, "layer d_model"))
    a, b = unit(a, noise_floor=noise_floor), unit(b, noise_floor=noise_floor)
    return (a * b).sum(-1).clamp(-1, 1).float()


def cosine_matrix(
    a: Float[Tensor, "layer_a d_model"], b: Float[Tensor, "layer_b d_model"]
) -> Float[Tensor, "layer_a layer_b"]:
    """Cosine of every layer of one direction with every layer of another.

    >>> cosine_matrix(r, n).shape
    torch.Size([32, 32])

    `cosine_matrix(refusal, refusal)` shows how a direction turns with depth. `a` and `b` have one
    d_model, and any number of layers. NaN where a direction is rounding noise.
    """
    check_tensors(a=(a, "layer_a d_model"), b=(b, "layer_b d_model"))
    products = einsum(unit(a), unit(b), "layer_a d_model, layer_b d_model -> layer_a layer_b")
    return products.clamp(-1, 1).float()


def standardised_cosine(a: Direction, b: Direction, variance: Direction) -> Curve:
    """Cosine after dividing each dimension by its standard deviation.

    `a` and `b` are directions. `variance` is that of each dimension, such as
    `WithinClassCovariance.variance`. Dimensions of variance 0 are omitted.
    >>> cosine = standardised_cosine(r, n, WithinClassCovariance.of(harmful, harmless).variance)
    """
    axes = "layer d_model"
    check_tensors(a=(a, axes), b=(b, axes), variance=(variance, axes))
    if (variance < 0).any():
        raise InputError("variance goes below 0: hand over variances, such as a covariance's own")
    spread = variance.double().sqrt()
    inverse = torch.where(spread > 0, 1 / spread, 0.0)
    return cosine_similarity(a.double() * inverse, b.double() * inverse)


def cosine_without_massive(a: Direction, b: Direction, dimensions: Int[Tensor, "layer k"]) -> Curve:
    """Cosine of `a` and `b` without some `dimensions`, such as `massive_dimensions` returns.
    >>> cosine = cosine_without_massive(r, n, massive_dimensions(harmless, k=2))
    """
    check_tensors(a=(a, "layer d_model"), b=(b, "layer d_model"))
    n_layers, d_model = a.shape
    outside = ((dimensions < 0) | (dimensions >= d_model)).any()
    if outside or dimensions.is_floating_point() or dimensions.shape[:-1] != (n_layers,):
        wanted = f"[layer k] for {n_layers} layers, whole numbers from 0 to {d_model - 1}"
        raise InputError(f"dimensions has shape {list(dimensions.shape)}: hand over {wanted}")
    return cosine_similarity(a.scatter(1, dimensions, 0.0), b.scatter(1, dimensions, 0.0))


def massive_dimensions(
    activations: Float[Tensor, "prompt layer d_model"], *, k: int = 4
) -> Int[Tensor, "layer k"]:
    """The `k` dimensions of the largest mean magnitude at each layer, largest first.

    In Llama models a few dimensions carry most of the norm of every prompt's residual stream (Sun
    et al. 2024, arXiv:2402.17762). The function returns `k` dimensions for models without massive
    activations too. `activations` are of any prompts; `k` is at most d_model - 1.
    >>> largest = massive_dimensions(harmless, k=2)
    """
    check_tensors(activations=(activations, "prompt layer d_model"))
    if not len(activations):
        raise InputError("there are no activations: hand over at least one prompt's")
    if not 0 < k < activations.shape[-1]:
        raise InputError(f"k = {k}: choose from 1 to d_model - 1 = {activations.shape[-1] - 1}")
    layers = activations.unbind(1)  # one at a time, since float64 copies of all take memory
    magnitudes = torch.stack([rows.double().abs().mean(0) for rows in layers])
    return magnitudes.topk(k, dim=-1).indices


def whitened_cosine(a: Direction, b: Direction, covariance: WithinClassCovariance) -> Curve:
    """Cosine under the inner product `a' S^-1 b`, with `S` the `covariance` (Mahalanobis 1936).
    >>> cosine = whitened_cosine(r, n, WithinClassCovariance.of(harmful, harmless))
    """
    check_tensors(a=(a, "layer d_model"), b=(b, "layer d_model"))
    a, b = unit(a), unit(b)
    solved_a, solved_b = covariance.solve(a), covariance.solve(b)
    norms = ((a * solved_a).sum(-1) * (b * solved_b).sum(-1)).sqrt()
    return ((a * solved_b).sum(-1) / norms).clamp(-1, 1).float()


def causal_cosine(
    a: Direction, b: Direction, unembedding: Float[Tensor, "d_model d_vocab"]
) -> Curve:
    """Cosine under the causal inner product, `a' Cov b`, in float32.

    `Cov` is the covariance over the vocabulary of the `unembedding`, which must include the weight
    of the final norm; `a' Cov b` is the covariance of the logits that the two directions write.
    Park, Choe and Veitch (2023, arXiv:2311.03658, theorem 3.2) give unembedding vectors the inner
    product `u' Cov^-1 v`, and directions live in the dual space. The derivation holds for the last
    layer. For earlier layers it assumes that directions write to the logits directly.
    >>> cosine = causal_cosine(r, n, effective_unembedding(model))
    """
    axes = "layer d_model"
    check_tensors(a=(a, axes), b=(b, axes), unembedding=(unembedding, "d_model d_vocab"))
    u = unembedding.float() - unembedding.float().mean(-1, keepdim=True)
    return cosine_similarity(unit(a).float() @ u, unit(b).float() @ u, noise_floor=0.0)


def orthogonal_part(direction: Vectors, to: Vectors) -> Vectors:
    """`direction` minus its component along `to`; NaN where `to` is zero.

    >>> orthogonal_part(torch.tensor([3.0, 4.0]), to=torch.tensor([1.0, 0.0]))
    tensor([0., 4.])
    """
    check_tensors(direction=(direction, "*layer d_model"), to=(to, "*layer d_model"))
    if direction.shape != to.shape:
        shapes = f"{list(direction.shape)} and {list(to.shape)}"
        raise InputError(f"the directions have shapes {shapes}: hand over two of one shape")
    exact, axis = direction.double(), to.double()
    along = (exact * axis).sum(-1, keepdim=True) / axis.square().sum(-1, keepdim=True)
    return (exact - along * axis).to(direction.dtype)


def unit(direction: Direction, *, noise_floor: float = NOISE_FLOOR) -> Direction:
    """`direction` at norm 1, in float64; NaN below `noise_floor` times the largest norm."""
    norm = direction.double().norm(dim=-1, keepdim=True)
    real = norm > noise_floor * norm.nan_to_num().amax() if len(norm) else norm > 0
    return direction.double() / torch.where(real, norm, torch.nan)
