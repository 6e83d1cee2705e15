"""History: every number that a run published, as arrays by step."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, NamedTuple

import numpy as np

from fxtrain.core import Control, EvalEnd, Rewound, StepEnd
from fxtrain.values import published

_TOGETHER = 256  # events between two readings of the device


class Series(NamedTuple):
    """One curve."""

    steps: np.ndarray  # int64 [n], increasing
    values: np.ndarray  # float64 [n]


class History(Mapping[str, Series]):
    """A mapping from names to curves, recorded by ``fit``. A rewind takes back what it abandons.

    Example:
        >>> from fxtrain import Control, EvalEnd, TrainState
        >>> history = History()
        >>> history.record(EvalEnd(step=10, metrics={"loss": 0.5}), Control())
        >>> history["eval/loss"].values.tolist()
        [0.5]
    """

    def __init__(self) -> None:
        self._points: dict[str, tuple[list[int], list[float]]] = {}
        self._unread: list[tuple[Any, Control]] = []

    ALWAYS: ClassVar[frozenset[type[Any]]] = frozenset({StepEnd, EvalEnd, Rewound})
    """The events that matter here even where nobody logs anything."""

    def record(self, event: Any, control: Control) -> None:
        """Adds what an event published.

        Args:
            event: With numbers for metrics.
            control: What was asked at it.
        """
        kind = type(event)
        if kind is StepEnd or kind is EvalEnd:
            if type(event.metrics) is dict and not self._unread:
                self._add(event.step, published(event, control))
                return
            # Read some at a time, so that the loop need not wait for the device at each step.
            self._unread.append((event, control))
            if len(self._unread) >= _TOGETHER:
                self._read()
        elif kind is Rewound:
            self._read()
            self._forget_after(event.to_step)
            self._add(event.to_step, published(event, control))
        elif control.log:
            values = published(event, control)
            self._read()
            self._add(event.step, values)

    def _read(self) -> None:
        unread, self._unread = self._unread, []
        for event, control in unread:
            self._add(event.step, published(event, control))

    def _add(self, step: int, values: Mapping[str, Any]) -> None:
        for name, value in values.items():
            if isinstance(value, int | float):
                steps, numbers = self._points.setdefault(name, ([], []))
                steps.append(step)
                numbers.append(value)

    def _forget_after(self, last: int) -> None:
        for steps, values in self._points.values():
            kept = sum(step <= last for step in steps)
            del steps[kept:], values[kept:]

    def __getitem__(self, name: str) -> Series:
        self._read()
        if name not in self._points:
            raise KeyError(f"{name!r} was not published; there are {', '.join(map(repr, self)) or 'no curves'}.")
        steps, values = self._points[name]
        return Series(np.asarray(steps, dtype=np.int64), np.asarray(values, dtype=np.float64))

    def __iter__(self) -> Iterator[str]:
        self._read()
        return iter(sorted(self._points))

    def __len__(self) -> int:
        self._read()
        return len(self._points)

    def __repr__(self) -> str:
        rows = [f"  {name}: {len(self[name].steps)} points, last {self[name].values[-1]:.6g}" for name in self]
        return "\n".join([f"History of {len(self)} curves", *rows])
