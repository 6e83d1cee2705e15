"""Gradient accumulation over several steps, with a fixed or scheduled number of steps per update."""

# pyright: reportIncompatibleMethodOverride=false
# As in optax, states have a field named `count`, which shadows the method of tuples.

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fxtrain import tree
from fxtrain.core import Tree, check_positive_int
from fxtrain.optim._initial_state import start_count, zeros
from fxtrain.optim._leafwise import map_with_state
from fxtrain.optim._parameter_scalars import PerParameter, start_counts, where_each
from fxtrain.optim._transform import GradientTransformation, refuse_unless_transformation


class EveryKState(NamedTuple):
    """The state of ``every_k``."""

    count: Tensor  # int64 []: updates made
    seen: Tensor  # int64 []: gradients since the last update
    unused: PerParameter  # int64 [parameters]: how many of these steps did not use the parameter
    mean: Tree  # like the parameters: the mean of these gradients
    inner_state: Tree  # state of the wrapped transformation
    # ``with_trainable`` may add parameters at any count, because a mean starts at zero, as after gradients of zero.
    SHARED_COUNTS = ()


def every_k(tx: GradientTransformation, k: int | Callable[[Tensor], int | Tensor]) -> GradientTransformation:
    """Applies ``tx`` to the mean gradient of every ``k`` steps.

    Between these updates the parameters and the state of ``tx`` do not change. A parameter that none of the ``k`` steps
    used keeps its value and its optimizer state, like a parameter whose ``grad`` is None in ``torch.optim``. If at
    least one step used it, the other steps contribute gradients of zero.

    Peak memory is that of one batch. In contrast, ``train_step(accumulate=k)`` splits one large batch into parts.
    ``k`` may change during a run without a retrace. Schedules inside ``tx`` count updates, not steps.

    Args:
        tx: Any transformation.
        k: The number of steps per update, at least 1. Or a schedule of it: a function of the number of updates so far
            (int64 []).

    Raises:
        TypeError: If ``k`` is neither an int nor callable.
        ValueError: If ``k`` is an int below 1.

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

    def init(params: Tree) -> EveryKState:
        return EveryKState(
            start_count(params), start_count(params), start_counts(params), zeros(params), tx.init(params)
        )

    def update(updates: Tree, opt_state: EveryKState, params: Tree | None = None) -> tuple[Tree, EveryKState]:
        required = k(opt_state.count) if callable(k) else k
        seen = opt_state.seen + 1

        def rule(grad: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
            mean = mean + (grad - mean) / seen
            return mean, mean

        full, mean = map_with_state(rule, updates, opt_state.mean)
        complete = seen >= required
        inner_updates, inner_state = tx.update(full, opt_state.inner_state, params)
        unused = opt_state.unused
        moved = unused.replace(complete & (unused.values < seen))
        return where_each(moved, complete, inner_updates, tree.zeros_like(inner_updates)), EveryKState(
            opt_state.count + complete,
            torch.where(complete, 0, seen),
            unused.replace(torch.where(complete, 0, unused.values)),
            tree.where(complete, tree.zeros_like(mean), mean),
            where_each(moved, complete, inner_state, opt_state.inner_state),
        )

    return GradientTransformation(init, update)
