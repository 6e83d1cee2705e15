"""Checks of hyperparameters when a transformation is built. Only the shape of tensors is checked, not their values."""

from __future__ import annotations

from torch import Tensor

from fxtrain.core import describe
from fxtrain.equivalents import refuse_foreign


def non_negative(**values: object) -> None:
    """Raises unless each value is at least 0."""
    for name, value in _constants(values):
        if not value >= 0:
            raise ValueError(f"expected {name} to be at least 0, got {value!r}.")


def positive(**values: object) -> None:
    """Raises unless each value is above 0."""
    for name, value in _constants(values):
        if not value > 0:
            raise ValueError(f"expected {name} to be above 0, got {value!r}.")


def decay_rate(**values: object) -> None:
    """Raises unless each value is in [0, 1)."""
    for name, value in _constants(values):
        if not 0 <= value < 1:
            raise ValueError(f"expected {name} to be in [0, 1), got {value!r}.")


def _constants(values: dict[str, object]) -> list[tuple[str, float]]:
    constants: list[tuple[str, float]] = []
    for name, value in values.items():
        if isinstance(value, Tensor):
            if value.ndim != 0:
                raise ValueError(f"expected {name} to be a float or a tensor of shape [], got {describe(value)}.")
        elif isinstance(value, bool) or not isinstance(value, int | float):
            refuse_foreign(name, "a number or a schedule", value, as_schedule=True)
            raise TypeError(f"expected {name} to be a float or a tensor of shape [], got {describe(value)}.")
        else:
            constants.append((name, value))
    return constants
