"""Transformations made from a rule for one leaf and the state that it starts from."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fxtrain.core import Tree
from fxtrain.optim._leafwise import map_with_state
from fxtrain.optim._moments import widest
from fxtrain.optim._transform import GradientTransformation

Rule = Callable[..., tuple[Tensor, ...]]
"""Maps an update, its state and its scalars to the new update and state; see ``map_with_state``."""


def from_rule(init: Callable[[Tree], tuple[Tree, ...]], rule: Rule) -> GradientTransformation:
    """Makes a transformation whose state has only trees like the parameters.

    Args:
        init: From the parameters to the state, a named tuple.
        rule: Takes an update and the leaves of the state's fields, and returns new ones.

    Example:
        >>> from fxtrain.optim import EmptyState
        >>> tx = from_rule(lambda params: EmptyState(), lambda update: (2 * update,))
        >>> tx.update(torch.tensor(3.0), tx.init(torch.tensor(0.0)))
        (tensor(6.), EmptyState())
    """

    def update(updates: Tree, opt_state: Tree, params: Tree | None = None) -> tuple[Tree, Tree]:
        updates, *state = map_with_state(rule, updates, *opt_state)
        return updates, type(opt_state)(*state)

    return GradientTransformation(init, update)


def from_counted_rule(
    init: Callable[[Tree], tuple[Tree, ...]], rule: Rule, numbers: Callable[[Tensor, torch.dtype], Sequence[Tensor]]
) -> GradientTransformation:
    """Makes a transformation whose state begins with the update counts of the parameters.

    Args:
        init: From the parameters to the state, a named tuple: first a ``PerParameter`` of counts, then trees like the
            parameters.
        rule: Takes an update, the leaves of the state's trees and one scalar of each of ``numbers``, and returns the
            new update and leaves.
        numbers: From the counts, which include this update, and a dtype, to vectors with one scalar per parameter.
    """

    def update(updates: Tree, opt_state: Tree, params: Tree | None = None) -> tuple[Tree, Tree]:
        count, *state = opt_state
        count = count + 1
        updates, *state = map_with_state(rule, updates, *state, numbers=numbers(count.values, widest(updates)))
        return updates, type(opt_state)(count, *state)

    return GradientTransformation(init, update)
