"""Compares two outputs of the same computation, up to rounding."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from fxtrain import tree
from fxtrain._torch_internals.dispatch import without_dispatch_modes
from fxtrain.core import Tree

# Absolute tolerance in rounding errors of the largest element, because elements that cancel to zero keep such errors.
_MAX_ROUNDING_ERRORS = 128
_MAX_DEPTH = 16


def are_close(ours: Tree, theirs: Tree, *, unit: float = 0.0, integers: bool = True) -> bool:
    """Returns whether two values hold the same tensors, up to the order of sums.

    Args:
        ours: A pytree. Mappings, dataclasses and sequences that are not registered as pytrees are searched too.
        theirs: The reference, of the same kind.
        unit: The smallest magnitude that the tolerance scales with. Smaller tensors get the tolerance of this one.
        integers: Whether integer and bool tensors are compared. They must be equal.

    Returns:
        Whether all tensors are close. Always True if ``torch.func.vmap`` hides the elements.

    Example:
        >>> import torch
        >>> are_close({"a": torch.tensor(1.0)}, {"a": torch.tensor(1.0 + 1e-6)})
        True
        >>> are_close([torch.tensor(1.0)], [torch.tensor(1.5)])
        False
    """
    ones, twos = list(tensors_in(ours)), list(tensors_in(theirs))
    if [(leaf.shape, leaf.dtype) for leaf in ones] != [(leaf.shape, leaf.dtype) for leaf in twos]:
        return False
    try:
        with without_dispatch_modes(), torch.no_grad():
            largest = max(map(_size, twos), default=0.0)
            return all(_is_close(*pair, unit, largest, integers) for pair in zip(ones, twos, strict=True))
    except RuntimeError:  # Batched by vmap.
        return True


def tensors_in(value: Tree, depth: int = 0) -> Iterator[Tensor]:
    """Yields the tensors of a value in a fixed order.

    Example:
        >>> import torch
        >>> class Output(dict): ...
        >>> [int(tensor) for tensor in tensors_in(Output(b=torch.tensor(1), a=(torch.tensor(2),)))]
        [1, 2]
    """
    for leaf in tree.leaves(value):
        if isinstance(leaf, Tensor):
            yield leaf
        elif depth < _MAX_DEPTH:
            for part in _parts(leaf):
                yield from tensors_in(part, depth + 1)


def _parts(leaf: object) -> list[Tree]:
    if isinstance(leaf, Mapping | list | tuple):
        return list(leaf.values() if isinstance(leaf, Mapping) else leaf)
    if dataclasses.is_dataclass(leaf) and not isinstance(leaf, type):
        return [getattr(leaf, field.name, None) for field in dataclasses.fields(leaf)]
    return []


def _size(leaf: Tensor) -> float:
    if not leaf.numel() or not (leaf.is_floating_point() or leaf.is_complex()):
        return 0.0
    return float(torch.nan_to_num(leaf.abs(), posinf=0.0).max())


def _is_close(one: Tensor, two: Tensor, unit: float, largest: float, integers: bool) -> bool:
    if not one.is_floating_point() and not one.is_complex():
        return not integers or torch.equal(one, two)
    eps = torch.finfo(one.dtype).eps
    absolute = eps**0.5 * max(unit, _size(two)) + min(_MAX_ROUNDING_ERRORS * eps, eps**0.5 / 8) * largest
    return torch.allclose(one, two, rtol=eps**0.5, atol=absolute, equal_nan=True)
