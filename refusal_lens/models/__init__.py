"""Load models that can be hooked, and run forward passes on either TransformerLens."""

from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    from transformer_lens import HookedTransformer
    from transformer_lens.model_bridge import TransformerBridge

    HookedModel: TypeAlias = HookedTransformer | TransformerBridge  # of TransformerLens 3 or 4
