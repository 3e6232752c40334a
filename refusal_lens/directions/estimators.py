"""Estimators of a contrast's direction at each layer, from the activations of its two prompt sets.

A direction points from baseline to target. Its dtype is float64 if the target is float64, else
float32. InputError if a set is empty, too small or not finite, or if shapes or devices differ.
"""

import warnings
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from ..errors import InputError, check_tensors
from .covariance import WithinClassCovariance

Target = Float[Tensor, "target layer d_model"]
Baseline = Float[Tensor, "baseline layer d_model"]
Direction = Float[Tensor, "layer d_model"]
BLOCK = 64  # prompts that are converted to float64 at a time


def mean_difference(target: Target, baseline: Baseline) -> Direction:
    """Difference of class means at every layer (Arditi et al. 2024, arXiv:2406.11717, section 2.3).

    >>> mean_difference(harmful, harmless).shape
    torch.Size([32, 64])

    `target` and `baseline` are the activations of the two prompt sets. The norm is the distance
    between the class means, which are computed in float64.
    """
    difference, dtype = _checked(target, baseline)
    return difference.to(dtype)


def whitened_mean_difference(target: Target, baseline: Baseline) -> Direction:
    r"""Linear discriminant: the inverse within-class covariance times the mean difference.

    `w = S^-1 (mu_target - mu_baseline)`, with `S` of `WithinClassCovariance`, needs two prompts in
    `target` and in `baseline`; NaN at layers where activations do not vary within the classes. `w`
    is the best linear classifier of two Gaussian classes with equal covariance. `w` detects the
    concept: adding `w` to activations need not have the effect of adding the mean difference.
    >>> discriminant = whitened_mean_difference(harmful, harmless)
    """
    difference, dtype = _checked(target, baseline)
    solved = torch.empty_like(difference)
    for layer in range(len(solved)):  # one at a time, since a layer's rows can fill the memory
        at = slice(layer, layer + 1)
        solved[at] = WithinClassCovariance.of(target[:, at], baseline[:, at]).solve(difference[at])
    return solved.to(dtype)


def paired_principal_component(target: Target, baseline: Baseline) -> Direction:
    """First principal component of the differences of pairs, a unit vector.

    Row `i` of `target` and of `baseline` are a pair. The differences are not centred, so the
    component includes their mean. Its sign gives the mean difference a positive projection (Zou et
    al. 2023, arXiv:2310.01405, section 3.1).
    >>> component = paired_principal_component(harmful, harmless)
    """
    components, dtype = _checked(target, baseline)
    if len(target) != len(baseline):
        counts = f"{len(target)} target and {len(baseline)} baseline rows"
        raise InputError(f"{counts} are no pairs: hand over activations of a paired contrast")
    for layer in range(len(components)):
        differences = target[:, layer].double() - baseline[:, layer].double()
        # The component lies in the span of the differences: n x n eigenvectors suffice.
        top = torch.linalg.eigh(differences @ differences.T).eigenvectors[:, -1]
        # The mean difference projects onto the component with the sign of the coefficients' sum.
        components[layer] = (-top if top.sum() < 0 else top) @ differences
    return torch.nn.functional.normalize(components, dim=-1).to(dtype)


def logistic_probe(
    target: Target,
    baseline: Baseline,
    *,
    penalties: tuple[float, ...] = (1e-3, 1e-2, 1e-1, 1.0, 10.0),
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
    >>> probe = logistic_probe(harmful, harmless)
    """
    from sklearn.linear_model import LogisticRegressionCV
    from sklearn.model_selection import PredefinedSplit
    from threadpoolctl import threadpool_limits

    weights, dtype = _checked(target, baseline)
    if folds < 2 or not penalties or not all(0 < p < float("inf") for p in penalties):
        given = f"folds = {folds}, penalties = {penalties}"
        raise InputError(f"{given}: at least 2 folds and a penalty are needed, penalties above 0")
    if min(len(target), len(baseline)) < folds:
        counts = f"{len(target)} target and {len(baseline)} baseline rows"
        raise InputError(f"{counts}: a side has fewer than the {folds} folds; lower `folds`")
    label = torch.arange(len(target) + len(baseline)) < len(target)
    fold = torch.cat([torch.arange(len(side)) % folds for side in (target, baseline)])
    inverse_penalties = [1 / (penalty * len(label)) for penalty in penalties]
    options: Any = {"l1_ratios": (0,), "tol": 1e-8, "max_iter": 10_000, "scoring": _log_likelihood}
    options |= {"cv": PredefinedSplit(fold.numpy()), "use_legacy_attributes": False}
    probe = LogisticRegressionCV(Cs=inverse_penalties, **options)
    # One thread is faster on problems this small; rounding may end a fit before `tol`.
    with threadpool_limits(1), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for layer in range(len(weights)):
            rows = torch.cat([target[:, layer], baseline[:, layer]]).double()
            rows = rows - rows.mean(0)
            scale = rows.square().sum(-1).mean().sqrt()
            weights[layer] = torch.nan
            if scale > 0:  # the weights lie in the span of the rows: fit in coordinates there
                axes, coordinates = torch.linalg.qr(rows.T / scale)
                probe.fit(coordinates.T.numpy(), label.numpy())
                weights[layer] = axes @ torch.from_numpy(probe.coef_[0]) / scale
    return weights.to(dtype)


def _log_likelihood(probe: Any, rows: np.ndarray, is_target: np.ndarray) -> float:
    """Mean log-likelihood of the labels, ten times as fast as scikit-learn's own scorer."""
    margin = np.where(is_target, 1, -1) * probe.decision_function(rows)
    return -float(np.logaddexp(0, -margin).mean())


def mean(rows: Float[Tensor, "prompt layer d_model"]) -> Float[Tensor, "layer d_model"]:
    """Mean over prompts, in float64, without a float64 copy of the rows."""
    total = torch.zeros(rows.shape[1:], dtype=torch.float64, device=rows.device)
    for block in rows.split(BLOCK):
        total += block.double().sum(0)
    return total / len(rows)


def checked_mean(
    name: str, rows: Float[Tensor, "prompt layer d_model"]
) -> Float[Tensor, "layer d_model"]:
    """`mean` of the set `name`; InputError if the set is empty or holds a non-finite value."""
    if len(rows) == 0:
        raise InputError(f"the {name} is empty: a direction needs at least one prompt a side")
    found = mean(rows)
    if not found.isfinite().all():
        row, layer = (~rows.isfinite().all(-1)).nonzero()[0].tolist()
        where = f"row {row} of the {name} holds a NaN or an infinity at layer {layer}"
        raise InputError(f"{where}: drop that prompt or recompute it in a wider dtype")
    return found


def _checked(
    target: Tensor, baseline: Tensor
) -> tuple[Float[Tensor, "layer d_model"], torch.dtype]:
    """The difference of the class means in float64, and the dtype of the direction."""
    axes = "layer d_model"
    check_tensors(target=(target, f"target {axes}"), baseline=(baseline, f"baseline {axes}"))
    difference = checked_mean("target set", target) - checked_mean("baseline set", baseline)
    return difference, torch.float64 if target.dtype == torch.float64 else torch.float32
