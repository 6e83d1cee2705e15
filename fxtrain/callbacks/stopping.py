"""Stopping: end a run when it has stopped getting better."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fxtrain import tree
from fxtrain.core import Control, EvalEnd, FitEnd, TrainState
from fxtrain.fold import Handler, slotted


class EarlyStoppingState(NamedTuple):
    """The memory of ``early_stopping``."""

    best: Tensor  # float32 []: the best value so far
    best_step: Tensor  # int64 []: where it was; -1 before the first improvement
    waited: Tensor  # int64 []: evaluations since then
    kept: Any  # the best parameters and buffers, or nothing: ()


def early_stopping(
    metric: str,
    *,
    patience: int,
    min_delta: float = 0.0,
    mode: str = "min",
    baseline: float | None = None,
    restore_best: bool = False,
    name: str = "early_stopping",
) -> Handler:
    """Stops when an evaluation metric has not improved for ``patience`` evaluations.

        improved = value < best - min_delta        (mode "min"; "max" mirrors it)
        waited   = 0 if improved else waited + 1
        stop     = waited >= patience

    A NaN is no improvement, and neither is a tie.

    Args:
        metric: Its name at ``EvalEnd``.
        patience: Evaluations without improvement, 1 or more.
        min_delta: What counts as an improvement, in the metric's units, 0 or more.
        mode: ``"min"`` or ``"max"``: which way is better.
        baseline: A value to beat; waiting begins with the first evaluation that does not.
        restore_best: Keep a copy of the best parameters and buffers in the slot, and put them into
            ``result.state`` at the end of the session. Live parameters are never touched.
        name: The slot, and the prefix of what is logged: ``<name>/best`` and ``<name>/waited``.

    Raises:
        ValueError: If an argument is out of its range.
        KeyError: When it runs, if the evaluation has no such metric.

    Example:
        >>> import torch, fxtrain as fx
        >>> callback = fx.compose(early_stopping("loss", patience=2))
        >>> state = fx.attach(fx.init(torch.nn.Linear(1, 1)), callback)
        >>> for step, loss in enumerate([3.0, 2.0, 2.5, 2.0]):
        ...     event = fx.EvalEnd(step=step, metrics={"loss": torch.tensor(loss)})
        ...     state, control = callback(state, event)
        >>> control.reasons("stop")
        ['loss has not improved for 2 evaluations']
    """
    if patience < 1:
        raise ValueError(f"patience={patience!r}: at least 1 evaluation is needed to see no improvement.")
    if not min_delta >= 0:
        raise ValueError(f"min_delta={min_delta!r}: 0 or more; `mode` says which way is better.")
    if mode not in ("min", "max"):
        raise ValueError(f"mode={mode!r}: 'min' or 'max' is wanted.")
    sign = 1.0 if mode == "min" else -1.0
    reason = f"{metric} has not improved for {patience} evaluation{'s' if patience > 1 else ''}"

    def init(state: TrainState) -> EarlyStoppingState:
        device = state.step.device
        return EarlyStoppingState(
            best=torch.tensor(sign * math.inf if baseline is None else baseline, device=device),
            best_step=torch.tensor(-1, device=device),
            waited=torch.tensor(0, device=device),
            kept=(state.params, state.buffers) if restore_best else (),
        )

    def update(state: TrainState, event: EvalEnd | FitEnd) -> tuple[TrainState, Control]:
        memory: EarlyStoppingState = state.slots[name]
        if isinstance(event, FitEnd):
            return _harvest(state, memory) if restore_best else state, Control()
        value = torch.as_tensor(_metric(event, metric), device=memory.best.device).to(memory.best.dtype)
        improved = sign * value < sign * memory.best - min_delta
        memory = EarlyStoppingState(
            best=torch.where(improved, value, memory.best),
            best_step=torch.where(improved, state.step, memory.best_step),
            waited=torch.where(improved, 0, memory.waited + 1),
            kept=tree.where(improved, (state.params, state.buffers), memory.kept) if restore_best else (),
        )
        control = Control(
            stop=memory.waited >= patience,
            reason=reason,
            log={f"{name}/best": memory.best, f"{name}/waited": memory.waited},
        )
        return state.with_slot(name, memory), control

    return slotted(name, init, update)


def _harvest(state: TrainState, memory: EarlyStoppingState) -> TrainState:
    found = memory.best_step >= 0
    params, buffers = tree.where(found, memory.kept, (state.params, state.buffers))
    return state.replace(params=params, buffers=buffers)


def _metric(event: EvalEnd, name: str) -> Any:
    if name not in event.metrics:
        there = ", ".join(map(repr, event.metrics)) or "none"
        raise KeyError(f"early_stopping watches {name!r}, and the evaluation has {there}: let eval_step measure it.")
    return event.metrics[name]
