"""Records the history of a run."""

from __future__ import annotations

import array
import bisect
import itertools
from collections.abc import Mapping, Sequence

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
        # Of each event in the order of publication, in which a step can repeat or arrive late.
        self._steps = array.array("q")
        self._times = array.array("d")
        self._positions = array.array("q")
        self._epochs: list[Epoch] = []

    def clock(self, steps: np.ndarray) -> dict[str, np.ndarray]:
        """Returns the fractional epochs and the times at steps, int64 [n]: float64 [n], NaN where unknown."""
        known, first = np.unique(np.array(self._steps, dtype=np.int64), return_index=True)
        index = np.searchsorted(known, steps)
        is_known = np.append(known, -1)[index] == steps
        return {
            name: np.where(is_known, np.append(values[first], np.nan)[index], np.nan)
            for name, values in (("epoch", self._fractional_epochs()), ("time", np.array(self._times)))
        }

    def _fractional_epochs(self) -> np.ndarray:
        # The length of an epoch may be known only from where the next one begins.
        starts = {epoch.done: epoch.start for epoch in self._epochs}
        ends = {epoch.done: epoch.end or starts.get(epoch.done + 1, np.nan) for epoch in self._epochs}
        each = [(epoch.done, epoch.start, ends[epoch.done] - epoch.start) for epoch in self._epochs]
        done, start, length = np.array(each, dtype=np.float64).reshape(-1, 3).T
        return done + (np.array(self._positions) - start) / length

    def mark(self, steps: Sequence[int], moments: Sequence[Moment]) -> None:
        """Records when values were published, of many events together because that is faster.

        Args:
            steps: The step of each event.
            moments: The moment of each event.
        """
        times, positions, epochs = zip(*moments, strict=True)
        self._steps.extend(steps)
        self._times.extend(times)
        self._positions.extend(positions)
        self._epochs.extend(epochs)

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
        is_kept = [step <= last for step in self._steps]
        self._steps = array.array("q", itertools.compress(self._steps, is_kept))
        self._times = array.array("d", itertools.compress(self._times, is_kept))
        self._positions = array.array("q", itertools.compress(self._positions, is_kept))
        self._epochs = list(itertools.compress(self._epochs, is_kept))
        for name, (steps, values) in list(self.points.items()):
            kept = sum(step <= last for step in steps)
            del steps[kept:], values[kept:]
            if not steps:
                del self.points[name]
