"""Which values of an append-only log belong to the run, after it rewound or resumed from an earlier step."""

from __future__ import annotations

import bisect

REWOUND = "rewound_to"
"""The only field of a marker in a log. The values above it of steps after this one are abandoned."""


class Rewinds:
    """The rewinds of a log. A value is abandoned if a later rewind returned to a step before it.

    Example:
        >>> rewinds = Rewinds()
        >>> rewinds.add(10, 4)  # line 10 says that the run returned to step 4
        >>> rewinds.keeps(9, 4), rewinds.keeps(9, 5), rewinds.keeps(11, 5)
        (True, False, True)
    """

    def __init__(self) -> None:
        # Only those that no later rewind exceeds, so steps increase with positions.
        self._positions: list[int] = []
        self._steps: list[int] = []

    def add(self, position: int, step: int) -> None:
        """Adds a rewind.

        Args:
            position: Its position in the log, after those of all earlier rewinds.
            step: The step that it returned to.
        """
        while self._steps and self._steps[-1] >= step:
            self._steps.pop()
            self._positions.pop()
        self._positions.append(position)
        self._steps.append(step)

    def keeps(self, position: int, step: int) -> bool:
        """Returns whether a value is part of the run.

        Args:
            position: Its position in the log.
            step: Its step.
        """
        later = bisect.bisect_right(self._positions, position)
        return later == len(self._steps) or step <= self._steps[later]
