"""Seeds the host's generators from the step's key while a function runs, and refuses reads of clocks and of entropy."""

from __future__ import annotations

import contextlib
import datetime
import os
import random
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from fxtrain._torch_internals.tracing import is_traced
from fxtrain.core import name_of
from fxtrain.core._tracebacks import is_of_users, place
from fxtrain.model._captured_values import captured_clocks, captured_values
from fxtrain.rng import Key
from fxtrain.rng import _host_generators as host


class UnseededError(RuntimeError):
    """A function took random samples that do not depend on the run's seed alone, or read a clock.

    Example:
        >>> import random, torch, fxtrain as fx
        >>> class Noisy(torch.nn.Linear):
        ...     def forward(self, x):
        ...         return super().forward(x) * self.generator.random()
        >>> module = Noisy(1, 1)
        >>> module.generator = random.Random(0)
        >>> try:
        ...     fx.eval_step(lambda model, batch: model(batch).mean())(fx.init(module), torch.ones(1, 1))
        ... except fx.model.UnseededError as error:
        ...     print(error)
        expected <lambda> to take random samples from the run's seed only, got samples from model.generator (Random)...
    """


class HostSeeding:
    """Makes a context for each run of a function, in which the global host generators are seeded from a key.

    Args:
        key: The key of this call.
        function: The function that runs.
        compare: Whether to detect sampling from the host's generators. Always done if the key has no values, as in a
            trace.
        generators: Generator objects that the function can reach, with their names.

    Attributes:
        sampled: Whether the last run sampled from a global generator, if that was detected.

    Raises:
        UnseededError: On exit, if the function sampled from one of ``generators``, or from a global generator while the
            key has no values. A graph would hold the sample as a constant, and vmap would share it between members.
            Also if the function read a clock while it was traced.
    """

    def __init__(
        self, key: Key, function: Callable[..., object], *, compare: bool, generators: Iterable[tuple[str, object]] = ()
    ) -> None:
        self._seed, self._function, self._who = host.host_seed(key), function, name_of(function)
        self._compare = compare or self._seed is None
        self._generators = list(generators)
        self.sampled = False

    @contextlib.contextmanager
    def __call__(self) -> Iterator[None]:
        with host.seeded(self._seed or 0):
            if not self._compare:
                yield
                return
            before = host.positions()
            states = [host.state_of(generator) for _, generator in self._generators]
            with clock_reads(self._function) if is_traced() else contextlib.nullcontext() as read:
                yield
            if read:
                raise UnseededError(
                    f"expected {self._who} to read only its arguments while it is traced, got a read of {read[0]}, "
                    "whose value a compiled step would repeat at each call. Measure time outside the step, and pass "
                    "times and random seeds in the batch."
                )
            for (name, generator), state in zip(self._generators, states, strict=True):
                if host.state_of(generator) != state:
                    kind = type(generator).__name__
                    raise _refusal(self._who, f"samples from {name} ({kind}), which depend on earlier samples")
            moved = host.moved(before)
            self.sampled = bool(moved)
            if moved and self._seed is None:
                raise _refusal(
                    self._who,
                    f"samples from {' and '.join(moved)}, which a compiled step would repeat at each call and vmap "
                    "would share between members",
                )


def captured_generators(function: Callable[..., object]) -> list[tuple[str, object]]:
    """Returns the generator objects of Python and numpy that a function captures, with their names."""
    found: dict[int, tuple[str, Any]] = {}
    for name, value in captured_values(function):
        parts = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
        for part in (value, *parts):
            if host.state_of(part) is not None:
                found.setdefault(id(part), (name, part))
    return list(found.values())


def _refusal(who: str, what: str) -> UnseededError:
    return UnseededError(
        f"expected {who} to take random samples from the run's seed only, got {what}. Use torch's functions "
        "(torch.rand, torch.bernoulli), which follow the seed, or sample in the data and pass the samples in the batch."
    )


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
            return place(file, line) if is_of_users(file) else None
    return None


def _caller_behind_library() -> str | None:
    """Returns ``file:line`` of user code that calls through the standard library only, as with ``secrets``, or None."""
    for frame, line in traceback.walk_stack(sys._getframe(2)):
        file = frame.f_code.co_filename
        if is_of_users(file):
            return place(file, line)
        if "site-packages" in file or (file == __file__ and frame.f_code.co_name != "urandom"):
            return None
    return None
