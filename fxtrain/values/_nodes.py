"""Registration of values as pytree nodes, and conversion between tensors and host arrays."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from fxtrain.core import describe, register_node

if TYPE_CHECKING:
    from _typeshed import DataclassInstance


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
        raise TypeError(f"expected a real tensor or array for {type(owner).__name__}, got {describe(value)}.")
    value = value.detach()
    object.__setattr__(owner, field, value)
    return value


def on_host(tensor: Tensor) -> np.ndarray:
    """Returns the tensor as an array, with floating-point values as float64."""
    tensor = tensor.detach()
    return (tensor.double() if tensor.is_floating_point() else tensor).cpu().numpy()
