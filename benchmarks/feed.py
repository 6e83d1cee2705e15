"""Supplies batches to contestants, and starts and ends their turns.

Each call of a trainer's ``fit`` pays its startup cost, so it is called only once, and the feed blocks it between turns.
A turn lasts from the first batch of the turn to the request for a batch after its last one, including the
synchronization with the device.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from typing import Any

from torch.utils.data import DataLoader, IterableDataset


class End(BaseException):
    """Ends a contestant's training. A BaseException, because trainers do not catch it."""


class Feed:
    """An iterable that repeats batches. It can be iterated only once.

    Args:
        batches: The batches to repeat.
        total: Number of batches to yield; None for an endless feed.
        pauses: Called with the number of batches yielded so far, each time that it reaches a number in ``at``.
        at: Returns an iterator of increasing numbers.
    """

    def __init__(
        self, batches: list[Any], total: int | None, pauses: Callable[[int], None], at: Callable[[], Iterator[int]]
    ) -> None:
        self.batches, self.total = batches, total
        self.sync: Callable[[], Any] = lambda: None  # synchronizes with the device
        self._pauses, self._at = pauses, at
        self._iterator: Iterator[Any] | None = None

    def convert(self, function: Callable[[Any], Any]) -> None:
        """Converts all batches to a library's types. Call it before the iteration."""
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

    # The interface of ``fxtrain.fit``: batches by position

    epoch_length = None

    def __getitem__(self, position: int) -> Any:
        if self._iterator is None:
            self._iterator = iter(self)
        return next(self._iterator)

    def loader(self) -> DataLoader[Any]:
        """Returns the feed as a DataLoader, for trainers that take no other iterable."""
        return DataLoader(_Dataset(self), batch_size=None)


class _Dataset(IterableDataset[Any]):
    def __init__(self, feed: Feed) -> None:
        self.feed = feed

    def __iter__(self) -> Iterator[Any]:
        return iter(self.feed)


def limited(batches: list[Any], total: int, pauses: Callable[[int], None] = lambda given: None, *at: int) -> Feed:
    """Returns a feed of ``total`` batches."""
    return Feed(batches, total, pauses, lambda: iter(at))


def in_turns(batches: list[Any], warmup: int, turn: int, end_turn: Callable[[float], None]) -> Feed:
    """Returns an endless feed, which calls ``end_turn`` between turns.

    Args:
        batches: The batches to repeat.
        warmup: Number of batches before the first turn.
        turn: Number of batches of a turn.
        end_turn: Called with the seconds of the last turn, NaN before the first. It returns when the next turn starts.
    """
    began = float("nan")

    def pause(given: int) -> None:
        nonlocal began
        end_turn(time.perf_counter() - began)
        began = time.perf_counter()

    return Feed(batches, None, pause, lambda: itertools.count(warmup, turn))
