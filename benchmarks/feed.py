"""Feed: where a contestant's batches come from, and so whose turn it is.

A trainer's ``fit`` cannot be left and entered again without paying for its beginning. So it is called once, and waits
where it asks for a batch: between its turns the feed does not answer. A turn lasts from one answer until, so many
batches later, another batch is asked for and the device has finished.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from typing import Any

from torch.utils.data import DataLoader, IterableDataset


class End(BaseException):
    """The parent needs no more turns. No trainer catches it."""


class Feed:
    """Batches again and again, without an end if there is no ``total``. It is to be iterated once.

    Args:
        batches: What is repeated.
        total: How many batches there are in all.
        pauses: Called with the number of batches given so far, before each of those numbers in ``at``.
        at: The numbers.
    """

    def __init__(
        self, batches: list[Any], total: int | None, pauses: Callable[[int], None], at: Callable[[], Iterator[int]]
    ) -> None:
        self.batches, self.total = batches, total
        self.sync: Callable[[], Any] = lambda: None  # waits until all that was asked of a device is done
        self._pauses, self._at = pauses, at
        self._iterator: Iterator[Any] | None = None

    def convert(self, function: Callable[[Any], Any]) -> None:
        """Changes the batches to what a library takes, before the first."""
        self.batches = [function(batch) for batch in self.batches]

    def __iter__(self) -> Iterator[Any]:
        batches = itertools.cycle(self.batches)
        given = 0
        for number in self._at():
            yield from itertools.islice(batches, number - given)
            given = number
            self.sync()
            self._pauses(given)
        if self.total is not None:
            yield from itertools.islice(batches, self.total - given)

    # What ``fxtrain.fit`` takes: batches by position

    epoch_length = None

    def __getitem__(self, position: int) -> Any:
        if self._iterator is None:
            self._iterator = iter(self)
        return next(self._iterator)

    def loader(self) -> DataLoader[Any]:
        """For trainers that take no other iterable."""
        return DataLoader(_Dataset(self), batch_size=None)


class _Dataset(IterableDataset[Any]):
    def __init__(self, feed: Feed) -> None:
        self.feed = feed

    def __iter__(self) -> Iterator[Any]:
        return iter(self.feed)


def limited(batches: list[Any], total: int, pauses: Callable[[int], None] = lambda given: None, *at: int) -> Feed:
    """A whole, short training."""
    return Feed(batches, total, pauses, lambda: iter(at))


def in_turns(batches: list[Any], warmup: int, turn: int, ask: Callable[[float], None]) -> Feed:
    """Training without an end. ``ask`` is told the seconds of the last turn, and returns when the next begins."""
    began = float("nan")

    def pause(given: int) -> None:
        nonlocal began
        ask(time.perf_counter() - began)
        began = time.perf_counter()

    return Feed(batches, None, pause, lambda: itertools.count(warmup, turn))
