"""Accumulation over steps: an update from the gradients of several batches, whose number may follow a schedule."""

# pyright: reportIncompatibleMethodOverride=false
# `count` is the name of the field, as in optax; that tuples have a method of this name is no loss.

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fxtrain import tree
from fxtrain.core import check_positive_int
from fxtrain.optim._leaves import map_with_memory, start_count, zeros
from fxtrain.optim._per_parameter import PerParameter, start_counts, where_each
from fxtrain.optim._transform import GradientTransformation, refuse_unless_transformation


class EveryKState(NamedTuple):
    """The memory of ``every_k``."""

    count: Tensor  # int64 []: updates made
    seen: Tensor  # int64 []: gradients since the last one
    unused: PerParameter  # int64 [parameters]: those of them in which the parameter was not used
    mean: Any  # like the parameters: the mean of these
    inner_state: Any  # of the wrapped transformation
    AGES = ()  # a mean begins at zero, and a parameter that joins in the middle has had gradients of zero


def every_k(tx: GradientTransformation, k: int | Callable[[Tensor], Any]) -> GradientTransformation:
    """``tx`` with the mean gradient of every ``k`` steps; zeros in between, and its memory kept as it was.

    A parameter that none of these steps used keeps its value and its optimizer state, as in ``torch.optim``, where
    its ``grad`` stays None. Steps that did not use it count as gradients of zero if another one did.

    Each batch takes the memory of one batch, where ``train_step(accumulate=k)`` cuts one large batch into parts; and
    ``k`` may grow during a run without a new graph. Schedules inside ``tx`` count updates, and not steps.

    Args:
        tx: Any transformation.
        k: A number of steps, or a schedule: from the updates made so far (int64 []) to that number, at least 1.

    Raises:
        ValueError: If ``k`` is a number and not a whole one above 0.

    Example:
        >>> from fxtrain import optim
        >>> tx = every_k(optim.sgd(1.0), 2)
        >>> state = tx.init(torch.tensor(0.0))
        >>> for grad in (1.0, 3.0, 5.0):
        ...     update, state = tx.update(torch.tensor(grad), state)
        ...     print(float(update))
        0.0
        -2.0
        0.0
    """
    refuse_unless_transformation("tx", tx)
    if not callable(k):
        check_positive_int("k", k)

    def init(params: Any) -> EveryKState:
        return EveryKState(
            start_count(params), start_count(params), start_counts(params), zeros(params), tx.init(params)
        )

    def update(updates: Any, opt_state: EveryKState, params: Any = None) -> tuple[Any, EveryKState]:
        wanted = k(opt_state.count) if callable(k) else k
        seen = opt_state.seen + 1

        def rule(grad: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
            mean = mean + (grad - mean) / seen
            return mean, mean

        full, mean = map_with_memory(rule, updates, opt_state.mean)
        complete = seen >= wanted
        inner_updates, inner_state = tx.update(full, opt_state.inner_state, params)
        unused = opt_state.unused
        busy = unused.replace(complete & (unused.values < seen))
        return where_each(busy, complete, inner_updates, tree.zeros_like(inner_updates)), EveryKState(
            opt_state.count + complete,
            torch.where(complete, 0, seen),
            unused.replace(torch.where(complete, 0, unused.values)),
            tree.where(complete, tree.zeros_like(mean), mean),
            where_each(busy, complete, inner_state, opt_state.inner_state),
        )

    return GradientTransformation(init, update)
