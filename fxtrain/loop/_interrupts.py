"""Interrupts: a signal becomes a flag, which the loop reads where the state is whole."""

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
from typing import Any, Self

_log = logging.getLogger(__name__)

# What is on the stack while a step has changed nothing yet: functions of ours that make a graph, or wait for a thread
# that makes a batch; a module of torch's that makes a graph.
_OURS = (
    ("fxtrain.compiler._trace", "compile_traced"),
    ("fxtrain.compiler._trace", "trace_step"),
    ("fxtrain.rng._host", "wait_for_turn"),
)
_DYNAMO = "torch._dynamo.convert_frame"
# Modules of which an exception would leave a half.
_IMPORTING = ("importlib._bootstrap", "importlib._bootstrap_external")
_LEAVABLE = (__name__, "leavable")
_LEAVABLE_WAIT = (__name__, "leavable_wait")

_DEAD_WORKER = "DataLoader worker (pid"  # how torch begins to say that a worker is gone
_GRACE = 1.0  # seconds in which a signal to all processes of a job, sent one by one, reaches this process too

_pending: list[signal.Signals] = []
"""The signal whose default action, to end the process, a session replaced by a save. Like a signal that is pending in
the kernel it belongs to the process, and is delivered once, where the next session begins."""


class Abandoned(BaseException):
    """A signal came, and what is under way changes nothing: it is left."""


class Interrupts:
    """While it is entered, the first SIGINT, SIGTERM or SIGUSR1 is noted, and a SIGINT after it acts at once.

    SIGUSR1 is what Slurm and some spot instances send ahead of the end; it is left alone where the program handles it
    itself. Signals belong to the main thread; elsewhere nothing is noted and nothing changed.

    A noted signal still ends the process, later: the program's own handler is called when the session has ended. For
    SIGTERM and SIGUSR1 without one, the next session raises SystemExit in place of training. A SIGINT without one ends
    this session only, because who pressed Ctrl-C is there to press it again.

    Args:
        is_saving: Whether a checkpoint is being written.

    Raises:
        SystemExit: If the process was asked to end during an earlier session.
    """

    def __init__(self, is_saving: Callable[[], bool] = bool) -> None:
        _deliver_pending()
        self.cause: str | None = None
        self.exit_code = 0
        self._kind: signal.Signals | None = None
        self._before: dict[signal.Signals, Any] = {}
        self._has_left = False
        self._is_saving = is_saving
        self._process = os.getpid()

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            # What whoever started this process had ignored, as a shell does of a job in the background, stays ignored.
            kinds = [kind for kind in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(kind) != signal.SIG_IGN]
            ahead = getattr(signal, "SIGUSR1", None)
            if ahead is not None and signal.getsignal(ahead) == signal.SIG_DFL:
                kinds.append(ahead)
            self._before = {kind: signal.signal(kind, self._note) for kind in kinds}
        return self

    def __exit__(self, *exc: object) -> None:
        before, kind = self._restore(), self._kind
        if kind is None:
            return
        theirs = before.get(kind)
        if theirs == signal.SIG_DFL:
            _pending[:] = [kind]
        elif callable(theirs) and theirs is not signal.default_int_handler:
            signal.raise_signal(kind)

    def leaving_waits(self, data: Any) -> Waits:
        """``data``, whose reading is left by ``Abandoned`` when a signal arrives."""
        return Waits(data, self)

    def explains(self, error: Exception) -> bool:
        """Whether an error of the data follows from a signal, as when it has ended workers of a DataLoader.

        For a signal that has reached the workers first it waits a second.
        """
        from_workers = isinstance(error, OSError | EOFError) or _DEAD_WORKER in str(error)
        until = time.monotonic() + (_GRACE if from_workers and self._before else 0.0)
        while self.cause is None and time.monotonic() < until:
            time.sleep(0.01)
        return self.cause is not None

    def _restore(self) -> dict[signal.Signals, Any]:
        before, self._before = self._before, {}
        for kind, handler in before.items():
            signal.signal(kind, handler)
        return before

    def _note(self, number: int, frame: FrameType | None) -> None:
        kind = signal.Signals(number)
        if os.getpid() != self._process:
            # A process forked during the session: this one answers for it, and ends it by SIGTERM.
            if kind == signal.SIGTERM:
                self._restore()
                signal.raise_signal(kind)
            return
        if self.cause is None:
            self.cause, self.exit_code, self._kind = kind.name, 128 + number, kind
            self._ignore_dead_workers()
        elif kind == signal.SIGINT:
            self._end_now(kind)
            return
        if not self._has_left and _can_be_left(frame):
            self._has_left = True
            raise Abandoned

    def _end_now(self, kind: signal.Signals) -> None:
        """Asked twice: whatever handled the signal before this session handles it now."""
        theirs = self._restore().get(kind)
        self._kind = None
        # A program without a handler ends in KeyboardInterrupt, and Python waits for the thread that writes.
        # Checkpoints are committed atomically, so ending in the middle of a save loses nothing but that save.
        if theirs is signal.default_int_handler and self._is_saving() and not _is_interactive():
            _end_process(kind)
        signal.raise_signal(kind)

    def _ignore_dead_workers(self) -> None:
        """From here on the death of a DataLoader's worker is a consequence of the signal.

        Torch raises it in its handler of SIGCHLD: anywhere in the main thread, in the middle of a step or a save.
        """
        theirs = signal.getsignal(signal.SIGCHLD) if hasattr(signal, "SIGCHLD") else None
        if not callable(theirs):
            return

        def handle(number: int, frame: FrameType | None) -> None:
            while True:
                try:
                    return theirs(number, frame)
                except RuntimeError as error:
                    # Torch reports each loader's dead workers once, and only then calls the handler before its own.
                    if _DEAD_WORKER not in str(error):
                        raise

        self._before[signal.SIGCHLD] = signal.signal(signal.SIGCHLD, handle)


class Waits:
    """Data by position, whose reading a signal can leave. Made by ``Interrupts.leaving_waits``."""

    def __init__(self, data: Any, interrupts: Interrupts) -> None:
        self._data, self._interrupts = data, interrupts
        self.can_jump: bool = data.can_jump
        self._read = _leaving_waits(data) if data.can_be_left else data.__getitem__

    @property
    def epoch_length(self) -> int | None:
        """As the data's."""
        return self._data.epoch_length

    def __getitem__(self, position: int) -> Any:
        try:
            return self._read(position)
        except Exception as error:
            if not self._interrupts.explains(error):
                raise
            _log.info("Reading a batch failed after %s: %r.", self._interrupts.cause, error)
            raise Abandoned from error


def _leaving_waits(data: Any) -> Callable[[int], Any]:
    def leavable_wait(position: int) -> Any:  # known by its name on the stack
        return data[position]

    return leavable_wait


def leaving_compilation(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function``, which is left by ``Abandoned`` if a signal arrives while it compiles or waits for a thread.

    That can take minutes and has changed nothing yet. A graph that runs is never left: it may be in the middle of
    writing over memory that was donated to it.
    """

    def leavable(*args: Any) -> Any:  # known by its name on the stack
        return function(*args)

    return leavable


def _can_be_left(frame: FrameType | None) -> bool:
    compiles = False
    while frame is not None:
        where = frame.f_globals.get("__name__"), frame.f_code.co_name
        if where[0] in _IMPORTING:
            return False
        compiles = compiles or where[0] == _DYNAMO or where in _OURS
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
        "Training does not start: this process received %s in an earlier session, which it ended with a save. The "
        "process exits with code %d. To end it earlier, look at result.exit_code after each fit. To go on after %s, "
        "install a handler for it before fit.",
        *(kind.name, code, kind.name),
    )
    raise SystemExit(code)


def _is_interactive() -> bool:
    return hasattr(sys, "ps1") or bool(sys.flags.interactive)


def _end_process(kind: signal.Signals) -> None:
    """Ends the process by the signal's default action, which its parent sees as its cause."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()
    for child in multiprocessing.active_children():
        if child.daemon:
            child.kill()
    signal.signal(kind, signal.SIG_DFL)
    signal.raise_signal(kind)
    os._exit(128 + kind)  # a container's first process does not die of a default action
