"""Series of values that are downsampled to a memory budget, for runs of any length."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

Value = TypeVar("Value")
Curve = tuple[list[int], list[float]]  # steps, increasing, and values


class Points:
    """A curve. Thinning keeps the minimum and the maximum of each interval, so that spikes stay visible."""

    _MIN_POINTS = 2000  # more points than the page draws

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.values: list[float] = []
        self.cost = 0

    def put(self, step: int, value: float, cost: int = 1) -> None:
        """Adds a value, or replaces the last value if ``step`` is the same.

        Args:
            step: A step that is not before the last one.
            value: The value.
            cost: Ignored: all points take the same memory.

        Raises:
            ValueError: If ``step`` is before the last one.
        """
        if self.steps and step <= self.steps[-1]:
            _check_not_before(step, self.steps[-1])
            self.values[-1] = value
        else:
            self.steps.append(step)
            self.values.append(value)
            self.cost += 1

    def thin(self) -> None:
        """Drops about half of the values."""
        self.steps, self.values = thinned((self.steps, self.values), max(len(self.steps) // 2, self._MIN_POINTS))
        self.cost = len(self.steps)


class Items(Generic[Value]):
    """Values of any type. Thinning drops every second value, but never the last.

    Attributes:
        count: The number of steps, including those dropped.
    """

    def __init__(self) -> None:
        self._kept: list[tuple[int, Value, int]] = []  # step, value, cost
        self._stride = 1
        self.count = self.cost = 0

    @property
    def items(self) -> list[tuple[int, Value]]:
        """The retained steps and values, including the last."""
        return [(step, value) for step, value, _ in self._kept]

    def put(self, step: int, value: Value, cost: int = 1) -> None:
        """Adds a value, or replaces the last value if ``step`` is the same.

        Args:
            step: A step that is not before the last one.
            value: The value.
            cost: The memory it uses, in units of the caller.

        Raises:
            ValueError: If ``step`` is before the last one.
        """
        last = self._kept[-1] if self._kept else None
        if last is not None and step <= last[0]:
            _check_not_before(step, last[0])
            self._drop_last()
            self.count -= 1
        elif (self.count - 1) % self._stride:
            self._drop_last()  # retained only while it was the last
        self._kept.append((step, value, cost))
        self.cost += cost
        self.count += 1

    def _drop_last(self) -> None:
        self.cost -= self._kept.pop()[2]

    def thin(self) -> None:
        """Drops about half of the values."""
        if len(self._kept) < 3:
            return
        self._stride *= 2
        last = self._kept[-1]
        self._kept = self._kept[::2]
        if self._kept[-1] is not last:
            self._kept.append(last)
        self.cost = sum(cost for *_, cost in self._kept)


_Series = TypeVar("_Series", bound=Points | Items[Any])


class BoundedSeries(Generic[_Series]):
    """Series by name within a shared budget. When the total cost exceeds the budget, all series are thinned.

    Args:
        make: Creates an empty series.
        budget: The largest total cost.
        names: The largest number of series.
    """

    def __init__(self, make: Callable[[], _Series], *, budget: int, names: int) -> None:
        self.series: dict[str, _Series] = {}
        self._make, self._budget, self._names, self._cost = make, budget, names, 0

    def put(self, name: str, step: int, value: Any, cost: int = 1) -> None:
        """Adds a value to the series ``name``.

        Args:
            name: The series.
            step: A step that is not before the last one of the series.
            value: The value.
            cost: Its share of the budget.

        Raises:
            ValueError: If the step decreases, there are too many names, or the budget is exceeded even after thinning.
        """
        series = self.series.get(name)
        if series is None:
            if len(self.series) >= self._names or cost > self._budget:
                raise ValueError(
                    f"expected at most {self._names:,} names and values within the memory budget, got more"
                )
            series = self.series[name] = self._make()
        before = series.cost
        series.put(step, value, cost)
        self._cost += series.cost - before
        if self._cost > self._budget:
            self._thin(name)

    def _thin(self, latest: str) -> None:
        for series in self.series.values():
            series.thin()
        self._cost = sum(series.cost for series in self.series.values())
        # If thinning does not free enough, drop the latest series and keep the others.
        if self._cost > self._budget:
            self._cost -= self.series.pop(latest).cost
            raise ValueError("expected values within the memory budget, got more")


def _check_not_before(step: int, last: int) -> None:
    if step < last:
        raise ValueError(f"expected a step after {last}, got {step}")


def thinned(curve: Curve, most: int) -> Curve:
    """Returns at most ``most`` points: the minimum and the maximum of each of equally long intervals.

    Args:
        curve: Steps and values.
        most: The largest number of points, at least 4.
    """
    steps, values = curve
    if len(steps) <= most:
        return curve
    chosen = {0, len(steps) - 1}
    stretches = most // 2 - 1
    for index in range(stretches):
        part = range(round(index * len(steps) / stretches), round((index + 1) * len(steps) / stretches))
        finite = [i for i in part if math.isfinite(values[i])] or list(part)[:1]
        chosen |= {min(finite, key=lambda i: values[i]), max(finite, key=lambda i: values[i])}
    return [steps[i] for i in sorted(chosen)], [values[i] for i in sorted(chosen)]


def evenly(items: Sequence[Value], most: int) -> list[Value]:
    """Returns at most ``most`` items, evenly spaced and including the last.

    Args:
        items: The items to choose from.
        most: The largest number of items, at least 1.

    Example:
        >>> evenly(range(10), 4)
        [0, 3, 6, 9]
    """
    count = len(items)
    if count <= most:
        return list(items)
    if most == 1:
        return [items[-1]]
    return [items[round(index * (count - 1) / (most - 1))] for index in range(most)]
