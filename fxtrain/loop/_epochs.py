"""Where in its epochs a session begins, given the state and the data."""

from __future__ import annotations

from typing import Any

from fxtrain.core import Epoch, TrainState


def begin_epochs(state: TrainState, data: Any) -> TrainState:
    """Returns the state with its epoch continued on this data.

    An epoch may have another number of batches than those before it, as with another batch size, but not change
    its length once it has begun.

    Args:
        state: At the start of a session.
        data: From ``fxtrain.data.adapt``. Data that does not know its length is told what an earlier session found.

    Raises:
        ValueError: If the state is inside an epoch that has another length in this data.
    """
    before = Epoch.of(state)
    announce(data, before or Epoch(0, 0, 0))
    epoch = _continued(before, int(state.position), data)
    announce(data, epoch)
    return state if epoch == before else epoch.into(state)


def announce(data: Any, epoch: Epoch) -> None:
    """Announces an epoch to data whose epochs may differ in length."""
    begin = getattr(data, "begin_epoch", None)
    if begin is not None:
        begin(epoch.done, epoch.length or data.epoch_length or 0)


def _continued(epoch: Epoch | None, position: int, data: Any) -> Epoch:
    length = data.epoch_length or 0
    consumed = 0 if epoch is None else position - epoch.start
    if epoch is None or consumed < 0 or consumed > epoch.length > 0:  # no loop has counted up to this position
        done = position // length if length else 0
        return Epoch(done, start=done * length, length=length)
    if epoch.length and not length:
        expect = getattr(data, "expect_epoch_length", None)
        if expect is not None:
            expect(epoch.length)
    if not length or length == epoch.length or (epoch.length and consumed >= epoch.length):
        return epoch
    if consumed == 0 or (not epoch.length and consumed <= length):
        return epoch._replace(length=length)
    raise ValueError(
        f"expected data with {epoch.length or f'at least {consumed}'} batches in an epoch, because {consumed} of the "
        f"current epoch are consumed, got {length}. Finish the epoch with the data and batch size that it began with, "
        "and change them after it."
    )
