"""Conversion of a batch's leaves: numbers and arrays become tensors, and other values are kept."""

from __future__ import annotations

import enum
from collections.abc import Callable
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from fxtrain import tree
from fxtrain.core import Batch, Tree, describe
from fxtrain.data._foreign_containers import register_containers

_NUMBERS = (bool, int, float, complex)
KINDS_OF_NUMBERS = "biufc"


def as_tensors(batch: Batch) -> Tree:
    """Returns the batch with numpy arrays, numbers and lists of numbers converted to tensors.

    A Python number becomes a tensor of shape [] (int64, bool, or torch's default floating dtype), and a list of numbers
    one of shape [n]. A structured array becomes a dict of its fields. Text, bytes, paths, dates, None and other
    non-numeric values are kept.

    Raises:
        TypeError: If a leaf contains numbers in a form that cannot be converted. The message names its path.
    """
    register_containers(batch)
    if all(isinstance(leaf, Tensor) and not leaf.is_nested for leaf in tree.leaves(batch)):
        return batch
    return tree.map_with_path(_as_tensor, batch, root="batch", is_leaf=_is_list_of_numbers)


def map_tensors(function: Callable[[Tensor], Tensor], batch: Batch) -> Tree:
    """Returns the batch with ``function`` applied to each tensor, and everything else unchanged.

    The ``batch_sizes`` of a packed sequence are kept, because torch requires them on the host.

    Args:
        function: Maps a tensor to a tensor.
        batch: Pytree of tensors and other values.

    Example:
        >>> map_tensors(lambda leaf: leaf + 1, {"x": torch.zeros(2), "name": "a"})
        {'x': tensor([1., 1.]), 'name': 'a'}
    """

    def apply(part: object) -> object:
        if isinstance(part, PackedSequence):
            found = {name: leaf for name, leaf in part._asdict().items() if name != "batch_sizes" and leaf is not None}
            return part._replace(**{name: function(leaf) for name, leaf in found.items()})
        return function(part) if isinstance(part, Tensor) else part

    return tree.map(apply, batch, is_leaf=lambda part: isinstance(part, PackedSequence))


def _as_tensor(path: str, leaf: object) -> Tree:
    if isinstance(leaf, Tensor):
        return _refuse(path, leaf, "leaf.to_padded_tensor(0)") if leaf.is_nested else leaf
    if isinstance(leaf, np.ndarray | np.generic):
        return _from_numpy(path, leaf)
    if isinstance(leaf, enum.Enum | str | bytes):
        return leaf
    if isinstance(leaf, _NUMBERS) or _is_list_of_numbers(leaf):
        try:
            return torch.tensor(leaf)
        except (OverflowError, RuntimeError, ValueError):
            raise TypeError(f"expected numbers that fit in 64 bits at {path}, got {describe(leaf)}.") from None
    if any(hasattr(leaf, name) for name in ("__array__", "__array_interface__", "__dlpack__")):
        return _refuse(path, leaf, "torch.as_tensor(numpy.asarray(leaf))")
    if _holds_tensors(leaf):
        raise TypeError(
            f"expected {path} to be a pytree, got {describe(leaf)}, an unregistered class that contains tensors. Make "
            "the class a dataclass, register it with optree.register_pytree_node(cls, flatten, unflatten, "
            'namespace="fxtrain"), or convert it to a dict with data.map.'
        )
    return leaf


def _refuse(path: str, leaf: object, conversion: str) -> NoReturn:
    kind = "nested tensor" if isinstance(leaf, Tensor) else f"{type(leaf).__module__}.{type(leaf).__qualname__}"
    raise TypeError(
        f"expected {path} to be a tensor, a numpy array or a number, got a {kind}. Convert it in the dataset or with "
        f"data.map, for example with {conversion}."
    )


def _from_numpy(path: str, leaf: np.ndarray | np.generic) -> Tree:
    if leaf.dtype.names is not None:
        fields: Any = leaf
        return {name: _from_numpy(f"{path}[{name!r}]", fields[name]) for name in leaf.dtype.names}
    if leaf.dtype.kind not in KINDS_OF_NUMBERS:
        return leaf
    try:
        if not leaf.dtype.isnative:
            leaf = leaf.astype(leaf.dtype.newbyteorder("="))
        # Tensors cannot be read-only or have negative strides, so such arrays are copied.
        as_it_is = isinstance(leaf, np.ndarray) and leaf.flags.writeable and min(leaf.strides, default=0) >= 0
        return torch.as_tensor(leaf if as_it_is else np.array(leaf, order="C"))
    except (TypeError, ValueError):
        raise TypeError(
            f"expected {path} to have a dtype that torch supports, got {leaf.dtype}. Convert it with data.map."
        ) from None


def _is_list_of_numbers(node: object) -> bool:
    return type(node) is list and len(node) > 0 and all(map(_is_number, node))


def _is_number(value: object) -> bool:
    if isinstance(value, np.generic):
        return value.dtype.kind in KINDS_OF_NUMBERS
    return isinstance(value, _NUMBERS) and not isinstance(value, enum.Enum)


def _holds_tensors(leaf: object) -> bool:
    values = leaf if isinstance(leaf, set | frozenset) else getattr(leaf, "__dict__", {}).values()
    return any(isinstance(part, Tensor | np.ndarray) for value in values for part in tree.leaves(value))


def to_device(batch: Batch, device: torch.device) -> Batch:
    """Returns the batch with its tensors on this device.

    Args:
        batch: Pytree of tensors and other values.
        device: The device of the state that the batch trains.

    Example:
        >>> to_device({"x": torch.zeros(2), "name": "a"}, torch.device("cpu"))
        {'x': tensor([0., 0.]), 'name': 'a'}
    """
    if device.type == "cpu":
        return batch
    return map_tensors(lambda leaf: leaf.to(device, non_blocking=True), batch)
