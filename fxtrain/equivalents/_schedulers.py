"""Translates learning rate schedulers of ``torch.optim`` and transformers to expressions of ``fx.schedules``."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

from torch.optim import lr_scheduler

from fxtrain.equivalents._expressions import NoEquivalentError, half_cosine, mirrored
from fxtrain.equivalents._transformers_schedules import TRANSFORMERS


class Schedules(NamedTuple):
    """The schedules that a scheduler applies to one parameter group."""

    rate: str  # expression of the learning rate
    momentum: str | None = None  # expression of the momentum or the first beta, if the scheduler cycles it


def schedules(scheduler: lr_scheduler.LRScheduler, group: int) -> Schedules:
    """Returns the expressions for one parameter group. Their steps are calls of ``scheduler.step()``.

    Args:
        scheduler: A scheduler of ``torch.optim``.
        group: The index of the parameter group.

    Raises:
        NoEquivalentError: If there is no equivalent expression.
    """
    base = _base(scheduler, group)
    match scheduler:
        case lr_scheduler.SequentialLR():
            parts = [schedules(part, group).rate for part in scheduler._schedulers]
            return Schedules(f"fx.schedules.join([{', '.join(parts)}], {list(scheduler._milestones)})")
        case lr_scheduler.ChainedScheduler():
            return Schedules(_product(list(scheduler._schedulers), group))
        case lr_scheduler.OneCycleLR():
            return _one_cycle(scheduler, group)
        case lr_scheduler.CyclicLR():
            return _cyclic(scheduler, group)
        case lr_scheduler.LambdaLR():
            return Schedules(_lambda(scheduler.lr_lambdas[group], base))
    rate = _rate(scheduler, base)
    if rate is None:
        raise NoEquivalentError(
            f"fx has no counterpart of {type(scheduler).__name__}. Write a function that maps the step, an int64 "
            "tensor of shape [], to the learning rate with tensor operations, and pass it as the learning rate."
        )
    return Schedules(rate)


def _base(scheduler: lr_scheduler.LRScheduler, group: int) -> float:
    return float(scheduler.base_lrs[group]) if hasattr(scheduler, "base_lrs") else 1.0


def _rate(given: Any, base: float) -> str | None:
    """Returns the expression for a scheduler whose rate is one function of the step, or None for other classes."""
    match type(given):  # subclasses may compute other rates
        case lr_scheduler.StepLR:
            options = f"{given.step_size}, decay_rate={given.gamma!r}, staircase=True"
            return f"fx.schedules.exponential({base!r}, {options})"
        case lr_scheduler.MultiStepLR:
            scales = {step: given.gamma**times for step, times in sorted(given.milestones.items())}
            return f"fx.schedules.piecewise({base!r}, {scales!r})"
        case lr_scheduler.ExponentialLR:
            return f"fx.schedules.exponential({base!r}, 1, decay_rate={given.gamma!r})"
        case lr_scheduler.ConstantLR:
            first, then = (f"fx.schedules.constant({value!r})" for value in (base * given.factor, base))
            # torch removes the factor when a step after 0 equals total_iters, so never if that is 0.
            return first if given.total_iters <= 0 else f"fx.schedules.join([{first}, {then}], [{given.total_iters}])"
        case lr_scheduler.LinearLR:
            start, end = base * given.start_factor, base * given.end_factor
            return f"fx.schedules.linear({start!r}, {end!r}, transition_steps={given.total_iters})"
        case lr_scheduler.PolynomialLR:
            options = f"power={float(given.power)!r}, transition_steps={given.total_iters}"
            return f"fx.schedules.polynomial({base!r}, 0.0, {options})"
        case lr_scheduler.CosineAnnealingLR:
            return mirrored(base, given.T_max, given.eta_min)
        case lr_scheduler.CosineAnnealingWarmRestarts:
            growth = f", growth={given.T_mult}" if given.T_mult != 1 else ""
            return f"fx.schedules.cycle({half_cosine(base, given.T_0, given.eta_min)}, {given.T_0}{growth})"
        case _:
            return None


def _product(parts: list[lr_scheduler.LRScheduler], group: int) -> str:
    """Translates chained schedulers, each of which multiplies the learning rate by a factor."""
    factors: list[str] = []
    for part in parts:
        shifted = getattr(part, "eta_min", 0) != 0 and len(parts) > 1
        is_product = not shifted and not isinstance(part, lr_scheduler.CosineAnnealingWarmRestarts)
        factor = _rate(part, 1.0 if factors else _base(part, group)) if is_product else None
        if factor is None:
            raise NoEquivalentError(
                f"a chain with {type(part).__name__}{' and eta_min' if shifted else ''} is not a product of schedules. "
                "Write a function that maps the step, an int64 tensor of shape [], to the learning rate."
            )
        factors.append(factor)
    if len(factors) == 1:
        return factors[0]
    return "lambda step: " + " * ".join(f"{factor}(step)" for factor in factors)


def _one_cycle(scheduler: lr_scheduler.OneCycleLR, group: int) -> Schedules:
    options = scheduler.optimizer.param_groups[group]
    ends = [phase["end_step"] for phase in scheduler._schedule_phases]
    if ends[0] <= 0 or ends != sorted(set(ends)):
        raise NoEquivalentError(
            "a phase of this OneCycleLR is shorter than a step. Use fx.schedules.cosine from the peak."
        )
    shape = "cosine" if scheduler._anneal_func_type == "cos" else "linear"

    def phases(start: str, end: str) -> str:
        values = [float(options[scheduler._schedule_phases[0][start]])]
        values += [float(options[phase[end]]) for phase in scheduler._schedule_phases]
        scales = {_whole(at): b / a for at, a, b in zip(ends, values, values[1:], strict=False)}
        return f"fx.schedules.piecewise({values[0]!r}, {scales!r}, interpolation={shape!r})"

    momentum = phases("start_momentum", "end_momentum") if scheduler.cycle_momentum else None
    return Schedules(phases("start_lr", "end_lr"), momentum)


def _whole(value: float) -> float:
    return int(value) if value == int(value) else value


def _cyclic(scheduler: lr_scheduler.CyclicLR, group: int) -> Schedules:
    up = scheduler.step_ratio * scheduler.total_size
    rising, whole = round(up), round(scheduler.total_size)
    if abs(up - rising) > 1e-6 or whole != scheduler.total_size or not 0 < rising < whole:
        raise NoEquivalentError("a CyclicLR with fractional steps has no counterpart. Use integer step sizes.")
    if scheduler._scale_fn_custom is not None:
        raise NoEquivalentError(
            "a CyclicLR with scale_fn has no counterpart. Multiply fx.schedules.cycle by a function of the step."
        )

    def triangle(base: float, peak: float) -> str:
        if scheduler.mode == "triangular":
            return _triangle(base, peak, rising, whole)
        length, rate = (whole, 0.5) if scheduler.mode == "triangular2" else (1, scheduler.gamma)
        stairs = ", staircase=True" if scheduler.mode == "triangular2" else ""
        height = f"fx.schedules.exponential({peak - base!r}, {length}, decay_rate={rate!r}{stairs})"
        return f"lambda step: {base!r} + {height}(step) * {_triangle(0.0, 1.0, rising, whole)}(step)"

    momentum = None
    if scheduler.cycle_momentum:
        momentum = triangle(float(scheduler.max_momentums[group]), float(scheduler.base_momentums[group]))
    return Schedules(triangle(float(scheduler.base_lrs[group]), float(scheduler.max_lrs[group])), momentum)


def _triangle(base: float, peak: float, rising: int, whole: int) -> str:
    up = f"fx.schedules.linear({base!r}, {peak!r}, transition_steps={rising})"
    if 2 * rising == whole:
        return f"fx.schedules.cycle({up}, {rising}, mirror=True)"
    down = f"fx.schedules.linear({peak!r}, {base!r}, transition_steps={whole - rising})"
    return f"fx.schedules.cycle(fx.schedules.join([{up}, {down}], [{rising}]), {whole})"


def _lambda(function: Callable[..., float], base: float) -> str:
    name = getattr(getattr(function, "func", function), "__name__", type(function).__name__)
    if isinstance(function, functools.partial) and name in TRANSFORMERS:
        return TRANSFORMERS[name](base, **function.keywords)
    if name == "_get_constant_lambda":
        return f"fx.schedules.constant({base!r})"
    called = "your function" if name == "<lambda>" else name
    raise NoEquivalentError(
        f"LambdaLR multiplies {base!r} by {called}, which cannot be translated. Pass "
        f"lambda step: {base!r} * factor(step) as the learning rate. factor takes an int64 tensor of shape [] and uses "
        "tensor operations: torch.where for if, torch.clamp for min and max."
    )
