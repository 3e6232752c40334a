"""Estimators of a contrast's direction at each layer, from the activations of its two prompt sets.

A direction points from baseline to target. Its dtype is float64 if the target is float64, else
float32. InputError if a set is empty, too small or not finite, or if shapes or devices differ.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import softplus

from ..errors import InputError, check_tensors
from .covariance import WithinClassCovariance
from .logistic_regression import logistic_regressions

Target = Float[Tensor, "target layer d_model"]
Baseline = Float[Tensor, "baseline layer d_model"]
Direction = Float[Tensor, "layer d_model"]
Penalties = tuple[float, ...]
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
    weights, dtype = _checked(target, baseline)
    if folds < 2 or not penalties or not all(0 < p < float("inf") for p in penalties):
        given = f"folds = {folds}, penalties = {penalties}"
        raise InputError(f"{given}: at least 2 folds and a penalty are needed, penalties above 0")
    if min(len(target), len(baseline)) < folds:
        counts = f"{len(target)} target and {len(baseline)} baseline rows"
        raise InputError(f"{counts}: a side has fewer than the {folds} folds; lower `folds`")
    label = torch.cat([torch.ones(len(target)), -torch.ones(len(baseline))]).double()
    fold = torch.cat([torch.arange(len(side)) % folds for side in (target, baseline)])
    candidates = torch.tensor(penalties, dtype=torch.float64)
    for layer in range(len(weights)):
        rows = torch.cat([target[:, layer], baseline[:, layer]]).double()
        rows = rows - rows.mean(0)
        scale = rows.square().sum(-1).mean()
        gram = rows @ rows.T / scale
        weights[layer] = _probe(gram, label, fold, candidates) @ rows / scale
    return weights.to(dtype)


def _probe(
    gram: Float[Tensor, "n n"],
    label: Float[Tensor, " n"],
    fold: Int[Tensor, " n"],
    penalties: Float[Tensor, " penalty"],
) -> Float[Tensor, " n"]:
    """Coefficients of the rows in the weights at the best penalty; NaN where all rows are equal."""
    if not gram.isfinite().all():
        return torch.full_like(label, torch.nan)
    n_folds = 1 + int(fold.max())
    held_out = fold[:, None] == torch.arange(n_folds).repeat_interleave(len(penalties))
    a, b = logistic_regressions(gram, label, ~held_out, penalties.repeat(n_folds))
    loss = softplus(-label[:, None] * (gram @ a + b)) * held_out
    by_penalty = (loss.sum(0) / held_out.sum(0)).unflatten(0, (n_folds, -1)).mean(0)
    best = penalties[[int(by_penalty.argmin())]]
    return logistic_regressions(gram, label, torch.ones_like(held_out[:, :1]), best)[0][:, 0]


def mean(rows: Float[Tensor, "prompt layer d_model"]) -> Float[Tensor, "layer d_model"]:
    """Mean over prompts, in float64, without a float64 copy of the rows."""
    total = torch.zeros(rows.shape[1:], dtype=torch.float64, device=rows.device)
    for block in rows.split(BLOCK):
        total += block.double().sum(0)
    return total / len(rows)


def _checked(
    target: Tensor, baseline: Tensor
) -> tuple[Float[Tensor, "layer d_model"], torch.dtype]:
    """The difference of the class means in float64, and the dtype of the direction."""
    sides = {"target": target, "baseline": baseline}
    check_tensors(**{side: (rows, f"{side} layer d_model") for side, rows in sides.items()})
    means = []
    for side, rows in sides.items():
        if len(rows) == 0:
            raise InputError(f"the {side} set is empty: a mean needs at least one prompt")
        means.append(mean(rows))
        if not means[-1].isfinite().all():
            row, layer = (~rows.isfinite().all(-1)).nonzero()[0].tolist()
            where = f"the {side} set's row {row} holds a non-finite value at layer {layer}"
            raise InputError(f"{where}: drop that prompt or recompute it in a wider dtype")
    dtype = torch.float64 if target.dtype == torch.float64 else torch.float32
    return means[0] - means[1], dtype
