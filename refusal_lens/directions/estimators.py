"""Activations of a contrast -> one direction per layer: the estimators.

Every estimator takes the two sides' activations, `[prompt layer d_model]`, and answers with one
vector per layer, pointing from baseline to target. None is normalised unless its name says unit.
"""

import torch
from einops import einsum, rearrange, reduce
from jaxtyping import Float
from torch import Tensor

from ..errors import InputError, check_tensors
from .covariance import WithinClassCovariance


def mean_difference(
    target: Float[Tensor, "target layer d_model"],
    baseline: Float[Tensor, "baseline layer d_model"],
) -> Float[Tensor, "layer d_model"]:
    """Difference of class means at every layer, the standard direction estimator.

    Not normalised: its norm says how far apart the classes are, in the units of the residual
    stream. Means are taken in float64 whatever the input's dtype; the answer is float32, or float64
    where the input was.

    Raises:
        InputError: if either set is empty or holds a non-finite value (names the first row), and if
            they are not two tensors of these shapes on one device.

    Reference: Arditi et al. 2024, arXiv:2406.11717, section 2.3.
    """
    target, baseline, dtype = _checked(target, baseline)
    return (_class_mean(target) - _class_mean(baseline)).to(dtype)


def whitened_mean_difference(
    target: Float[Tensor, "target layer d_model"],
    baseline: Float[Tensor, "baseline layer d_model"],
) -> Float[Tensor, "layer d_model"]:
    r"""Linear discriminant: the mean difference divided by the within-class covariance.

    `w = S^-1 (mu_target - mu_baseline)`, `S` the pooled within-class covariance shrunk towards a
    multiple of the identity as Ledoit and Wolf prescribe. It separates the classes best where both
    are Gaussian with one covariance; next to the mean difference it discounts dimensions that vary
    much for other reasons. As a *detector* it is better, as a direction to *write* along it is
    not the mean difference and need not act like it.

    NaN at layers where the activations do not vary within the classes.

    Raises:
        InputError: as `mean_difference`, and with fewer than two rows on a side.

    Reference: Ledoit and Wolf 2004, doi:10.1016/S0047-259X(03)00096-4.
    """
    difference = mean_difference(target, baseline).double()
    covariance = WithinClassCovariance.of(target, baseline)
    return covariance.solve(difference).to(_answer_dtype(target))


def paired_principal_component(
    target: Float[Tensor, "prompt layer d_model"],
    baseline: Float[Tensor, "prompt layer d_model"],
) -> Float[Tensor, "layer d_model"]:
    """First principal component of the pairs' differences: a unit direction, for paired contrasts.

    The differences are not centred, so that what the pairs have in common counts, as in
    representation engineering. Its sign is set so that the mean difference projects onto it
    positively.

    Raises:
        InputError: as `mean_difference`, and where the two differ in their number of rows.

    Reference: Zou et al. 2023, arXiv:2310.01405, section 3.1.
    """
    target, baseline, dtype = _checked(target, baseline)
    if len(target) != len(baseline):
        raise InputError(
            f"{len(target)} target and {len(baseline)} baseline rows are no pairs: hand over the "
            "activations of a paired contrast"
        )
    differences = rearrange(target - baseline, "prompt layer d_model -> layer prompt d_model")
    # The component lies in the span of the pairs: n x n eigenvectors, never d_model x d_model.
    gram = einsum(differences, differences, "layer p d_model, layer q d_model -> layer p q")
    top = torch.linalg.eigh(gram).eigenvectors[..., -1]
    component = einsum(differences, top, "layer prompt d_model, layer prompt -> layer d_model")
    component = torch.nn.functional.normalize(component, dim=-1)
    mean = reduce(differences, "layer prompt d_model -> layer d_model", "mean")
    sign = torch.where((component * mean).sum(-1, keepdim=True) < 0, -1.0, 1.0)
    return (component * sign).to(dtype)


def logistic_probe(
    target: Float[Tensor, "target layer d_model"],
    baseline: Float[Tensor, "baseline layer d_model"],
    *,
    penalties: tuple[float, ...] = (1e-3, 1e-2, 1e-1, 1.0, 10.0),
    folds: int = 5,
) -> Float[Tensor, "layer d_model"]:
    r"""Weights of a ridge-penalised logistic regression, its penalty chosen by cross-validation.

    Minimises `mean log-loss + penalty / 2 * s * |w|^2`, with `s` the mean squared distance of a row
    from the overall mean, so that a penalty means the same in every model and at every layer. Among
    `penalties` the one with the lowest held-out log-loss over `folds` folds (rows `i`, `i + folds`,
    ... of each side) is used, layer by layer. Solved by Newton's method in the span of the rows.

    NaN at layers where all rows are equal.

    Raises:
        InputError: as `mean_difference`, where a side has fewer rows than `folds`, and where a
            penalty is not above 0.

    Reference: Alain and Bengio 2016, arXiv:1610.01644 (linear probes).
    """
    target, baseline, dtype = _checked(target, baseline)
    if folds < 2 or not penalties or not all(0 < p < float("inf") for p in penalties):
        raise InputError(
            f"folds = {folds}, penalties = {penalties}: at least 2 folds are needed, and one "
            "penalty, each above 0 and finite"
        )
    for side, rows in (("target", target), ("baseline", baseline)):
        if len(rows) < folds:
            raise InputError(
                f"the {side} set has {len(rows)} rows, fewer than the {folds} folds of the "
                "cross-validation: add prompts or lower `folds`"
            )
    rows = rearrange(torch.cat([target, baseline]), "prompt layer d_model -> layer prompt d_model")
    centred = rows - rows.mean(1, keepdim=True)
    scale = centred.square().sum(-1).mean(1)
    kernel = einsum(centred, centred, "layer p d_model, layer q d_model -> layer p q")
    kernel = (kernel / rearrange(scale, "layer -> layer 1 1")).nan_to_num()
    label = torch.cat([torch.ones(len(target)), torch.zeros(len(baseline))]).to(kernel)
    fold = torch.cat([torch.arange(len(side)) % folds for side in (target, baseline)])

    held_out = []
    for penalty in penalties:
        loss = torch.zeros(len(kernel), dtype=torch.float64)
        for k in range(folds):
            fit, test = (fold != k).nonzero()[:, 0], (fold == k).nonzero()[:, 0]
            alpha, bias = _kernel_logistic(kernel[:, fit][:, :, fit], label[fit], penalty)
            logit = einsum(kernel[:, test][:, :, fit], alpha, "l test fit, l fit -> l test") + bias
            loss += torch.nn.functional.binary_cross_entropy_with_logits(
                logit, label[test].expand_as(logit), reduction="none"
            ).sum(-1)
        held_out.append(loss)
    best = torch.stack(held_out).argmin(0)
    alphas = torch.stack([_kernel_logistic(kernel, label, p)[0] for p in penalties])
    alpha = alphas[best, torch.arange(len(kernel))]
    weights = einsum(centred, alpha, "layer prompt d_model, layer prompt -> layer d_model")
    return (weights / rearrange(scale, "layer -> layer 1")).to(dtype)


def _kernel_logistic(
    kernel: Float[Tensor, "layer row row"], label: Float[Tensor, " row"], penalty: float
) -> tuple[Float[Tensor, "layer row"], Float[Tensor, "layer 1"]]:
    """Newton's method for logistic regression with weights `X' alpha` and a free intercept.

    At the optimum `alpha = (label - p) / (n penalty)`; each step solves the bordered system of the
    weighted ridge problem, which stays well-conditioned where the classes separate.
    """
    n_layers, n = kernel.shape[:2]
    alpha = torch.zeros(n_layers, n, dtype=kernel.dtype)
    bias = torch.zeros(n_layers, 1, dtype=kernel.dtype)
    system = torch.zeros(n_layers, n + 1, n + 1, dtype=kernel.dtype)
    system[:, :n, n] = system[:, n, :n] = 1.0
    for _ in range(50):
        logit = einsum(kernel, alpha, "layer p q, layer q -> layer p") + bias
        p = logit.sigmoid()
        curvature = (p * (1 - p)).clamp_min(1e-10)
        working = logit + (label - p) / curvature
        system[:, :n, :n] = kernel + torch.diag_embed(n * penalty / curvature)
        right = torch.cat([working, torch.zeros_like(bias)], dim=-1)
        solution = torch.linalg.solve(system, right)
        step = (solution[:, :n] - alpha).abs().amax()
        alpha, bias = solution[:, :n], solution[:, n:]
        if step < 1e-10 * (1 + alpha.abs().amax()):
            break
    return alpha, bias


def _checked(target: Tensor, baseline: Tensor) -> tuple[Tensor, Tensor, torch.dtype]:
    check_tensors(
        target=(target, "target layer d_model"), baseline=(baseline, "baseline layer d_model")
    )
    for side, rows in (("target", target), ("baseline", baseline)):
        if len(rows) == 0:
            raise InputError(f"the {side} set is empty: a mean needs at least one prompt")
        bad = ~rows.isfinite().flatten(1).all(1)
        if bad.any():
            row = int(bad.nonzero()[0])
            layer = int((~rows[row].isfinite().all(-1)).nonzero()[0])
            raise InputError(
                f"the {side} set's row {row} holds a non-finite value at layer {layer}: drop that "
                "prompt or recompute its activations in a wider dtype"
            )
    return target.double(), baseline.double(), _answer_dtype(target)


def _answer_dtype(rows: Tensor) -> torch.dtype:
    return torch.float64 if rows.dtype == torch.float64 else torch.float32


def _class_mean(rows: Float[Tensor, "prompt layer d_model"]) -> Float[Tensor, "layer d_model"]:
    return reduce(rows, "prompt layer d_model -> layer d_model", "mean")
