"""The host's global generators, of Python and numpy: seeded for a while, and then put back."""

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

_LOCKS: dict[int, threading.RLock] = {}  # by process: a forked worker must not inherit a lock that is held
_MT19937 = 625 * 4  # bytes of numpy's Mersenne twister: its words and the position among them
_GENERATORS: list[Any] = []  # one of numpy's for each depth of ``seeded`` in itself


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seeds the global generators of Python and numpy, and puts them back at the end.

    The generators belong to the whole process, so other threads that enter wait until this one leaves. It costs some
    tens of microseconds.

    Args:
        seed: An integer of 64 bits.

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
    """Takes the lock of the generators. The loop leaves this wait when a signal arrives; it knows it by its name."""
    try:
        lock.acquire()
    except BaseException:
        if not is_seeded():  # an exception of a signal's handler may come when the lock was taken
            with contextlib.suppress(RuntimeError):
                lock.release()
        raise


def is_seeded() -> bool:
    """Whether this thread is inside ``seeded``, so that other threads wait for it."""
    return _here.depth > 0


class Mark(NamedTuple):
    """The state of both generators, copied as memory: some microseconds."""

    python: Any
    bits: Any  # numpy's generator object
    words: Any  # its memory; None for a kind of generator that is not known here
    spare: dict[str, Any]  # the second of a pair of normal numbers, which numpy keeps beside the generator


def mark() -> Mark | None:
    """Marks where both generators are; None while another thread has seeded them."""
    lock = _LOCKS.setdefault(os.getpid(), threading.RLock())
    if not lock.acquire(blocking=False):
        return None
    try:
        bits = _numpy().get_bit_generator()
        known = type(bits) is np.random.MT19937
        words = ctypes.string_at(bits.ctypes.state_address, _MT19937) if known else None
        return Mark(random.getstate(), bits, words, _spare_normal())
    finally:
        lock.release()


def rewind_if_moved(before: Mark) -> bool:
    """Whether one of the generators has drawn numbers since ``before``. If so, both are put back there.

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
        ctypes.memmove(before.bits.ctypes.state_address, before.words, _MT19937)
    _numpy().set_state({**_numpy().get_state(legacy=False), **before.spare})
    return True


def positions() -> dict[str, Any]:
    """The states of both generators by name, to be compared with ``moved``. Costs about 0.05 ms."""
    return {"Python's random module": random.getstate(), "numpy.random": _comparable(_numpy().get_state(legacy=False))}


def moved(before: dict[str, Any]) -> list[str]:
    """The names of the generators that have drawn numbers since ``positions`` returned ``before``.

    Example:
        >>> with seeded(1):
        ...     before = positions()
        ...     _ = np.random.rand()
        ...     moved(before)
        ['numpy.random']
    """
    return [name for name, state in positions().items() if state != before[name]]


def global_generators() -> tuple[Any, Any]:
    """The generator objects behind the functions of both modules."""
    return getattr(random.random, "__self__", None), getattr(np.random.rand, "__self__", None)


def state_of(generator: Any) -> Any:
    """The state of a generator object of Python or numpy, comparable by ``==``; None for any other object.

    The global generators count as other objects.
    """
    if any(generator is each for each in global_generators()):
        return None
    if isinstance(generator, random.Random):
        return generator.getstate()
    bits = _bits(generator)
    return None if bits is None else _comparable(bits.state)


def set_state(generator: Any, state: Any) -> None:
    """Gives a generator object the state that ``state_of`` returned, if it has another."""
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
    # The generator is exchanged for another, because reading its state and writing it back takes 0.1 ms: each of its
    # 624 words becomes a Python number. Normal numbers are drawn in pairs; the second is kept beside the generator, and
    # an exchange forgets it.
    theirs, spare = _numpy().get_bit_generator(), _spare_normal()
    if len(_GENERATORS) < _here.depth:
        _GENERATORS.append(np.random.MT19937())
    _numpy().set_bit_generator(_GENERATORS[_here.depth - 1])
    _numpy().seed(seed)
    try:
        yield
    finally:
        _numpy().set_bit_generator(theirs)
        if spare["has_gauss"]:
            _numpy().set_state({**_numpy().get_state(legacy=False), **spare})


def _spare_normal() -> dict[str, Any]:
    """The part of numpy's state that is beside its generator."""
    numpys, theirs, stand_in = _numpy().mtrand._rand, _numpy().get_bit_generator(), _stand_in()
    stand_in.stands_for, stand_in.thread = theirs, threading.get_ident()
    with contextlib.suppress(AttributeError):  # a private name, without which this reads all words
        numpys._bit_generator = stand_in
    try:
        state = _numpy().get_state(legacy=False)
    finally:
        with contextlib.suppress(AttributeError):
            numpys._bit_generator = theirs
    return {name: state[name] for name in ("has_gauss", "gauss")}


@functools.cache
def _stand_in() -> Any:
    class StandIn(np.random.MT19937):
        """Replaces numpy's generator for a moment. The thread that put it there reads no words from it."""

        stands_for: Any
        thread: int

        @property
        def state(self) -> dict[str, Any]:
            return {"bit_generator": "MT19937"} if threading.get_ident() == self.thread else self.stands_for.state

    return StandIn(0)


def _numpy() -> Any:
    # Without types, because numpy's annotations omit the functions that exchange its generator. numpy imports this
    # module at its first use, which costs a tenth of the import of this library.
    return np.random


class _Here(threading.local):
    depth = 0


_here = _Here()
