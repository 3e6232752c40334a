"""Ablate or add a direction while the model runs, and read what it does to the first token.

Nothing is generated: every effect is read from the distribution of the reply's first token.
"""

from .cross_ablation import (
    ContrastEffects,
    CrossEffects,
    ablation_cross_effects,
    addition_cross_effects,
)
from .hooks import ablate_direction, add_direction
from .refusal_metric import RefusalTokens, find_refusal_tokens, next_token_kl, refusal_log_odds
from .sweep import Effects, ablation_effects, addition_effects

__all__ = [
    "ContrastEffects",
    "CrossEffects",
    "Effects",
    "RefusalTokens",
    "ablate_direction",
    "ablation_cross_effects",
    "ablation_effects",
    "add_direction",
    "addition_cross_effects",
    "addition_effects",
    "find_refusal_tokens",
    "next_token_kl",
    "refusal_log_odds",
]
