"""Fetches the batches of a run by position, and detects the end of the data.

A resumed run rereads the last batch before its checkpoint, and warns if the data returns another one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch

from fxtrain.core import Batch, Epoch
from fxtrain.data import Exhausted, Source, to_device
from fxtrain.data._batch_checks import checksum, warn_of_another_batch
from fxtrain.loop._interrupts import Waits

if TYPE_CHECKING:
    from fxtrain.loop._ranks import Ranks


class LastBatch(NamedTuple):
    """The batch read last.

    Args:
        index: Index into the data.
        checksum: Checksum of the batch, or of the parts of all ranks.
        num_ranks: Number of ranks that have split the batch.
    """

    index: int
    checksum: int
    num_ranks: int = 1


class BatchReader:
    """Reads the batches of the next steps.

    Args:
        data: From ``fxtrain.data.as_source``.
        device: Device of the run's state.
        clock: Returns the time in seconds.
        wanted: Length of the run in words, for errors.
        ranks: The ranks of the run, each of which reads a part of every batch; None if there is one.
    """

    def __init__(
        self,
        data: Source | Waits,
        device: torch.device,
        clock: Callable[[], float],
        wanted: str,
        ranks: Ranks | None = None,
    ) -> None:
        self.data, self._ranks = data, ranks
        self._num_ranks = 1 if ranks is None else ranks.mesh.world_size
        self.expected: LastBatch | None = None  # last batch read before the checkpoint of a resumed run
        self._last: tuple[int, Batch] | None = None  # index and batch read last
        self.wait = 0.0  # seconds that the loop waited for the last batches
        self._end: int | None = None  # end of data of unknown length, once found
        self._is_over = False  # whether the epoch ends after the batches of the last call
        # Cached, because reading a device's type is slower than the rest of a fetch.
        self._device, self._on_host = device, device.type == "cpu"
        self._clock, self._wanted = clock, wanted

    def next(self, position: int, epoch: Epoch, count: int) -> list[Batch]:
        """Fetches up to ``count`` batches of one epoch, starting at ``position``. Returns none at the end of the epoch.

        Raises:
            ValueError: If the data is exhausted before the run is over.
        """
        began = self._clock()
        if self.expected is not None:
            expected, self.expected = self.expected, None
            self._compare(expected, position, epoch)
        batches: list[Batch] = []
        is_over, self._is_over = self._is_over and position == self._end, False
        while len(batches) < count and not is_over and (epoch.length or position != self._end):
            try:
                batches.append(self._fetch(position, epoch))
            except Exhausted:
                ends_early = self.data.epoch_length == position - epoch.start
                if position == epoch.start or (epoch.length and not ends_early):
                    raise ValueError(self._exhausted(position)) from None
                self._end, self._is_over = position, bool(epoch.length and batches)
                break
            position += 1
        self.wait = self._clock() - began
        return batches if self._on_host else [to_device(batch, self._device) for batch in batches]

    def _fetch(self, position: int, epoch: Epoch) -> Batch:
        index = epoch.data_index(position)
        try:
            batch = self.data[index]
        except Exhausted:
            if position != epoch.start or not epoch.length:
                raise
            # The length is known from an earlier session, and this session's data has only now reached its end.
            batch = self.data[index]
        self._last = index, batch
        return batch

    def last_batch(self) -> LastBatch | None:
        """Returns the batch read last. None before the first one, and after a rank has failed."""
        if self._last is None or (self._ranks is not None and self._ranks.is_over):
            return None
        index, batch = self._last
        return LastBatch(index, self._checksum(batch), self._num_ranks)

    def _checksum(self, batch: Batch) -> int:
        own = checksum(batch)
        if self._ranks is None or self._num_ranks == 1:
            return own
        return self._ranks.digest(own, "checksums of the last batch")

    def _compare(self, expected: LastBatch, position: int, epoch: Epoch) -> None:
        """Reads the batch before ``position`` again, and warns if it differs from the expected one.

        Another number of ranks has other parts, which are not compared.
        """
        # At the start of an epoch, the comparison would make a stream read the whole previous epoch.
        is_near = self.data.random_access or position > epoch.start
        is_repeated = is_near and expected.index == epoch.data_index(position) - 1
        if not is_repeated or expected.num_ranks != self._num_ranks:
            return
        if self._checksum(self.data[expected.index]) != expected.checksum:
            warn_of_another_batch(expected.index, "the data")

    def _exhausted(self, position: int) -> str:
        if position == 0:
            return "expected data with at least one batch, got none. Check what the data source yields."
        return (
            f"expected data for {self._wanted}, got {position} batches. Give data that can be read more than once "
            "(a list, a DataLoader, fxtrain.data.batches), or train for less."
        )
