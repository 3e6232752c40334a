"""Estimators of a contrast's direction at each layer, from the activations of its two prompt sets.

A direction points from baseline to target. Its dtype is float64 if the target is float64, else
float32. InputError if a set is empty, too small or not finite, or if shapes or devices differ.
"""

import warnings
from typing import Any

import numpy as np
import torch
from einops import einsum, rearrange
from jaxtyping import Float
from torch import Tensor

from ..errors import InputError, check_tensors
from .covariance import WithinClassCovariance

Target = Float[Tensor, "target layer d_model"]
Baseline = Float[Tensor, "baseline layer d_model"]
Direction = Float[Tensor, "layer d_model"]
Penalties = tuple[float, ...]


def mean_difference(target: Target, baseline: Baseline) -> Direction:
    """Difference of class means at every layer (Arditi et al. 2024, arXiv:2406.11717, section 2.3).

        refusal = mean_difference(harmful, harmless)  # [layer d_model]

    `target` and `baseline` are the activations of the two prompt sets. The norm is the distance
    between the class means, which are computed in float64.
    """
    target, baseline, dtype = _checked(target, baseline)
    return (target.mean(0) - baseline.mean(0)).to(dtype)


def whitened_mean_difference(target: Target, baseline: Baseline) -> Direction:
    r"""Linear discriminant: the inverse within-class covariance times the mean difference.

    `w = S^-1 (mu_target - mu_baseline)`, with `S` of `WithinClassCovariance`, needs two prompts in
    `target` and in `baseline`; NaN at layers where activations do not vary within the classes. `w`
    is the best linear classifier of two Gaussian classes with equal covariance. `w` detects the
    concept: adding `w` to activations need not have the effect of adding the mean difference.
    """
    target, baseline, dtype = _checked(target, baseline)
    covariance = WithinClassCovariance.of(target, baseline)
    return covariance.solve(target.mean(0) - baseline.mean(0)).to(dtype)


def paired_principal_component(target: Target, baseline: Baseline) -> Direction:
    """First principal component of the differences of pairs, a unit vector.

    Row `i` of `target` and of `baseline` are a pair. The differences are not centred, so the
    component includes their mean. Its sign gives the mean difference a positive projection (Zou et
    al. 2023, arXiv:2310.01405, section 3.1).
    """
    target, baseline, dtype = _checked(target, baseline)
    if len(target) != len(baseline):
        counts = f"{len(target)} target and {len(baseline)} baseline rows"
        raise InputError(f"{counts} are no pairs: hand over activations of a paired contrast")
    differences = rearrange(target - baseline, "prompt layer d_model -> layer prompt d_model")
    # The component lies in the span of the differences: n x n eigenvectors suffice.
    top = torch.linalg.eigh(differences @ differences.mT).eigenvectors[..., -1]
    # The mean difference projects onto the component with the sign of the coefficients' sum.
    top = torch.where(top.sum(-1, keepdim=True) < 0, -top, top)
    component = einsum(differences, top, "layer prompt d_model, layer prompt -> layer d_model")
    return torch.nn.functional.normalize(component, dim=-1).to(dtype)


def logistic_probe(
    target: Target,
    baseline: Baseline,
    *,
    penalties: Penalties = (1e-3, 1e-2, 1e-1, 1.0, 10.0),
    folds: int = 5,
) -> Direction:
    r"""Weights of an L2-penalised logistic regression, its penalty chosen by cross-validation.

    Minimises `mean log-loss + penalty / 2 * s * |w|^2`, with `s` the mean squared distance of a row
    from the mean of all rows, so that a penalty has the same meaning in every model and layer. In
    scikit-learn's terms, rows are divided by `sqrt(s)` and `C = 1 / (penalty * rows)`. Each layer
    gets the penalty with the lowest held-out log-loss. NaN at layers where all rows are equal.
    Linear probes: Alain and Bengio 2016, arXiv:1610.01644.

    Args:
        target, baseline: activations of the two prompt sets, at least `folds` prompts each.
        penalties: candidate penalties, above 0.
        folds: number of folds, at least 2; row `i` of each side is in fold `i % folds`.
    """
    target, baseline, dtype = _checked(target, baseline)
    if folds < 2 or not penalties or not all(0 < p < float("inf") for p in penalties):
        given = f"folds = {folds}, penalties = {penalties}"
        raise InputError(f"{given}: at least 2 folds and a penalty are needed, penalties above 0")
    if min(len(target), len(baseline)) < folds:
        counts = f"{len(target)} target and {len(baseline)} baseline rows"
        raise InputError(f"{counts}: a side has fewer than the {folds} folds; lower `folds`")
    return _fit_probes(target, baseline, penalties, folds).to(dtype)


def _fit_probes(target: Tensor, baseline: Tensor, penalties: Penalties, folds: int) -> Direction:
    """Fit in coordinates of the span of the rows, which contains every minimum."""
    from sklearn.linear_model import LogisticRegressionCV
    from sklearn.model_selection import PredefinedSplit
    from threadpoolctl import threadpool_limits

    rows = rearrange(torch.cat([target, baseline]), "prompt layer d_model -> layer prompt d_model")
    rows = rows - rows.mean(1, keepdim=True)
    scale = rows.square().sum(-1).mean(1)
    gram = rows @ rows.mT
    fold = torch.cat([torch.arange(len(side)) % folds for side in (target, baseline)])
    probe = LogisticRegressionCV(
        Cs=[1 / (penalty * len(fold)) for penalty in penalties],
        cv=PredefinedSplit(fold.numpy()),
        scoring=_log_likelihood,
        solver="newton-cholesky",
        tol=1e-8,
    )
    label = torch.arange(len(fold)) < len(target)
    weights = torch.full_like(rows[:, 0], torch.nan)
    # Systems this small are solved faster by one thread than by several.
    with warnings.catch_warnings(), threadpool_limits(1):
        warnings.simplefilter("ignore")
        for layer in scale.nonzero()[:, 0].tolist():
            eigenvalues, axes = torch.linalg.eigh(gram[layer] / scale[layer])
            spanned = eigenvalues > 1e-12 * eigenvalues[-1]
            axes, lengths = axes[:, spanned], eigenvalues[spanned].sqrt()
            probe.fit((axes * lengths).numpy(), label.numpy())
            alpha = axes @ (torch.from_numpy(probe.coef_[0]) / lengths)
            weights[layer] = alpha @ rows[layer] / scale[layer]
    return weights


def _log_likelihood(probe: Any, rows: np.ndarray, is_target: np.ndarray) -> float:
    """Mean log-likelihood of the labels, ten times as fast as scikit-learn's own scorer."""
    margin = np.where(is_target, 1, -1) * probe.decision_function(rows)
    return float(-np.logaddexp(0, -margin).mean())


def _checked(target: Tensor, baseline: Tensor) -> tuple[Tensor, Tensor, torch.dtype]:
    """Both sides in float64, and the dtype of the direction."""
    sides = {"target": target, "baseline": baseline}
    check_tensors(**{side: (rows, f"{side} layer d_model") for side, rows in sides.items()})
    for side, rows in sides.items():
        if len(rows) == 0:
            raise InputError(f"the {side} set is empty: a mean needs at least one prompt")
        bad = (~rows.isfinite().all(-1)).nonzero()
        if len(bad):
            row, layer = bad[0].tolist()
            where = f"the {side} set's row {row} holds a non-finite value at layer {layer}"
            raise InputError(f"{where}: drop that prompt or recompute it in a wider dtype")
    dtype = torch.float64 if target.dtype == torch.float64 else torch.float32
    return target.double(), baseline.double(), dtype
