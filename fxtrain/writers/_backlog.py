"""A bounded queue of writer calls, with a count of the points that were dropped."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from torch import Tensor

from fxtrain import tree
from fxtrain.core import LoopEvent, RunInfo
from fxtrain.values import Artifact, HParams, Table, Text, Value
from fxtrain.values._table import Column

MOST_POINTS = 10_000
MOST_BYTES = 2**26
_SCALAR_BYTES = 64  # approximate size of a scalar with its name


class PendingCall(NamedTuple):
    """A pending writer call. Without values, the call is a purge."""

    step: int
    values: Mapping[str, Value] | None
    event: LoopEvent | None = None
    bytes: int = 0
    milliseconds: int = 0  # since the Unix epoch, when the call was made

    @property
    def points(self) -> int:
        return 0 if self.values is None else len(self.values)

    @property
    def is_kept(self) -> bool:
        """Whether a full queue keeps the call. Purges and facts of the run are, because they are small and rare."""
        return self.values is None or any(isinstance(value, HParams | RunInfo) for value in self.values.values())


class Lost:
    """Counts points that will never be written.

    Example:
        >>> lost = Lost()
        >>> lost.add(3, 2), lost.add(9, 1)
        (None, None)
        >>> print(lost)
        3 points of steps 3 to 9
    """

    def __init__(self) -> None:
        self.points = 0
        self._first = self._last = 0

    def add(self, step: int, points: int) -> None:
        if points:
            self._first = min(self._first, step) if self.points else step
            self._last = max(self._last, step) if self.points else step
            self.points += points

    def __bool__(self) -> bool:
        return self.points > 0

    def __str__(self) -> str:
        steps = f"step {self._first}" if self._first == self._last else f"steps {self._first} to {self._last}"
        return f"{self.points} point{'s' if self.points != 1 else ''} of {steps}"


class Backlog:
    """A queue of pending writer calls. When it is full, the oldest points are dropped and counted."""

    def __init__(self) -> None:
        self._calls: deque[PendingCall] = deque()
        self.points = self._bytes = 0  # of pending calls
        self.lost = Lost()

    def __len__(self) -> int:
        return len(self._calls)

    @property
    def first(self) -> PendingCall:
        return self._calls[0]

    def add(self, call: PendingCall) -> None:
        self._calls.append(call)
        self._count(call, 1)
        while (self.points > MOST_POINTS or self._bytes > MOST_BYTES) and len(self._calls) > 1:
            oldest = next((each for each in self._calls if not each.is_kept and each is not call), None)
            if oldest is None:
                return
            self._remove(oldest)
            self.lost.add(oldest.step, oldest.points)

    def pop(self) -> PendingCall:
        call = self._calls.popleft()
        self._count(call, -1)
        return call

    def truncate_after(self, step: int) -> None:
        """Drops points after ``step``, which a rewind or resume abandoned. They do not count as lost."""
        for call in [call for call in self._calls if call.values is not None and call.step > step]:
            self._remove(call)

    def lose_all(self) -> None:
        """Drops and counts all pending points."""
        while self._calls:
            call = self.pop()
            self.lost.add(call.step, call.points)

    def _remove(self, call: PendingCall) -> None:
        self._calls = deque(each for each in self._calls if each is not call)
        self._count(call, -1)

    def _count(self, call: PendingCall, sign: int) -> None:
        self.points += sign * call.points
        self._bytes += sign * call.bytes


def pending_call(step: int, values: Mapping[str, Value], event: LoopEvent | None = None) -> PendingCall:
    """Returns a pending call with its values copied to the host, because the run reuses its tensors' buffers."""
    own = {name: on_host_copy(value) for name, value in values.items()}
    return PendingCall(int(step), own, event, sum(map(_size, own.values())), int(1000 * time.time()))


def on_host_copy(value: Value) -> Value:
    """Returns a host copy of the value, which shares no storage with it."""
    match value:
        case np.ndarray():
            return value.copy()
        case Table():
            return Table({name: tree.map(_leaf_on_host, column) for name, column in value.columns.items()})
        case HParams():
            return HParams(value.flat())
        case bool() | int() | float() | RunInfo() | Artifact():
            return value
        case _:
            return tree.map(_leaf_on_host, value)


def _leaf_on_host(leaf: object) -> object:
    return leaf.detach().to("cpu", copy=True) if isinstance(leaf, Tensor) else leaf


def _size(value: Value | Column) -> int:
    if isinstance(value, Text):
        return _SCALAR_BYTES + len(value.markdown)
    if isinstance(value, Table):
        return sum(map(_size, value.columns.values()))
    if isinstance(value, list):
        return _SCALAR_BYTES * len(value) + sum(leaf.nbytes for leaf in tree.leaves(value) if isinstance(leaf, Tensor))
    return _SCALAR_BYTES + sum(leaf.nbytes for leaf in tree.leaves(value) if isinstance(leaf, Tensor | np.ndarray))
