"""Following: numbers that a function draws from Python's and numpy's generators, as a function of the step's key."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from fxtrain.fold._subscription import name_of
from fxtrain.model._captured import captured
from fxtrain.model._clocks import reads_noticed
from fxtrain.rng import Key
from fxtrain.rng import _host as host
from fxtrain.rng._tracing import host_seed, is_traced


class UnseededError(RuntimeError):
    """A function drew random numbers, or read a clock, where only the run's seed may decide."""


class Following:
    """A context, to be entered for each run of a function, in which the host's generators start from the key.

    Args:
        key: Where in the run.
        function: What is run.
        compare: Whether to notice draws; without it ``moved`` stays False.
        generators: Generator objects that the function can reach, with a name for each.

    Raises:
        UnseededError: At the end, if the function drew from one of ``generators``, or from a global generator where the
            key has no values: in a graph the draw would be a constant, and under vmap the same for all members.
            Also if it read a clock while it was traced.
    """

    def __init__(
        self, key: Key, function: Callable[..., Any], *, compare: bool, generators: Iterable[tuple[str, Any]] = ()
    ) -> None:
        self._seed, self._function, self._who = host_seed(key), function, name_of(function)
        self._compare = compare or self._seed is None
        self._generators = list(generators)
        self.moved = False

    @contextlib.contextmanager
    def __call__(self) -> Iterator[None]:
        with host.seeded(self._seed or 0):
            if not self._compare:
                yield
                return
            before = host.positions()
            states = [host.state_of(generator) for _, generator in self._generators]
            with _clocks_refused(self._function) if is_traced() else contextlib.nullcontext():
                yield
            for (name, generator), state in zip(self._generators, states, strict=True):
                if host.state_of(generator) != state:
                    kind = type(generator).__name__
                    what = f"draws from {name} ({kind}), whose numbers depend on what was drawn before"
                    raise _refusal(self._who, what)
            moved = host.moved(before)
            self.moved = bool(moved)
            if moved and self._seed is None:
                raise _refusal(
                    self._who,
                    f"draws from {' and '.join(moved)}, which a compiled step would repeat at each call and vmap for "
                    "each member",
                )


@contextlib.contextmanager
def _clocks_refused(function: Callable[..., Any]) -> Iterator[None]:
    """Raises at the end if the user's code read a clock or the operating system's entropy."""
    with reads_noticed(function) as read:
        yield
    if read:
        raise UnseededError(
            f"expected {name_of(function)} to read nothing but its arguments while it is traced, got a read of "
            f"{read[0]}, which a compiled step would repeat at each call. Measure time outside of the step, and pass a "
            "time or a random number that the step needs in the batch."
        )


def generators_in(function: Callable[..., Any]) -> list[tuple[str, Any]]:
    """The generator objects of Python and numpy that a function captured."""
    found: dict[int, tuple[str, Any]] = {}
    for name, value in captured(function):
        parts = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
        for part in (value, *parts):
            if host.state_of(part) is not None:
                found.setdefault(id(part), (name, part))
    return list(found.values())


def _refusal(who: str, what: str) -> UnseededError:
    return UnseededError(
        f"expected {who} to draw random numbers from the run's seed alone, got {what}. Draw with torch's functions "
        "(torch.rand, torch.bernoulli), which follow the seed, or in the data, and pass the numbers in."
    )
