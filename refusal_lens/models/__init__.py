"""Load models that can be hooked, and run forward passes on either TransformerLens."""
