"""Results as trees of JSON and named tensors, and back."""

import dataclasses
import math
from collections.abc import Mapping
from enum import Enum
from typing import Any

from torch import Tensor

from ..errors import InputError


def pack(value: Any) -> tuple[Any, dict[str, Tensor]]:
    """Split a tree of dataclasses, enums, mappings, lists, tuples, tensors and scalars.

    Returns the structure as JSON, and the tensors by path, for `unpack`. TypeError on other values.
    """
    tensors: dict[str, Tensor] = {}

    def visit(node: Any, path: str) -> Any:
        if isinstance(node, Enum):
            return {"type": type(node).__name__, "fields": {"value": node.value}}
        if node is None or isinstance(node, (bool, int, str)):
            return node
        if isinstance(node, float):
            return node if math.isfinite(node) else {"float": repr(node)}
        if isinstance(node, Tensor):
            tensors[path] = node
            return {"tensor": path}
        if isinstance(node, (list, tuple)):
            kind = "tuple" if isinstance(node, tuple) else "list"
            return {kind: [visit(item, f"{path}/{i}") for i, item in enumerate(node)]}
        if isinstance(node, Mapping):
            return {"dict": {str(k): visit(item, f"{path}/{k}") for k, item in node.items()}}
        if dataclasses.is_dataclass(node) and not isinstance(node, type):
            names = [field.name for field in dataclasses.fields(node) if field.init]
            fields = {name: visit(getattr(node, name), f"{path}/{name}") for name in names}
            return {"type": type(node).__name__, "fields": fields}
        raise TypeError(f"{path}: a {type(node).__name__} can't be saved")

    return visit(value, ""), tensors


def unpack(tree: Any, tensors: Mapping[str, Tensor], types: tuple[type, ...]) -> Any:
    """Restore a tree from the JSON and the tensors of `pack`. The JSON need not be trusted.

    Builds no dataclass or enum except `types`. Raises InputError on an unknown type or tensor.
    """
    known = {kind.__name__: kind for kind in types}

    def visit(node: Any) -> Any:
        match node:
            case None | bool() | int() | float() | str():
                return node
            case {"tensor": str(path)} if path in tensors:
                return tensors[path]
            case {"tensor": path}:
                raise InputError(f"the saved results lack the tensor {path!r}: save them anew")
            case {"float": "nan" | "inf" | "-inf" as number}:
                return float(number)
            case {"tuple": list(items)}:
                return tuple(map(visit, items))
            case {"list": list(items)}:
                return [*map(visit, items)]
            case {"dict": dict(items)}:
                return {key: visit(item) for key, item in items.items()}
            case {"type": str(name), "fields": dict(items)} if name in known:
                fields = visit({"dict": items})
                try:
                    return known[name](**fields)
                except (TypeError, ValueError) as error:
                    raise InputError(f"the saved {name} needs another version: {error}") from error
            case {"type": name, "fields": dict()}:
                raise InputError(f"the saved results hold an unknown {name!r}: update the package")
        raise InputError(f"the saved results can't be read: {str(node)[:60]!r} is unknown")

    try:
        return visit(tree)
    except RecursionError:
        raise InputError("the saved results nest too deeply: save them anew") from None
