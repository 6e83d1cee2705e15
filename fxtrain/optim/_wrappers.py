"""Wrappers of transformations: accumulation, skipping of non-finite updates, lookahead and complex values."""

# pyright: reportIncompatibleMethodOverride=false
# As in optax, states have a field named `count`, which shadows the method of tuples.

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fxtrain import tree
from fxtrain.core import Scalar, Tree, check_positive_int, name_of
from fxtrain.core._shard import full_tensor
from fxtrain.optim._leafwise import map_with_state
from fxtrain.optim._learning_rates import inner_state_of, inside
from fxtrain.optim._state import PerParameter, clones, start_count, start_counts, where_each, zeros
from fxtrain.optim._transform import GradientTransformation, described, refuse_unless_transformation


class EveryKState(NamedTuple):
    """The state of ``every_k``."""

    count: Tensor  # int64 []: updates made
    seen: Tensor  # int64 []: gradients since the last update
    unused: PerParameter  # int64 [parameters]: how many of these steps did not use the parameter
    mean: Tree  # like the parameters: the mean of these gradients
    inner_state: Tree  # state of the wrapped transformation
    # ``with_trainable`` may add parameters at any count, because a mean starts at zero, as after gradients of zero.
    SHARED_COUNTS = ()


@described
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

    return GradientTransformation(init, update, inside(tx.learning_rates, inner_state_of, follows_step=False))


def steps_per_update(tx: GradientTransformation) -> int | None:
    """Returns the number of steps whose gradients ``every_k`` averages for an update, or None if it is a schedule.

    Example:
        >>> from fxtrain import optim
        >>> steps_per_update(optim.chain(optim.clip_by_global_norm(1.0), every_k(optim.sgd(0.1), 4)))
        4
    """
    if tx.call is None:
        return 1
    given = (*tx.call.args, *tx.call.kwargs.values())
    counts = [steps_per_update(part) for part in given if isinstance(part, GradientTransformation)]
    if name_of(tx.call.function) == every_k.__name__:
        number = tx.call.kwargs["k"] if "k" in tx.call.kwargs else tx.call.args[1]
        counts.append(number if isinstance(number, int) else None)
    return None if None in counts else math.prod(count for count in counts if count is not None)


class ApplyIfFiniteState(NamedTuple):
    """The state of ``apply_if_finite``."""

    notfinite_count: Tensor  # int64 []: consecutive steps with non-finite gradients
    total_notfinite: Tensor  # int64 []: all steps with non-finite gradients
    inner_state: Tree  # state of the wrapped transformation


@described
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
        flags = [full_tensor(leaf.isfinite().all()) for leaf in tree.leaves(updates)] or [torch.tensor(True)]
        finite = torch.stack(flags).all()
        in_a_row = torch.where(finite, 0, opt_state.notfinite_count + 1)
        apply = finite | (in_a_row > max_consecutive)
        inner_updates, inner_state = tx.update(updates, opt_state.inner_state, params)
        return tree.where(apply, inner_updates, tree.zeros_like(inner_updates)), ApplyIfFiniteState(
            in_a_row,
            opt_state.total_notfinite + (~finite).long(),
            tree.where(apply, inner_state, opt_state.inner_state),
        )

    return GradientTransformation(init, update, inside(tx.learning_rates, inner_state_of, follows_step=False))


class LookaheadState(NamedTuple):
    """The state of ``lookahead``."""

    count: Tensor  # int64 []: updates made
    slow: Tree  # like the parameters: the slow weights
    inner_state: Tree  # state of the wrapped transformation
    # ``with_trainable`` may add parameters at any count, because slow weights start as copies of the parameters.
    SHARED_COUNTS = ()


@described
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

    return GradientTransformation(init, update, inside(tx.learning_rates, inner_state_of))


@described
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

    return GradientTransformation(init, update, tx.learning_rates)


def _split(leaf: Tensor) -> Tensor:
    return torch.view_as_real(leaf) if leaf.is_complex() else leaf


def _joined(like: Tensor, leaf: Tensor) -> Tensor:
    return torch.view_as_complex(leaf.contiguous()) if like.is_complex() else leaf
