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


def as_tensor(what: str, value: object) -> Tensor:
    """Returns a detached tensor of real numbers from a tensor or array.

    Args:
        what: The name of the class in the error.
        value: A tensor, which is not copied, or an array, which is.

    Raises:
        TypeError: ``value`` is neither, or not real.
    """
    if isinstance(value, np.ndarray) and value.dtype.kind in "biuf":
        # Copied, because refilling the array would change the logged value.
        return torch.from_numpy(np.array(value))
    if isinstance(value, Tensor) and not value.is_complex():
        return value.detach()
    raise TypeError(f"expected a real tensor or array for {what}, got {describe(value)}.")


def on_host(tensor: Tensor) -> np.ndarray:
    """Returns the tensor as an array, with floating-point values as float64."""
    tensor = tensor.detach()
    return (tensor.double() if tensor.is_floating_point() else tensor).cpu().numpy()
