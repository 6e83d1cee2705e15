"""Registration of values as pytree nodes, and conversion between tensors and host arrays in a range."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from fxtrain.core import describe, register_node

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

_NOTE = "_clipped"
_ROUNDING = 1e-3  # share of the range by which a pixel or sample may exceed it without a warning
_OVERSHOOT = 0.25  # share up to which it is clipped with a warning; beyond it, the value is rejected


def register_value(cls: type[DataclassInstance], *tensors: str) -> None:
    """Registers a class of values as a pytree node, so that values can be logged inside a compiled step.

    Args:
        cls: A frozen dataclass.
        tensors: The fields that hold a tensor or None. The other fields are static, and must support ``==`` and
            hashing.
    """
    others = [field.name for field in dataclasses.fields(cls) if field.name not in tensors]

    def flatten(value: object) -> tuple[list[Any], Any]:
        present = tuple(name for name in tensors if getattr(value, name) is not None)
        return [getattr(value, name) for name in present], (present, tuple(getattr(value, name) for name in others))

    def unflatten(context: Any, children: Any) -> Any:
        # Bypasses __init__ and its checks, because transforms put other objects in place of tensors.
        present, rest = context
        value = object.__new__(cls)
        for name in tensors:
            object.__setattr__(value, name, None)
        for name, child in (*zip(present, children, strict=True), *zip(others, rest, strict=True)):
            object.__setattr__(value, name, child)
        return value

    register_node(cls, flatten, unflatten)


def set_tensor(owner: object, field: str) -> Tensor:
    """Replaces a field of a frozen dataclass, a tensor or array, by a detached tensor of real numbers, and returns it.

    Args:
        owner: The object, named in the error.
        field: The name of the field. A tensor is not copied, and an array is.

    Raises:
        TypeError: The field is neither, or not real.
    """
    value = getattr(owner, field)
    if isinstance(value, np.ndarray) and value.dtype.kind in "biuf":
        # Copied, because refilling the array would change the logged value.
        value = torch.from_numpy(np.array(value))
    elif not isinstance(value, Tensor) or value.is_complex():
        raise TypeError(
            f"expected a real tensor or array for {type(owner).__name__}, got {describe(value)}. Convert it with "
            "torch.as_tensor."
        )
    value = value.detach()
    object.__setattr__(owner, field, value)
    return value


def on_host(tensor: Tensor) -> np.ndarray:
    """Returns the tensor as an array, with floating-point values as float64."""
    tensor = tensor.detach()
    return (tensor.double() if tensor.is_floating_point() else tensor).cpu().numpy()


def within(value: object, data: np.ndarray, low: float, high: float, what: str) -> np.ndarray:
    """Clips values that are slightly out of range, and leaves a note for ``note_of_clipping`` on ``value``."""
    name, least, most = type(value).__name__, float(data.min()), float(data.max())
    beyond = max(low - least, most - high) / (high - low)  # NaN compares as false below
    if not beyond <= _OVERSHOOT:
        remedy = "Set limits= to the values of black and white." if what == "pixels" else "Scale them."
        raise ValueError(f"expected {name} {what} from {low:g} to {high:g}, got {least:g} to {most:g}. {remedy}")
    if beyond > _ROUNDING:
        value.__dict__[_NOTE] = f"{name} {what} from {least:g} to {most:g} are clipped to {low:g} to {high:g}."
    return data.clip(low, high)


def note_of_clipping(value: object) -> str | None:
    """Returns a description of the clipping on the host, once, or None if nothing was clipped."""
    return vars(value).pop(_NOTE, None)
