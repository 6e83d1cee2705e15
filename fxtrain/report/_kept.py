"""What is kept of values by name and step, so that memory stays bounded however long a run is."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Generic, Protocol, TypeVar

Value = TypeVar("Value")
Curve = tuple[list[int], list[float]]  # steps, increasing, and values


class Series(Protocol):
    """Values by increasing steps, which can be thinned."""

    cost: int

    def put(self, step: int, value: Any, cost: int) -> None:
        """Adds a value. One for the last step again replaces that; steps do not go back."""
        ...

    def thin(self) -> None:
        """Drops about half."""
        ...


_Series = TypeVar("_Series", bound=Series)


class Kept(Generic[_Series]):
    """Series by name, whose costs stay within a budget: when it is exceeded, all of them are thinned.

    Args:
        make: Makes an empty series.
        budget: The most that all series together may cost.
        names: At most so many series.
    """

    def __init__(self, make: Callable[[], _Series], *, budget: int, names: int) -> None:
        self.series: dict[str, _Series] = {}
        self._make, self._budget, self._names, self._cost = make, budget, names, 0

    def put(self, name: str, step: int, value: Any, cost: int = 1) -> None:
        """Adds a value.

        Raises:
            ValueError: If the step goes back, or there is no room.
        """
        series = self.series.get(name)
        if series is None:
            if len(self.series) >= self._names or cost > self._budget:
                raise ValueError(f"expected at most {self._names:,} names, and values that fit into memory, got more")
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
        # Where thinning gives no room, the other names are kept.
        if self._cost > self._budget:
            self._cost -= self.series.pop(latest).cost
            raise ValueError("expected values that fit into memory, got more")


class Points:
    """A curve. Thinning keeps the least and the largest value of each stretch, so that no spike is lost."""

    _FEWEST = 2000  # more than a page draws

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.values: list[float] = []
        self.cost = 0

    def put(self, step: int, value: float, cost: int = 1) -> None:
        if self.steps and step <= self.steps[-1]:
            _refuse_earlier(step, self.steps[-1])
            self.values[-1] = value
        else:
            self.steps.append(step)
            self.values.append(value)
            self.cost += 1

    def thin(self) -> None:
        self.steps, self.values = thinned((self.steps, self.values), max(len(self.steps) // 2, self._FEWEST))
        self.cost = len(self.steps)


class Items(Generic[Value]):
    """Values of any kind. Thinning drops every other one, and never the last.

    Attributes:
        count: Steps there are in all.
    """

    def __init__(self) -> None:
        self._kept: list[tuple[int, Value, int]] = []  # step, value, cost
        self._stride = 1
        self.count = self.cost = 0

    @property
    def items(self) -> list[tuple[int, Value]]:
        """The steps and values that are kept, the last one included."""
        return [(step, value) for step, value, _ in self._kept]

    def put(self, step: int, value: Value, cost: int = 1) -> None:
        last = self._kept[-1] if self._kept else None
        if last is not None and step <= last[0]:
            _refuse_earlier(step, last[0])
            self._drop_last()
            self.count -= 1
        elif (self.count - 1) % self._stride:
            self._drop_last()  # it was kept only because it was the last
        self._kept.append((step, value, cost))
        self.cost += cost
        self.count += 1

    def _drop_last(self) -> None:
        self.cost -= self._kept.pop()[2]

    def thin(self) -> None:
        if len(self._kept) < 3:
            return
        self._stride *= 2
        last = self._kept[-1]
        self._kept = self._kept[::2]
        if self._kept[-1] is not last:
            self._kept.append(last)
        self.cost = sum(cost for *_, cost in self._kept)


def _refuse_earlier(step: int, last: int) -> None:
    if step < last:
        raise ValueError(f"expected a step after {last}, got {step}")


def thinned(curve: Curve, most: int) -> Curve:
    """At most so many points, 4 or more: of each stretch the least and the largest, so that no spike is lost."""
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
    """At most so many, spread over all of them, the last one included.

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
