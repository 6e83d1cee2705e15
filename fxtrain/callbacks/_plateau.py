"""Callbacks that change injected hyperparameters between steps, without recompiling."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fxtrain import optim
from fxtrain.callbacks._watched_metric import Better, Metric, direction, measured, needing
from fxtrain.core import Control, EpochBegin, EvalEnd, StepEnd, TrainState, check_int, describe, wide_dtype
from fxtrain.equivalents import refuse_foreign, with_known_arguments
from fxtrain.fold import Handler, slotted
from fxtrain.fold._settings import accepts_settings_per_member


class ReduceOnPlateauState(NamedTuple):
    """State of ``reduce_on_plateau``."""

    best: Tensor  # float64 []: the best value so far
    bad: Tensor  # int64 []: consecutive evaluations without improvement
    cooldown: Tensor  # int64 []: evaluations left in the cooldown
    reductions: Tensor  # int64 []: reductions so far


@with_known_arguments
@accepts_settings_per_member
def reduce_on_plateau(
    metric: Metric,
    *,
    hyperparam: str = "learning_rate",
    factor: float = 0.1,
    patience: int | Tensor = 10,
    cooldown: int = 0,
    minimum: float = 0.0,
    mode: str | Better = "min",
    min_delta: float | None = None,
    relative: bool | None = None,
    name: str = "reduce_on_plateau",
) -> Handler:
    """Multiplies a hyperparameter by ``factor`` when a metric has not improved for more than ``patience`` evaluations.

        bad   = 0 if improved or cooling down else bad + 1
        value = max(factor * value, minimum) if bad > patience

    After a reduction ``bad`` restarts at 0, and the next ``cooldown`` evaluations are not counted. Defaults and
    semantics are those of ``torch.optim.lr_scheduler.ReduceLROnPlateau``, except that the relative margin of a negative
    best value is a fraction of its absolute value.

    Args:
        metric: Metric name at ``EvalEnd``, or a function of all metrics there.
        hyperparam: Name of a hyperparameter in the optimizer state, put there by ``fxtrain.optim.inject_hyperparams``.
            If several have this name, all are changed.
        factor: Between 0 and 1, exclusive.
        patience: Evaluations without improvement to tolerate, 0 or more. Of a batch of runs, numbers may be tensors
            [members], as for ``early_stopping``.
        cooldown: Evaluations to ignore after a reduction, 0 or more.
        minimum: Lower bound of reductions.
        mode: As for ``early_stopping``.
        min_delta: As for ``early_stopping``; 1e-4 by default, or no margin if ``mode`` is a function.
        relative: As for ``early_stopping``; True by default, or False if ``mode`` is a function.
        name: The slot, and the prefix of the logged name: ``<name>/<hyperparam>``.

    Raises:
        ValueError: If an argument is out of range, or, at run time, if the optimizer state has no such hyperparameter.
        KeyError: At run time, if the evaluation has no such metric.

    Example:
        >>> import torch, fxtrain as fx
        >>> tx = fx.optim.inject_hyperparams(fx.optim.sgd)(learning_rate=1.0)
        >>> callback = fx.compose(reduce_on_plateau("loss", patience=1, factor=0.5))
        >>> state = fx.attach(fx.init(torch.nn.Linear(1, 1), tx), callback)
        >>> for step, loss in enumerate([3.0, 2.0, 2.0, 2.0], start=1):
        ...     event = fx.EvalEnd(step=step, metrics={"loss": torch.tensor(loss)})
        ...     state, control = callback(state, event)
        >>> fx.optim.get_hyperparams(state.opt_state)
        {'learning_rate': tensor(0.5000)}
    """
    if not 0 < factor < 1:
        raise ValueError(f"expected factor to be between 0 and 1, got {describe(factor)}.")
    for argument, value in (("patience", patience), ("cooldown", cooldown)):
        check_int(argument, value, minimum=0)
    better, worst = direction(
        mode,
        min_delta=min_delta if min_delta is not None else 0.0 if callable(mode) else 1e-4,
        relative=not callable(mode) if relative is None else relative,
    )

    def init(state: TrainState) -> ReduceOnPlateauState:
        zero = torch.zeros_like(state.step)
        best = torch.tensor(worst, dtype=wide_dtype(zero.device), device=zero.device)
        return ReduceOnPlateauState(best, zero, zero.clone(), zero.clone())

    def update(state: TrainState, event: EvalEnd) -> tuple[TrainState, Control]:
        slot: ReduceOnPlateauState = state.slots[name]
        value = measured(event, metric, name, slot.best.device)
        improved = better(value, slot.best)
        cooling = slot.cooldown > 0
        bad = torch.where(improved | cooling, 0, slot.bad + 1)
        reduce = bad > patience
        opt_state = optim.set_hyperparams(
            state.opt_state,
            **{hyperparam: lambda old: torch.where(reduce, torch.clamp(old * factor, min=minimum).minimum(old), old)},
        )
        slot = ReduceOnPlateauState(
            best=torch.where(improved, value.to(slot.best.dtype), slot.best),
            bad=torch.where(reduce, 0, bad),
            cooldown=torch.where(reduce, cooldown, torch.clamp(slot.cooldown - 1, min=0)),
            reductions=slot.reductions + reduce,
        )
        state = state.replace(opt_state=opt_state).with_slot(name, slot)
        found = optim.get_hyperparams(opt_state).items()
        log = {f"{name}/{path}": changed for path, changed in found if path.rpartition(".")[2] == hyperparam}
        return state, Control(log=log)

    return needing(slotted(name, init, update), metric)


def schedule_hyperparam(hyperparam: str, schedule: Callable[[Tensor], Tensor | float]) -> Handler:
    """Sets an injected hyperparameter, such as weight decay or momentum, from a schedule.

        value(step) = schedule(steps taken before it)

    The value for the next step is set at ``EpochBegin`` and after each step, at the cost of a few small operations. A
    schedule given to ``inject_hyperparams`` itself is computed inside the step at no extra cost.

    Args:
        hyperparam: Name of the hyperparameter, as for ``reduce_on_plateau``.
        schedule: Maps the number of steps taken, int64 [], to the value. See ``fxtrain.schedules``.

    Raises:
        ValueError: At run time, if the optimizer state has no such hyperparameter.

    Example:
        >>> import torch, fxtrain as fx
        >>> tx = fx.optim.inject_hyperparams(fx.optim.adamw)(learning_rate=0.1, weight_decay=0.0)
        >>> callback = schedule_hyperparam("weight_decay", fx.schedules.linear(0.0, 1.0, transition_steps=10))
        >>> state = fx.init(torch.nn.Linear(1, 1), tx).replace(step=torch.tensor(5))
        >>> state, _ = callback(state, fx.StepEnd(step=5, metrics={}))
        >>> fx.optim.get_hyperparams(state.opt_state)["weight_decay"]
        tensor(0.5000)
    """

    refuse_foreign("schedule", "a function of the step", schedule, as_schedule=True)

    def update(state: TrainState, event: EpochBegin | StepEnd) -> tuple[TrainState, Control]:
        value = torch.as_tensor(schedule(state.step))
        opt_state = optim.set_hyperparams(state.opt_state, **{hyperparam: lambda old: value.to(old)})
        return state.replace(opt_state=opt_state), Control()

    return Handler(f"schedule_hyperparam {hyperparam}", update, frozenset({EpochBegin, StepEnd}))
