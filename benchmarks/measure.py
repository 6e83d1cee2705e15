"""Measure: rounds in which everybody has a turn, in another order each time, and what comes of them.

A machine's speed drifts, by more than what is to be told apart. Turns that lie close together share it, so contestants
are compared within each round.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence

Seconds = dict[str, list[float]]  # one for each round


def alternate(turns: Mapping[str, Callable[[], float]], rounds: int) -> Seconds:
    """What each turn returned.

    Example:
        >>> order = []
        >>> turn = lambda name: lambda: order.append(name) or 1.0
        >>> alternate({name: turn(name) for name in "abc"}, rounds=2)
        {'a': [1.0, 1.0], 'b': [1.0, 1.0], 'c': [1.0, 1.0]}
        >>> "".join(order)
        'abcbca'
    """
    names = list(turns)
    seconds: Seconds = {name: [] for name in names}
    for index in range(rounds):
        first = index % len(names) if names else 0
        for name in [*names[first:], *names[:first]]:
            seconds[name].append(turns[name]())
    return seconds


def ratios(above: Sequence[float], below: Sequence[float]) -> list[float]:
    """One for each round."""
    return [a / b for a, b in zip(above, below, strict=True)]


def fastest(seconds: Mapping[str, Sequence[float]], names: Sequence[str]) -> str:
    """Whose median is lowest, of those that were measured.

    Example:
        >>> fastest({"a": [3, 1, 2], "b": [1, 1, 9]}, ["a", "b", "c"])
        'b'
    """
    return min((name for name in names if name in seconds), key=lambda name: statistics.median(seconds[name]))


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """The middle one is the median.

    Example:
        >>> quartiles([4.0, 1.0, 2.0, 3.0, 5.0])
        (2.0, 3.0, 4.0)
    """
    if len(values) < 2:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high
