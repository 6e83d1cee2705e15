"""Slots that only checkpoints have, because a state in memory must not depend on whether it was saved."""

from __future__ import annotations

import json
from typing import NamedTuple

import torch
from torch import Tensor

from fxtrain.core import BATCH, DATA, STOP_REASONS, TrainState
from fxtrain.loop._batches import LastBatch


class CheckpointSlots(NamedTuple):
    """State of a session at a save.

    Args:
        batch: The batch read last; None before the first one.
        data: Iterator state of the data source, uint8 [n]; None where the source has none.
        stop_reasons: Why a pending stop was requested.
    """

    batch: LastBatch | None = None
    data: Tensor | None = None
    stop_reasons: tuple[str, ...] = ()

    def added_to(self, state: TrainState) -> TrainState:
        """Returns the state with these slots, as it is saved."""
        device = state.step.device
        state = state.with_slot(BATCH, torch.tensor(self.batch or (-1, 0), device=device))
        if self.data is not None:
            state = state.with_slot(DATA, self.data)
        if self.stop_reasons:
            text = json.dumps(list(dict.fromkeys(self.stop_reasons))).encode()
            state = state.with_slot(STOP_REASONS, torch.tensor(list(text), dtype=torch.uint8, device=device))
        return state

    @classmethod
    def split(cls, state: TrainState) -> tuple[TrainState, CheckpointSlots]:
        """Splits a restored state into the state of the run and these slots."""
        slots = dict(state.slots)
        batch, data, reasons = (slots.pop(name, None) for name in (BATCH, DATA, STOP_REASONS))
        last = None if batch is None else LastBatch(*batch.tolist())
        saved = cls(
            batch=last if last is not None and last.index >= 0 else None,
            data=data,
            stop_reasons=() if reasons is None else tuple(json.loads(bytes(reasons.tolist()))),
        )
        return (state if len(slots) == len(state.slots) else state.replace(slots=slots)), saved
