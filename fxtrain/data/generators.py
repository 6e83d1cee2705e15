"""Random numbers in users' data code, as a function of where it is: generators seeded for a while."""

from __future__ import annotations

import contextlib
import os
import random
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from fxtrain.data.order import mix

_LOCKS: dict[int, threading.RLock] = {}  # by process: a worker forked while a lock was held must not inherit it


@contextlib.contextmanager
def seeded(*numbers: int) -> Iterator[None]:
    """Seeds the global generators of torch (CPU), Python and numpy from ``numbers``, and puts them back at the end.

    So a dataset that augments at random gives at each position what it gave before, in this process or in a
    worker. It costs about 0.1 ms. The generators belong to the whole process: here one thread waits for another, and
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
        states = torch.default_generator.get_state(), random.getstate(), np.random.get_state()
        _here.depth += 1
        try:
            torch.default_generator.manual_seed(seed)
            random.seed(seed)
            np.random.seed(seed % 2**32)
            yield
        finally:
            _here.depth -= 1
            torch.default_generator.set_state(states[0])
            random.setstate(states[1])
            np.random.set_state(states[2])


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
