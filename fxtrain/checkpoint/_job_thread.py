"""Runs jobs sequentially in a background thread, without losing jobs to exceptions in the calling thread.

A signal handler may raise between any two instructions of the calling thread. So a job is submitted by one atomic
append and stays pending until it has run, and every wait restarts the thread if necessary. Only locks and deques
implemented in C are used, because an exception inside ``threading.Event`` or a ``Future`` could leave their locks held.
"""

from __future__ import annotations

import _thread
import builtins
import collections
import os
import sys
import weakref
from collections.abc import Callable
from multiprocessing import util

_RECHECK_SECONDS = 1.0  # a wait checks again, because another waiter may have consumed the notification


class JobThread:
    """Runs jobs in order of submission. A job must not raise."""

    def __init__(self) -> None:
        self._reset()
        _LIVE.add(self)

    @property
    def busy(self) -> bool:
        """Whether any job is pending or running."""
        return bool(self._jobs)

    def submit(self, job: Callable[[], None]) -> None:
        """Submits a job. Once appended it stays pending, even if an exception interrupts this call."""
        self._jobs.append(job)
        self._start()

    def wait(self) -> None:
        """Blocks until no job is pending."""
        while self._jobs:
            if not self._running.locked():
                self._start()
            self._job_done.acquire(timeout=_RECHECK_SECONDS)

    def join(self) -> None:
        """Blocks until no job is pending and the thread has freed the last one.

        A thread that is freeing tensors while the interpreter shuts down would abort the process.
        """
        self.wait()
        if self._running.acquire(timeout=_RECHECK_SECONDS):
            self._running.release()

    def _reset(self) -> None:
        self._jobs: collections.deque[Callable[[], None]] = collections.deque()
        self._running = _thread.allocate_lock()  # held by the thread that runs jobs
        self._job_done = _thread.allocate_lock()  # released after each job
        self._job_done.acquire()

    def _start(self) -> None:
        _finish_at_exit()
        try:
            # Not threading.Thread: an exception in its start() can leave a thread that never runs.
            _thread.start_new_thread(self._run, ())
        except RuntimeError:  # no more threads available, or the interpreter is shutting down
            self._run()

    def _run(self) -> None:
        # The outer loop handles a job appended after the inner loop ended and before the lock was released.
        while self._jobs and self._running.acquire(blocking=False):
            try:
                while self._jobs:
                    try:
                        self._jobs[0]()
                    finally:
                        self._jobs.popleft()
                        if self._job_done.locked():
                            self._job_done.release()
            finally:
                self._running.release()


_LIVE: weakref.WeakSet[JobThread] = weakref.WeakSet()
_registered_in = 0  # the id of the process in which the finalizer is registered


def _finish_at_exit() -> None:
    global _registered_in
    if _registered_in != os.getpid():
        # Unlike atexit, a finalizer also runs at the end of a child of multiprocessing.
        util.Finalize(None, _finish, exitpriority=0)
        _registered_in = os.getpid()


def _finish() -> None:
    # A process ended by Ctrl-C does not wait, because commits are atomic. In an interactive session, last_type may be
    # left over from an earlier Ctrl-C.
    interactive = hasattr(sys, "ps1") or hasattr(builtins, "get_ipython")
    if getattr(sys, "last_type", None) is KeyboardInterrupt and not interactive:
        return
    for writer in list(_LIVE):
        writer.join()


def _forget() -> None:
    # A forked child inherits the pending jobs, which the parent runs, but not the thread.
    for writer in list(_LIVE):
        writer._reset()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
