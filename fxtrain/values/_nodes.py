"""Nodes: how values of tensors become pytrees, and how their tensors come to the host."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fxtrain.core import register_node


def register_value(cls: type[Any], *tensors: str) -> None:
    """Makes a value a pytree node, so that it can be logged inside a compiled step.

    Args:
        cls: A frozen dataclass.
        tensors: The fields that hold a tensor, or None; the others, which must compare and hash, are its structure.
    """
    others = [field.name for field in dataclasses.fields(cls) if field.name not in tensors]

    def flatten(value: Any) -> tuple[list[Any], Any]:
        there = tuple(name for name in tensors if getattr(value, name) is not None)
        return [getattr(value, name) for name in there], (there, tuple(getattr(value, name) for name in others))

    def unflatten(context: Any, children: Any) -> Any:
        # Past __init__ and its checks: transforms put other things in the place of tensors.
        there, rest = context
        value = object.__new__(cls)
        for name in tensors:
            object.__setattr__(value, name, None)
        for name, child in (*zip(there, children, strict=True), *zip(others, rest, strict=True)):
            object.__setattr__(value, name, child)
        return value

    register_node(cls, flatten, unflatten)


def as_tensor(what: str, value: Any) -> Tensor:
    """A tensor of real numbers, from one or from an array.

    Raises:
        TypeError: If it is anything else; ``what`` says who takes it.
    """
    if isinstance(value, np.ndarray) and value.dtype.kind in "biuf":
        # A copy, as an array that is filled anew would change what was logged.
        return torch.from_numpy(np.array(value))
    if isinstance(value, Tensor) and not value.is_complex():
        return value.detach()
    came = f"a {value.dtype} {type(value).__name__.lower()}" if hasattr(value, "dtype") else f"a {type(value).__name__}"
    raise TypeError(f"{what} takes a tensor or an array of real numbers, and {came} came.")


def on_host(tensor: Tensor) -> np.ndarray:
    """The numbers as float64, or as they are where they are whole."""
    tensor = tensor.detach()
    return (tensor.double() if tensor.is_floating_point() else tensor).cpu().numpy()
