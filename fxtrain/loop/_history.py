"""Records the history of a run."""

from __future__ import annotations

import array
import bisect
from collections.abc import Mapping

import numpy as np

from fxtrain.core import Epoch

_SCALARS = (int, float)


Moment = tuple[float, int, Epoch]
"""When values were published: the seconds since the session began, the data position, and the epoch.

Not a named tuple, whose constructor is slower, because there is one at each step. The epoch's length may be unknown.
"""


class HistoryRecorder:
    """Records published scalars as the points of a ``History``, and when the first of each step were published."""

    def __init__(self) -> None:
        self.points: dict[str, tuple[list[int], list[float]]] = {}
        self._steps = array.array("q")  # increasing
        self._times = array.array("d")
        self._positions = array.array("q")
        self._epochs: list[Epoch] = []

    def clock(self, steps: np.ndarray) -> dict[str, np.ndarray]:
        """Returns the fractional epochs and the times at steps, int64 [n]: float64 [n], NaN where unknown."""
        known = np.array(self._steps, dtype=np.int64)
        index = np.searchsorted(known, steps)
        is_known = np.append(known, -1)[index] == steps
        return {
            name: np.where(is_known, np.append(values, np.nan)[index], np.nan)
            for name, values in (("epoch", self._fractional_epochs()), ("time", np.array(self._times)))
        }

    def _fractional_epochs(self) -> np.ndarray:
        # The length of an epoch may be known only from where the next one begins.
        starts = {epoch.done: epoch.start for epoch in self._epochs}
        ends = {epoch.done: epoch.end or starts.get(epoch.done + 1, np.nan) for epoch in self._epochs}
        each = [(epoch.done, epoch.start, ends[epoch.done] - epoch.start) for epoch in self._epochs]
        done, start, length = np.array(each, dtype=np.float64).reshape(-1, 3).T
        return done + (np.array(self._positions) - start) / length

    def add(self, step: int, values: Mapping[str, object], moment: Moment | None = None) -> None:
        """Adds the scalars among published values. A later value of the same name and step replaces the earlier one.

        Args:
            step: Step of the values.
            values: Published values by name. Values that are not ints or floats are ignored.
            moment: When they were published.
        """
        # Steps that arrive out of order were recorded when they were taken.
        if moment is not None and (not self._steps or step > self._steps[-1]):
            time, position, epoch = moment
            self._steps.append(step)
            self._times.append(time)
            self._positions.append(position)
            self._epochs.append(epoch)
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
        count = bisect.bisect_right(self._steps, last)
        for recorded in (self._steps, self._times, self._positions, self._epochs):
            del recorded[count:]
        for name, (steps, values) in list(self.points.items()):
            kept = sum(step <= last for step in steps)
            del steps[kept:], values[kept:]
            if not steps:
                del self.points[name]
