"""Checks of arguments that are asked for everywhere."""

from __future__ import annotations

from typing import Any


def refuse_unless_whole(name: str, value: Any, of: str, *, least: int = 1) -> None:
    """Refuses what is no whole number, or less than ``least``.

    Args:
        name: The argument's.
        value: What came.
        of: What it is a number of, in words.
        least: The smallest one that is wanted.

    Raises:
        ValueError: In that case.

    Example:
        >>> refuse_unless_whole("every", 0, "steps")
        Traceback (most recent call last):
        ...
        ValueError: every=0: a whole number of steps, 1 or more, is wanted.
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name}={value!r}: a whole number of {of}, {least} or more, is wanted.")
