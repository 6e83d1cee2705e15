"""Seeds, saves and restores the global random generators of Python and NumPy."""

from __future__ import annotations

import contextlib
import ctypes
import os
import random
import threading
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch

from fxtrain._torch_internals.dispatch import without_dispatch_modes
from fxtrain._torch_internals.tracing import is_traced
from fxtrain.rng._philox import Key, words

_HOST_SITE = (1 << 24) - 1  # the last site of a key, which program order never reaches
_LOCKS: dict[int, threading.RLock] = {}  # by process, because a forked worker must not inherit a held lock
_MT19937_BYTES = 625 * 4  # bytes of NumPy's Mersenne Twister: 624 words and the position
_GENERATORS: list[Any] = []  # one bit generator per nesting depth of ``seeded``


def host_seed(key: Key) -> int | None:
    """Returns a 64-bit seed for host generators as a function of the key, or None if the key has no values.

    A key has no values while a graph is traced, and under ``vmap`` over keys. Reading them synchronizes with the
    device.

    Example:
        >>> from fxtrain import rng
        >>> host_seed(rng.key(0, step=1)) == host_seed(rng.key(0, step=1)) != host_seed(rng.key(0, step=2))
        True
    """
    if is_traced():
        return None
    tensors = key.seed, key.step, key.microbatch
    try:
        with without_dispatch_modes():
            if key.seed.device.type == "cpu":
                seed, step, microbatch = map(int, tensors)
            else:
                seed, step, microbatch = torch.stack(tensors).tolist()  # one transfer
    except RuntimeError:  # batched by vmap
        return None
    low, high, *_ = words(0, _HOST_SITE, key.stream, seed, step, microbatch)
    return low | high << 32


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


def wait_for_turn(lock: threading.RLock) -> None:
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
    spare: float | None  # the second of a pair of normal samples, which NumPy caches outside the bit generator


def mark() -> Mark | None:
    """Returns a snapshot of both generators, or None while another thread has seeded them."""
    lock = _LOCKS.setdefault(os.getpid(), threading.RLock())
    if not lock.acquire(blocking=False):
        return None
    try:
        bits, spare = _numpy().get_bit_generator(), _take_spare_normal()
        if spare is not None:
            _put_spare_normal(spare)
        return Mark(random.getstate(), bits, _words(bits), spare)
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
    _numpy().set_bit_generator(before.bits)  # without a spare normal
    if before.spare is not None:
        _put_spare_normal(before.spare)
    return True


def positions() -> dict[str, object]:
    """Returns the states of both generators by name, for ``moved``."""
    return {"Python's random module": random.getstate(), "numpy.random": _comparable(_numpy().get_state(legacy=False))}


def moved(before: Mapping[str, object]) -> list[str]:
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


def state_of(generator: object) -> object:
    """Returns the state of a generator object of Python or NumPy, comparable with ``==``.

    Returns None for any other object, and for the global generators.
    """
    if any(generator is each for each in global_generators()):
        return None
    if isinstance(generator, random.Random):
        return generator.getstate()
    if isinstance(generator, np.random.RandomState):
        return _comparable(generator.get_state(legacy=False))
    bits = _bits(generator)
    return None if bits is None else _comparable(bits.state)


def set_state(generator: object, state: Any) -> None:
    """Restores a state that ``state_of`` returned, if the generator's state differs."""
    if state_of(generator) == state:
        return
    if isinstance(generator, random.Random):
        generator.setstate(state)
    elif isinstance(generator, np.random.RandomState):
        generator.set_state(_readable(state))
    else:
        _bits(generator).state = _readable(state)


def _bits(generator: object) -> Any:
    if isinstance(generator, np.random.Generator):
        return generator.bit_generator
    return generator if isinstance(generator, np.random.BitGenerator) else None


def _comparable(state: object) -> object:
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
    # Exchanges the bit generator, because reading and writing its state converts 624 words to Python integers.
    original, spare = _numpy().get_bit_generator(), _take_spare_normal()
    if len(_GENERATORS) < _here.depth:
        _GENERATORS.append(np.random.MT19937())
    _numpy().set_bit_generator(_GENERATORS[_here.depth - 1])
    _numpy().seed(seed)
    try:
        yield
    finally:
        _numpy().set_bit_generator(original)
        if spare is not None:
            _put_spare_normal(spare)


def _words(bits: object) -> bytes | None:
    """Returns the raw state of a bit generator, or None if it is not an MT19937."""
    return ctypes.string_at(bits.ctypes.state_address, _MT19937_BYTES) if isinstance(bits, np.random.MT19937) else None


def _take_spare_normal() -> float | None:
    """Removes the normal sample that NumPy caches outside its bit generator, and returns it. None if there is none.

    NumPy samples normals in pairs and caches the second one. Reading the whole state would be slow, so this function
    samples a normal. It comes from the cache if the bit generator has not advanced.
    """
    bits = _numpy().get_bit_generator()
    before = _words(bits)
    if before is None:
        state = _numpy().get_state(legacy=False)
        return state["gauss"] if state["has_gauss"] else None
    sample = _numpy().standard_normal()
    if _words(bits) == before:
        return sample
    ctypes.memmove(bits.ctypes.state_address, before, _MT19937_BYTES)
    _numpy().set_bit_generator(bits)  # discards the second sample of the new pair
    return None


def _put_spare_normal(sample: float) -> None:
    _numpy().set_state({**_numpy().get_state(legacy=False), "has_gauss": 1, "gauss": sample})


def _numpy() -> Any:
    # Untyped, because NumPy's type stubs omit the functions that exchange its bit generator. Read at each use, because
    # NumPy imports the module at the first, which takes a tenth of the time of importing fxtrain.
    return np.random


class _Here(threading.local):
    depth = 0


_here = _Here()
