"""Checks of arguments that are asked for everywhere."""

from __future__ import annotations

from collections.abc import Sequence
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


def refuse_unless_one_of(name: str, value: Any, choices: Sequence[Any]) -> None:
    """Refuses what is none of the choices.

    Args:
        name: The argument's.
        value: What came.
        choices: What is wanted.

    Raises:
        ValueError: In that case.

    Example:
        >>> refuse_unless_one_of("unit", "years", ("steps", "epochs"))
        Traceback (most recent call last):
        ...
        ValueError: unit='years': one of 'steps', 'epochs' is wanted.
    """
    if value not in choices:
        raise ValueError(f"{name}={value!r}: one of {', '.join(map(repr, choices))} is wanted.")
