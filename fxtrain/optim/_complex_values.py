"""Complex parameters as pairs of real values."""

from __future__ import annotations

import torch
from torch import Tensor

from fxtrain import tree
from fxtrain.core import Tree
from fxtrain.optim._transform import GradientTransformation, refuse_unless_transformation


def split_real_and_imaginary(tx: GradientTransformation) -> GradientTransformation:
    """Wraps ``tx`` so that it sees each complex leaf as a real one with a last dimension of size 2.

    The real and imaginary parts are then independent values, as in ``torch.optim``. Real leaves are passed unchanged.

    Args:
        tx: An elementwise transformation.

    Example:
        >>> from fxtrain import optim
        >>> tx = split_real_and_imaginary(optim.clip_by_value(1.0))
        >>> grads = {"w": torch.tensor([3.0 + 0.5j])}
        >>> tx.update(grads, tx.init(grads))[0]
        {'w': tensor([1.+0.5000j])}
    """

    refuse_unless_transformation("tx", tx)

    def update(updates: Tree, opt_state: Tree, params: Tree | None = None) -> tuple[Tree, Tree]:
        inner_params = None if params is None else tree.map(_split, params)
        inner, opt_state = tx.update(tree.map(_split, updates), opt_state, inner_params)
        return tree.map(_joined, updates, inner), opt_state

    def init(params: Tree) -> Tree:
        return tx.init(tree.map(_split, params))

    return GradientTransformation(init, update)


def _split(leaf: Tensor) -> Tensor:
    return torch.view_as_real(leaf) if leaf.is_complex() else leaf


def _joined(like: Tensor, leaf: Tensor) -> Tensor:
    return torch.view_as_complex(leaf.contiguous()) if like.is_complex() else leaf
