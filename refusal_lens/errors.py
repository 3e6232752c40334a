"""InputError, the one error for mistakes in the input, and the check of tensors that raises it."""

from torch import Tensor


class InputError(ValueError):
    """Something handed to us can't be used as it is.

    Its message says what was wrong, where, and what to do, in one line. The command line prints that
    line alone and exits with status 2; every other exception is a fault of ours and keeps its
    traceback.

    What a message quotes of a stranger's file stays harmless: line breaks and tabs become spaces,
    and whatever else a terminal would not show but obey is written out (`\\x1b`).
    """

    def __init__(self, message: str):
        super().__init__("".join(map(_shown, message)))


def _shown(character: str) -> str:
    if character.isprintable():
        return character
    return " " if character in "\r\n\t" else ascii(character)[1:-1]


def check_tensors(**tensors: tuple[object, str]) -> None:
    """Refuse what is not a tensor of floating-point numbers with the axes it should have.

    Each is given by its name in the caller's words, with its axes as a signature spells them:
    `check_tensors(target=(target, "target layer d_model"))`. Axes of one name are equally long
    wherever they occur; a leading `*` stands for any number of axes.

    Raises:
        InputError: on anything but a tensor, another dtype, a wrong number of axes, axes of one
            name that differ in length, tensors on several devices or on the meta device.
    """
    lengths: dict[str, tuple[str, int]] = {}
    where: tuple[str, str] | None = None
    for name, (tensor, axes) in tensors.items():
        shape = _checked_alone(name, tensor, axes)
        device = str(tensor.device)  # type: ignore[attr-defined]
        if where is not None and where[1] != device:
            raise InputError(
                f"{where[0]} is on {where[1]} and {name} on {device}: move both to one device"
            )
        where = (name, device)
        for axis, length in shape.items():
            first, other = lengths.setdefault(axis, (name, length))
            if other != length:
                raise InputError(
                    f"{first} and {name} differ in {axis}, {other} and {length}: hand over tensors "
                    "of one model and one set of layers"
                )


def _checked_alone(name: str, tensor: object, axes: str) -> dict[str, int]:
    """The lengths of the named axes of one tensor."""
    if not isinstance(tensor, Tensor):
        raise InputError(f"{name} is a {type(tensor).__name__}: hand over a tensor [{axes}]")
    if not tensor.is_floating_point():
        kind = str(tensor.dtype).removeprefix("torch.")
        raise InputError(f"{name} holds {kind}: hand over floating-point numbers, {name}.float()")
    if tensor.is_meta:
        raise InputError(f"{name} is on the meta device, which holds no numbers: load it first")
    if tensor.is_sparse:
        raise InputError(f"{name} is sparse: hand over {name}.to_dense()")
    named = [axis for axis in axes.split() if not axis.startswith("*")]
    shape = list(tensor.shape)
    if len(shape) < len(named) or (len(shape) > len(named) and "*" not in axes):
        raise InputError(f"{name} has shape {shape}: hand over a tensor [{axes}]")
    return dict(zip(named, shape[len(shape) - len(named) :], strict=True))
