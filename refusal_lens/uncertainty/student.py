"""Student's t distribution, by its finite series: the package has no other need of scipy."""

from math import atan, cos, isinf, pi, sin, sqrt
from statistics import NormalDist


def student_quantile(p: float, freedom: int) -> float:
    """The `p` quantile of Student's t with an integer number of degrees of freedom.

    Reference: Abramowitz and Stegun 1964, 26.7.3 and 26.7.4.
    """
    if p < 0.5:
        return -student_quantile(1 - p, freedom)
    low, high = 0.0, 1.0
    while _student_probability(high, freedom) < p and not isinf(high):
        high *= 2
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if _student_probability(middle, freedom) < p else (low, middle)
    return (low + high) / 2


def student_inflation(p: float, freedom: int) -> float:
    """How much wider than the normal's the `p` quantile is, the spread being itself estimated."""
    return student_quantile(p, freedom) / NormalDist().inv_cdf(p)


def _student_probability(t: float, freedom: int) -> float:
    angle = atan(t / sqrt(freedom))
    if freedom == 1:
        return 0.5 + angle / pi
    odd = freedom % 2
    term = total = cos(angle) if odd else 1.0
    for k in range(2 + odd, freedom, 2):
        term *= (k - 1) / k * cos(angle) ** 2
        total += term
    if odd:
        return 0.5 + (angle + sin(angle) * total) / pi
    return 0.5 + sin(angle) * total / 2
