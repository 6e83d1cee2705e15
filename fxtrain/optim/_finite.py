"""Skipping updates whose gradients are not finite."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fxtrain import tree
from fxtrain.core import check_positive_int
from fxtrain.optim._leaves import start_count
from fxtrain.optim._transform import GradientTransformation, refuse_unless_transformation


class ApplyIfFiniteState(NamedTuple):
    """The memory of ``apply_if_finite``."""

    notfinite_count: Tensor  # int64 []: bad gradients in a row
    total_notfinite: Tensor  # int64 []: bad gradients in all
    inner_state: Any  # of the wrapped transformation


def apply_if_finite(tx: GradientTransformation, *, max_consecutive: int) -> GradientTransformation:
    """``tx`` where every gradient is finite; elsewhere zeros, and its memory kept as it was.

    After more than ``max_consecutive`` bad gradients in a row they are let through: something is wrong that waiting
    does not mend, and the run had better show it.

    Args:
        tx: Any transformation.
        max_consecutive: How many bad gradients in a row are skipped; 1 or more.

    Raises:
        ValueError: If ``max_consecutive`` is not a whole number above 0.

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

    def init(params: Any) -> ApplyIfFiniteState:
        return ApplyIfFiniteState(start_count(params), start_count(params), tx.init(params))

    def update(updates: Any, opt_state: ApplyIfFiniteState, params: Any = None) -> tuple[Any, ApplyIfFiniteState]:
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
