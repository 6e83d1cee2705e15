"""Lookahead: slow weights that periodically move a part of the way to the fast weights."""

# pyright: reportIncompatibleMethodOverride=false
# As in optax, states have a field named `count`, which shadows the method of tuples.

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fxtrain.core import Scalar, Tree, check_positive_int
from fxtrain.optim._initial_state import clones, start_count
from fxtrain.optim._leafwise import map_with_state
from fxtrain.optim._transform import GradientTransformation, refuse_unless_transformation


class LookaheadState(NamedTuple):
    """The state of ``lookahead``."""

    count: Tensor  # int64 []: updates made
    slow: Tree  # like the parameters: the slow weights
    inner_state: Tree  # state of the wrapped transformation
    # ``with_trainable`` may add parameters at any count, because slow weights start as copies of the parameters.
    SHARED_COUNTS = ()


def lookahead(tx: GradientTransformation, *, period: int = 5, slow_rate: Scalar = 0.5) -> GradientTransformation:
    """Moves fast weights by ``tx``, and pulls slow weights toward them every ``period`` steps.

        slow = slow + slow_rate (fast - slow),   fast = slow        every ``period`` steps

    The parameters are the fast weights. At the end of each period they are reset to the slow weights. Use it as the
    outermost transformation.

    Args:
        tx: Any transformation.
        period: Steps between synchronizations, at least 1.
        slow_rate: The fraction of the way that slow weights move, in (0, 1].

    Raises:
        TypeError: If ``period`` is not an int.
        ValueError: If an argument is out of range. At ``update``, if no parameters are passed.

    Example:
        >>> from fxtrain import optim
        >>> tx = lookahead(optim.sgd(1.0), period=2)
        >>> params = torch.tensor(8.0)
        >>> state = tx.init(params)
        >>> for _ in range(2):
        ...     update, state = tx.update(torch.tensor(1.0), state, params)
        ...     params = optim.apply_updates(params, update)
        >>> float(params)
        7.0

    References:
        Zhang et al., "Lookahead optimizer: k steps forward, 1 step back", 2019.
    """
    refuse_unless_transformation("tx", tx)
    check_positive_int("period", period)
    if not isinstance(slow_rate, Tensor) and not 0 < slow_rate <= 1:
        raise ValueError(f"expected slow_rate to be in (0, 1], got {slow_rate!r}.")

    def init(params: Tree) -> LookaheadState:
        return LookaheadState(start_count(params), clones(params), tx.init(params))

    def update(updates: Tree, opt_state: LookaheadState, params: Tree | None = None) -> tuple[Tree, LookaheadState]:
        if params is None:
            raise ValueError("expected params for lookahead, got None. Call update(grads, opt_state, params).")
        updates, inner_state = tx.update(updates, opt_state.inner_state, params)
        count = opt_state.count + 1
        meets = count % period == 0

        def follow(update: Tensor, param: Tensor, slow: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            slow = torch.where(meets, slow + slow_rate * (param + update - slow), slow)
            return torch.where(meets, slow - param, update), param, slow

        updates, _, slow = map_with_state(follow, updates, params, opt_state.slow)
        return updates, LookaheadState(count, slow, inner_state)

    return GradientTransformation(init, update)
