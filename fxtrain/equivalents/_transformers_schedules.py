"""Translates the schedules of transformers, found by the function in their ``LambdaLR``, to ``fx.schedules``."""

from __future__ import annotations

from collections.abc import Callable

from fxtrain.equivalents._expressions import NoEquivalentError, half_cosine, mirrored


def _root(base: float, height: float, share: str) -> str:
    return f"lambda step: {base!r} - {height!r} * {share}(step) ** 0.5"


def _warm(after: str, steps: int) -> str:
    return f"fx.schedules.warmup({after}, {steps})" if steps else after


def _linear_warmup(base: float, *, num_warmup_steps: int, num_training_steps: int) -> str:
    left = max(1, num_training_steps - num_warmup_steps)
    return _warm(f"fx.schedules.linear({base!r}, 0.0, transition_steps={left})", num_warmup_steps)


def _constant_warmup(base: float, *, num_warmup_steps: int) -> str:
    return _warm(f"fx.schedules.constant({base!r})", num_warmup_steps)


def _cosine_warmup(
    base: float, *, num_warmup_steps: int, num_training_steps: int, num_cycles: float, min_lr_rate: float = 0.0
) -> str:
    half = _cycles(max(1, num_training_steps - num_warmup_steps), 2 * num_cycles)
    return _warm(mirrored(base, half, base * min_lr_rate), num_warmup_steps)


def _hard_restarts(base: float, *, num_warmup_steps: int, num_training_steps: int, num_cycles: float) -> str:
    left = max(1, num_training_steps - num_warmup_steps)
    period = _cycles(left, num_cycles)
    wave = f"fx.schedules.cosine({base!r}, {period})"
    if num_cycles != 1:
        wave = f"fx.schedules.cycle({wave}, {period})"
    wave = f"fx.schedules.join([{wave}, fx.schedules.constant(0.0)], [{left}])"
    return _warm(wave, num_warmup_steps)


def _cycles(steps: int, count: float) -> int:
    if count <= 0 or abs(steps / count - round(steps / count)) > 1e-9:
        raise NoEquivalentError(
            f"{steps} steps cannot be divided into {count!r} cycles of whole steps. Choose a number of cycles that "
            "divides them, and use fx.schedules.cycle."
        )
    return round(steps / count)


def _polynomial_warmup(
    base: float, *, num_warmup_steps: int, num_training_steps: int, lr_end: float, power: float, lr_init: float
) -> str:
    left = max(1, num_training_steps - num_warmup_steps)
    end = base * (lr_end / lr_init)
    decay = f"fx.schedules.polynomial({base!r}, {end!r}, power={float(power)!r}, transition_steps={left})"
    return _warm(decay, num_warmup_steps)


def _inverse_sqrt(base: float, *, num_warmup_steps: int, timescale: int) -> str:
    return _warm(f"fx.schedules.inverse_sqrt({base!r}, {timescale})", num_warmup_steps)


def _warmup_stable_decay(
    base: float,
    *,
    num_warmup_steps: int,
    num_stable_steps: int,
    num_decay_steps: int,
    warmup_type: str,
    decay_type: str,
    min_lr_ratio: float,
    num_cycles: float,
) -> str:
    least = base * min_lr_ratio
    up, down = max(1, num_warmup_steps), max(1, num_decay_steps)
    rising = {
        "linear": lambda: f"fx.schedules.linear({least!r}, {base!r}, transition_steps={up})",
        "cosine": lambda: f"lambda step: {half_cosine(base, up, least)}({up} - step)",  # reversed in time
        "1-sqrt": lambda: _root(base, base - least, f"fx.schedules.linear(1.0, 0.0, transition_steps={up})"),
    }
    falling = {
        "linear": lambda: f"fx.schedules.linear({base!r}, {least!r}, transition_steps={down})",
        "cosine": lambda: mirrored(base, _cycles(down, 2 * num_cycles), least),
        "1-sqrt": lambda: _root(base, base - least, f"fx.schedules.linear(0.0, 1.0, transition_steps={down})"),
    }
    stages = [
        (rising[warmup_type](), num_warmup_steps),
        (f"fx.schedules.constant({base!r})", num_stable_steps),
        (falling[decay_type](), num_decay_steps),
    ]
    parts = [(code, steps) for code, steps in stages if steps]
    boundaries = [sum(steps for _, steps in parts[: index + 1]) for index in range(len(parts))]
    schedules = [*(code for code, _ in parts), f"fx.schedules.constant({least!r})"]
    return f"fx.schedules.join([{', '.join(schedules)}], {boundaries})"


def _cosine_by_rate(
    base: float,
    *,
    num_warmup_steps: float,
    num_training_steps: float,
    num_cycles: float,
    min_lr_rate: float = 0.0,
    warmup_lr_rate: float | None = None,
) -> str:
    warmup, left = int(num_warmup_steps), int(max(1, num_training_steps - num_warmup_steps))
    half = _cycles(left, 2 * num_cycles)
    # transformers counts these steps from 1.
    wave = f"lambda step: {mirrored(base, half, base * min_lr_rate)}(step + 1)"
    if not warmup:
        return wave
    if warmup_lr_rate is None:
        start, end, steps = base / warmup, base + base / warmup, warmup
    else:
        start, end, steps = base * warmup_lr_rate, base, max(1, warmup - 1)
    rising = f"fx.schedules.linear({start!r}, {end!r}, transition_steps={steps})"
    return f"fx.schedules.join([{rising}, {wave}], [{warmup}])"


TRANSFORMERS: dict[str, Callable[..., str]] = {
    "_get_constant_schedule_with_warmup_lr_lambda": _constant_warmup,
    "_get_linear_schedule_with_warmup_lr_lambda": _linear_warmup,
    "_get_cosine_schedule_with_warmup_lr_lambda": _cosine_warmup,
    "_get_cosine_with_hard_restarts_schedule_with_warmup_lr_lambda": _hard_restarts,
    "_get_polynomial_decay_schedule_with_warmup_lr_lambda": _polynomial_warmup,
    "_get_inverse_sqrt_schedule_lr_lambda": _inverse_sqrt,
    "_get_wsd_scheduler_lambda": _warmup_stable_decay,
    "_get_cosine_with_min_lr_schedule_with_warmup_lr_rate_lambda": _cosine_by_rate,
}
