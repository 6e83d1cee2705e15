"""Writer: jobs in a thread of their own, one after another, which no exception in the calling thread can lose.

A signal handler may raise between any two instructions of the calling thread. So a job is handed over by one atomic
append, counts as pending until it has run, and every wait starts the thread again. The locks and the deque are
implemented in C: an exception inside ``threading.Event`` or a ``Future`` could leave their locks held.
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

_RECHECK = 1.0  # seconds after which a wait looks again, in case another waiter took the news


class Writer:
    """Runs jobs in their order. A job must not raise."""

    def __init__(self) -> None:
        self._reset()
        _LIVE.add(self)

    @property
    def busy(self) -> bool:
        """Whether a job has not ended yet."""
        return bool(self._jobs)

    def submit(self, job: Callable[[], None]) -> None:
        """Hands over a job. Once it is appended it is pending, whatever interrupts this call."""
        self._jobs.append(job)
        self._start()

    def wait(self) -> None:
        """Returns when no job is pending."""
        while self._jobs:
            if not self._running.locked():
                self._start()
            self._news.acquire(timeout=_RECHECK)

    def _reset(self) -> None:
        self._jobs: collections.deque[Callable[[], None]] = collections.deque()
        self._running = _thread.allocate_lock()  # held by the one thread that runs jobs
        self._news = _thread.allocate_lock()  # released after each job
        self._news.acquire()

    def _start(self) -> None:
        _finish_at_exit()
        try:
            # Not threading.Thread, whose start() can be interrupted in a state in which the thread never runs.
            _thread.start_new_thread(self._run, ())
        except RuntimeError:  # no more threads, or the interpreter is ending
            self._run()

    def _run(self) -> None:
        # The outer loop finds a job that was appended after the inner one ended and before the lock was released.
        while self._jobs and self._running.acquire(blocking=False):
            try:
                while self._jobs:
                    try:
                        self._jobs[0]()
                    finally:
                        self._jobs.popleft()
                        if self._news.locked():
                            self._news.release()
            finally:
                self._running.release()


_LIVE: weakref.WeakSet[Writer] = weakref.WeakSet()
_registered_in = 0  # the process whose end waits for pending jobs


def _finish_at_exit() -> None:
    global _registered_in
    if _registered_in != os.getpid():
        # Unlike atexit, a finalizer also runs at the end of a child of multiprocessing.
        util.Finalize(None, _finish, exitpriority=0)
        _registered_in = os.getpid()


def _finish() -> None:
    # A process that Ctrl-C ends does not wait: a checkpoint is committed whole or not at all.
    # In an interactive session the last exception is no reason for its end.
    interactive = hasattr(sys, "ps1") or hasattr(builtins, "get_ipython")
    if getattr(sys, "last_type", None) is KeyboardInterrupt and not interactive:
        return
    for writer in list(_LIVE):
        writer.wait()


def _forget() -> None:
    # A forked child has the pending jobs, but not the thread: they are the parent's.
    for writer in list(_LIVE):
        writer._reset()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
