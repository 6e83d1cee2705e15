"""Callbacks that measure inside the compiled step and publish from the loop.

Cheap statistics are measured at every step, so a checkpoint holds those of its own step. Costly ones are in a
conditional branch of the graph. Publishing happens in the loop: unless its trigger holds, nothing is logged or read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from fxtrain import tree
from fxtrain._torch_internals.dispatch import is_recorded
from fxtrain.callbacks._update_stats import UpdateStats, trainable
from fxtrain.core import Control, Logged, StepEnd, TrainState, Tree, Updated
from fxtrain.fold import Handler, When, as_trigger, on, slotted

_Values = TypeVar("_Values")
_Seen = TypeVar("_Seen")


class MonitorState(NamedTuple):
    """State of a monitor."""

    step: Tensor  # int64 []: the step measured last; -1 before the first
    values: Tree  # its measurements, a pytree of tensors


def monitor(
    name: str,
    measure: Callable[[TrainState, UpdateStats, _Values | None], _Values],
    show: Callable[[TrainState, _Values], Mapping[str, object]],
    *,
    every: When = 1,
    publish: When | None = None,
) -> Handler:
    """Returns a callback that measures a step from inside and publishes from the loop.

    Args:
        name: The slot, and the prefix of the logged names.
        measure: ``measure(state, stats, before)`` returns a pytree of tensors. Only the structure and shapes of
            ``state`` may be used. ``stats`` has the weights, gradients and updates of the step. ``before`` is the
            previous measurement, or None when the slot is initialized.
        show: ``show(state, values)`` returns the values to log, by name without the prefix.
        every: When to measure: a number of steps, or a trigger, evaluated inside the step. Unless it is 1, the
            measurement is in a conditional branch of the graph.
        publish: When to publish, evaluated at ``StepEnd``; ``every`` by default. Only values measured at that same step
            are published.

    Raises:
        TypeError: If ``every`` or ``publish`` is neither an int nor a trigger.
        ValueError: If one of them is below 1.

    Example:
        >>> import torch, fxtrain as fx
        >>> def measure(state, stats, before):
        ...     return stats.sums("updates", "max").max()
        >>> largest = monitor("largest", measure, lambda state, value: {"update": value})
        >>> tx = fx.optim.sgd(0.5)
        >>> step = fx.train_step(lambda model, batch: model["w"] * batch, tx, callbacks=largest)
        >>> state = fx.attach(fx.init({"w": torch.tensor(4.0)}, tx), largest)
        >>> state, _ = step(state, torch.tensor(2.0))
        >>> fx.compose(largest)(state, fx.StepEnd(step=1, metrics={}))[1].log["largest/update"].value
        tensor(1.)
    """
    measures = as_trigger(every)
    due = measures if publish is None else as_trigger(publish, "publish")

    def init(state: TrainState) -> MonitorState:
        weights = trainable(state)
        stats = UpdateStats(weights, weights, weights, torch.zeros_like(state.due.stop))
        blank = tree.map(torch.zeros_like, measure(state, stats, None))
        return MonitorState(torch.full_like(state.step, -1), blank)

    def update(state: TrainState, event: Updated | StepEnd) -> tuple[TrainState, Control]:
        slot: MonitorState = state.slots[name]
        if isinstance(event, Updated):
            stats = UpdateStats.at(state, event)
            if every == 1:
                values = measure(state, stats, slot.values)
                return state.with_slot(name, MonitorState(event.step.clone(), values)), Control()
            flag = measures(event)
            now = flag if isinstance(flag, Tensor) else torch.full((), flag, device=event.step.device)
            seen = (stats.weights, stats.grads, stats.updates, stats.skipped)
            values = _where(now, lambda seen, old: measure(state, UpdateStats(*seen), old), seen, slot.values)
            return state.with_slot(name, MonitorState(torch.where(now, event.step, slot.step), values)), Control()
        if not due(event):
            return state, Control()
        is_of_this_step = slot.step == event.step
        shown = show(state, slot.values)
        log = {f"{name}/{key}": Logged(value, when=is_of_this_step) for key, value in shown.items()}
        return state, Control(log=log)

    return slotted(name, init, on(Updated | StepEnd, update))


def _where(flag: Tensor, function: Callable[[_Seen, _Values], _Values], seen: _Seen, otherwise: _Values) -> _Values:
    """Returns ``function(seen, otherwise)`` if the flag holds, else ``otherwise``.

    The function is called only if the flag holds, except under ``vmap``, where both branches are computed.
    """
    if not (torch.compiler.is_dynamo_compiling() or is_recorded()):
        try:
            return function(seen, otherwise) if bool(flag) else otherwise
        except RuntimeError:  # vmap: the flag has one value per member
            return tree.where(flag, function(seen, otherwise), otherwise)
    leaves, structure = tree.flatten((seen, otherwise))

    def yes(*leaves: Tensor) -> tuple[Tensor, ...]:
        return tuple(tree.leaves(function(*tree.unflatten(structure, leaves))))

    def no(*leaves: Tensor) -> tuple[Tensor, ...]:
        return tuple(leaf.clone() for leaf in tree.leaves(tree.unflatten(structure, leaves)[1]))

    # The operator itself under make_fx, because `torch.cond` would start Dynamo.
    cond: Any = torch.cond if torch.compiler.is_dynamo_compiling() else torch.ops.higher_order.cond
    return tree.unflatten(tree.structure(otherwise), cond(flag, yes, no, tuple(leaves)))
