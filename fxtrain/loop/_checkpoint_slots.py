"""Slots that states have only between two sessions.

States within a session must depend neither on whether they were saved nor on where the session began.
"""

from __future__ import annotations

import json
from typing import NamedTuple

import torch
from torch import Tensor

from fxtrain.core import BATCH, DATA, EPOCH_METRICS, STOP_REASONS, TrainState
from fxtrain.core._device_tensors import tensor_on
from fxtrain.loop._batches import LastBatch
from fxtrain.loop._epoch_metrics import EpochMetrics


class CheckpointSlots(NamedTuple):
    """State of a session at a save.

    Args:
        batch: The batch read last; None before the first one.
        data: Iterator state of the data source, uint8 [n]; None where the source has none.
        stop_reasons: Why a pending stop was requested.
        epoch_metrics: Metrics of the current epoch's steps.
    """

    batch: LastBatch | None = None
    data: Tensor | None = None
    stop_reasons: tuple[str, ...] = ()
    epoch_metrics: EpochMetrics | None = None

    def added_to(self, state: TrainState) -> TrainState:
        """Returns the state with these slots, as it is saved."""
        device = state.step.device
        state = state.with_slot(BATCH, tensor_on(device, self.batch or (-1, 0, 1)))
        if self.data is not None:
            state = state.with_slot(DATA, self.data)
        if self.epoch_metrics is not None:
            state = self.epoch_metrics.added_to(state)
        if self.stop_reasons:
            text = json.dumps(list(dict.fromkeys(self.stop_reasons))).encode()
            state = state.with_slot(STOP_REASONS, tensor_on(device, list(text), torch.uint8))
        return state

    @classmethod
    def split(cls, state: TrainState) -> tuple[TrainState, CheckpointSlots]:
        """Splits a restored state into the state of the run and these slots."""
        slots = dict(state.slots)
        names = (BATCH, DATA, STOP_REASONS, EPOCH_METRICS)
        batch, data, reasons, epoch_metrics = (slots.pop(name, None) for name in names)
        last = None if batch is None else LastBatch(*batch.tolist())
        saved = cls(
            batch=last if last is not None and last.index >= 0 else None,
            data=data,
            stop_reasons=() if reasons is None else tuple(json.loads(bytes(reasons.tolist()))),
            epoch_metrics=EpochMetrics.from_slot(epoch_metrics),
        )
        return (state if len(slots) == len(state.slots) else state.replace(slots=slots)), saved
