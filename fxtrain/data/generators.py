"""Random numbers in users' data code, as a function of where it is: generators seeded for a while."""

from __future__ import annotations

import contextlib
import functools
import os
import random
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from fxtrain.data.order import mix

_RANDOM: Any = np.random  # of which numpy's annotations do not know all
_LOCKS: dict[int, threading.RLock] = {}  # by process: a worker forked while a lock was held must not inherit it


@contextlib.contextmanager
def seeded(*numbers: int) -> Iterator[None]:
    """Seeds the global generators of torch (CPU), Python and numpy from ``numbers``, and puts them back at the end.

    So a dataset that augments at random gives at each position what it gave before, in this process or in a
    worker. It costs about 0.05 ms. The generators belong to the whole process: here one thread waits for another, and
    code of other threads had better draw from generators of its own while ``prefetch`` runs a dataset.

    Example:
        >>> with seeded(1, 2):
        ...     first = torch.rand(()), random.random(), np.random.rand()
        >>> with seeded(1, 2):
        ...     first == (torch.rand(()), random.random(), np.random.rand())
        True
    """
    seed = mix(*numbers)
    with _LOCKS.setdefault(os.getpid(), threading.RLock()):
        states = torch.default_generator.get_state(), random.getstate()
        _here.depth += 1
        try:
            torch.default_generator.manual_seed(seed)
            random.seed(seed)
            with _numpy_seeded(seed % 2**32):
                yield
        finally:
            _here.depth -= 1
            torch.default_generator.set_state(states[0])
            random.setstate(states[1])


@contextlib.contextmanager
def _numpy_seeded(seed: int) -> Iterator[None]:
    # Its generator is exchanged for another. To read its state and put it back takes 0.1 ms: each of its 624 words
    # becomes a Python number. Of two normal numbers that are drawn at once the second is kept beside the generator,
    # and an exchange forgets it.
    theirs, spare = _RANDOM.get_bit_generator(), _spare_normal()
    if len(_OURS) < _here.depth:
        _OURS.append(np.random.MT19937())
    _RANDOM.set_bit_generator(_OURS[_here.depth - 1])
    _RANDOM.seed(seed)
    try:
        yield
    finally:
        _RANDOM.set_bit_generator(theirs)
        if spare["has_gauss"]:
            _RANDOM.set_state({**_RANDOM.get_state(legacy=False), **spare})


def _spare_normal() -> dict[str, Any]:
    """What of numpy's state is beside its generator."""
    numpys, theirs, stand_in = _RANDOM.mtrand._rand, _RANDOM.get_bit_generator(), _stand_in()
    stand_in.stands_for, stand_in.thread = theirs, threading.get_ident()
    with contextlib.suppress(AttributeError):  # a private name, without which this reads all words
        numpys._bit_generator = stand_in
    try:
        state = _RANDOM.get_state(legacy=False)
    finally:
        with contextlib.suppress(AttributeError):
            numpys._bit_generator = theirs
    return {name: state[name] for name in ("has_gauss", "gauss")}


class _StandIn(np.random.MT19937):
    """In the place of numpy's generator for a moment, without its words for the thread that does not want them."""

    stands_for: Any
    thread: int

    @property
    def state(self) -> dict[str, Any]:
        return {"bit_generator": "MT19937"} if threading.get_ident() == self.thread else self.stands_for.state


@functools.cache
def _stand_in() -> _StandIn:
    return _StandIn(0)


_OURS: list[Any] = []  # a generator of numpy's for each depth of ``seeded`` in itself


def is_seeded() -> bool:
    """Whether this thread is inside ``seeded``, so that others wait for it."""
    return _here.depth > 0


class _Here(threading.local):
    depth = 0


_here = _Here()


@contextlib.contextmanager
def borrowed(loader: Any) -> Iterator[list[torch.Generator]]:
    """The generators of a loader and of its samplers. They are put back at the end."""
    found = {id(part.generator): part.generator for part in _parts(loader) if hasattr(part, "generator")}
    generators = [generator for generator in found.values() if isinstance(generator, torch.Generator)]
    states = [generator.get_state() for generator in generators]
    try:
        yield generators
    finally:
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)


def start_epoch(loader: Any, epoch: int, seed: int) -> None:
    """Tells a loader's parts which epoch begins, and seeds its generators from (seed, epoch)."""
    for part in (*_parts(loader), getattr(loader, "dataset", None)):
        if callable(set_epoch := getattr(part, "set_epoch", None)):
            set_epoch(epoch)
        if isinstance(generator := getattr(part, "generator", None), torch.Generator):
            generator.manual_seed(mix(seed, epoch))


def _parts(loader: Any) -> list[Any]:
    batch_sampler = getattr(loader, "batch_sampler", None)
    parts = loader, getattr(loader, "sampler", None), batch_sampler, getattr(batch_sampler, "sampler", None)
    return [part for part in parts if part is not None]
