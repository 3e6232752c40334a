"""Uncertainty of cosines, from Gram matrices, and intervals of means over prompts."""

from .cautions import Caution as Caution
from .clusters import near_duplicates as near_duplicates
from .cosine import Cause as Cause
from .cosine import CosineEstimate as CosineEstimate
from .cosine import CosineStatistics as CosineStatistics
from .cosine import Unmeasured as Unmeasured
from .cosine import cosine_statistics as cosine_statistics
from .cosine import estimate_cosine as estimate_cosine
from .cosine import fewest_resamples as fewest_resamples
from .gram import Gram as Gram
from .permutation import permutation_null as permutation_null
