"""Activations to one direction per layer, and how similar two of them are."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(__name__, submodules=["formats"])
