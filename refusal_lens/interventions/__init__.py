"""Ablate or add directions while the model runs, and measure next-token distributions."""

from .cross_ablation import ContrastEffects, CrossEffects, Intervention, cross_effects
from .hooks import ablate_direction, add_direction
from .refusal_metric import RefusalTokens, find_refusal_tokens, next_token_kl, refusal_log_odds
from .reply_openings import ReplyOpenings, openings_of
from .sweep import Effects, ablation_effects, addition_effects
