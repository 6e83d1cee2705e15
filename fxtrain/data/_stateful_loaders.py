"""Batches of loaders that save and restore their own position."""

from __future__ import annotations

import copy
import io
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import IterableDataset

from fxtrain.core import Batch, describe
from fxtrain.core._short_tracebacks import with_short_traceback
from fxtrain.data._batch_checks import checksum, warn_of_another_batch
from fxtrain.data._iterables import IterableBatches, dynamic_dimensions
from fxtrain.data._seeding import seeded, start_epoch
from fxtrain.data._source import Source
from fxtrain.data._types import StatefulLoader
from fxtrain.data._workers import WorkerSeeds, end_persistent, end_workers, start_iterator


class StatefulLoaderBatches(IterableBatches):
    """Batches of a loader that tracks its own position. Use ``from_stateful_loader``."""

    def __init__(self, loader: StatefulLoader, *, seed: int, dynamic: bool) -> None:
        dynamic_dims = dynamic_dimensions(loader, dynamic)
        super().__init__(self._start, name=f"the {type(loader).__name__}", seed=seed, dynamic_dims=dynamic_dims)
        self.loader, self.epoch_length = loader, _length(loader)
        self.interruptible = False  # rebuilding the loader's state would require rereading the epoch
        self._reads_ahead = False  # the loader's state would already include the next batch
        dataset = getattr(loader, "dataset", None)
        self._dataset = dataset if hasattr(dataset, "load_state_dict") and hasattr(dataset, "state_dict") else None
        self._start_of_dataset = copy.deepcopy(self._dataset.state_dict()) if self._dataset is not None else None
        self._readable = False  # whether a snapshot was loaded successfully
        self._worker_epoch: int | None = None  # the epoch, as counted by persistent workers
        self._batches = 0  # number of batches read since the iterator was started
        self._trial: dict[str, Any] | None = None  # a loader state, and the checksum of the batch after it
        self._trial_checked = False

    def _start(self, epoch: int) -> Iterator[Batch]:
        follows = self._ended and epoch == self._epoch + 1
        if self._begun and not follows and self._dataset is not None:
            self._dataset.load_state_dict(copy.deepcopy(self._start_of_dataset))
        start_epoch(self.loader, epoch, self.seed)
        if getattr(self.loader, "persistent_workers", False) and not (follows and self._worker_epoch == self._epoch):
            end_persistent(self.loader)
        self._worker_epoch, self._batches = epoch, 0
        return start_iterator(self.loader, WorkerSeeds(self.seed, epoch))

    def fetch(self, position: int) -> Batch:
        if self._trial is not None:
            return super().fetch(position)
        self._seek(position)
        # No trial until each worker has made a batch.
        if self._batches < max(1, getattr(self.loader, "num_workers", 0)):
            return super().fetch(position)
        before = copy.deepcopy(self._state())
        batch = super().fetch(position)
        if before["index"] + 1 == self._index:
            self._trial = {"state": before, "checksum": checksum(batch)}
        return batch

    def _read(self) -> Batch:
        self._batches += 1
        return super()._read()

    def snapshot(self, position: int) -> Tensor:
        """Returns the snapshot for ``restore`` to continue at ``position`` without rereading batches, uint8 [n]."""
        if self._iterator is None or position != self._position:
            self._seek(position)
        buffer = io.BytesIO()
        torch.save({**self._state(), "trial": self._trial}, buffer)
        snapshot = torch.from_numpy(np.frombuffer(buffer.getvalue(), np.uint8).copy())
        if not self._readable:
            _load(snapshot)  # fail now instead of when a run is resumed
            self._readable = True
        return snapshot

    def restore(self, position: int, snapshot: Tensor) -> None:
        """Continues at ``position``, exactly like the source that made the snapshot.

        The first call also rereads an earlier batch, from the state saved before it. If the batch differs, a warning
        says that the loader is not repeatable.

        Raises:
            ValueError: If the snapshot was taken at another position.
        """
        content = _load(snapshot)
        stood = content["epoch"] * (content["epoch_length"] or 0) + content["index"]
        if stood != position:
            raise ValueError(f"expected a snapshot of {self._name} at position {position}, got one at {stood}.")
        trial, self._trial = content.get("trial"), content.get("trial")
        if trial is not None and not self._trial_checked:
            self._trial_checked = True
            self._continue_from(trial["state"])
            at = self._position
            if checksum(self._read()) != trial["checksum"]:
                warn_of_another_batch(at, self._name)
            self.close()
        self._continue_from(content)

    def _state(self) -> dict[str, Any]:
        return {
            "epoch": self._epoch,
            "index": self._index,
            "ended": self._ended,
            "epoch_length": self.epoch_length,
            "loader": self.loader.state_dict(),
        }

    def _continue_from(self, state: dict[str, Any]) -> None:
        epoch = state["epoch"]
        start_epoch(self.loader, epoch, self.seed)
        end_workers(getattr(self.loader, "_iterator", None))
        self.loader.load_state_dict(state["loader"])
        with seeded(self.seed, epoch, 2):
            self._iterator = start_iterator(self.loader, WorkerSeeds(self.seed, epoch))
        self._begun, self._epoch, self._index, self._batches = True, epoch, state["index"], 0
        self._ended, self.epoch_length = state["ended"], state["epoch_length"]
        self._worker_epoch = None if self._ended else epoch  # at its end, the loader has already started the next

    def close(self) -> None:
        super().close()
        end_persistent(self.loader)  # torchdata's loader keeps its workers alive


def _length(loader: Any) -> int | None:
    """Returns the number of batches of a loader over a map-style dataset, or None for others, which may be wrong."""
    dataset = getattr(loader, "dataset", None)
    if not (hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")) or isinstance(dataset, IterableDataset):
        return None
    try:
        return len(loader) or None
    except TypeError:
        return None


@with_short_traceback
def from_stateful_loader(loader: StatefulLoader, *, seed: int = 0, dynamic: bool = False) -> Source:
    """Returns the batches of a loader with a ``state_dict``, such as torchdata's ``StatefulDataLoader``.

    The source has ``snapshot(position)`` and ``restore(position, snapshot)``, so a run resumes without rereading
    batches. Any other jump reads from the start of the epoch, and logs a warning.

    Workers seed the global generators of torch, Python and numpy for each batch from (seed, epoch, sample keys), so a
    resumed run gets the same random samples. Other generators of the dataset must be part of its ``state_dict``. The
    first restore rereads one earlier batch, and warns if it differs from the one before the checkpoint. Workers of an
    iterable dataset generate random samples in one sequence that cannot be resumed, which causes the same warning.

    Args:
        loader: The loader. Its state may contain tensors, numbers, strings, lists, dicts and None.
        seed: Any int. The loader's generators are seeded from (seed, epoch) at each epoch.
        dynamic: Whether sizes may change from batch to batch.

    Raises:
        TypeError: If the loader lacks one of the two methods.

    Example:
        >>> class Counter:
        ...     index = 0
        ...
        ...     def __iter__(self):
        ...         while self.index < 3:
        ...             self.index += 1
        ...             yield torch.tensor([self.index])
        ...         self.index = 0
        ...
        ...     def state_dict(self):
        ...         return {"index": self.index}
        ...
        ...     def load_state_dict(self, state):
        ...         self.index = state["index"]
        >>> data = from_stateful_loader(Counter())
        >>> data[0], data[1]
        (tensor([1]), tensor([2]))
        >>> resumed = from_stateful_loader(Counter())
        >>> resumed.restore(2, data.snapshot(2))
        >>> resumed[2]
        tensor([3])
    """
    if not all(callable(getattr(loader, name, None)) for name in ("__iter__", "state_dict", "load_state_dict")):
        raise TypeError(
            f"expected a loader with state_dict and load_state_dict, got {describe(loader)}. Use from_loader or "
            "from_iterable."
        )
    return StatefulLoaderBatches(loader, seed=seed, dynamic=dynamic)


def _load(snapshot: Tensor) -> dict[str, Any]:
    try:
        # weights_only, because reading a checkpoint must not run code.
        return torch.load(io.BytesIO(snapshot.cpu().numpy().tobytes()), weights_only=True)
    except Exception as error:
        raise ValueError(
            "expected a loader state of tensors, numbers, strings, lists, dicts and None, got one that cannot be read "
            f"from a checkpoint ({error}). Change the state_dict of the loader, its dataset or its sampler."
        ) from error
