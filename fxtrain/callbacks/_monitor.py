"""Monitor: what is measured inside the step, kept with the number of its step, and published from the loop.

What is cheap is measured at every step, so a save at any step holds what belongs to it. What is costly is behind a
branch of the graph. Publishing is the loop's: where its trigger does not hold, nothing is logged and nothing read.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fxtrain import tree
from fxtrain.callbacks._update_stats import Moved, trainable
from fxtrain.core import Control, Logged, StepEnd, TrainState, Updated, check_positive_int
from fxtrain.fold import Handler, every, on, slotted

Publish = Callable[[Any], Any] | None
"""A trigger, asked at ``StepEnd``: ``fx.every(epochs=1)``, or that of the saves. By default each measured step."""


class MonitorState(NamedTuple):
    """The memory of a monitor."""

    step: Tensor  # int64 []: the step that was measured; -1 before the first
    values: Any  # what was measured there, float32 tensors


def monitor(
    name: str,
    measure: Callable[[TrainState, Moved, Any], Any],
    show: Callable[[TrainState, Any], Mapping[str, Any]],
    *,
    period: int = 1,
    publish: Publish = None,
) -> Handler:
    """A callback that measures inside the step what it moved, and publishes it from the loop.

    Args:
        name: The slot, and the prefix of what is logged.
        measure: From a state, of which only structure and shapes may be used, what moved, and what was measured before,
            or None at first, to a pytree of tensors.
        show: From a state and what was measured to what is logged, by name, without the prefix.
        period: Measure at the multiples of so many steps. Above 1, it is behind a branch of the compiled graph, which
            costs 10 us where it is not taken.
        publish: When to publish; only what was measured at that very step is.

    Example:
        >>> import torch, fxtrain as fx
        >>> def measure(state, moved, before):
        ...     return moved.sums("updates", "max").max()
        >>> largest = monitor("largest", measure, lambda state, value: {"update": value})
        >>> tx = fx.optim.sgd(0.5)
        >>> step = fx.train_step(lambda model, batch: model["w"] * batch, tx, callbacks=largest)
        >>> state = fx.attach(fx.init({"w": torch.tensor(4.0)}, tx), largest)
        >>> state, _ = step(state, torch.tensor(2.0))
        >>> fx.compose(largest)(state, fx.StepEnd(step=1, metrics={}))[1].log["largest/update"].value
        tensor(1.)
    """
    check_positive_int("every", period)
    due = every(period) if publish is None else publish

    def init(state: TrainState) -> MonitorState:
        weights = trainable(state)
        moved = Moved(weights, weights, weights, torch.zeros_like(state.due.stop))
        blank = tree.map(torch.zeros_like, measure(state, moved, None))
        return MonitorState(torch.full_like(state.step, -1), blank)

    def update(state: TrainState, event: Updated | StepEnd) -> tuple[TrainState, Control]:
        memory: MonitorState = state.slots[name]
        if isinstance(event, Updated):
            moved = Moved.at(state, event)
            if period == 1:
                values = measure(state, moved, memory.values)
                return state.with_slot(name, MonitorState(event.step.clone(), values)), Control()
            now = event.step % period == 0
            seen = (moved.weights, moved.grads, moved.updates, moved.skipped)
            values = _where(now, lambda seen, old: measure(state, Moved(*seen), old), seen, memory.values)
            return state.with_slot(name, MonitorState(torch.where(now, event.step, memory.step), values)), Control()
        if not due(event):
            return state, Control()
        is_of_this_step = memory.step == event.step
        shown = show(state, memory.values)
        log = {f"{name}/{key}": Logged(value, when=is_of_this_step) for key, value in shown.items()}
        return state, Control(log=log)

    return slotted(name, init, on(Updated | StepEnd, update))


def _where(flag: Tensor, function: Callable[[Any, Any], Any], seen: Any, otherwise: Any) -> Any:
    """``function(seen, otherwise)`` where the flag holds, ``otherwise`` elsewhere. What is not wanted is not computed,
    but under ``vmap``, where some members may want it."""
    if not _is_traced():
        try:
            return function(seen, otherwise) if bool(flag) else otherwise
        except RuntimeError:  # under vmap a flag is many
            return tree.where(flag, function(seen, otherwise), otherwise)
    leaves, structure = tree.flatten((seen, otherwise))

    def yes(*leaves: Tensor) -> tuple[Tensor, ...]:
        return tuple(tree.leaves(function(*tree.unflatten(structure, leaves))))

    def no(*leaves: Tensor) -> tuple[Tensor, ...]:
        return tuple(leaf.clone() for leaf in tree.leaves(tree.unflatten(structure, leaves)[1]))

    # `torch.cond` itself would start Dynamo, where what traces is make_fx.
    cond: Any = torch.cond if torch.compiler.is_dynamo_compiling() else torch.ops.higher_order.cond
    return tree.unflatten(tree.structure(otherwise), cond(flag, yes, no, tuple(leaves)))


def _is_traced() -> bool:
    tracer: Any = sys.modules.get("torch.fx.experimental.proxy_tensor")  # heavy to import, and there where it traces
    return torch.compiler.is_dynamo_compiling() or (tracer is not None and tracer.get_proxy_mode() is not None)
