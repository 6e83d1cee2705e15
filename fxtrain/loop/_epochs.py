"""The epoch in which a session begins, and the end of each epoch."""

from __future__ import annotations

from fxtrain.core import Epoch, EpochEnd, TrainState
from fxtrain.data import Source
from fxtrain.loop._emitter import Emitter
from fxtrain.loop._epoch_metrics import EpochMetrics
from fxtrain.loop._interrupts import Waits
from fxtrain.loop._types import Events

_MAX_EMPTY_EPOCHS = 100  # consecutive epochs without a step, after which the run is stuck


def begin_epochs(state: TrainState, data: Source) -> TrainState:
    """Returns the state with its epoch continued on this data.

    Epochs may differ in length, for example after a change of the batch size, but a started epoch keeps its length.

    Args:
        state: State at the start of a session.
        data: From ``fxtrain.data.as_source``. Data of unknown length receives the epoch length that an
            earlier session found.

    Raises:
        ValueError: If the state is inside an epoch that has another length in this data.
    """
    before = Epoch.from_state(state)
    announce(data, before or Epoch(0, 0, 0))
    epoch = _continued(before, int(state.position), data)
    announce(data, epoch)
    return state if epoch == before else epoch.written_to(state)


def announce(data: Source | Waits, epoch: Epoch) -> None:
    """Announces the start of an epoch to data whose epochs may differ in length."""
    data.begin_epoch(epoch.done, epoch.length or data.epoch_length or 0)


def _continued(epoch: Epoch | None, position: int, data: Source) -> Epoch:
    length = data.epoch_length or 0
    consumed = 0 if epoch is None else position - epoch.start
    # The position was not set by the loop, so derive the epoch from it.
    if epoch is None or consumed < 0 or consumed > epoch.length > 0:
        done = position // length if length else 0
        return Epoch(done, start=done * length, length=length)
    if epoch.length and not length:
        data.expect_epoch_length(epoch.length)
    if not length or length == epoch.length or (epoch.length and consumed >= epoch.length):
        return epoch
    if consumed == 0 or (not epoch.length and consumed <= length):
        return epoch._replace(length=length)
    raise ValueError(
        f"expected data with {epoch.length or f'at least {consumed}'} batches in an epoch, because {consumed} of the "
        f"current epoch are consumed, got {length}. Finish the epoch with the data and batch size that it began with, "
        "and change them after it."
    )


class Epochs:
    """Handles the requests to end an epoch.

    Args:
        emitter: Emits ``EpochEnd``.
        data: The data source.
    """

    def __init__(self, emitter: Emitter, data: Source) -> None:
        self._now, self._data, self._emitter = emitter.now, data, emitter
        self._empty_epochs = 0  # consecutive epochs without a step
        self._step_of_last_epoch = -1

    def handle(self) -> Events[None]:
        """Moves to the next epoch, past the batches that are left."""
        now, epoch = self._now, self._now.epoch
        if not epoch.length:
            raise ValueError(
                "expected data with a known epoch length for the request end_epoch, got data of unknown length in its "
                "first epoch. Give data that has a length."
            )
        if now.position < epoch.start + epoch.length:
            now.move_to(epoch.start + epoch.length)
        self._empty_epochs = 0 if now.step > self._step_of_last_epoch else self._empty_epochs + 1
        if self._empty_epochs >= _MAX_EMPTY_EPOCHS:
            raise ValueError(
                f"expected a step within {_MAX_EMPTY_EPOCHS} epochs, got none. A callback skips every batch or ends "
                "every epoch before its first step. Request a stop there instead."
            )
        self._step_of_last_epoch = now.step
        following = Epoch(epoch.done + 1, start=now.position, length=self._data.epoch_length or epoch.length)
        announce(self._data, following)
        now.count(following._replace(length=self._data.epoch_length or following.length))
        if now.is_batch:
            from fxtrain.loop._members import record_epoch

            now.state = record_epoch(now.state, ends=True)
        now.set(end_epoch=False, begin_epoch=True)
        measured, now.metrics = now.metrics, EpochMetrics()
        emitter = self._emitter
        if emitter.is_seen(EpochEnd):
            yield from emitter.emit(
                EpochEnd,
                metrics=measured.compute(now.state.step.device),
                evaluation=now.last_evaluation(),
                duration=emitter.time() - emitter.epoch_began,
            )
