"""Turns signals into a flag that the loop reads where the state is consistent."""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any, Self, TypeVar, TypeVarTuple

from fxtrain._torch_internals.dynamo import COMPILING_MODULE
from fxtrain.core import Batch
from fxtrain.data import Source

Arguments = TypeVarTuple("Arguments")
R = TypeVar("R")

_log = logging.getLogger(__name__)

# Functions and a module on the stack while a step has had no effect yet: while compiling, or waiting for a thread that
# makes a batch.
_COMPILING_OR_WAITING = (
    ("fxtrain.compiler.lowering._trace", "compile_traced"),
    ("fxtrain.compiler.lowering._trace", "trace_step"),
    ("fxtrain.rng._host_generators", "wait_for_turn"),
)
# An exception inside these would leave a module half imported.
_IMPORTING = ("importlib._bootstrap", "importlib._bootstrap_external")
_LEAVABLE = (__name__, "leavable")
_LEAVABLE_WAIT = (__name__, "leavable_wait")

_DEAD_WORKER = "DataLoader worker (pid"  # start of torch's message that a worker died
_GRACE = 1.0  # seconds for a signal sent to each process of a job to reach this process after the workers

_pending: list[signal.Signals] = []
"""The signal whose default action, ending the process, a session replaced by a save. Like a signal pending in the
kernel, it belongs to the process. It is delivered once, when the next session begins."""


class Abandoned(BaseException):
    """Raised by a signal handler to abort an operation that has had no effect yet."""


class Interrupts:
    """A context manager that records the first SIGINT, SIGTERM or SIGUSR1. A later SIGINT acts immediately.

    SIGUSR1 is sent by Slurm and some spot instances ahead of preemption. It is not handled if the program has a handler
    for it. Outside the main thread, which alone receives signals, the context manager does nothing.

    A recorded signal still takes effect later. If the program has a handler, it is called when the session has ended.
    If not, the next session raises SystemExit after SIGTERM and SIGUSR1. SIGINT ends only the current session, because
    the user can press Ctrl-C again.

    In a run of several ranks, a recorded signal takes effect once all ranks have agreed on it and call ``adopt``.
    Compilations and waits for data are not aborted, because the other ranks would wait for this one in a collective.

    Args:
        is_alone: Whether this process is the only rank.

    Attributes:
        is_saving: Returns whether a checkpoint is being written.
        noted: The first signal that this process has received.
        cause: Name of the signal that ends the session.
        exit_code: 128 plus its number, or 0.

    Raises:
        SystemExit: If a signal during an earlier session was to end the process.
    """

    def __init__(self, *, is_alone: bool = True) -> None:
        _deliver_pending()
        self.is_saving: Callable[[], bool] = bool
        self.noted: signal.Signals | None = None
        self.cause: str | None = None
        self.exit_code = 0
        self._is_alone = is_alone
        self._kind: signal.Signals | None = None
        self._before: dict[signal.Signals, Any] = {}
        self._has_left = False
        self._process = os.getpid()

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            # Signals that the parent process had ignored stay ignored, as SIGINT in a shell's background job.
            kinds = [kind for kind in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(kind) != signal.SIG_IGN]
            ahead = getattr(signal, "SIGUSR1", None)
            if ahead is not None and signal.getsignal(ahead) == signal.SIG_DFL:
                kinds.append(ahead)
            self._before = {kind: signal.signal(kind, self._note) for kind in kinds}
        return self

    def __exit__(self, *exc: object) -> None:
        self.adopt_own()
        before, kind = self._restore(), self._kind
        if kind is None:
            return
        handler = before.get(kind)
        if handler == signal.SIG_DFL:
            _pending[:] = [kind]
        elif callable(handler) and handler is not signal.default_int_handler:
            signal.raise_signal(kind)

    def adopt(self, number: int) -> None:
        """Ends the session by a signal, unless it ends by another one already.

        Args:
            number: The number of the signal, which another rank may have received.
        """
        if self.cause is None:
            self._kind = signal.Signals(number)
            self.cause, self.exit_code = self._kind.name, 128 + number

    def adopt_own(self) -> None:
        """Ends the session by this process's signal, which came after the last agreement of ranks."""
        if self.noted is not None:
            self.adopt(self.noted)

    def explains(self, error: Exception) -> bool:
        """Whether an error of the data was caused by a signal, such as one that killed DataLoader workers.

        If the error is from workers, waits up to a second for the signal, which may reach them first.
        """
        from_workers = isinstance(error, OSError | EOFError) or _DEAD_WORKER in str(error)
        until = time.monotonic() + (_GRACE if from_workers and self._before else 0.0)
        while self.noted is None and time.monotonic() < until:
            time.sleep(0.01)
        return self.noted is not None

    def _restore(self) -> dict[signal.Signals, Any]:
        before, self._before = self._before, {}
        for kind, handler in before.items():
            signal.signal(kind, handler)
        return before

    def _note(self, number: int, frame: FrameType | None) -> None:
        kind = signal.Signals(number)
        if os.getpid() != self._process:
            # In a process forked during the session, which its parent ends with SIGTERM.
            if kind == signal.SIGTERM:
                self._restore()
                signal.raise_signal(kind)
            return
        if self.noted is None:
            self.noted = kind
            if self._is_alone:
                self.adopt(kind)
            self._ignore_dead_workers()
        elif kind == signal.SIGINT:
            self._end_now(kind)
            return
        if self._is_alone and not self._has_left and _can_be_left(frame):
            self._has_left = True
            raise Abandoned

    def _end_now(self, kind: signal.Signals) -> None:
        """Handles a second SIGINT: restores the previous handler and raises the signal again."""
        handler = self._restore().get(kind)
        self._kind = None
        is_interactive = hasattr(sys, "ps1") or bool(sys.flags.interactive)
        # A program without a handler ends in KeyboardInterrupt, and Python then waits for the thread that writes.
        # Checkpoints are committed atomically, so ending the process during a save loses only that save.
        if handler is signal.default_int_handler and self.is_saving() and not is_interactive:
            _end_process(kind)
        signal.raise_signal(kind)

    def _ignore_dead_workers(self) -> None:
        """Suppresses errors of dead DataLoader workers, because the signal killed them.

        Torch raises them in its SIGCHLD handler, so at any point of the main thread, even during a step or a save.
        """
        handler = signal.getsignal(signal.SIGCHLD) if hasattr(signal, "SIGCHLD") else None
        if not callable(handler):
            return

        def handle(number: int, frame: FrameType | None) -> None:
            while True:
                try:
                    return handler(number, frame)
                except RuntimeError as error:
                    # Torch reports the dead workers of each loader once, and only then calls the previous handler.
                    if _DEAD_WORKER not in str(error):
                        raise

        self._before[signal.SIGCHLD] = signal.signal(signal.SIGCHLD, handle)


class Waits:
    """A view of data by position, whose reads raise ``Abandoned`` when a signal arrives."""

    def __init__(self, data: Source, interrupts: Interrupts) -> None:
        self._data, self._interrupts = data, interrupts
        self.random_access: bool = data.random_access
        self._read = _leaving_waits(data) if data.interruptible else data.__getitem__

    @property
    def epoch_length(self) -> int | None:
        """Batches in an epoch; None if unknown."""
        return self._data.epoch_length

    def begin_epoch(self, epoch: int, length: int) -> None:
        self._data.begin_epoch(epoch, length)

    def __getitem__(self, position: int) -> Batch:
        try:
            return self._read(position)
        except Exception as error:
            if not self._interrupts.explains(error):
                raise
            _log.info("Reading a batch failed after %s: %r.", self._interrupts.noted, error)
            raise Abandoned from error


def _leaving_waits(data: Source) -> Callable[[int], Batch]:
    def leavable_wait(position: int) -> Batch:  # identified on the stack by its name
        return data[position]

    return leavable_wait


def leaving_compilation(function: Callable[[*Arguments], R]) -> Callable[[*Arguments], R]:
    """Returns ``function``, raising ``Abandoned`` if a signal arrives while it compiles or waits for a thread.

    Compiling can take minutes and has no effect to undo. A running graph is never aborted, because it may be writing
    into donated buffers.
    """

    def leavable(*args: *Arguments) -> R:  # identified on the stack by its name
        return function(*args)

    return leavable


def _can_be_left(frame: FrameType | None) -> bool:
    compiles = False
    while frame is not None:
        where = frame.f_globals.get("__name__"), frame.f_code.co_name
        if where[0] in _IMPORTING:
            return False
        compiles = compiles or where[0] == COMPILING_MODULE or where in _COMPILING_OR_WAITING
        if where == _LEAVABLE:
            return compiles
        if where == _LEAVABLE_WAIT:
            return True
        frame = frame.f_back
    return False


def _deliver_pending() -> None:
    if not _pending:
        return
    kind = _pending.pop()
    code = 128 + kind
    _log.warning(
        "Training does not start, because this process received %s in an earlier session, which ended with a save. The "
        "process exits with code %d. To exit earlier, check result.exit_code after each fit. To continue after %s, "
        "install a handler for it before fit.",
        *(kind.name, code, kind.name),
    )
    raise SystemExit(code)


def _end_process(kind: signal.Signals) -> None:
    """Ends the process by the signal's default action, so that its parent sees the signal as the cause."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()
    for child in multiprocessing.active_children():
        if child.daemon:
            child.kill()
    signal.signal(kind, signal.SIG_DFL)
    signal.raise_signal(kind)
    os._exit(128 + kind)  # the default action does not end a container's first process
