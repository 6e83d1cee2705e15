"""Skipping of updates whose gradients are not finite."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fxtrain import tree
from fxtrain.core import Tree, check_positive_int
from fxtrain.optim._initial_state import start_count
from fxtrain.optim._transform import GradientTransformation, refuse_unless_transformation


class ApplyIfFiniteState(NamedTuple):
    """The state of ``apply_if_finite``."""

    notfinite_count: Tensor  # int64 []: consecutive steps with non-finite gradients
    total_notfinite: Tensor  # int64 []: all steps with non-finite gradients
    inner_state: Tree  # state of the wrapped transformation


def apply_if_finite(tx: GradientTransformation, *, max_consecutive: int) -> GradientTransformation:
    """Applies ``tx`` only if all gradients are finite.

    Otherwise the updates are zero, and the state of ``tx`` does not change. After more than ``max_consecutive`` skipped
    steps in a row, non-finite gradients are passed to ``tx``, so that a persistent problem becomes visible.

    Args:
        tx: Any transformation.
        max_consecutive: How many consecutive steps to skip at most, at least 1.

    Raises:
        TypeError: If ``max_consecutive`` is not an int.
        ValueError: If ``max_consecutive`` is below 1.

    Example:
        >>> from fxtrain import optim
        >>> tx = apply_if_finite(optim.sgd(0.1), max_consecutive=3)
        >>> state = tx.init(torch.tensor(1.0))
        >>> update, state = tx.update(torch.tensor(float("nan")), state)
        >>> float(update), int(state.notfinite_count)
        (0.0, 1)
    """
    refuse_unless_transformation("tx", tx)
    check_positive_int("max_consecutive", max_consecutive)

    def init(params: Tree) -> ApplyIfFiniteState:
        return ApplyIfFiniteState(start_count(params), start_count(params), tx.init(params))

    def update(
        updates: Tree, opt_state: ApplyIfFiniteState, params: Tree | None = None
    ) -> tuple[Tree, ApplyIfFiniteState]:
        flags = [leaf.isfinite().all() for leaf in tree.leaves(updates)] or [torch.tensor(True)]
        finite = torch.stack(flags).all()
        in_a_row = torch.where(finite, 0, opt_state.notfinite_count + 1)
        apply = finite | (in_a_row > max_consecutive)
        inner_updates, inner_state = tx.update(updates, opt_state.inner_state, params)
        return tree.where(apply, inner_updates, tree.zeros_like(inner_updates)), ApplyIfFiniteState(
            in_a_row,
            opt_state.total_notfinite + (~finite).long(),
            tree.where(apply, inner_state, opt_state.inner_state),
        )

    return GradientTransformation(init, update)
