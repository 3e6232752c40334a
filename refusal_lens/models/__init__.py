"""Load models that can be hooked, and run forward passes on either TransformerLens."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:  # a model with hooks is one of these
    from transformer_lens import HookedTransformer as HookedTransformer
    from transformer_lens.model_bridge import TransformerBridge as TransformerBridge
