"""Many L2-penalised logistic regressions on the same rows, from the rows' inner products alone."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import softplus

TOLERANCE = 1e-9  # of the gradient's norm, as a share of its norm at the start
MOST_STEPS, MOST_PRODUCTS = 100, 1000  # bounds that rounding alone can reach

Rows = Float[Tensor, "n fit"]
Fits = Float[Tensor, " fit"]


def logistic_regressions(
    gram: Float[Tensor, "n n"],
    label: Float[Tensor, " n"],
    used: Bool[Tensor, "n fit"],
    penalty: Fits,
) -> tuple[Rows, Fits]:
    r"""Coefficients `a` of the rows in the weights `w = rows' a`, and intercepts `b`, of each fit.

    Minimises `sum of used rows' log-loss / n + penalty / 2 |w|^2`, in float64, by Newton's method
    with steps from conjugate gradients in the space of `w`. `w` enters only as `gram a`, and all
    fits share each product with `gram`. Reference: Nocedal and Wright 2006, algorithm 7.1.

    Args:
        gram: inner products of the rows.
        label: 1 or -1 for each row.
        used, penalty: the rows that each fit uses, and its penalty, above 0.
    """
    share, label = used.double() / len(label), label[:, None]
    a, b = torch.zeros_like(share), torch.zeros_like(penalty)
    image = torch.zeros_like(share)  # gram @ a
    start = None

    def objective(a: Rows, b: Fits, image: Rows) -> Fits:
        loss = softplus(-label * (image + b)) * share
        return loss.sum(0) + penalty / 2 * (a * image).sum(0)

    for _ in range(MOST_STEPS):
        slope = -label * (-label * (image + b)).sigmoid() * share
        gradient = slope + penalty * a
        towards = gram @ gradient
        size = ((gradient * towards).sum(0) + slope.sum(0).square()).clamp_min(0).sqrt()
        start = size if start is None else start
        if (size <= TOLERANCE * start).all():
            break
        curvature = (image + b).sigmoid() * (-image - b).sigmoid() * share
        accuracy = size * (size / start).clamp(TOLERANCE, 0.1)
        residual = gradient, slope.sum(0), towards
        step = _newton_step(gram, curvature, penalty, residual, accuracy)
        before, scale = objective(a, b, image), torch.ones_like(b)
        while True:
            ahead = [x - scale * dx for x, dx in zip((a, b, image), step, strict=True)]
            worse = objective(ahead[0], ahead[1], ahead[2]) > before * (1 + 1e-12)
            if not worse.any():
                break
            scale = torch.where(worse, scale / 2, scale)
        a, b, image = ahead
    return a, b


def _newton_step(
    gram: Float[Tensor, "n n"],
    curvature: Rows,
    penalty: Fits,
    gradient: tuple[Rows, Fits, Rows],
    accuracy: Fits,
) -> tuple[Rows, Fits, Rows]:
    """The inverse Hessian times the gradient: coefficients, intercept and `gram @ coefficients`."""
    step = [torch.zeros_like(each) for each in gradient]
    residual, direction = list(gradient), list(gradient)
    size = (residual[0] * residual[2]).sum(0) + residual[1].square()
    for _ in range(MOST_PRODUCTS):
        active = size.clamp_min(0).sqrt() > accuracy
        if not active.any():
            break
        bent = curvature * (direction[2] + direction[1])
        curved = bent + penalty * direction[0]
        along = (direction[2] * curved).sum(0) + direction[1] * bent.sum(0)
        length = torch.where(active, size / along, 0.0)
        step = [x + length * dx for x, dx in zip(step, direction, strict=True)]
        residual[0] = residual[0] - length * curved
        residual[1] = residual[1] - length * bent.sum(0)
        residual[2] = gram @ residual[0]
        new = (residual[0] * residual[2]).sum(0) + residual[1].square()
        turn = torch.where(active, new / size, 0.0)
        direction = [x + turn * dx for x, dx in zip(residual, direction, strict=True)]
        size = torch.where(active, new, size)
    return step[0], step[1], step[2]
