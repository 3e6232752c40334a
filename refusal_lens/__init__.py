"""Is the direction along which a chat model refuses its own mechanism, or just negativity?

The public names are listed, with the room each lives in, in `__init__.pyi`; each is imported when
it is first used, so that `import refusal_lens` itself is cheap.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
