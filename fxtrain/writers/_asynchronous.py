"""A writer that passes values to another writer in a background thread."""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable, Mapping

from fxtrain.core import LoopEvent, check_positive_int, try_all
from fxtrain.values import KINDS, Kind, Value
from fxtrain.writers._backlog import on_host_copy
from fxtrain.writers._channel import Channel
from fxtrain.writers._interface import Backend, Writer, check_writer


def asynchronous(writer: Writer, *, size: int = 100) -> AsynchronousWriter:
    """A writer that passes everything to another writer in a background thread (clu's ``asynclib.Pool``), in order.

    Values are first copied to the host, so the run may reuse its tensors' buffers. The queue is bounded: if the other
    writer stays slower than the run, the run waits, and nothing is lost. ``flush`` and ``close`` return once everything
    written before has been passed on. An error in the thread is raised at the next call. If an observer uses the
    writer, the thread instead queues and retries missed points, as ``observers.write`` does for other writers.

    Args:
        writer: A writer of ``fxtrain.writers``, or clu's.
        size: The maximum number of queued calls.

    Raises:
        ValueError: ``size`` is below 1.

    Example:
        >>> import pathlib, tempfile
        >>> from fxtrain.writers import jsonl
        >>> path = pathlib.Path(tempfile.mkdtemp(), "metrics.jsonl")
        >>> writer = asynchronous(jsonl(path, clock=None))
        >>> for step in (1, 2):
        ...     writer.write_scalars(step, {"loss": 1 / step})
        >>> writer.close()
        >>> print(path.read_text(), end="")
        {"step": 1, "metrics": {"loss": 1.0}}
        {"step": 2, "metrics": {"loss": 0.5}}
    """
    check_positive_int("size", size)
    check_writer("asynchronous", writer)
    return AsynchronousWriter(writer, size)


class AsynchronousWriter(Backend):
    """Passes everything to another writer in a thread. Created by ``asynchronous``."""

    kinds = frozenset((float, *KINDS))

    def __init__(self, writer: Writer, size: int) -> None:
        from clu import asynclib

        self._writer = writer
        self._channel = Channel(writer)
        self._contains_failures = False
        self._pool = asynclib.Pool(thread_name_prefix="writer", max_workers=1)  # one thread keeps the order
        self._room = threading.Semaphore(size)
        self.blocked = 0.0
        """Seconds that callers have waited for queue space, host copies and flushes."""

    @property
    def keeps(self) -> frozenset[Kind]:
        return self._channel.keeps

    def write(self, step: int, values: Mapping[str, Value], event: LoopEvent | None = None) -> None:
        # Values are only copied here. The thread checks their range.
        began = time.perf_counter()
        own = {name: on_host_copy(value) for name, value in values.items()}
        self.blocked += time.perf_counter() - began
        write = self._channel.submit if self._contains_failures else self._channel.write
        self._submit(functools.partial(write, int(step), own, event))

    def purge(self, step: int) -> None:
        purge = self._channel.truncate_after if self._contains_failures else self._channel.purge
        self._submit(functools.partial(purge, step))

    def flush(self) -> None:
        inner = self._channel if self._contains_failures else self._writer
        try_all(lambda: self._submit(inner.flush), self._wait)

    def close(self) -> None:
        """Waits for pending writes, closes the other writer, then raises the first error."""
        inner = self._channel if self._contains_failures else self._writer
        try_all(self._wait, inner.close)

    def contain_failures(self) -> None:
        """Makes the thread queue and retry what the other writer misses, instead of raising at a later call."""
        self._contains_failures = True
        if isinstance(self._writer, Backend):
            self._writer.contain_failures()

    def take_failure(self) -> Exception | None:
        return self._channel.take_failure() if self._contains_failures else None

    def _submit(self, act: Callable[[], None]) -> None:
        began = time.perf_counter()
        self._room.acquire()
        self.blocked += time.perf_counter() - began

        def acting() -> None:
            try:
                act()
            finally:
                self._room.release()

        self._raising(self._pool(acting))

    def _wait(self) -> None:
        began = time.perf_counter()
        try:
            self._raising(self._pool.join)
        finally:
            self.blocked += time.perf_counter() - began

    def _raising(self, act: Callable[[], object]) -> None:
        """Raises the original exception of the thread instead of the pool's wrapper."""
        from clu import asynclib

        try:
            act()
            return
        except asynclib.AsyncError as error:
            cause = error.__cause__
        assert cause is not None
        cause.add_note("Raised in the thread of an asynchronous writer, after the call that caused it.")
        try:
            raise cause
        finally:
            del cause  # its traceback references this frame
