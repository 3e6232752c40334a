"""InputError, the error for mistakes in the input, and the check of tensors that raises it."""


class InputError(ValueError):
    """The input can't be used; the message says what was wrong, where, and what to do.

    The command line prints the message, one line, and exits with status 2. Every other exception
    is a bug and keeps its traceback.

    A message may quote a stranger's file. Line breaks and tabs become spaces, and every other
    character that does not print is escaped (`\\x1b`).
    """

    def __init__(self, message: str):
        super().__init__("".join(map(_printable, message)))


class InterventionError(InputError):
    """TransformerLens can't intervene in this model; its directions can still be read."""


def _printable(character: str) -> str:
    if character.isprintable():
        return character
    return " " if character in "\r\n\t" else ascii(character)[1:-1]


def check_tensors(**tensors: tuple[object, str]) -> None:
    """Check that arguments are dense floating-point tensors with the expected axes.

        check_tensors(a=(a, "layer d_model"), b=(b, "layer d_model"))

    Args:
        **tensors: for each argument, under its name, its value and its axes. Axes of one name must
            have one length in all tensors. A leading `*axis` stands for any number of axes.

    Raises:
        InputError: on a value that is no such tensor, a wrong number of axes, axes of one name that
            differ in length, tensors on several devices or on the meta device.
    """
    lengths: dict[str, tuple[str, int]] = {}
    devices: dict[str, str] = {}
    for name, (tensor, axes) in tensors.items():
        shape = _axis_lengths(name, tensor, axes)
        devices.setdefault(str(tensor.device), name)  # type: ignore[attr-defined]
        if len(devices) > 1:
            (device, first), (other, second) = devices.items()
            raise InputError(
                f"{first} is on {device} and {second} on {other}: move both to one device"
            )
        for axis, length in shape.items():
            first, other_length = lengths.setdefault(axis, (name, length))
            if other_length != length:
                raise InputError(
                    f"{first} and {name} differ in {axis}, {other_length} and {length}: hand over "
                    "tensors of one model and one set of layers"
                )


def _axis_lengths(name: str, tensor: object, axes: str) -> dict[str, int]:
    """Check one tensor alone; the length of each named axis."""
    from torch import Tensor

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
