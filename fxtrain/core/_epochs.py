"""The epoch that a run is in, kept in a slot of the state."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fxtrain.core._slots import EPOCH
from fxtrain.core._state import TrainState


class Epoch(NamedTuple):
    """The epoch that a run is in.

    Args:
        done: Epochs finished.
        start: Data position at which the current epoch began.
        length: Batches in an epoch; 0 while that is unknown.
    """

    done: int
    start: int
    length: int

    @classmethod
    def of(cls, state: TrainState) -> Epoch | None:
        """Reads the epoch from the state; None for a state that no loop has counted for."""
        slot = state.slots.get(EPOCH)
        return None if slot is None else cls(**{name: int(value) for name, value in slot.items()})

    @property
    def end(self) -> int | None:
        """Position at which the epoch ends; None while its length is unknown."""
        return self.start + self.length if self.length else None

    def data_index(self, position: int) -> int:
        """Index into the data, which counts batches as if all epochs had the current length."""
        return self.done * self.length + position - self.start

    def into(self, state: TrainState) -> TrainState:
        """Writes the epoch into the state."""
        device = state.step.device
        slot = {name: torch.tensor(value, device=device) for name, value in self._asdict().items()}
        return state.with_slot(EPOCH, slot)


def epochs_taken(state: TrainState) -> Tensor:
    """Epochs done, with their fraction: float64 []. Zero while the length of an epoch is unknown."""
    slot = state.slots.get(EPOCH)
    if slot is None:
        return torch.zeros((), dtype=torch.float64, device=state.step.device)
    within = (state.position - slot["start"]).double() / slot["length"].clamp(min=1)
    return slot["done"] + torch.where(slot["length"] > 0, within, 0.0)
