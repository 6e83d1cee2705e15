"""One thread: bitwise claims hold for one thread count, and two cores are shared."""

import signal

import pytest
import torch

torch.set_num_threads(1)

if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # the tests run in the background of a shell
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def _quiet_generator():
    """No test may depend on the global generator, or leave it moved."""
    before = torch.random.get_rng_state()
    yield
    torch.random.set_rng_state(before)
