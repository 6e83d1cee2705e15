"""Seeds, saves and restores the global random generators of Python and NumPy."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import random
import threading
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

_LOCKS: dict[int, threading.RLock] = {}  # by process, because a forked worker must not inherit a held lock
_MT19937_BYTES = 625 * 4  # bytes of NumPy's Mersenne Twister: 624 words and the position
_GENERATORS: list[Any] = []  # one bit generator per nesting depth of ``seeded``


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seeds the global generators of Python and NumPy, and restores them on exit.

    The generators belong to the whole process, so other threads that enter block until this one leaves.

    Args:
        seed: A 64-bit integer.

    Example:
        >>> with seeded(1):
        ...     first = random.random(), np.random.rand()
        >>> with seeded(1):
        ...     first == (random.random(), np.random.rand())
        True
    """
    lock = _LOCKS.setdefault(os.getpid(), threading.RLock())
    wait_for_turn(lock)
    try:
        state = random.getstate()
        _here.depth += 1
        try:
            random.seed(seed)
            with _numpy_seeded(seed % 2**32):
                yield
        finally:
            _here.depth -= 1
            random.setstate(state)
    finally:
        lock.release()


def wait_for_turn(lock: Any) -> None:
    """Acquires the generator lock. The loop recognizes this wait by the function's name, and signals interrupt it."""
    try:
        lock.acquire()
    except BaseException:
        if not is_seeded():  # a signal handler may raise after the lock was acquired
            with contextlib.suppress(RuntimeError):
                lock.release()
        raise


def is_seeded() -> bool:
    """Returns whether this thread is inside ``seeded``, which blocks other threads."""
    return _here.depth > 0


class Mark(NamedTuple):
    """A snapshot of both generators, with NumPy's state as raw bytes."""

    python: Any
    bits: Any  # NumPy's bit generator
    words: Any  # its raw state, or None if it is not an MT19937
    spare: dict[str, Any]  # the second of a pair of normal samples, which NumPy caches outside the bit generator


def mark() -> Mark | None:
    """Returns a snapshot of both generators, or None while another thread has seeded them."""
    lock = _LOCKS.setdefault(os.getpid(), threading.RLock())
    if not lock.acquire(blocking=False):
        return None
    try:
        bits = _numpy().get_bit_generator()
        known = type(bits) is np.random.MT19937
        words = ctypes.string_at(bits.ctypes.state_address, _MT19937_BYTES) if known else None
        return Mark(random.getstate(), bits, words, _spare_normal())
    finally:
        lock.release()


def rewind_if_moved(before: Mark) -> bool:
    """Restores both generators to ``before`` if one has advanced since, and returns whether it did.

    Returns False if another thread has seeded the generators, or NumPy's bit generator was exchanged.

    Example:
        >>> before = mark()
        >>> _ = np.random.rand()
        >>> rewind_if_moved(before), rewind_if_moved(before)
        (True, False)
    """
    now = mark()
    if now is None or now.bits is not before.bits or now == before:
        return False
    random.setstate(before.python)
    if before.words is not None:
        ctypes.memmove(before.bits.ctypes.state_address, before.words, _MT19937_BYTES)
    _numpy().set_state({**_numpy().get_state(legacy=False), **before.spare})
    return True


def positions() -> dict[str, Any]:
    """Returns the states of both generators by name, for ``moved``."""
    return {"Python's random module": random.getstate(), "numpy.random": _comparable(_numpy().get_state(legacy=False))}


def moved(before: dict[str, Any]) -> list[str]:
    """Returns the names of the generators that have advanced since ``positions`` returned ``before``.

    Example:
        >>> with seeded(1):
        ...     before = positions()
        ...     _ = np.random.rand()
        ...     moved(before)
        ['numpy.random']
    """
    return [name for name, state in positions().items() if state != before[name]]


def global_generators() -> tuple[Any, Any]:
    """Returns the generator objects behind the functions of ``random`` and ``numpy.random``."""
    return getattr(random.random, "__self__", None), getattr(np.random.rand, "__self__", None)


def state_of(generator: Any) -> Any:
    """Returns the state of a generator object of Python or NumPy, comparable with ``==``.

    Returns None for any other object, and for the global generators.
    """
    if any(generator is each for each in global_generators()):
        return None
    if isinstance(generator, random.Random):
        return generator.getstate()
    bits = _bits(generator)
    return None if bits is None else _comparable(bits.state)


def set_state(generator: Any, state: Any) -> None:
    """Restores a state that ``state_of`` returned, if the generator's state differs."""
    if state_of(generator) == state:
        return
    if isinstance(generator, random.Random):
        generator.setstate(state)
    else:
        _bits(generator).state = _readable(state)


def _bits(generator: Any) -> Any:
    if isinstance(generator, np.random.BitGenerator):
        return generator
    if isinstance(generator, np.random.Generator):
        return generator.bit_generator
    return generator._bit_generator if isinstance(generator, np.random.RandomState) else None  # pyright: ignore


def _comparable(state: Any) -> Any:
    if isinstance(state, dict):
        return {name: _comparable(value) for name, value in state.items()}
    return ("array", state.dtype.str, state.tobytes()) if isinstance(state, np.ndarray) else state


def _readable(state: Any) -> Any:
    if isinstance(state, dict):
        return {name: _readable(value) for name, value in state.items()}
    if isinstance(state, tuple) and state[:1] == ("array",):
        return np.frombuffer(state[2], dtype=state[1])
    return state


@contextlib.contextmanager
def _numpy_seeded(seed: int) -> Iterator[None]:
    # Exchanges the bit generator, because reading and writing its state converts 624 words to Python integers. NumPy
    # samples normals in pairs and caches the second outside the bit generator. An exchange discards it.
    original, spare = _numpy().get_bit_generator(), _spare_normal()
    if len(_GENERATORS) < _here.depth:
        _GENERATORS.append(np.random.MT19937())
    _numpy().set_bit_generator(_GENERATORS[_here.depth - 1])
    _numpy().seed(seed)
    try:
        yield
    finally:
        _numpy().set_bit_generator(original)
        if spare["has_gauss"]:
            _numpy().set_state({**_numpy().get_state(legacy=False), **spare})


def _spare_normal() -> dict[str, Any]:
    """Returns the part of NumPy's state that is outside its bit generator."""
    global_state, original, stand_in = _numpy().mtrand._rand, _numpy().get_bit_generator(), _stand_in()
    stand_in.stands_for, stand_in.thread = original, threading.get_ident()
    with contextlib.suppress(AttributeError):  # without this private attribute, get_state reads all words
        global_state._bit_generator = stand_in
    try:
        state = _numpy().get_state(legacy=False)
    finally:
        with contextlib.suppress(AttributeError):
            global_state._bit_generator = original
    return {name: state[name] for name in ("has_gauss", "gauss")}


@functools.cache
def _stand_in() -> Any:
    class StandIn(np.random.MT19937):
        """Briefly replaces NumPy's bit generator, so that ``get_state`` in this thread reads no words."""

        stands_for: Any
        thread: int

        @property
        def state(self) -> dict[str, Any]:
            return {"bit_generator": "MT19937"} if threading.get_ident() == self.thread else self.stands_for.state

    return StandIn(0)


def _numpy() -> Any:
    # Untyped, because NumPy's type stubs omit the functions that exchange its bit generator. Read at each use, because
    # NumPy imports the module at the first, which takes a tenth of the time of importing fxtrain.
    return np.random


class _Here(threading.local):
    depth = 0


_here = _Here()
