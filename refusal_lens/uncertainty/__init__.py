"""How sure a similarity is: intervals, nulls and reliability, from Gram matrices; and the like for
numbers per prompt.
"""

from .cosine import (
    CosineEstimate,
    CosineStatistics,
    cosine_statistics,
    cosine_statistics_from_gram,
    estimate_cosine,
    fewest_resamples,
)
from .gram import Gram
from .permutation import permutation_null

__all__ = [
    "CosineEstimate",
    "CosineStatistics",
    "Gram",
    "cosine_statistics",
    "cosine_statistics_from_gram",
    "estimate_cosine",
    "fewest_resamples",
    "permutation_null",
]
