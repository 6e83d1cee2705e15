"""Temporary seeds for the global generators of torch, Python and numpy, whose states are restored afterwards."""

import random

import numpy as np
import pytest
import torch

from fxtrain.data._seeding import seeded


def drawn():
    return torch.rand(()).item(), random.random(), np.random.rand(), np.random.normal(), random.gauss(0, 1)


@pytest.fixture(autouse=True)
def numpys_own():
    generator = np.random.get_bit_generator()
    yield
    np.random.set_bit_generator(generator)


def test_random_samples_are_determined_by_seeds():
    found = []
    for numbers in ((1, 2), (1, 2), (2, 1)):
        with seeded(*numbers):
            found.append(drawn())
    assert found[0] == found[1]
    assert all(one != other for one, other in zip(found[1], found[2], strict=True))


@pytest.mark.parametrize("before", [0, 1, 2])  # normal samples are generated in pairs, and the second is cached
@pytest.mark.parametrize("kind", [np.random.MT19937, np.random.PCG64])
def test_generators_continue_after_temporary_seed(kind, before):
    found = []
    for interrupted in (False, True):
        torch.manual_seed(3)
        random.seed(3)
        np.random.set_bit_generator(kind(3))
        for _ in range(before):
            drawn()
        if interrupted:
            with seeded(1):
                drawn()
        found.append([drawn() for _ in range(3)])
    assert found[0] == found[1]


def test_seeded_does_not_read_the_slow_numpy_state():
    class Unread(np.random.MT19937):
        @property
        def state(self):
            raise AssertionError("read")

    np.random.set_bit_generator(Unread(3))
    with seeded(1):
        drawn()
    np.random.rand()
    with pytest.raises(AssertionError, match="read"):
        np.random.get_state()


def test_nested_seed_leaves_outer_generators_unchanged():
    with seeded(1):
        first = drawn(), drawn()
    with seeded(1):
        found = [drawn()]
        with seeded(2):
            inner = drawn()
        found.append(drawn())
    with seeded(2):
        assert inner == drawn()
    assert tuple(found) == first
