"""One thread: bitwise claims hold for one thread count, and two cores are shared."""

import signal

import pytest
import torch

from fxtrain.loop import _interrupts as interrupts

torch.set_num_threads(1)

if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # the tests run in the background of a shell
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def _quiet_generator():
    """No test may depend on the global generator, or leave it moved."""
    before = torch.random.get_rng_state()
    yield
    torch.random.set_rng_state(before)


@pytest.fixture(autouse=True)
def _no_pending_signal():
    """A test that ends a run by SIGTERM must not end the next test."""
    yield
    interrupts._pending.clear()


@pytest.fixture
def own_handler():
    """A SIGTERM handler of the program's own, so that sessions after SIGTERM go on. Returns what it has received."""
    received = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: received.append(number))
    yield received
    signal.signal(signal.SIGTERM, before)


@pytest.fixture
def double():
    """Float64 by default: torch.optim keeps its counts, and what it derives from them, in the default dtype."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)
