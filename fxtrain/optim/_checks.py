"""Checks of hyperparameters when a transformation is built. Only the shape of tensors is checked, not their values."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fxtrain.equivalents import refuse_foreign


def non_negative(**values: Any) -> None:
    """Raises unless each value is at least 0."""
    for name, value in _numbers(values):
        if not value >= 0:
            raise ValueError(f"{name}={value!r}: zero or more is wanted.")


def positive(**values: Any) -> None:
    """Raises unless each value is above 0."""
    for name, value in _numbers(values):
        if not value > 0:
            raise ValueError(f"{name}={value!r}: a number above zero is wanted.")


def decay_rate(**values: Any) -> None:
    """Raises unless each value is in [0, 1)."""
    for name, value in _numbers(values):
        if not 0 <= value < 1:
            raise ValueError(f"{name}={value!r}: a decay rate lies in [0, 1).")


def _numbers(values: dict[str, Any]) -> list[tuple[str, float]]:
    numbers: list[tuple[str, float]] = []
    for name, value in values.items():
        if isinstance(value, Tensor):
            if value.ndim != 0:
                raise ValueError(f"{name} is a tensor of shape {list(value.shape)}: a 0-d tensor is wanted.")
        elif isinstance(value, bool) or not isinstance(value, int | float):
            refuse_foreign(name, "a number or a schedule", value, as_schedule=True)
            raise TypeError(f"{name}={value!r}: a number or a 0-d tensor is wanted.")
        else:
            numbers.append((name, value))
    return numbers
