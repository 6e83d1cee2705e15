"""How ``write`` reduces and names the values that it writes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from fxtrain.core import check_choice, describe
from fxtrain.fold import When
from fxtrain.values import HParams, Value


def _std(values: list[float]) -> float:
    with np.errstate(invalid="ignore"):  # of infinities
        return float(np.std(values))


_REDUCTIONS: Mapping[str, Callable[[list[float]], float]] = {
    "mean": lambda values: sum(values) / len(values),
    "last": lambda values: values[-1],
    "min": lambda values: float(np.min(values)),  # propagates NaN, unlike min()
    "max": lambda values: float(np.max(values)),
    "std": _std,
}
_PREFIXES = ("train", "eval", "eval_batch")


class Options(NamedTuple):
    """The options of ``write``."""

    periods: Mapping[str, When]  # by kind
    reductions: tuple[str, ...]
    prefixes: Mapping[str, str]  # by default prefix, with the slash of each
    hparams: HParams | None
    flush_seconds: float
    every_rank: bool


def checked_reductions(reduce: str | Sequence[str]) -> tuple[str, ...]:
    """Returns the argument ``reduce`` of ``write`` as names of reductions."""
    reductions = (reduce,) if isinstance(reduce, str) else tuple(reduce)
    if not reductions:
        raise ValueError('expected reduce to be at least one reduction, got none. Pass "mean".')
    for name in reductions:
        check_choice("reduce", name, tuple(_REDUCTIONS))
    return reductions


def checked_prefixes(prefixes: Mapping[str, str]) -> dict[str, str]:
    """Returns the argument ``prefixes`` of ``write``, with a slash after each prefix."""
    for default, prefix in prefixes.items():
        check_choice("a key of prefixes", default, _PREFIXES)
        if not isinstance(prefix, str):
            raise TypeError(
                f"expected prefixes[{default!r}] to be a string, got {describe(prefix)}. Pass a name such as 'val'."
            )
    chosen = [prefixes.get(default, default) for default in _PREFIXES]
    if len(set(chosen)) < len(chosen):
        raise ValueError(
            f"expected prefixes that differ from each other, got {', '.join(map(repr, chosen))} for "
            f"{', '.join(_PREFIXES)}. Change one of them."
        )
    return {default: prefix and f"{prefix.removesuffix('/')}/" for default, prefix in prefixes.items()}


def reduced(measured: Sequence[Mapping[str, float]], reductions: Sequence[str]) -> dict[str, float]:
    """Returns the metrics of steps as one point.

    Args:
        measured: The metrics of each step by name. A step may lack some.
        reductions: The first one keeps the names of the metrics, and the others add theirs.

    Example:
        >>> reduced([{"loss": 1.0}, {"loss": 3.0}], ("mean", "std"))
        {'loss': 2.0, 'loss_std': 1.0}
    """
    found: dict[str, list[float]] = {}
    for metrics in measured:
        for name, value in metrics.items():
            found.setdefault(name, []).append(value)
    first, *others = reductions
    return _united(
        {name: _REDUCTIONS[first](values) for name, values in found.items()},
        *({f"{name}_{how}": _REDUCTIONS[how](values) for name, values in found.items()} for how in others),
    )


def renamed(values: Mapping[str, Value], prefixes: Mapping[str, str]) -> Mapping[str, Value]:
    """Returns published values under the names with the chosen prefixes.

    Example:
        >>> renamed({"eval/loss": 1.0, "lr": 0.1}, {"eval": "val/"})
        {'val/loss': 1.0, 'lr': 0.1}
    """
    if not prefixes:
        return values
    named = [(name.partition("/"), value) for name, value in values.items()]
    return _united(
        *(
            {prefixes[head] + rest if slash and head in prefixes else head + slash + rest: value}
            for (head, slash, rest), value in named
        )
    )


def _united(*parts: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a union of values by name. A name that occurs twice is an error."""
    united: dict[str, Any] = {}
    for part in parts:
        for name, value in part.items():
            if name in united:
                raise ValueError(
                    f"expected one value for each name, got two values named {name!r}. Rename one of them, or set "
                    "reduce= and prefixes= of write() so that their names differ."
                )
            united[name] = value
    return united
