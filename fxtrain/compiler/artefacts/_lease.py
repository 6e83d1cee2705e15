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
def turn(path: Path, is_done: Callable[[], bool], on_wait: Callable[[], None]) -> Generator[bool]:
    """A context that one process at a time enters, unless the others have waited long enough or the work is done.

    It yields whether this process holds the lease.

    Args:
        path: The file of the lease. Where it cannot be created, all processes enter immediately.
        is_done: Whether another process has finished the work, so that waiting is over.
        on_wait: Called once before this process waits.
    """
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
    if not _is_held(_creates(path), is_done, on_wait):
        yield False
        return
    stop = threading.Event()
    beats = threading.Thread(target=_beat, args=(path, stop), name="fxtrain-lease", daemon=True)
    beats.start()
    try:
        yield True
    finally:
        stop.set()
        beats.join()
        with contextlib.suppress(OSError):
            path.unlink()


@contextlib.contextmanager
def local_turn(path: Path, is_done: Callable[[], bool], on_wait: Callable[[], None]) -> Generator[bool]:
    """A context like ``turn``, for the processes of one machine."""
    file: io.FileIO | None = None
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        file = io.FileIO(path, "a")
    if file is None:
        yield False
        return
    with file:
        close_in_children(file)
        descriptor = file.fileno()
        is_held = _is_held(lambda: try_lock(descriptor), is_done, on_wait)
        try:
            yield is_held
        finally:
            if is_held:
                with contextlib.suppress(OSError):
                    path.unlink()


def _is_held(attempt: Callable[[], bool | None], is_done: Callable[[], bool], on_wait: Callable[[], None]) -> bool:
    """Waits for a lease until the work is done or the wait is too long. Returns whether this process holds the lease.

    Args:
        attempt: Takes the lease, and returns whether that succeeded; None if there are no leases here.
        is_done: As for ``turn``.
        on_wait: As for ``turn``.
    """
    began, is_held = time.monotonic(), attempt()
    if is_held is False and not is_done():
        on_wait()
    while is_held is False and not is_done() and time.monotonic() - began < _MAX_WAIT_SECONDS:
        time.sleep(_POLL_SECONDS)
        is_held = attempt()
    return bool(is_held)


def _creates(path: Path) -> Callable[[], bool | None]:
    """Returns ``attempt`` of ``_is_held``, which creates the file of a lease, and removes the file of a dead holder."""
    changed, before = time.monotonic(), -1

    def attempt() -> bool | None:
        nonlocal changed, before
        try:
            os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644))
            return True
        except FileExistsError:
            pass
        except OSError:
            return None
        now = time.monotonic()
        with contextlib.suppress(OSError):
            beat = path.stat().st_mtime_ns
            if beat != before:
                before, changed = beat, now
        if now - changed > _DEAD_SECONDS:
            try:
                path.unlink(missing_ok=True)
            except OSError:
                return None
            changed = now
        return False

    return attempt


def _beat(path: Path, stop: threading.Event) -> None:
    while not stop.wait(_BEAT_SECONDS):
        with contextlib.suppress(OSError):
            os.utime(path)
