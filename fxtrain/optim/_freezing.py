"""Freezing: which parameters move, and when."""

# pyright: reportIncompatibleMethodOverride=false
# `count` is the name of the field, as in optax; that tuples have a method of this name is no loss.

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from fxtrain import tree
from fxtrain.optim._leaves import start_count
from fxtrain.optim._masking import partition
from fxtrain.optim._transform import GradientTransformation, refuse_unless_transformation, set_to_zero

Phase = int | tuple[int, int] | None
"""The step at which training begins; or that, and the step at which it ends; or None: never."""


class ActiveWhenState(NamedTuple):
    """The memory of ``active_when``."""

    count: Tensor  # int64 []: steps seen
    inner_state: Any  # of the wrapped transformation


def active_when(tx: GradientTransformation, holds: Callable[[Tensor], Tensor]) -> GradientTransformation:
    """``tx`` while ``holds(count)``; else zeros, and its memory kept as it was.

    Args:
        tx: Any transformation.
        holds: From the number of steps before (int64 []) to a bool tensor [].

    Example:
        >>> import torch
        >>> from fxtrain import optim
        >>> tx = active_when(optim.sgd(1.0), lambda count: count >= 1)
        >>> state = tx.init(torch.tensor(0.0))
        >>> first, state = tx.update(torch.tensor(1.0), state)
        >>> second, state = tx.update(torch.tensor(1.0), state)
        >>> float(first), float(second)
        (0.0, -1.0)
    """

    refuse_unless_transformation("tx", tx)

    def init(params: Any) -> ActiveWhenState:
        return ActiveWhenState(start_count(params), tx.init(params))

    def update(updates: Any, opt_state: ActiveWhenState, params: Any = None) -> tuple[Any, ActiveWhenState]:
        active = holds(opt_state.count)
        moved, inner_state = tx.update(updates, opt_state.inner_state, params)
        return tree.where(active, moved, tree.zeros_like(moved)), ActiveWhenState(
            opt_state.count + 1, tree.where(active, inner_state, opt_state.inner_state)
        )

    return GradientTransformation(init, update)


def unfreeze(tx: GradientTransformation, phases: Mapping[str, Phase]) -> GradientTransformation:
    """``tx`` for each parameter in its own time: what is frozen gets zeros, and its memory waits.

    Counts of updates, and with them schedules and bias corrections inside ``tx``, begin where the phase begins.

    It is one graph for all phases: the gradients of what is frozen are computed and thrown away.
    ``fxtrain.with_trainable`` leaves them out of the graph, and makes a graph for each phase. What never trains takes
    no memory here either.

    Args:
        tx: Any transformation. What it does over all parameters at once, as clipping by a global norm, it does over
            those of one phase here: put it before, ``chain(clip_by_global_norm(1.0), unfreeze(adamw(3e-4), ...))``.
        phases: From patterns of a shell to phases; the first pattern that a parameter's name matches counts.

    Raises:
        ValueError: If a phase is none, or, when it runs, if a parameter matches no pattern.

    Example:
        >>> import torch
        >>> from fxtrain import optim
        >>> tx = unfreeze(optim.sgd(1.0), {"head.*": 0, "*": 1})
        >>> grads = {"body.w": torch.tensor(1.0), "head.w": torch.tensor(1.0)}
        >>> state = tx.init(grads)
        >>> first, state = tx.update(grads, state)
        >>> second, state = tx.update(grads, state)
        >>> first, second
        ({'body.w': tensor(0.), 'head.w': tensor(-1.)}, {'body.w': tensor(-1.), 'head.w': tensor(-1.)})
    """
    refuse_unless_transformation("tx", tx)
    transforms = {pattern: _during(tx, pattern, phase) for pattern, phase in phases.items()}

    def matched(path: str) -> str:
        for pattern in transforms:
            if fnmatch.fnmatchcase(path, pattern):
                return pattern
        raise ValueError(
            f"{path!r} matches none of {', '.join(map(repr, transforms))}: add a pattern, such as '*', with its phase."
        )

    label = cast(Any, torch.compiler).assume_constant_result(matched)  # Dynamo cannot look into patterns
    return partition(transforms, lambda path, leaf: label(path))


def _during(tx: GradientTransformation, pattern: str, phase: Any) -> GradientTransformation:
    match phase:
        case None:
            return set_to_zero()
        case bool():
            pass
        case 0:
            return tx
        case int(start) if start > 0:
            return active_when(tx, lambda count: count >= start)
        case (int(start), int(end)) if 0 <= start < end:
            return active_when(tx, lambda count: (count >= start) & (count < end))
        case _:
            pass
    raise ValueError(f"phases[{pattern!r}] is {phase!r}: its first step, (first, end), or None for never, is wanted.")
