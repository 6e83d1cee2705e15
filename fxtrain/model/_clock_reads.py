"""Detects reads of clocks and of the operating system's entropy, whose values a graph would repeat at each call."""

from __future__ import annotations

import contextlib
import datetime
import os
import random
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any

from fxtrain.core._tracebacks import is_of_users
from fxtrain.model._captured_values import captured_clocks

_NOW = ("now", "utcnow", "today")
_ARGUMENTS_BEFORE_TIME: dict[Callable[..., object], int] = {time.strftime: 1}


@contextlib.contextmanager
def clock_reads(function: Callable[..., object]) -> Iterator[list[str]]:
    """Records reads of clocks and of ``os.urandom`` by the user's files, in this thread only.

    Args:
        function: The function that runs inside. Clocks that it imported under global names are watched too.

    Yields:
        A list to which each read appends ``call at file:line``. ``random.Random()`` without a seed counts, because it
        reads the system's entropy.
    """
    read: list[str] = []
    thread = threading.get_ident()

    def note(what: str, line: str | None) -> None:
        if line is not None and threading.get_ident() == thread:
            read.append(f"{what} at {line}")

    def watched_clock(clock: Callable[..., object]) -> Callable[..., object]:
        def watched(*args: object) -> object:
            # With an explicit time, the function does not read the clock.
            if len(args) <= _ARGUMENTS_BEFORE_TIME.get(clock, 0):
                note(f"time.{clock.__name__}()", _caller())
            return clock(*args)

        return watched

    def urandom(size: int) -> bytes:
        note("os.urandom()", _caller_behind_library())
        return before_urandom(size)

    before_urandom = os.urandom
    named = {clock: watched_clock(clock) for clock in CLOCKS}
    named[datetime.datetime] = _watched_datetime(lambda name: note(f"datetime.{name}()", _caller()))
    named[random.Random] = _watched_random(lambda: note("random.Random() without a seed", _caller()))
    changes: list[tuple[Any, str, Any]] = [
        *((vars(time), clock.__name__, named[clock]) for clock in CLOCKS),
        *((names, name, named[clock]) for names, name, clock in captured_clocks(function, WATCHED)),
        (vars(datetime), "datetime", named[datetime.datetime]),
        (vars(random), "Random", named[random.Random]),
        (vars(os), "urandom", urandom),
        (vars(random), "_urandom", urandom),
    ]
    before = [names[name] for names, name, _ in changes]
    try:
        for names, name, value in changes:
            names[name] = value
        yield read
    finally:
        for (names, name, _), value in reversed(list(zip(changes, before, strict=True))):
            names[name] = value


CLOCKS = tuple(
    getattr(time, name)
    for name in (
        *("time", "time_ns", "perf_counter", "perf_counter_ns", "monotonic", "monotonic_ns"),
        *("process_time", "process_time_ns", "thread_time", "thread_time_ns"),
        *("localtime", "gmtime", "ctime", "asctime", "strftime"),
    )
    if hasattr(time, name)
)
WATCHED = (*CLOCKS, datetime.datetime, random.Random)


def _watched_datetime(note: Callable[[str], None]) -> Any:
    """Returns a stand-in for ``datetime.datetime`` that reports reads of the clock. Its instances are real ones."""
    real = datetime.datetime

    class Meta(type):
        def __instancecheck__(cls, instance: object) -> bool:
            return isinstance(instance, real)

        def __call__(cls, *args: Any, **kwargs: Any) -> Any:
            return real(*args, **kwargs)

    def reading(name: str) -> Any:
        def read(*args: Any, **kwargs: Any) -> Any:
            note(name)
            return getattr(real, name)(*args, **kwargs)

        return staticmethod(read)

    return Meta("datetime", (real,), {name: reading(name) for name in _NOW})


def _watched_random(note: Callable[[], None]) -> Any:
    """Returns a stand-in for ``random.Random`` that reports generators without a seed. Its instances are real ones."""
    real = random.Random

    class Meta(type):
        def __instancecheck__(cls, instance: object) -> bool:
            return isinstance(instance, real) if cls is stand_in else super().__instancecheck__(instance)

        def __call__(cls, *args: Any, **kwargs: Any) -> Any:
            if cls is not stand_in:
                return super().__call__(*args, **kwargs)
            if not any(value is not None for value in (*args, *kwargs.values())):
                note()
            return real(*args, **kwargs)

    stand_in = Meta("Random", (real,), {})
    return stand_in


def _caller() -> str | None:
    """Returns ``file:line`` of the calling code, or None if it is not the user's."""
    for frame, line in traceback.walk_stack(sys._getframe(2)):
        file = frame.f_code.co_filename
        if file != __file__:
            return f"{file}:{line}" if is_of_users(file) else None
    return None


def _caller_behind_library() -> str | None:
    """Returns ``file:line`` of user code that calls through the standard library only, as with ``secrets``, or None."""
    for frame, line in traceback.walk_stack(sys._getframe(2)):
        file = frame.f_code.co_filename
        if is_of_users(file):
            return f"{file}:{line}"
        if "site-packages" in file or (file == __file__ and frame.f_code.co_name != "urandom"):
            return None
    return None
