"""Records which functions have passed the checks of their first call."""

from __future__ import annotations

import functools
import types
import weakref
from collections.abc import Callable, Hashable
from typing import Any


class CheckedFunctions:
    """Records which user functions have run a model, and whether they took random samples on the host.

    Functions that a step creates at each call are recognized by their code after a few calls.
    """

    def __init__(self) -> None:
        self._seen: dict[Hashable, tuple[Callable[[], Any], bool]] = {}
        self._codes: dict[Any, tuple[int, bool]] = {}

    def samples_on_host(self, function: Callable[..., object]) -> bool | None:
        """Returns whether calls sample from Python's or numpy's generator, or None before the first call."""
        key, part = _identity(function)
        alive, samples_on_host = self._seen.get(key, (None, False))
        if alive is not None and alive() is part:
            return samples_on_host
        count, samples_on_host = self._codes.get(_code(function), (0, False))
        return samples_on_host if count >= _MAX_CHECKED_PER_CODE else None

    def has_seen_like(self, function: Callable[..., object]) -> bool:
        """Returns whether a function with the same code has passed."""
        return _code(function) in self._codes

    def add(self, function: Callable[..., object], *, samples_on_host: bool = False) -> None:
        """Records that a call has passed.

        Args:
            function: The function that was called.
            samples_on_host: Whether it sampled from Python's or numpy's generator.
        """
        key, part = _identity(function)
        if len(self._seen) >= _MAX_ENTRIES:
            self._seen = {key: entry for key, entry in self._seen.items() if entry[0]() is not None}
        try:
            alive: Callable[[], Any] = weakref.ref(part)
        except TypeError:
            alive = functools.partial(_same, part)
        self._seen[key] = alive, samples_on_host
        count, sampled = self._codes.get(_code(function), (0, False))
        self._codes[_code(function)] = count + 1, sampled or samples_on_host


# Number of functions with the same code that are checked.
_MAX_CHECKED_PER_CODE = 8
# Number of entries at which those of deleted functions are dropped.
_MAX_ENTRIES = 64


def _same(part: object) -> object:
    return part


def _identity(function: Callable[..., object]) -> tuple[Hashable, object]:
    """Returns a key, and the object whose lifetime limits it. Bound methods are recreated at each access."""
    if isinstance(function, types.MethodType):
        return (id(function.__self__), function.__func__), function.__self__
    return id(function), function


def _code(function: Callable[..., object]) -> Hashable:
    while isinstance(function, functools.partial):
        function = function.func
    function = getattr(function, "__func__", function)
    return getattr(function, "__code__", type(function))
