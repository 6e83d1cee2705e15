"""Expressions of cosines, and the error where there is no expression."""

from __future__ import annotations


class NoEquivalentError(Exception):
    """There is no expression. The message says why, and what to do."""


def half_cosine(base: float, steps: int, least: float) -> str:
    """A cosine that falls from ``base`` to ``least``."""
    if least == 0:
        return f"fx.schedules.cosine({base!r}, {steps})"
    if base == 0:
        raise NoEquivalentError(
            f"its cosine rises from 0 to {least!r}. Write a function from the step, an int64 tensor of shape [], to "
            "the learning rate."
        )
    return f"fx.schedules.cosine({base!r}, {steps}, alpha={least / base!r})"


def mirrored(base: float, steps: int, least: float) -> str:
    """A cosine that falls for ``steps`` and rises again."""
    return f"fx.schedules.cycle({half_cosine(base, steps, least)}, {steps}, mirror=True)"
