"""Covariance of activations within their classes, which whitening divides by."""

import torch
from einops import einsum, rearrange
from jaxtyping import Float
from torch import Tensor

from ..errors import InputError, check_tensors, lenient


@lenient
class WithinClassCovariance:
    r"""Pooled within-class covariance at every layer, shrunk towards a multiple of the identity.

    `S = (1 - rho) X'X / n + rho mu I`, where `X` holds the rows minus their class mean, `mu` is the
    mean eigenvalue of `X'X / n`, and `rho` minimises the expected squared error (Ledoit and Wolf
    2004, doi:10.1016/S0047-259X(03)00096-4). `S` is never computed: the `n x n` Gram matrix of the
    rows suffices.

    Attributes:
        shrinkage, scale: `rho` in [0, 1], and `mu` in squared units of the residual stream.
        variance: the unshrunk variance of each dimension.
    >>> whitened = WithinClassCovariance.of(harmful, harmless).solve(r)
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
        shrinkage = error.minimum(distance) / distance
        self.shrinkage: Float[Tensor, " layer"] = shrinkage.nan_to_num(nan=1.0, posinf=1.0)

    @classmethod
    def of(cls, *classes: Float[Tensor, "_ layer d_model"]) -> "WithinClassCovariance":
        """The pooled covariance of several classes, each centred on its own mean.

        Args:
            *classes: activations of one class each, at least one class and two prompts in each.
        """
        axes = {f"class {i}": (rows, f"row_{i} layer d_model") for i, rows in enumerate(classes)}
        check_tensors(**axes)
        if min(map(len, classes), default=0) < 2:
            found = ", ".join(str(len(rows)) for rows in classes) or "no class"
            raise InputError(f"rows of each class: {found}; a covariance needs at least 2 in each")
        centred = torch.cat([rows.double() - rows.double().mean(0) for rows in classes])
        return cls(rearrange(centred, "prompt layer d_model -> layer prompt d_model"))

    def solve(self, vectors: Float[Tensor, "layer d_model"]) -> Float[Tensor, "layer d_model"]:
        """`S^-1 vectors` at every layer, in float64; NaN where rows do not vary."""
        axes = "layer d_model"
        check_tensors(vectors=(vectors, axes), activations=(self.variance, axes))
        n = self._rows.shape[1]
        ridge = rearrange(self.shrinkage * self.scale, "layer -> layer 1 1")
        ridge = torch.where(ridge > 0, ridge, torch.nan)
        weight = rearrange((1 - self.shrinkage) / n, "layer -> layer 1 1")
        columns = rearrange(vectors.double(), "layer d_model -> layer d_model 1")
        inner = ridge * torch.eye(n, dtype=torch.float64) + weight * self._gram
        # Woodbury identity. solve_ex returns NaN for NaN, where solve raises.
        coefficients = torch.linalg.solve_ex(inner, self._rows @ columns).result
        solved = (columns - weight * (self._rows.mT @ coefficients)) / ridge
        return rearrange(solved, "layer d_model 1 -> layer d_model")
