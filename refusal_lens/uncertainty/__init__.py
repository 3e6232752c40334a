"""Uncertainty of cosines, from Gram matrices, and intervals of means over prompts."""

from .cautions import Caution
from .clusters import near_duplicates
from .cosine import Cause, CosineEstimate, CosineStatistics, Unmeasured, cosine_statistics
from .gram import Gram
from .permutation import permutation_null
