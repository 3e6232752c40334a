"""How activations vary within a class: the covariance that whitening divides by."""

import torch
from einops import einsum, rearrange
from jaxtyping import Float
from torch import Tensor

from ..errors import InputError, check_tensors


class WithinClassCovariance:
    r"""Pooled within-class covariance at every layer, shrunk as Ledoit and Wolf prescribe.

    `S = (1 - rho) X'X / n + rho mu I`, `X` the rows less their own class's mean, `mu` the mean
    eigenvalue of `X'X / n` and `rho` the shrinkage that minimises the expected squared error. Never
    formed: everything goes through the `n x n` Gram matrix of the rows, so `d_model` may be large.

    Attributes:
        shrinkage: `rho`, `[layer]`, in [0, 1].
        scale: `mu`, `[layer]`, in squared units of the residual stream.
        variance: the unshrunk variance of each dimension, `[layer d_model]`.

    Reference: Ledoit and Wolf 2004, doi:10.1016/S0047-259X(03)00096-4.
    """

    def __init__(self, rows: Float[Tensor, "layer prompt d_model"]):
        n, d_model = rows.shape[1:]
        self._rows = rows
        self._gram = einsum(rows, rows, "layer p d_model, layer q d_model -> layer p q")
        self.variance: Float[Tensor, "layer d_model"] = rows.square().mean(1)
        norms = self._gram.diagonal(dim1=-2, dim2=-1)
        self.scale: Float[Tensor, " layer"] = norms.sum(-1) / (n * d_model)
        spread = self._gram.square().sum((-2, -1)) / n**2
        error = (norms.square().sum(-1) / n - spread) / n
        distance = spread - d_model * self.scale.square()
        self.shrinkage: Float[Tensor, " layer"] = (error.minimum(distance) / distance).nan_to_num(
            nan=1.0, posinf=1.0
        )

    @classmethod
    def of(cls, *classes: Float[Tensor, "_ layer d_model"]) -> "WithinClassCovariance":
        """The pooled covariance of several classes, each centred on its own mean.

        Raises:
            InputError: if there is no class, one has fewer than two rows, or they differ in shape.
        """
        if not classes:
            raise InputError("there is no class: hand over the activations of at least one")
        check_tensors(
            **{f"class {i}": (rows, f"row_{i} layer d_model") for i, rows in enumerate(classes)}
        )
        for number, rows in enumerate(classes):
            if len(rows) < 2:
                raise InputError(
                    f"class {number} has {len(rows)} row(s): a covariance needs at least 2"
                )
        centred = [rows.double() - rows.double().mean(0) for rows in classes]
        return cls(rearrange(torch.cat(centred), "prompt layer d_model -> layer prompt d_model"))

    def solve(self, vectors: Float[Tensor, "layer d_model"]) -> Float[Tensor, "layer d_model"]:
        """`S^-1 v` at every layer, by the Woodbury identity; NaN where the rows do not vary."""
        n = self._rows.shape[1]
        check_tensors(
            vectors=(vectors, "layer d_model"), activations=(self._rows, "layer prompt d_model")
        )
        ridge = rearrange(self.shrinkage * self.scale, "layer -> layer 1")
        ridge = torch.where(ridge > 0, ridge, torch.nan)
        weight = rearrange((1 - self.shrinkage) / n, "layer -> layer 1")
        along = einsum(self._rows, vectors.double(), "layer p d_model, layer d_model -> layer p")
        identity = torch.eye(n, dtype=torch.float64)
        inner = ridge.unsqueeze(-1) * identity + weight.unsqueeze(-1) * self._gram
        inner = torch.where(inner.isnan(), identity, inner)
        coefficients = torch.linalg.solve(inner, along)
        back = einsum(self._rows, coefficients, "layer p d_model, layer p -> layer d_model")
        return (vectors.double() - weight * back) / ridge
