"""Temporary seeding of the global random generators, which makes random samples in users' data code repeatable."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator

import numpy as np
import torch

from fxtrain.data._epoch_order import mix
from fxtrain.rng import _host_generators as host


@contextlib.contextmanager
def seeded(*numbers: int) -> Iterator[None]:
    """Seeds the global generators of torch (CPU), Python and numpy from ``numbers``, and restores them on exit.

    A dataset with random augmentations thus returns the same sample each time it reads a position, in this process or
    in a worker. The generators are shared by the whole process. Threads that use ``seeded`` wait for each other, and
    other threads should use separate generators while ``prefetch`` reads a dataset.

    Example:
        >>> import random
        >>> with seeded(1, 2):
        ...     first = torch.rand(()), random.random()
        >>> with seeded(1, 2):
        ...     first == (torch.rand(()), random.random())
        True
    """
    seed = mix(*numbers)
    with host.seeded(seed):
        state = torch.default_generator.get_state()
        try:
            torch.default_generator.manual_seed(seed)
            yield
        finally:
            torch.default_generator.set_state(state)


def seed_process(*numbers: int) -> None:
    """Seeds the same generators permanently, for processes in which no other code uses them."""
    seed = mix(*numbers)
    torch.default_generator.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)


@contextlib.contextmanager
def restoring_generators(loader: object) -> Iterator[list[torch.Generator]]:
    """Yields the generators of a loader and of its samplers, and restores their states on exit."""
    found = {id(generator): generator for part in _parts(loader) if (generator := getattr(part, "generator", None))}
    generators = [generator for generator in found.values() if isinstance(generator, torch.Generator)]
    states = [generator.get_state() for generator in generators]
    try:
        yield generators
    finally:
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)


def start_epoch(loader: object, epoch: int, seed: int) -> None:
    """Passes an epoch to ``set_epoch`` of a loader's parts, and seeds their generators from (seed, epoch)."""
    for part in (*_parts(loader), getattr(loader, "dataset", None)):
        if callable(set_epoch := getattr(part, "set_epoch", None)):
            set_epoch(epoch)
        if isinstance(generator := getattr(part, "generator", None), torch.Generator):
            generator.manual_seed(mix(seed, epoch))


def _parts(loader: object) -> list[object]:
    batch_sampler = getattr(loader, "batch_sampler", None)
    parts = loader, getattr(loader, "sampler", None), batch_sampler, getattr(batch_sampler, "sampler", None)
    return [part for part in parts if part is not None]
