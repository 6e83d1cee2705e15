"""A thread that runs torch's compilers while the calling thread takes steps.

Tracing swaps the parameters of modules, which all threads share, so only the part after the trace runs in a worker.
Neither the tracer nor Inductor is thread-safe. There is one job at a time, and ``compiler_lock`` locks out the other
compilations of the process.
"""

from __future__ import annotations

import atexit
import contextlib
import contextvars
import ctypes
import os
import sys
import threading
import time
from collections.abc import Callable, Generator
from types import FrameType

import torch

from fxtrain._torch_internals.dynamo import compile_lock, nested_calls_inlined
from fxtrain._torch_internals.vector_instructions import ignore_interrupts_of_compilers
from fxtrain.compiler.lowering._executable import Executable
from fxtrain.compiler.lowering._muted_logs import without_torch_logs

_EXIT_TIMEOUT_SECONDS, _EXIT_RETRY_SECONDS = 2.0, 0.2

_lock = threading.RLock()
_current_job: Job | None = None


def compiler_lock() -> threading.RLock:
    """Returns the lock that a thread holds while it traces or compiles."""
    return _lock


def is_idle() -> bool:
    """Whether a new job can start."""
    return _current_job is None or _current_job.is_over


class Job:
    """Calls a function in a new thread, with this thread's context variables. Create one only if ``is_idle``.

    Args:
        function: Compiles a traced graph.
        device: The device on which the graph runs.
    """

    def __init__(self, function: Callable[[], Executable], device: torch.device) -> None:
        global _current_job
        self.result: Executable | None = None
        self.error: Exception | None = None
        self.seconds = 0.0
        self._function, self._device = function, device
        self._has_ended = threading.Event()
        self._grad_enabled = torch.is_grad_enabled()
        # The options of torch's compilers are context variables.
        run = contextvars.copy_context().run
        if _current_job is not None:
            _current_job.close()
        self._restore: Callable[[], None] | None = nested_calls_inlined()
        self._thread = threading.Thread(target=run, args=(self._run,), name="fxtrain-compile", daemon=True)
        _current_job = self
        # Functions run in reverse order of registration, so this one runs before torch shuts down its compilers.
        atexit.unregister(_leave)
        atexit.register(_leave)
        self._thread.start()

    @property
    def is_over(self) -> bool:
        """Whether there is a result or an error, or the thread is gone, as in a forked process."""
        return self._has_ended.is_set() or not self._thread.is_alive()

    def close(self) -> None:
        """Restores the setting that the job changed. Call it once the job is over."""
        global _current_job
        if _current_job is self:
            _current_job = None  # a reference would keep the result alive
        restore, self._restore = self._restore, None
        if restore is not None:
            restore()

    def _run(self) -> None:
        ignore_interrupts_of_compilers()
        began = time.perf_counter()
        try:
            with _lock, compile_lock(), _without_generator_resets(), without_torch_logs(), _current(self._device):
                torch.set_grad_enabled(self._grad_enabled)
                self.result = self._function()
        except Exception as error:
            self.error = error
        finally:
            del self._function
            self.seconds = time.perf_counter() - began
            self._has_ended.set()

    def leave(self) -> None:
        """Stops the thread where it runs Python, and waits a moment for it.

        It raises SystemExit in the thread, which ends it without a report. Callbacks of the garbage collector ignore
        the exception, so it is raised until the thread ends. A thread that imports a module is left alone meanwhile,
        because it might never release the lock of all imports.
        """
        identity, deadline = self._thread.ident, time.monotonic() + _EXIT_TIMEOUT_SECONDS
        while identity is not None and not self.is_over and time.monotonic() < deadline:
            if not _is_importing(sys._current_frames().get(identity)):
                ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(identity), ctypes.py_object(SystemExit))
                self._thread.join(_EXIT_RETRY_SECONDS)
            self._thread.join(_EXIT_RETRY_SECONDS / 100)


def _is_importing(frame: FrameType | None) -> bool:
    """Whether a frame is part of an import of Python, not of the module that is imported."""
    return frame is not None and frame.f_code.co_filename.startswith("<frozen importlib")


@contextlib.contextmanager
def _without_generator_resets() -> Generator[None]:
    """Ignores resets of torch's generators in this thread.

    Compilers restore the generators when they finish, which would undo the progress of other threads.
    """
    thread = threading.get_ident()

    def by_others(setter: Callable[..., None]) -> Callable[..., None]:
        def set_rng_state(*args: object, **kwargs: object) -> None:
            if threading.get_ident() != thread:
                setter(*args, **kwargs)

        return set_rng_state

    before = torch.random.set_rng_state, torch.cuda.set_rng_state
    torch.random.set_rng_state, torch.cuda.set_rng_state = map(by_others, before)
    try:
        yield
    finally:
        torch.random.set_rng_state, torch.cuda.set_rng_state = before


def _current(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Returns a context that makes the device current, because each thread has its own current device."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def _leave() -> None:
    if _current_job is not None:
        with contextlib.suppress(KeyboardInterrupt):  # of a user who does not want to wait
            _current_job.leave()


def _reset_after_fork() -> None:
    # A forked child has no such thread, so nothing would release the lock.
    global _lock, _current_job
    _lock, _current_job = threading.RLock(), None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_reset_after_fork)
