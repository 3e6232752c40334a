"""Is the direction along which a chat model refuses its own mechanism, or just negativity?

`__init__.pyi` lists the public names and their modules. Each name is imported when it is first used,
so that `import refusal_lens` itself is cheap. The functions under these names take arrays, lists and
names where the modules' own functions take tensors, models and contrasts (`errors.lenient`).
"""

from typing import Any

from .errors import lenient_package

_attribute, __dir__, __all__ = lenient_package(__name__, __file__)


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version(__name__)
    return _attribute(name)
