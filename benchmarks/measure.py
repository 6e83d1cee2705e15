"""Rounds of interleaved measurements and their statistics.

The speed of a machine drifts by more than the differences to be measured. Turns of one round run close together at a
similar speed, so contestants are compared within each round.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence

Seconds = dict[str, list[float]]  # one value per round


def alternate(turns: Mapping[str, Callable[[], float]], rounds: int) -> Seconds:
    """Calls each turn once per round, in rotating order, and returns the results by name.

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
    """Returns the ratio of each round."""
    return [a / b for a, b in zip(above, below, strict=True)]


def fastest(seconds: Mapping[str, Sequence[float]], names: Sequence[str]) -> str:
    """Returns the name with the lowest median, among the names that were measured.

    Example:
        >>> fastest({"a": [3, 1, 2], "b": [1, 1, 9]}, ["a", "b", "c"])
        'b'
    """
    return min((name for name in names if name in seconds), key=lambda name: statistics.median(seconds[name]))


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Returns the lower quartile, the median and the upper quartile.

    Example:
        >>> quartiles([4.0, 1.0, 2.0, 3.0, 5.0])
        (2.0, 3.0, 4.0)
    """
    if len(values) < 2:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high
