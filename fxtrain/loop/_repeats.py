"""Checks that data is reproducible: a resumed run rereads the last batch before the checkpoint and compares it."""

from __future__ import annotations

from typing import Any, NamedTuple

from fxtrain.data._checksum import checksum, warn_of_another_batch


class LastBatch(NamedTuple):
    """The batch read last.

    Args:
        index: Index into the data.
        checksum: Checksum of the batch.
    """

    index: int
    checksum: int

    @classmethod
    def of(cls, read: tuple[int, Any]) -> LastBatch:
        """Makes one from the index and the batch."""
        return cls(read[0], checksum(read[1]))


def warn_unless_repeated(data: Any, last: LastBatch) -> None:
    """Reads a batch again and warns if it differs from the first read."""
    if checksum(data[last.index]) != last.checksum:
        warn_of_another_batch(last.index, "the data")
