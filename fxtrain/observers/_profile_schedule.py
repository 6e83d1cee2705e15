"""When the recordings of ``profile`` begin: on a schedule, at given steps, or at a trigger."""

from __future__ import annotations

import math
from collections.abc import Callable

from fxtrain.core import StepEnd


class Schedule:
    """Recordings after numbers of steps of a session."""

    def __init__(self, wait: int, repeat: int, skip_first: int) -> None:
        self._wait, self._repeat, self._skip_first = wait, repeat or math.inf, skip_first
        self.reset()

    def reset(self) -> None:
        """Begins a session."""
        self._taken, self._left, self._next = 0, self._repeat, self._skip_first + self._wait

    def begins(self, step: int, warmup: int) -> int:
        """Returns the number of warm-up steps of a recording that begins before a step, or 0 if none begins."""
        return warmup if self._left and self._taken >= self._next else 0

    def ended(self, event: StepEnd) -> None:
        """Counts a step."""
        self._taken += 1

    def recorded(self) -> None:
        """Counts a recording."""
        self._left -= 1
        self._next = self._taken + self._wait

    def missed(self, taken: int, warmup: int) -> str | None:
        """Returns the warning for a session in which nothing was recorded, or None."""
        return (
            f"expected a session of more than {self._skip_first + self._wait + warmup} steps to profile, got {taken}, "
            "so nothing was recorded. Pass profile() a smaller wait."
        )


class GivenSteps:
    """Recordings whose first steps are given."""

    def __init__(self, steps: frozenset[int]) -> None:
        self._steps = steps
        self._last = 0

    def reset(self) -> None:
        """Begins a session."""

    def begins(self, step: int, warmup: int) -> int:
        """Returns the number of warm-up steps, which is smaller if the session begins shortly before the recording."""
        return min((ahead for number in self._steps if 0 < (ahead := number - step) <= warmup), default=0)

    def ended(self, event: StepEnd) -> None:
        """Notes the number of a step."""
        self._last = event.step

    def recorded(self) -> None:
        """Counts a recording."""

    def missed(self, taken: int, warmup: int) -> str | None:
        """Returns the warning for a session in which nothing was recorded, or None."""
        return (
            f"expected a session with one of the steps {', '.join(map(str, sorted(self._steps)))} and a step before it "
            f"to profile, got the steps {self._last - taken + 1} to {self._last}, so nothing was recorded. Pass "
            "profile() another at."
        )


class Triggered:
    """Recordings after steps at which a trigger holds."""

    def __init__(self, holds: Callable[[StepEnd], object]) -> None:
        self._holds = holds
        self._begins = False

    def reset(self) -> None:
        """Begins a session."""
        self._begins = False

    def begins(self, step: int, warmup: int) -> int:
        """Returns the number of warm-up steps of a recording that begins before a step, or 0 if none begins."""
        return warmup if self._begins else 0

    def ended(self, event: StepEnd) -> None:
        """Evaluates the trigger."""
        self._begins = bool(self._holds(event))

    def recorded(self) -> None:
        """Counts a recording."""

    def missed(self, taken: int, warmup: int) -> str | None:
        """Returns None, because a trigger may never hold."""
        return None
