"""Is the direction along which a chat model refuses its own mechanism, or just negativity?

`__init__.pyi` lists the public names and their modules. Each name is imported when it is first used,
so that `import refusal_lens` itself is cheap.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
