"""Tensors checked where no type checker is: what is wrong, as one line that a user can act on.

Signatures say which shapes are wanted, and tests hold every call to them. A user's calls are not
checked like that, and what a wrong shape makes einops or PyTorch say is long and names none of the
user's words. So functions that take tensors from outside check them here first.
"""

from torch import Tensor

from .errors import InputError


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
