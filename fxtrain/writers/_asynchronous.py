"""A writer that passes values to another writer in a background thread."""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from fxtrain.core import check_positive_int
from fxtrain.values import KINDS, Outlet, hand_over, on_host_copy, take_back, try_all
from fxtrain.writers._interface import Backend


def asynchronous(writer: Any, *, size: int = 100) -> AsynchronousWriter:
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
        >>> writer = asynchronous(jsonl(path))
        >>> for step in (1, 2):
        ...     writer.write_scalars(step, {"loss": 1 / step})
        >>> writer.close()
        >>> print(path.read_text(), end="")
        {"step": 1, "metrics": {"loss": 1.0}}
        {"step": 2, "metrics": {"loss": 0.5}}
    """
    check_positive_int("size", size)
    return AsynchronousWriter(writer, size)


class AsynchronousWriter(Backend):
    """Passes everything to another writer in a thread. Created by ``asynchronous``."""

    kinds = frozenset((float, *KINDS))

    def __init__(self, writer: Any, size: int) -> None:
        from clu import asynclib

        self._writer = writer
        self._contained: Outlet | None = None
        self._pool = asynclib.Pool(thread_name_prefix="writer", max_workers=1)  # one thread keeps the order
        self._room = threading.Semaphore(size)
        self._blocked = 0.0

    @property
    def blocked(self) -> float:
        """Seconds that callers have waited for queue space, host copies and flushes."""
        return self._blocked

    def write(self, step: int, values: Mapping[str, Any], event: Any = None) -> None:
        # Values are only copied here. The thread checks their range.
        began = time.perf_counter()
        own = {name: on_host_copy(value) for name, value in values.items()}
        self._blocked += time.perf_counter() - began
        inner = self._contained
        write = functools.partial(hand_over, self._writer) if inner is None else inner.hand_over
        self._submit(functools.partial(write, int(step), own, event))

    def purge(self, step: int) -> None:
        inner = self._contained
        self._submit(
            functools.partial(take_back, self._writer, step) if inner is None else lambda: inner.take_back(step)
        )

    def flush(self) -> None:
        inner = self._contained or self._writer
        try_all(lambda: self._submit(inner.flush), self._wait)

    def close(self) -> None:
        """Waits for pending writes, closes the other writer, then raises the first error."""
        inner = self._contained or self._writer
        try_all(self._wait, inner.close)

    def contain_failures(self) -> None:
        """Makes the thread queue and retry what the other writer misses, instead of raising at a later call."""
        self._contained = self._contained or Outlet(self._writer)

    def take_failure(self) -> Exception | None:
        return None if self._contained is None else self._contained.take_failure()

    def _submit(self, act: Callable[[], None]) -> None:
        began = time.perf_counter()
        self._room.acquire()
        self._blocked += time.perf_counter() - began

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
            self._blocked += time.perf_counter() - began

    def _raising(self, act: Callable[[], Any]) -> None:
        """Raises the original exception of the thread instead of the pool's wrapper."""
        from clu import asynclib

        try:
            act()
            return
        except asynclib.AsyncError as error:
            cause = error.__cause__
        assert cause is not None
        cause.add_note("Raised in the thread of an asynchronous writer, after the call that caused it.")
        raise cause
