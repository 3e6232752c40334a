"""Ablate or add directions while the model runs, and measure next-token distributions."""

from .cross_ablation import ContrastEffects as ContrastEffects
from .cross_ablation import CrossEffects as CrossEffects
from .cross_ablation import Intervention as Intervention
from .cross_ablation import cross_effects as cross_effects
from .hooks import ablate_direction as ablate_direction
from .hooks import add_direction as add_direction
from .refusal_metric import RefusalTokens as RefusalTokens
from .refusal_metric import find_refusal_tokens as find_refusal_tokens
from .refusal_metric import next_token_kl as next_token_kl
from .refusal_metric import refusal_log_odds as refusal_log_odds
from .reply_openings import ReplyOpenings as ReplyOpenings
from .reply_openings import openings_of as openings_of
from .sweep import Effects as Effects
from .sweep import ablation_effects as ablation_effects
from .sweep import addition_effects as addition_effects
