"""A lease: which of several processes compiles a graph while the others wait for its file.

On one machine it is a lock, which the system releases when its holder ends. For several machines, the holder touches
the lease's file. Waiting processes watch whether its time changes, by their own clocks, so that neither a killed holder
nor clocks that disagree can block them.
"""

from __future__ import annotations

import contextlib
import io
import os
import threading
import time
from collections.abc import Callable, Generator
from pathlib import Path

from fxtrain.disk import close_in_children, try_lock

_BEAT_SECONDS = 1.0
_DEAD_SECONDS = 15.0  # without a beat, after which a holder counts as dead
_POLL_SECONDS = 0.1
_MAX_WAIT_SECONDS = 1800.0


@contextlib.contextmanager
def turn(path: Path, is_done: Callable[[], bool], on_wait: Callable[[], None]) -> Generator[None]:
    """A context that one process at a time enters, unless the others have waited long enough or the work is done.

    Args:
        path: The file of the lease. Where it cannot be created, all processes enter immediately.
        is_done: Whether another process has finished the work, so that waiting is over.
        on_wait: Called once before this process waits.
    """
    if not _acquire(path, is_done, on_wait):
        yield
        return
    stop = threading.Event()
    beats = threading.Thread(target=_beat, args=(path, stop), name="fxtrain-lease", daemon=True)
    beats.start()
    try:
        yield
    finally:
        stop.set()
        beats.join()
        with contextlib.suppress(OSError):
            path.unlink()


@contextlib.contextmanager
def local_turn(path: Path, is_done: Callable[[], bool], on_wait: Callable[[], None]) -> Generator[None]:
    """A context like ``turn``, for the processes of one machine."""
    file: io.FileIO | None = None
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        file = io.FileIO(path, "a")
    if file is None:
        yield
        return
    with file:
        close_in_children(file)
        began, is_held = time.monotonic(), try_lock(file.fileno())
        if is_held is False and not is_done():
            on_wait()
        while is_held is False and not is_done() and time.monotonic() - began < _MAX_WAIT_SECONDS:
            time.sleep(_POLL_SECONDS)
            is_held = try_lock(file.fileno())
        try:
            yield
        finally:
            if is_held:
                with contextlib.suppress(OSError):
                    path.unlink()


def _acquire(path: Path, is_done: Callable[[], bool], on_wait: Callable[[], None]) -> bool:
    """Waits for the lease. Returns whether this process holds it."""
    began = changed = time.monotonic()
    before: int | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError:
        return False
    while not is_done():
        try:
            os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644))
            return True
        except FileExistsError:
            pass
        except OSError:
            return False
        now = time.monotonic()
        if before is None:
            on_wait()
        with contextlib.suppress(OSError):
            beat = path.stat().st_mtime_ns
            if beat != before:
                before, changed = beat, now
        if now - began > _MAX_WAIT_SECONDS:
            return False
        if now - changed > _DEAD_SECONDS:
            try:
                path.unlink(missing_ok=True)
            except OSError:
                return False
            changed = now
        time.sleep(_POLL_SECONDS)
    return False


def _beat(path: Path, stop: threading.Event) -> None:
    while not stop.wait(_BEAT_SECONDS):
        with contextlib.suppress(OSError):
            os.utime(path)
