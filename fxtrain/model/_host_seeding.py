"""Seeds the generators of Python and numpy from the step's key while a function runs."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from fxtrain._torch_internals.tracing import is_traced
from fxtrain.core import name_of
from fxtrain.model._captured_values import captured_values
from fxtrain.model._clock_reads import clock_reads
from fxtrain.rng import Key
from fxtrain.rng import _host_generators as host


class UnseededError(RuntimeError):
    """A function took random samples that do not depend on the run's seed alone, or read a clock.

    Example:
        >>> import random, torch, fxtrain as fx
        >>> class Noisy(torch.nn.Linear):
        ...     def forward(self, x):
        ...         return super().forward(x) * self.generator.random()
        >>> module = Noisy(1, 1)
        >>> module.generator = random.Random(0)
        >>> try:
        ...     fx.eval_step(lambda model, batch: model(batch).mean())(fx.init(module), torch.ones(1, 1))
        ... except fx.model.UnseededError as error:
        ...     print(error)
        expected <lambda> to take random samples from the run's seed only, got samples from model.generator (Random)...
    """


class HostSeeding:
    """Makes a context for each run of a function, in which the global host generators are seeded from a key.

    Args:
        key: The key of this call.
        function: The function that runs.
        compare: Whether to detect sampling from the host's generators. Always done if the key has no values, as in a
            trace.
        generators: Generator objects that the function can reach, with their names.

    Attributes:
        sampled: Whether the last run sampled from a global generator, if that was detected.

    Raises:
        UnseededError: On exit, if the function sampled from one of ``generators``, or from a global generator while the
            key has no values. A graph would hold the sample as a constant, and vmap would share it between members.
            Also if the function read a clock while it was traced.
    """

    def __init__(
        self, key: Key, function: Callable[..., object], *, compare: bool, generators: Iterable[tuple[str, object]] = ()
    ) -> None:
        self._seed, self._function, self._who = host.host_seed(key), function, name_of(function)
        self._compare = compare or self._seed is None
        self._generators = list(generators)
        self.sampled = False

    @contextlib.contextmanager
    def __call__(self) -> Iterator[None]:
        with host.seeded(self._seed or 0):
            if not self._compare:
                yield
                return
            before = host.positions()
            states = [host.state_of(generator) for _, generator in self._generators]
            with _clocks_refused(self._function) if is_traced() else contextlib.nullcontext():
                yield
            for (name, generator), state in zip(self._generators, states, strict=True):
                if host.state_of(generator) != state:
                    kind = type(generator).__name__
                    raise _refusal(self._who, f"samples from {name} ({kind}), which depend on earlier samples")
            moved = host.moved(before)
            self.sampled = bool(moved)
            if moved and self._seed is None:
                raise _refusal(
                    self._who,
                    f"samples from {' and '.join(moved)}, which a compiled step would repeat at each call and vmap "
                    "would share between members",
                )


@contextlib.contextmanager
def _clocks_refused(function: Callable[..., object]) -> Iterator[None]:
    """Raises on exit if the user's code read a clock or the operating system's entropy."""
    with clock_reads(function) as read:
        yield
    if read:
        raise UnseededError(
            f"expected {name_of(function)} to read only its arguments while it is traced, got a read of {read[0]}, "
            "whose value a compiled step would repeat at each call. Measure time outside the step, and pass times and "
            "random seeds in the batch."
        )


def captured_generators(function: Callable[..., object]) -> list[tuple[str, object]]:
    """Returns the generator objects of Python and numpy that a function captures, with their names."""
    found: dict[int, tuple[str, Any]] = {}
    for name, value in captured_values(function):
        parts = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
        for part in (value, *parts):
            if host.state_of(part) is not None:
                found.setdefault(id(part), (name, part))
    return list(found.values())


def _refusal(who: str, what: str) -> UnseededError:
    return UnseededError(
        f"expected {who} to take random samples from the run's seed only, got {what}. Use torch's functions "
        "(torch.rand, torch.bernoulli), which follow the seed, or sample in the data and pass the samples in the batch."
    )
