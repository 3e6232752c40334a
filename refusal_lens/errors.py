"""InputError, the error for mistakes in the input, and what reads arguments and raises it."""

import difflib
import functools
import inspect
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from numbers import Real
from types import FunctionType, UnionType
from typing import Any, TypeVar, Union, get_args, get_origin

F = TypeVar("F", bound=Callable[..., Any])


class InputError(ValueError):
    """The input can't be used; the message says what was wrong, where, and what to do.

    >>> load_contrast("refusals")
    Traceback (most recent call last):
    refusal_lens.errors.InputError: there is no bundled contrast 'refusals': did you mean ...

    The command line prints the message, one line, and exits with status 2; every other exception is
    a bug. A message may quote a stranger's file: what does not print is escaped (`\\x1b`).
    """

    def __init__(self, message: str):
        super().__init__("".join(map(_printable, message)))


class InterventionError(InputError):
    """TransformerLens can't intervene in this model; its directions can still be read."""


def _printable(character: str) -> str:
    if character.isprintable():
        return character
    return " " if character in "\r\n\t" else ascii(character)[1:-1]


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """Return "did you mean ...? " for the closest of the names; empty if none is close."""
    near = difflib.get_close_matches(name, names, n=1)
    return f"did you mean {near[0]!r}? " if near else ""


def check_tensors(**tensors: tuple[object, str]) -> None:
    """Raise an InputError unless all are floating-point tensors with their axes, on one device.

    Axes of one name must have one length. A leading `*axis` stands for any number of axes.
    """
    known: dict[str, tuple[str, object]] = {}
    for name, (tensor, axes) in tensors.items():
        for fact, value in _facts(name, tensor, axes).items():
            first, other = known.setdefault(fact, (name, value))
            if other != value:
                problem = f"{first} and {name} differ in {fact}, {other} and {value}"
                raise InputError(f"{problem}: hand over tensors of one model, on one device")


def _facts(name: str, tensor: object, axes: str) -> dict[str, object]:
    """Check one tensor alone; return its device and the length of each named axis."""
    from torch import Tensor

    if not isinstance(tensor, Tensor):
        raise InputError(f"{name} is a {type(tensor).__name__}: hand over a tensor [{axes}]")
    if not tensor.is_floating_point():
        kind = str(tensor.dtype).removeprefix("torch.")
        raise InputError(f"{name} holds {kind}: hand over floating-point numbers, {name}.float()")
    named = [axis for axis in axes.split() if not axis.startswith("*")]
    shape = list(tensor.shape)
    if len(shape) < len(named) or (len(shape) > len(named) and "*" not in axes):
        raise InputError(f"{name} has shape {shape}: hand over a tensor [{axes}]")
    lengths = zip(named, shape[len(shape) - len(named) :], strict=True)
    return {"device": str(tensor.device), **dict(lengths)}


def _as_generator(seed: Any) -> Any:
    from torch import Generator

    return Generator().manual_seed(seed) if isinstance(seed, int) else seed


READERS: dict[str, Callable[[Any], Any]] = {"Generator": _as_generator}
"""How a value is read where the annotation has this word; steps add theirs."""


def lenient(function: F) -> F:
    """A function or class that takes arguments as people type them, or says what to write.

    Where the signature has tensors, it takes arrays, lists and `Direction`s; where it has models or
    contrasts, their names (`READERS`); for an integer, digits; for a generator, a seed, by default
    0. A class's public methods are lenient too; its own arguments of several types it reads itself.
    """
    if isinstance(function, type):
        for name, each in [*vars(function).items()]:
            if name == "__init__" or not name.startswith("_"):
                if isinstance(each, FunctionType):
                    setattr(function, name, _lenient(each))
                elif isinstance(each, classmethod):
                    setattr(function, name, classmethod(_lenient(each.__func__)))
        return function
    return _lenient(function)


def lenient_package(package: str, file: str) -> tuple[Callable[[str], Any], Any, list[str]]:
    """`__getattr__`, `__dir__`, `__all__` of a package from its stub; names are imported when used."""
    import lazy_loader

    strict, names, public = lazy_loader.attach_stub(package, file)

    def attribute(name: str) -> Any:
        found = strict(name)
        if isinstance(found, FunctionType):
            found = lenient(found)
            found.__module__ = package  # where pickle finds it again
        setattr(sys.modules[package], name, found)
        return found

    return attribute, names, public


@functools.cache
def _lenient(function: Any) -> Any:
    name = function.__qualname__.removesuffix(".__init__")
    signature = inspect.signature(function)
    parameters = signature.parameters
    needed = [key for key, each in parameters.items() if each.default is each.empty]
    seeds = {key: 0 for key in needed if "Generator" in str(parameters[key].annotation)}
    known = [key for key in parameters if key not in ("self", "cls")]

    @functools.wraps(function)
    def read(*args: Any, **given: Any) -> Any:
        try:
            bound = signature.bind(*args, **seeds | given)
        except TypeError as error:
            why = f"{error}; "
            for typed in [key for key in given if key not in known][:1]:
                why = f"no argument is named {typed!r}; {did_you_mean(typed, known)}"
            raise InputError(f"{name}: {why}it takes {', '.join(known)}") from None
        of_class = name != function.__qualname__
        for key, value in bound.arguments.items():
            bound.arguments[key] = _read(value, parameters[key], of_class=of_class)
        return function(*bound.args, **bound.kwargs)

    return read


def _read(value: Any, parameter: inspect.Parameter, *, of_class: bool) -> Any:
    """The value that a parameter stands for; InputError if its annotation excludes the value."""
    annotation, words = parameter.annotation, {*re.findall(r"\w+", str(parameter.annotation))}
    several = parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
    integer = words <= {"class", "int", "None"}
    checked = integer or (isinstance(annotation, type) and annotation is not str)
    if value is parameter.default or (of_class and not checked):
        return value
    if "Tensor" in words and "Callable" not in words:
        value = as_tensor(value, whole="Int" in words)
        if get_origin(annotation) is not Mapping:
            return value  # the function checks the shape
    for word in words & READERS.keys() if value is not None else ():
        value = READERS[word](value) if "str" not in words or "Mapping" in words else value
    if integer and re.fullmatch(r"-?\d+", str(value)):
        value = int(value)
    if not several and not _fits(value, annotation):
        wanted = re.sub(r"<class '|'>|\b\w+\.", "", str(annotation))
        what = f"{str(value)[:60]!r} ({type(value).__name__})"
        raise InputError(f"{parameter.name} is {what}: hand over {wanted}")
    return value


def _fits(value: Any, annotation: Any) -> bool:
    """Whether a value is of an annotation's class, whatever it holds inside."""
    kind = get_origin(annotation) or annotation
    if kind in (Union, UnionType):
        return any(_fits(value, each) for each in get_args(annotation))
    if not isinstance(kind, type) or kind in (Any, inspect.Parameter.empty):
        return True
    return isinstance(value, Real if kind is float else kind)


def as_tensor(value: Any, *, whole: bool = False) -> Any:
    """Numbers as tensors, floating-point unless `whole`, in whatever holds them; or what is given."""
    import numpy as np
    import torch

    value = getattr(value, "vectors", value)  # of a Direction
    if isinstance(value, Mapping):
        return {key: as_tensor(each, whole=whole) for key, each in value.items()}
    if isinstance(value, tuple) and not all(isinstance(each, (int, float)) for each in value):
        return tuple(as_tensor(each, whole=whole) for each in value)
    is_list = isinstance(value, (list, tuple))
    if isinstance(value, torch.Tensor) or not (is_list or hasattr(value, "__array__")):
        return value
    try:
        if is_list and value and all(isinstance(each, torch.Tensor) for each in value):
            return torch.stack(list(value))
        array = np.array(value, order="C")
    except (RuntimeError, TypeError, ValueError):  # rows of different lengths
        return value
    if array.dtype.kind not in "biuf":
        return value
    tensor = torch.from_numpy(array.astype(array.dtype.newbyteorder("=")))
    exact = whole or (tensor.is_floating_point() and not is_list)
    return tensor if exact else tensor.to(torch.get_default_dtype())
