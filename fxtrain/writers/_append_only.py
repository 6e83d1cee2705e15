"""The base classes of writers to files that only grow, and the rewinds in such files."""

from __future__ import annotations

import bisect
from collections.abc import Iterable
from pathlib import Path
from typing import ClassVar

from fxtrain.disk import Appendable, is_open_here, make_folder
from fxtrain.writers._interface import Backend, explain_failure

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


class OneFile(Backend):
    """A writer to a single file, which is open from the first value on."""

    _file: Appendable | None = None

    def flush(self) -> None:
        """Syncs written values to the disk."""
        if self._file is not None:
            self._file.flush()

    def close(self) -> None:
        """Flushes and closes the file."""
        if self._file is not None:
            file, self._file = self._file, None
            file.close()


class RunLog(OneFile):
    """A writer to one file with all values of a run, and a marker for each rewind.

    A subclass defines ``name``, ``_open``, ``_steps`` and ``_mark``.
    """

    name: ClassVar[str]  # in errors

    def __init__(self, path: Path) -> None:
        self._path = path
        self._last: int | None = None  # the highest step of the run in the file, unless it is unknown
        # Opened and closed again, which repairs the file, and raises an error of the path before any value is written.
        try:
            self._opened()
        except BlockingIOError:
            # Rank 0 may be writing already, and this process be another rank, which writes nothing.
            if is_open_here(path):
                raise
        self.close()

    def _open(self) -> Appendable:
        """Repairs the file, and opens it at its end."""
        raise NotImplementedError

    def _steps(self) -> Iterable[int]:
        """Reads the steps of the run in the file."""
        raise NotImplementedError

    def _mark(self, step: int) -> None:
        """Appends a marker that the run returned to a step."""
        raise NotImplementedError

    def purge(self, step: int) -> None:
        """Marks the values of later steps as abandoned, unless there are none."""
        self._opened()
        if self._last is None:
            self._last = max(self._steps(), default=0)
        if self._last > step:
            self._mark(step)
            self._last = step

    def _append(self, step: int, record: bytes) -> None:
        self._opened().append(record)
        if self._last is not None:
            self._last = max(self._last, step)

    def _opened(self) -> Appendable:
        if self._file is None:
            with explain_failure(self.name, self._path):
                make_folder(self._path.parent)
                self._file = self._open()
            # Another writer may have changed the file since.
            self._last = None if self._file.size else 0
        return self._file
