"""Whether data repeats itself: a resumed run reads the last batch before the checkpoint again and compares."""

from __future__ import annotations

from typing import Any, NamedTuple

from fxtrain.data._checksum import checksum, warn_of_another_batch


class LastBatch(NamedTuple):
    """The batch read last.

    Args:
        index: Index into the data.
        checksum: From ``fxtrain.data.checksum``.
    """

    index: int
    checksum: int

    @classmethod
    def of(cls, read: tuple[int, Any]) -> LastBatch:
        """From the index and the batch."""
        return cls(read[0], checksum(read[1]))


def warn_unless_repeated(data: Any, last: LastBatch) -> None:
    """Reads a batch again and warns if it is another than before."""
    if checksum(data[last.index]) != last.checksum:
        warn_of_another_batch(last.index, "the data")
