"""A background thread that reads batches ahead."""

from __future__ import annotations

import collections
import contextlib
import logging
import operator
import threading
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fxtrain import tree
from fxtrain.core import Batch, check_device, check_positive_int
from fxtrain.core._short_tracebacks import with_short_traceback
from fxtrain.data._as_source import as_source
from fxtrain.data._as_tensors import map_tensors
from fxtrain.data._source import Source
from fxtrain.data._types import SourceLike
from fxtrain.rng._host_generators import is_seeded

_log = logging.getLogger(__name__)

_CLOSE_TIMEOUT = 2.0  # seconds to wait for the batch in progress when closing


@with_short_traceback
def prefetch(data: SourceLike, size: int = 2, *, seed: int = 0, device: torch.device | str | None = None) -> Source:
    """Returns the same batches, read ahead by a background thread.

    An error in the thread is raised at the position where it occurred, with the thread's traceback. Reading any
    position but the next discards the batches read ahead. While the thread runs, ``data`` must not be used elsewhere.

    Args:
        data: Batches, or any argument of ``as_source``.
        size: Number of batches to keep ready. The thread holds one more.
        seed: Any int, passed to ``as_source``. Use the state's seed for the order that ``fit`` would use without
            prefetching.
        device: Device to copy batches to. Copies to a CUDA device go through pinned memory, and overlap with
            computation.

    Example:
        >>> from fxtrain.data import batches
        >>> data = prefetch(batches(torch.arange(8), 2, shuffle=False))
        >>> data[0], data[1], data[0]
        (tensor([0, 1]), tensor([2, 3]), tensor([0, 1]))
        >>> data.close()
    """
    check_positive_int("size", size)
    check_device("device", device)
    return PrefetchedBatches(as_source(data, seed=seed), size, device)


class PrefetchedItem(NamedTuple):
    """The thread's result for one position."""

    batch: Any
    error: BaseException | None
    epoch_length: int | None  # as of this batch, so that it does not depend on thread timing
    snapshot: Tensor | None  # for the next position
    copied: Any  # the CUDA event of the copy, or None
    follows: int  # the next position


class PrefetchedBatches(Source):
    """Batches that are read ahead. Use ``prefetch``."""

    def __init__(self, source: Source, size: int, device: torch.device | str | None) -> None:
        super().__init__(dynamic_dims=source.dynamic_dims, num_shapes=source.num_shapes)
        self.source = source
        self.random_access = source.random_access
        self.size = size
        self.device = None if device is None else torch.device(device)
        self.epoch_length = source.epoch_length
        self._reader: PrefetchThread | None = None
        self._kept: tuple[int, Tensor] | None = None  # a position, and its snapshot
        self._closed: PrefetchThread | None = None  # a reader that was busy when it was closed
        self._expected: int | None = None
        self._epoch = -1  # the last one announced

    @property
    def has_snapshots(self) -> bool:
        return self.source.has_snapshots

    @property
    def has_variable_epochs(self) -> bool:
        return self.source.has_variable_epochs

    def begin_epoch(self, epoch: int, length: int) -> None:
        follows, self._epoch = epoch == self._epoch + 1, epoch
        # Batches read ahead remain valid if the expected epoch length has not changed.
        if follows and self.source.epoch_length_may_change and self.epoch_length and length == self.epoch_length:
            return
        self._pause()
        self.source.begin_epoch(epoch, length)
        self.epoch_length = self.source.epoch_length

    def __getitem__(self, position: int) -> Batch:
        position = operator.index(position)
        if is_seeded():
            raise RuntimeError(
                "expected prefetch around the outermost source, got a source that reads prefetched batches while it "
                "makes a batch, which would deadlock the two threads. Apply prefetch to the outer source."
            )
        if self._reader is None:
            self._wait_for_closed()
            self._reader = PrefetchThread(_reading(self.source, self.device), self.size)
            self._unused = weakref.finalize(self, self._reader.stop, _CLOSE_TIMEOUT)  # on garbage collection or exit
            self._expected = None
        if position != self._expected:
            self._reader.jump(position)
        self._expected = None
        item = self._reader.take()
        self.epoch_length = item.epoch_length
        self._kept = None if item.snapshot is None else (position + 1, item.snapshot)
        if item.error is not None:
            try:
                raise item.error
            finally:
                del item  # the traceback of its error references this frame
        self._expected = item.follows
        if item.copied is not None:
            for leaf in tree.leaves(item.batch):
                if isinstance(leaf, Tensor) and leaf.is_cuda:
                    stream = torch.cuda.current_stream(leaf.device)
                    stream.wait_event(item.copied)
                    leaf.record_stream(stream)
        return item.batch

    def fetch(self, position: int) -> Batch:
        return self[position]

    def expect_epoch_length(self, length: int) -> None:
        if self._reader is None:
            self.source.expect_epoch_length(length)
            self.epoch_length = self.source.epoch_length

    def close(self) -> None:
        if self._reader is not None:
            self._unused.detach()
            reader, self._reader = self._reader, None
            if not reader.stop(_CLOSE_TIMEOUT):
                # Waiting longer would keep an interrupted process alive until its scheduler kills it.
                self._closed = reader
                reader.afterwards(self.source.close)
                _log.info("Prefetch closes after the batch in progress, which takes longer than expected.")
                return
        self._wait_for_closed()
        self.source.close()

    def _wait_for_closed(self) -> None:
        """Waits for a closed reader, because two threads must not read the source at the same time."""
        if self._closed is not None:
            self._closed.stop()
            self._closed = None

    def snapshot(self, position: int) -> Tensor | None:
        """Returns the source's snapshot at ``position``, taken before the thread read further ahead."""
        if not self.has_snapshots:
            return None
        if self._kept is None or self._kept[0] != position:
            self._pause()
            taken = self.source.snapshot(position)
            self._kept = None if taken is None else (position, taken)
        return None if self._kept is None else self._kept[1]

    def restore(self, position: int, snapshot: Tensor) -> None:
        """Continues at ``position``, from a snapshot of the source taken with or without prefetching."""
        self._pause()
        self.source.restore(position, snapshot)
        self.epoch_length = self.source.epoch_length

    def _pause(self) -> None:
        self._expected = self._kept = None
        self._wait_for_closed()
        if self._reader is not None:
            self._reader.jump(None)


class PrefetchThread:
    """The background thread, and the state it shares with its consumer, guarded by one condition."""

    def __init__(self, read: Callable[[int], PrefetchedItem], size: int) -> None:
        self._read, self._size = read, size
        self._changed = threading.Condition()
        self._ready: collections.deque[PrefetchedItem] = collections.deque()
        self._next: int | None = None  # the position to read next; None while idle
        self._jumps = 0
        self._busy = False
        self._stopped = False
        self._afterwards: Callable[[], None] | None = None
        self._has_ended = False
        # A daemon, so that a hanging dataset cannot keep the interpreter from exiting.
        self._thread = threading.Thread(target=self._run, name="fxtrain prefetch", daemon=True)
        self._thread.start()

    def jump(self, position: int | None) -> None:
        """Discards the ready batches and continues at ``position``. None waits until the thread is idle."""
        with self._changed:
            self._jumps += 1
            self._ready.clear()
            self._next = position
            self._changed.notify_all()
            self._changed.wait_for(lambda: position is not None or not self._busy)

    def take(self) -> PrefetchedItem:
        """Waits for the next item and returns it."""
        with self._changed:
            self._changed.wait_for(lambda: self._ready)
            self._changed.notify_all()
            return self._ready.popleft()

    def stop(self, timeout: float | None = None) -> bool:
        """Ends the thread, and waits for at most ``timeout`` seconds until its last batch is done.

        Returns:
            Whether the thread has ended.
        """
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
        if threading.current_thread() is not self._thread:  # a finalizer may run in any thread
            self._thread.join(timeout)
        return not self._thread.is_alive()

    def afterwards(self, action: Callable[[], None]) -> None:
        """Calls ``action`` after the thread has stopped reading."""
        with self._changed:
            if not self._has_ended:
                self._afterwards = action
                return
        action()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(
                    lambda: self._stopped or (self._next is not None and len(self._ready) < self._size)
                )
                if self._stopped or self._next is None:
                    self._has_ended, action = True, self._afterwards
                    break
                position, jumps, self._busy = self._next, self._jumps, True
            item = self._read(position)
            with self._changed:
                self._busy = False
                if jumps == self._jumps:
                    self._ready.append(item)
                    self._next = None if item.error is not None else item.follows
                self._changed.notify_all()
            del item  # do not keep a batch, or a traceback with its frames, alive while waiting
        if action is not None:
            action()


def _reading(data: Source, device: torch.device | None) -> Callable[[int], PrefetchedItem]:
    copies = _Copies(device) if device is not None and device.type == "cuda" else None

    def read(position: int) -> PrefetchedItem:
        batch = error = snapshot = copied = None
        length = data.epoch_length
        try:
            # Each thread has a current device, at first the first one. Pinning memory would initialize that.
            with contextlib.nullcontext() if copies is None else torch.cuda.device(copies.device):
                batch = data[position]
                snapshot = data.snapshot(position + 1)
                if copies is not None:
                    batch, copied = copies.start(batch)
                elif device is not None:
                    batch = map_tensors(lambda leaf: leaf.to(device), batch)
        except BaseException as raised:  # raised again in the consumer's thread
            error = raised
        # In an epoch that exceeds its expected length, positions count from its start.
        at = position % length if length is not None and data.epoch_length is None else position
        try:
            return PrefetchedItem(batch, error, data.epoch_length, snapshot, copied, at + 1)
        finally:
            del error  # its traceback references this frame

    return read


class _Copies:
    """Copies batches to a CUDA device on a stream of its own. Create one in the consumer's thread.

    Args:
        device: The device. Without an index, the current one of this thread.
    """

    def __init__(self, device: torch.device) -> None:
        index = torch.cuda.current_device() if device.index is None else device.index
        self.device = torch.device("cuda", index)
        self._stream = torch.cuda.Stream(self.device)

    def start(self, batch: Batch) -> tuple[Batch, torch.Event]:
        """Starts to copy a batch. Returns it with the event that its consumer's stream must wait for."""
        if any(isinstance(leaf, Tensor) and leaf.is_cuda for leaf in tree.leaves(batch)):
            # The data computes on the thread's stream. It is also that of the training steps, for which the copies of
            # other batches must not wait.
            self._stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._stream):
            return map_tensors(self._copied, batch), self._stream.record_event()

    def _copied(self, leaf: Tensor) -> Tensor:
        return (leaf.pin_memory() if leaf.is_cpu else leaf).to(self.device, non_blocking=True)
