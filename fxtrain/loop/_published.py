"""The event that follows each event at which values were published, and the values by their published names."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from fxtrain import metrics
from fxtrain.core import Logged, LoopEvent, Metrics, Published, did_you_mean, event_of
from fxtrain.values import METRIC_PREFIXES

_MISSING = object()
_LOOP_FIELDS = tuple(field.name for field in dataclasses.fields(LoopEvent))


def published_after(
    event: LoopEvent,
    log: Mapping[str, Logged],
    *,
    previous_time: float = 0.0,
    compute: Callable[[Metrics], Mapping[str, Any]] = metrics.compute,
) -> Published | None:
    """Returns the event to fire after ``event``, or None if nothing was published.

    Args:
        event: Any event of the loop.
        log: What was logged at it.
        previous_time: Time of the previous ``Published`` event, in seconds.
        compute: Maps the metrics of the event to values by name. Called at the first read of one.
    """
    kind = type(event)
    if kind not in METRIC_PREFIXES and not log:
        return None
    fields = event.__dict__
    values = PublishedLog(event, log, compute)
    same = {name: fields[name] for name in _LOOP_FIELDS if name in fields}
    return event_of(Published, {**same, "previous_time": previous_time, "event": event, "log": values})


class PublishedLog(Mapping[str, Any]):
    """What an event published, by the names that writers see. Metrics are computed, and flags read, when looked up.

    Args:
        event: The event, whose metrics are included if it publishes them.
        log: Logged values. Those whose flag is false are left out.
        compute: Maps the metrics of the event to values by name.
    """

    def __init__(
        self, event: LoopEvent, log: Mapping[str, Logged], compute: Callable[[Metrics], Mapping[str, Any]]
    ) -> None:
        self._event, self._log, self._compute = event, log, compute
        self._prefix = METRIC_PREFIXES.get(type(event))

    @functools.cached_property
    def _measured(self) -> Mapping[str, Any]:
        if self._prefix is None:
            return {}
        values = self._compute(getattr(self._event, "metrics"))  # noqa: B009
        return {self._prefix + name: value for name, value in values.items()}

    def _find(self, name: str) -> Any:
        entry = self._log.get(name)
        if entry is not None:
            return entry.value if entry.when else _MISSING
        return self._measured.get(name, _MISSING)

    def __getitem__(self, name: str) -> Any:
        value = self._find(name)
        if value is _MISSING:
            names = list(self)
            raise KeyError(
                f"expected a name that {type(self._event).__name__} published, got {name!r}."
                f"{did_you_mean(name, names)} Published: {', '.join(map(repr, names)) or 'nothing'}."
            )
        return value

    def get(self, name: str, default: Any = None, /) -> Any:
        value = self._find(name)
        return default if value is _MISSING else value

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and self._find(name) is not _MISSING

    def __iter__(self) -> Iterator[str]:
        yield from self._measured
        yield from (name for name, entry in self._log.items() if entry.when)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __repr__(self) -> str:
        return repr(dict(self))
