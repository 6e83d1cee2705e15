"""Names of the slots in which the loop keeps its own state, and the epoch that one of them holds."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fxtrain.core._device_tensors import tensor_on
from fxtrain.core._state import TrainState
from fxtrain.core._types import wide_dtype

LOOP = "loop/"
"""Prefix of the loop's slots. Callbacks cannot claim a name that begins with it."""

EPOCH = f"{LOOP}epoch"  # dict of int64 []: the fields of `Epoch`
EVALUATED = f"{LOOP}evaluated"  # metrics of the last evaluation, and its step
EPOCH_METRICS = f"{LOOP}epoch_metrics"  # sums of the metrics of an epoch's steps; not in the states of a session
REWINDS = f"{LOOP}rewinds"  # int64 [n, 2]: steps that the run rewound to, and how often
SNAPSHOTS = f"{LOOP}snapshots"  # int64 [keep]: steps whose states are retained for rewinds; -1 in unused entries
CHANGED_AT_END = f"{LOOP}changed_at_end"  # bool []: callbacks changed this state at FitEnd, so no run continues from it

MEMBERS = f"{LOOP}members"  # counters of the members, in the state of a batch of runs: see fxtrain.core._members
MEMBERS_EVALUATED = f"{LOOP}members_evaluated"  # as EVALUATED, with a leading axis of members

# These exist in checkpoints only.
BATCH = f"{LOOP}batch"  # int64 [3]: index and checksum of the batch read last, and number of ranks that split it
DATA = f"{LOOP}data"  # uint8 [n]: iterator state of a stateful data source
STOP_REASONS = f"{LOOP}stop_reasons"  # uint8 [n]: JSON list of the reasons of a pending stop


class Epoch(NamedTuple):
    """The current epoch of a run.

    Args:
        done: Number of completed epochs.
        start: Data position at which the current epoch began.
        length: Number of batches in an epoch; 0 while it is unknown.
    """

    done: int
    start: int
    length: int

    @classmethod
    def from_state(cls, state: TrainState) -> Epoch | None:
        """Reads the epoch from the state. Returns None if no loop has written one."""
        slot = state.slots.get(EPOCH)
        return None if slot is None else cls(**{name: int(value) for name, value in slot.items()})

    @property
    def end(self) -> int | None:
        """Data position at which the epoch ends; None while its length is unknown."""
        return self.start + self.length if self.length else None

    def data_index(self, position: int) -> int:
        """Converts a data position to an index into the data source.

        Indices count batches as if every completed epoch had had the current length.
        """
        return self.done * self.length + position - self.start

    def written_to(self, state: TrainState) -> TrainState:
        """Returns ``state`` with this epoch in its slot."""
        device = state.step.device
        slot = {name: tensor_on(device, value) for name, value in self._asdict().items()}
        return state.with_slot(EPOCH, slot)


def fractional_epoch(state: TrainState) -> Tensor:
    """Returns the number of epochs done: float64 [], or float32 on a device without float64.

    The current epoch counts as a fraction, or as 0 while its length is unknown.
    """
    slot = state.slots.get(EPOCH)
    dtype = wide_dtype(state.step.device)
    if slot is None:
        return torch.zeros((), dtype=dtype, device=state.step.device)
    within = (state.position - slot["start"]).to(dtype) / slot["length"].clamp(min=1)
    return slot["done"] + torch.where(slot["length"] > 0, within, 0.0)
