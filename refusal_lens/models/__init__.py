"""A name or a path to a model that can be hooked."""
