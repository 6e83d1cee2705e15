"""Records the history of a run."""

from __future__ import annotations

import bisect
from collections.abc import Mapping

_SCALARS = (int, float)


class HistoryRecorder:
    """Records published scalars as the points of a ``History``."""

    def __init__(self) -> None:
        self.points: dict[str, tuple[list[int], list[float]]] = {}

    def add(self, step: int, values: Mapping[str, object]) -> None:
        """Adds the scalars among published values. A later value of the same name and step replaces the earlier one.

        Args:
            step: Step of the values.
            values: Published values by name. Values that are not ints or floats are ignored.
        """
        for name, value in values.items():
            if isinstance(value, _SCALARS):
                points = self.points.get(name)
                if points is None:
                    points = self.points[name] = ([], [])
                steps, recorded = points
                if not steps or step > steps[-1]:
                    steps.append(step)
                    recorded.append(value)
                    continue
                # Steps can repeat or arrive out of order: a second evaluation, or a save reported later.
                index = bisect.bisect_left(steps, step)
                if steps[index] != step:
                    steps.insert(index, step)
                    recorded.insert(index, value)
                recorded[index] = value

    def forget_after(self, last: int) -> None:
        """Removes the points of later steps."""
        for name, (steps, values) in list(self.points.items()):
            kept = sum(step <= last for step in steps)
            del steps[kept:], values[kept:]
            if not steps:
                del self.points[name]
