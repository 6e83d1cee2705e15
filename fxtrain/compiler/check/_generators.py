"""Repeats the random samples of a call that Python, NumPy and torch took from global generators."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fxtrain.rng import _host_generators as host
from fxtrain.rng._functional import generator_states


class Generators(NamedTuple):
    """The states of the global generators.

    Args:
        host: Those of Python and NumPy. None while another thread has seeded them.
        torch: Those of torch, by device.

    Example:
        >>> before, first = Generators.now(), random.random()
        >>> with before.repeated():
        ...     random.random() == first
        True
    """

    host: host.Mark | None
    torch: dict[str, Tensor]

    @classmethod
    def now(cls) -> Generators:
        """Returns the present states."""
        return cls(host.mark(), generator_states())

    @contextlib.contextmanager
    def repeated(self) -> Iterator[None]:
        """A context that starts from these states. Afterwards, the generators are as they were before it."""
        after = Generators.now()
        self._restore()
        try:
            yield
        finally:
            after._restore()

    def _restore(self) -> None:
        # Generators that have not moved are not touched, because other threads may use them.
        if self.host is not None:
            host.rewind_if_moved(self.host)
        now = generator_states()
        for device, state in self.torch.items():
            if device not in now or torch.equal(now[device], state):
                continue
            if device == "cpu":
                torch.set_rng_state(state)
            else:
                torch.cuda.set_rng_state(state, device)


@contextlib.contextmanager
def other_samples() -> Iterator[None]:
    """A context in which the generators give samples that they have not given before. It leaves them unchanged."""
    with Generators.now().repeated():
        random.random()
        np.random.random()
        torch.rand(())
        if torch.cuda.is_initialized():
            torch.rand((), device=torch.device("cuda", torch.cuda.current_device()))
        yield
