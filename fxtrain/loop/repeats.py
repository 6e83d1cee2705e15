"""Whether data repeats itself: a resumed run reads the last batch before the checkpoint again and compares.

The checksum of that batch is in checkpoints alone. A state in memory does not depend on whether it was saved.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from fxtrain.core import BATCH, TrainState
from fxtrain.data.checksum import checksum, warn_of_another_batch


class LastBatch(NamedTuple):
    """The batch read last.

    Args:
        index: Index into the data.
        checksum: From ``fxtrain.data.checksum``.
    """

    index: int
    checksum: int

    @classmethod
    def of(cls, read: tuple[int, Any] | None) -> LastBatch | None:
        """From the index and the batch."""
        return None if read is None else cls(read[0], checksum(read[1]))


def with_last_batch(state: TrainState, last: LastBatch | None) -> TrainState:
    """The state as it is saved."""
    return state.with_slot(BATCH, torch.tensor(last or (-1, 0), device=state.step.device))


def without_last_batch(state: TrainState) -> tuple[TrainState, LastBatch | None]:
    """The state of a run, and the last batch that the checkpoint it was read from names."""
    if BATCH not in state.slots:
        return state, None
    last = LastBatch(*state.slots[BATCH].tolist())
    rest = {name: slot for name, slot in state.slots.items() if name != BATCH}
    return state.replace(slots=rest), last if last.index >= 0 else None


def warn_unless_repeated(data: Any, last: LastBatch) -> None:
    """Reads a batch again and warns if it is another than before."""
    if checksum(data[last.index]) != last.checksum:
        warn_of_another_batch(last.index, "the data")
