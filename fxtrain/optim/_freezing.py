"""Freezing of parameters during parts of a run."""

# pyright: reportIncompatibleMethodOverride=false
# As in optax, states have a field named `count`, which shadows the method of tuples.

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from fxtrain import tree
from fxtrain.core import Tree, describe
from fxtrain.optim._masking import partition
from fxtrain.optim._state import start_count
from fxtrain.optim._transform import GradientTransformation, refuse_unless_transformation, set_to_zero

Phase = int | tuple[int, int] | None
"""The first step of training, or ``(first, end)`` with ``end`` exclusive, or None to never train."""


class ActiveWhenState(NamedTuple):
    """The state of ``active_when``."""

    count: Tensor  # int64 []: steps so far
    inner_state: Tree  # state of the wrapped transformation


def active_when(tx: GradientTransformation, holds: Callable[[Tensor], Tensor]) -> GradientTransformation:
    """Applies ``tx`` only while ``holds(count)`` is true.

    Otherwise the updates are zero, and the state of ``tx`` does not change.

    Args:
        tx: Any transformation.
        holds: A function from the number of earlier steps (int64 []) to a bool tensor of shape [].

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

    def update(updates: Tree, opt_state: ActiveWhenState, params: Tree | None = None) -> tuple[Tree, ActiveWhenState]:
        active = holds(opt_state.count)
        moved, inner_state = tx.update(updates, opt_state.inner_state, params)
        return tree.where(active, moved, tree.zeros_like(moved)), ActiveWhenState(
            opt_state.count + 1, tree.where(active, inner_state, opt_state.inner_state)
        )

    def init(params: Tree) -> ActiveWhenState:
        return ActiveWhenState(start_count(params), tx.init(params))

    return GradientTransformation(init, update)


def unfreeze(tx: GradientTransformation, phases: Mapping[str, Phase]) -> GradientTransformation:
    """Trains each parameter with ``tx`` only during its phase.

    Outside of it the parameter gets updates of zero, and its optimizer state does not change. Update counts inside
    ``tx``, and with them schedules and bias corrections, start when the phase starts.

    All phases share one graph, so gradients of frozen parameters are computed and discarded.
    ``fxtrain.with_trainable`` leaves them out of the graph, but retraces for each phase. Parameters that never train
    have no optimizer state in either case.

    Args:
        tx: Any transformation. Whole-tree operations, such as clipping by global norm, see only the parameters of one
            pattern here. Put them first: ``chain(clip_by_global_norm(1.0), unfreeze(adamw(3e-4), ...))``.
        phases: From shell-style patterns of parameter names to phases. The first matching pattern applies.

    Raises:
        ValueError: If a phase is invalid. At ``init``, if a parameter matches no pattern.

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
            f"expected phases to have a pattern for {path!r}, got {', '.join(map(repr, transforms))}. Add a pattern, "
            "such as '*', with its phase."
        )

    label = cast(Any, torch.compiler).assume_constant_result(matched)  # Dynamo cannot trace fnmatch
    return partition(transforms, lambda path, leaf: label(path))


def _during(tx: GradientTransformation, pattern: str, phase: Phase) -> GradientTransformation:
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
    raise ValueError(
        f"expected phases[{pattern!r}] to be a first step, (first, end) with first < end, or None for never, got "
        f"{describe(phase)}."
    )
