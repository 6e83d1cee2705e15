"""Arithmetic on trees of tensors."""

from __future__ import annotations

import torch
from torch import Tensor

from fxtrain.core import Tree, leaf_bytes
from fxtrain.core._shard import full_tensor
from fxtrain.tree._map import leaves, map  # noqa: A004


def where(condition: Tensor, tree: Tree, other: Tree) -> Tree:
    """Selects the leaves of ``tree`` if ``condition`` holds and those of ``other`` if not.

    A leaf that is the same tensor in both trees is returned as it is.

    Args:
        condition: bool [].
        tree: A tree of tensors.
        other: A tree of the same structure, shapes and dtypes.

    Example:
        >>> where(torch.tensor(False), {"x": torch.tensor(1)}, {"x": torch.tensor(2)})
        {'x': tensor(2)}
    """

    def select(a: Tensor, b: Tensor) -> Tensor:
        return a if a is b else torch.where(condition, a, b)

    return map(select, tree, other)


def clone(tree: Tree) -> Tree:
    """Clones every leaf.

    Example:
        >>> clone({"x": torch.ones(2)})
        {'x': tensor([1., 1.])}
    """
    return map(torch.clone, tree)


def zeros_like(tree: Tree) -> Tree:
    """Returns a tree of zeros with the shapes and dtypes of ``tree``.

    Example:
        >>> zeros_like({"x": torch.ones(2)})
        {'x': tensor([0., 0.])}
    """
    return map(torch.zeros_like, tree)


def global_norm(tree: Tree) -> Tensor:
    """Returns the L2 norm over all elements of all leaves: a 0-d tensor, float32 or wider.

    Squares are summed in float32 or wider, so that half-precision leaves do not overflow.

    Example:
        >>> global_norm({"weight": torch.tensor([3.0]), "bias": torch.tensor([4.0])})
        tensor(5.)
    """
    squares = [_squared_norm(leaf) for leaf in leaves(tree)]
    return torch.stack(squares).sum().sqrt() if squares else torch.zeros(())


def nbytes(tree: Tree) -> int:
    """Returns the size of all leaves in bytes."""
    return sum(leaf_bytes(leaf) if isinstance(leaf, Tensor) else leaf.nbytes for leaf in leaves(tree))


def device_of(tree: Tree) -> torch.device | None:
    """Returns the device of the first tensor, or None for a tree without tensors."""
    return next((leaf.device for leaf in leaves(tree) if isinstance(leaf, Tensor)), None)


def _squared_norm(leaf: Tensor) -> Tensor:
    real = torch.view_as_real(leaf) if leaf.is_complex() else leaf
    wide = torch.promote_types(real.dtype, torch.float32)
    return full_tensor(real.to(wide).square().sum())
