"""Expressions of cosine schedules, and the error raised if a schedule or an optimizer has no equivalent."""

from __future__ import annotations


class NoEquivalentError(Exception):
    """Raised if there is no equivalent expression. The message says why and what to do."""


def half_cosine(base: float, steps: int, least: float) -> str:
    """Returns an expression for half a cosine, from ``base`` down to ``least``.

    Args:
        base: The value at step 0.
        steps: The length of the decay.
        least: The value from ``steps`` on.

    Raises:
        NoEquivalentError: If ``base`` is 0 and ``least`` is not.
    """
    if least == 0:
        return f"fx.schedules.cosine({base!r}, {steps})"
    if base == 0:
        raise NoEquivalentError(
            f"its cosine rises from 0 to {least!r}. Write a function that maps the step, an int64 tensor of shape [], "
            "to the learning rate."
        )
    return f"fx.schedules.cosine({base!r}, {steps}, alpha={least / base!r})"


def mirrored(base: float, steps: int, least: float) -> str:
    """Returns an expression for a full cosine, which falls for ``steps`` steps and rises again, repeatedly."""
    return f"fx.schedules.cycle({half_cosine(base, steps, least)}, {steps}, mirror=True)"
