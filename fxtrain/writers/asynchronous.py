"""Asynchronous: a writer that works behind the run's back."""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from torch import Tensor

from fxtrain import tree
from fxtrain.values import KINDS, HParams, Table, hand_over, take_back, try_all
from fxtrain.writers.interface import Backend


def asynchronous(writer: Any, *, size: int = 100) -> AsynchronousWriter:
    """A writer that hands everything to another one in a thread (clu's ``asynclib.Pool``), in the same order.

    What is written is first copied to the host, so the run may write over its tensors. The queue has an end: where the
    other writer is slower than the run for long, the run waits, and nothing is lost. ``flush`` and ``close`` return
    when all that was written has been handed over. An error of the thread is raised at the next call.

    Args:
        writer: One of ours, or clu's.
        size: How many calls may wait in the queue.

    Raises:
        ValueError: If ``size`` is below 1.

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
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        raise ValueError(f"size={size!r}: a whole number of calls, 1 or more, is wanted.")
    return AsynchronousWriter(writer, size)


class AsynchronousWriter(Backend):
    """Hands everything to another writer in a thread; made by ``asynchronous``."""

    kinds = frozenset((float, *KINDS))

    def __init__(self, writer: Any, size: int) -> None:
        from clu import asynclib

        self._writer = writer
        self._pool = asynclib.Pool(thread_name_prefix="writer", max_workers=1)  # one thread keeps the order
        self._room = threading.Semaphore(size)
        self._blocked = 0.0

    @property
    def blocked(self) -> float:
        """Seconds that callers have waited for room, for copies, and for what they flushed."""
        return self._blocked

    def write(self, step: int, values: Mapping[str, Any], event: Any = None) -> None:
        # Whether they are in range is found out in the thread as well: here they are copied, and that is all.
        began = time.perf_counter()
        own = {name: _copied(value) for name, value in values.items()}
        self._blocked += time.perf_counter() - began
        self._submit(functools.partial(hand_over, self._writer, int(step), own, event))

    def purge(self, step: int) -> None:
        self._submit(functools.partial(take_back, self._writer, step))

    def flush(self) -> None:
        try_all(lambda: self._submit(self._writer.flush), self._wait)

    def close(self) -> None:
        """Waits for all that was written, and closes the other writer; then the first error is raised."""
        try_all(self._wait, self._writer.close)

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
        """Raises what the thread raised as it was, not what the pool makes of it."""
        from clu import asynclib

        try:
            act()
            return
        except asynclib.AsyncError as error:
            cause = error.__cause__
        assert cause is not None
        cause.add_note("It was raised in the thread of an asynchronous writer, after the call that caused it.")
        raise cause


def _copied(value: Any) -> Any:
    """The value with memory of its own, on the host."""
    match value:
        case np.ndarray():
            return value.copy()
        case Table():
            return Table({name: _copied(column) for name, column in value.columns.items()})
        case HParams():
            return HParams(value.flat())
        case bool() | int() | float():
            return value
        case _:
            return tree.map(_on_host, value)


def _on_host(leaf: Any) -> Any:
    return leaf.detach().to("cpu", copy=True) if isinstance(leaf, Tensor) else leaf
