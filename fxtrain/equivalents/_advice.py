"""Describes optimizers and schedulers of other libraries, with the expression to use instead."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.optim import lr_scheduler

from fxtrain.equivalents import class_of, library_of
from fxtrain.equivalents._expressions import NoEquivalentError
from fxtrain.equivalents._optax import chained_from_optax, is_from_optax, schedule_from_optax
from fxtrain.equivalents._optimizers import optimizer, optimizer_class
from fxtrain.equivalents._schedulers import schedules


def advice_on(value: object, model: object, *, as_schedule: bool) -> tuple[str, str] | None:
    """Returns a description of a foreign object and advice on its replacement; None for any other value.

    Args:
        value: The value to describe.
        model: The module that is trained, or None.
        as_schedule: Whether a scheduler is translated to a schedule alone, without its optimizer.
    """
    match value:
        case _ if (inner := _unwrapped(value)) is not None:
            return advice_on(inner, model, as_schedule=False)
        case lr_scheduler.ReduceLROnPlateau():
            return _name(type(value)), _attempt(lambda: _plateau(value, model))
        case lr_scheduler.LRScheduler() if as_schedule:
            return _name(type(value)), _attempt(lambda: _schedule(value))
        case lr_scheduler.LRScheduler():
            return _name(type(value)), _attempt(lambda: _scheduled(value, model))
        case torch.optim.Optimizer():
            return _name(type(value)), _attempt(lambda: _optimizer(value, model))
        case type() if issubclass(value, torch.optim.Optimizer):
            return f"the class {_name(value)}", _attempt(lambda: f"Use {optimizer_class(value)}.")
        case type() if issubclass(value, lr_scheduler.LRScheduler):
            advice = f"Pass the scheduler, {value.__name__}(optimizer, ...), to see its equivalent."
            return f"the class {_name(value)}", advice
        case _ if library_of(value) in ("keras", "tf_keras") and (found := _keras_counterpart(value)):
            return f"{class_of(value).__name__} of Keras", f"Use {found} with the same values."
        case _ if is_from_optax(value) and callable(value):
            name = schedule_from_optax(value)
            return f"the schedule optax.{name}", f"Use fx.schedules.{_SCHEDULES.get(name, name)} with the same values."
        case _ if is_from_optax(value):
            return "an optax transformation", _attempt(lambda: f"Use {chained_from_optax(value)}.")
        case _:
            return None


def _attempt(translate: Callable[[], str]) -> str:
    try:
        return translate()
    except NoEquivalentError as error:
        reason = str(error).rstrip(".")
    except AttributeError as error:  # private attributes of schedulers may change
        reason = f"its attributes differ in this version of torch ({error}). Build it from fx.optim and fx.schedules"
    return f"There is no equivalent expression: {reason}."


def _optimizer(value: torch.optim.Optimizer, model: object) -> str:
    advice = f"Use {optimizer(value, model)}."
    if any("initial_lr" in group for group in value.param_groups):
        advice += "\nA scheduler controls its learning rate. Pass the scheduler here to get the schedule too."
    return advice


def _scheduled(value: lr_scheduler.LRScheduler, model: object) -> str:
    bare = _unwrapped(value.optimizer) or value.optimizer
    return f"Use {optimizer(bare, model, lambda index: schedules(value, index))}.\n{_STEPS}"


def _schedule(value: lr_scheduler.LRScheduler) -> str:
    found = schedules(value, 0)
    if any(schedules(value, index) != found for index in range(1, len(value.optimizer.param_groups))):
        raise NoEquivalentError(
            "its parameter groups have different learning rates. Pass it to fx.init(module, scheduler), which prints "
            "an expression for all groups"
        )
    momentum = "" if found.momentum is None else f"\nIts momentum follows {found.momentum}."
    return f"Use {found.rate}.{momentum}\n{_STEPS}"


_STEPS = (
    "Its steps are optimizer updates. If scheduler.step() was called once per epoch, use "
    "lambda step: schedule(step // updates_per_epoch)."
)


def _plateau(value: lr_scheduler.ReduceLROnPlateau, model: object) -> str:
    if len(set(map(float, value.min_lrs))) > 1:
        raise NoEquivalentError("its min_lr differs between parameter groups. Use one minimum for all.")
    whole = optimizer(_unwrapped(value.optimizer) or value.optimizer, model, inject=True)
    # The values and their defaults.
    options: dict[str, tuple[object, object]] = {
        "hyperparam": ("lr" if "learning_rate=" not in whole else "learning_rate", "learning_rate"),
        "factor": (value.factor, 0.1),
        "patience": (value.patience, 10),
        "cooldown": (value.cooldown, 0),
        "minimum": (float(value.min_lrs[0]), 0.0),
        "mode": (value.mode, "min"),
        "min_delta": (value.threshold, 1e-4),
        "relative": (value.threshold_mode == "rel", True),
    }
    listed = "".join(f", {name}={given!r}" for name, (given, default) in options.items() if given != default)
    return (
        f"Use {whole}.\nAdd the callback fx.callbacks.reduce_on_plateau('loss'{listed}) to fx.fit, with the name of "
        "the metric at EvalEnd."
    )


def _keras_counterpart(value: object) -> str | None:
    return next((_KERAS[base.__name__] for base in class_of(value).__mro__ if base.__name__ in _KERAS), None)


_KERAS = {
    **{name: f"fx.optim.{name.lower()}" for name in ("Adadelta", "Adafactor", "Adagrad", "Adam", "Adamax", "AdamW")},
    **{name: f"fx.optim.{name.lower()}" for name in ("Lamb", "Lion", "Muon", "Nadam", "RMSprop", "SGD")},
    "ScheduleFreeAdamW": "fx.optim.adamw",
    "MultiOptimizer": "fx.optim.partition",
    "OptimizerMap": "fx.optim.partition",
    "Optimizer": "an optimizer of fx.optim",
    "LearningRateSchedule": "a schedule of fx.schedules",
    "CosineDecay": "fx.schedules.cosine",
    "CosineDecayRestarts": "fx.schedules.cycle and fx.schedules.cosine",
    "ExponentialDecay": "fx.schedules.exponential",
    "InverseTimeDecay": "the function lambda step: rate / (1 + decay * step / decay_steps)",
    "PiecewiseConstantDecay": "fx.schedules.piecewise",
    "PolynomialDecay": "fx.schedules.polynomial",
}
"""Optimizers and schedules of Keras by class name."""

_SCHEDULES = {
    "constant_schedule": "constant",
    "linear_schedule": "linear",
    "polynomial_schedule": "polynomial",
    "cosine_decay_schedule": "cosine",
    "exponential_decay": "exponential",
    "piecewise_constant_schedule": "piecewise",
    "piecewise_interpolate_schedule": "piecewise",
    "warmup_constant_schedule": "warmup",
    "warmup_cosine_decay_schedule": "warmup_cosine_decay",
    "warmup_exponential_decay_schedule": "warmup",
    "linear_onecycle_schedule": "one_cycle",
    "cosine_onecycle_schedule": "one_cycle",
    "join_schedules": "join",
    "sgdr_schedule": "join",
}


def _unwrapped(value: object) -> Any:
    """Returns the scheduler, or else the optimizer, in a list, a dict, or a wrapper of accelerate or Lightning."""
    if type(value).__module__.partition(".")[0] in _WRAPPERS:
        return getattr(value, "optimizer", None) or getattr(value, "scheduler", None)
    if not isinstance(value, list | tuple | dict) or type(value) not in (list, tuple, dict):
        return None
    parts = list(value.values() if isinstance(value, dict) else value)
    parts = [_unwrapped(part) or part for part in parts]
    ranked = [
        part for kind in (lr_scheduler.LRScheduler, torch.optim.Optimizer) for part in parts if isinstance(part, kind)
    ]
    return ranked[0] if ranked else None


_WRAPPERS = ("accelerate", "lightning", "pytorch_lightning", "lightning_fabric")


def _name(kind: type) -> str:
    module = "torch.optim" if kind.__module__.startswith("torch.optim") else kind.__module__
    if issubclass(kind, lr_scheduler.LRScheduler) and module == "torch.optim":
        module = "torch.optim.lr_scheduler"
    return f"{module}.{kind.__qualname__}"
