"""Is the direction along which a chat model refuses its own mechanism, or just negativity?

`__init__.pyi` lists the public names and their modules. Each name is imported when it is first used,
so that `import refusal_lens` itself is cheap. The functions under these names take arrays, lists and
names where the modules' own functions take tensors, models and contrasts (`errors.lenient`).
"""

from types import FunctionType
from typing import Any

import lazy_loader

_strict, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version(__name__)
    from .errors import lenient

    found = _strict(name)
    if isinstance(found, FunctionType):
        found = lenient(found)
        found.__module__ = __name__  # where pickle finds it again
    globals()[name] = found
    return found
