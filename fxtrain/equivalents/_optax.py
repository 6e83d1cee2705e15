"""Translates optax transformations, whose arguments are read from their closures, and names optax schedules."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from fxtrain.core import describe
from fxtrain.equivalents._expressions import NoEquivalentError

_DEFAULTS: dict[str, dict[str, Any]] = {
    "scale_by_adam": {"b1": 0.9, "b2": 0.999, "eps": 1e-8, "eps_root": 0.0, "nesterov": False},
    "scale_by_amsgrad": {"b1": 0.9, "b2": 0.999, "eps": 1e-8, "eps_root": 0.0},
    "scale_by_adamax": {"b1": 0.9, "b2": 0.999, "eps": 1e-8},
    "scale_by_lion": {"b1": 0.9, "b2": 0.99},
    "scale_by_rms": {"decay": 0.9, "eps": 1e-8, "initial_scale": 0.0, "eps_in_sqrt": True, "bias_correction": False},
    "scale_by_rss": {"initial_accumulator_value": 0.1, "eps": 1e-7},
    "scale_by_adadelta": {"rho": 0.9, "eps": 1e-6},
    "trace": {"nesterov": False},
    "scale_by_trust_ratio": {"min_norm": 0.0, "trust_coefficient": 1.0, "eps": 0.0},
}
_FIRST = {
    "trace": "decay",
    "clip_by_global_norm": "max_norm",
    "clip": "max_delta",
    "clip_by_block_rms": "threshold",
    "add_decayed_weights": "weight_decay",
    "scale": "step_size",
}
_RENAMED = {"clip": "clip_by_value"}

_REMEDY = "Build it from fx.optim, which has the names and arguments of optax"


def is_from_optax(value: object) -> bool:
    """Whether a transformation or a schedule was made by optax."""
    init = getattr(value, "init", None)
    if init is not None and hasattr(value, "update"):
        return str(getattr(init, "__module__", "")).startswith("optax")
    return callable(value) and str(getattr(value, "__module__", "")).startswith("optax")


def schedule_from_optax(schedule: object) -> str:
    """Returns the name of the optax function that made a schedule."""
    return str(getattr(schedule, "__qualname__", "schedule")).partition(".")[0]


def chained_from_optax(tx: Any) -> str:
    """Returns the expression for an optax transformation.

    Raises:
        NoEquivalentError: If a part of it cannot be read.
    """
    parts = _parts(tx.init, tx.update)
    return parts[0] if len(parts) == 1 else f"fx.optim.chain({', '.join(parts)})"


def _parts(init: Callable[..., object], update: Callable[..., object]) -> list[str]:
    name = str(init.__qualname__).partition(".")[0]
    kept = {**inspect.getclosurevars(init).nonlocals, **inspect.getclosurevars(update).nonlocals}
    if name == "chain":
        inits, updates = kept.get("init_fns", ()), kept.get("update_fns", ())
        if not inits or len(inits) != len(updates):
            raise NoEquivalentError("the chain cannot be read. Build it from fx.optim by the same names")
        return [part for pair in zip(inits, updates, strict=True) for part in _parts(*pair)]
    name = str(update.__qualname__).partition(".")[0]
    if name == "with_extra_args_support":
        return _parts(kept["tx"].init, kept["tx"].update)
    if name == "identity":
        return []
    if name in _DEFAULTS or name in _FIRST:
        return [_call(name, kept)]
    raise NoEquivalentError(f"the arguments of {name} cannot be read. {_REMEDY}")


def _call(name: str, kept: Mapping[str, object]) -> str:
    arguments: list[str] = []
    if any(kept.get(dtype) is not None for dtype in ("mu_dtype", "accumulator_dtype")):
        raise NoEquivalentError(f"{name} keeps its moments in a JAX dtype. Build it from fx.optim with a torch dtype")
    first = _FIRST.get(name)
    for argument in [*([first] if first else []), *_DEFAULTS.get(name, {})]:
        if argument not in kept:
            raise NoEquivalentError(f"the argument {argument} of {name} cannot be read. {_REMEDY}")
        value = kept[argument]
        if not isinstance(value, bool | int | float):
            raise NoEquivalentError(f"the argument {argument} of {name} is {describe(value)}. {_REMEDY}")
        if argument == first:
            arguments.append(repr(value))
        elif value != _DEFAULTS[name][argument]:
            arguments.append(f"{argument}={value!r}")
    return f"fx.optim.{_RENAMED.get(name, name)}({', '.join(arguments)})"
