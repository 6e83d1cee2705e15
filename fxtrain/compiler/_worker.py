"""Worker: a thread in which torch's compilers run while the thread that takes the steps goes on.

Tracing exchanges the parameters of modules, which all threads share, so only what follows a trace is a job for a
worker. Neither the tracer nor Inductor may run in two threads: there is one job at a time, and ``turn`` keeps the other
compilations of the process apart from it.
"""

from __future__ import annotations

import atexit
import contextlib
import contextvars
import ctypes
import os
import threading
import time
from collections.abc import Callable, Generator
from typing import Any

import torch

from fxtrain.compiler._quiet import without_logs

_PATIENCE = 2.0  # seconds that the end of the process waits for a job to leave

_turn = threading.RLock()
_under_way: Job | None = None


def turn() -> threading.RLock:
    """The lock that a thread holds while it traces or compiles."""
    return _turn


def is_idle() -> bool:
    """Whether a job can begin."""
    return _under_way is None or _under_way.is_over


class Job:
    """A call of a function in a thread of its own, in the context of this one. Make one only if ``is_idle``.

    Args:
        function: Compiles a graph that was traced.
        device: Where the graph runs.
    """

    def __init__(self, function: Callable[[], Any], device: torch.device) -> None:
        global _under_way
        self.result: Any = None
        self.error: Exception | None = None
        self.seconds = 0.0
        self._function, self._device = function, device
        self._has_ended = threading.Event()
        self._grad_enabled = torch.is_grad_enabled()
        # Options of torch's compilers are context variables.
        run = contextvars.copy_context().run
        if _under_way is not None:
            _under_way.close()
        self._restore: Callable[[], None] | None = _inline_nested_calls()
        self._thread = threading.Thread(target=run, args=(self._run,), name="fxtrain-compile", daemon=True)
        _under_way = self
        _leave_at_exit()
        self._thread.start()

    @property
    def is_over(self) -> bool:
        """Whether there is a result or an error, or the thread is gone: a forked process does not have it."""
        return self._has_ended.is_set() or not self._thread.is_alive()

    def close(self) -> None:
        """Puts back what this thread needed for the job. To be called once it is over."""
        global _under_way
        if _under_way is self:
            _under_way = None  # which would keep the result
        restore, self._restore = self._restore, None
        if restore is not None:
            restore()

    def _run(self) -> None:
        began = time.perf_counter()
        try:
            with _turn, _lock_of_dynamo(), _generators_left_alone(), without_logs(), _current(self._device):
                torch.set_grad_enabled(self._grad_enabled)
                self.result = self._function()
        except Exception as error:
            self.error = error
        finally:
            del self._function
            self.seconds = time.perf_counter() - began
            self._has_ended.set()

    def leave(self) -> None:
        """Ends the thread where it runs Python, and waits a moment for it. Threads report no SystemExit."""
        identity = self._thread.ident
        if self.is_over or identity is None:
            return
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(identity), ctypes.py_object(SystemExit))
        self._thread.join(_PATIENCE)


@contextlib.contextmanager
def _generators_left_alone() -> Generator[None]:
    """Compilers put torch's generators back to where they were, which would undo what other threads draw meanwhile."""
    thread = threading.get_ident()

    def by_others(setter: Callable[..., None]) -> Callable[..., None]:
        def set_rng_state(*args: Any, **kwargs: Any) -> None:
            if threading.get_ident() != thread:
                setter(*args, **kwargs)

        return set_rng_state

    before = torch.random.set_rng_state, torch.cuda.set_rng_state
    torch.random.set_rng_state, torch.cuda.set_rng_state = map(by_others, before)
    try:
        yield
    finally:
        torch.random.set_rng_state, torch.cuda.set_rng_state = before


def _inline_nested_calls() -> Callable[[], None]:
    """Lets functions that Dynamo has compiled run uncompiled while a job traces; returns a function that ends this.

    A flag of the whole process says that torch.fx traces. Dynamo refuses to be called then, in any thread.
    """
    from torch._dynamo import config

    option = "error_on_nested_fx_trace"
    before = getattr(config, option)
    setattr(config, option, False)
    return lambda: setattr(config, option, before)


def _lock_of_dynamo() -> Any:
    """The lock under which Dynamo compiles."""
    from torch._dynamo import convert_frame

    return getattr(convert_frame, "compile_lock", contextlib.nullcontext())


def _current(device: torch.device) -> Any:
    """The device as the current one: each thread has its own."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def _leave_at_exit() -> None:
    # The last function registered is the first to run, before torch ends what its compilers use.
    atexit.unregister(_leave)
    atexit.register(_leave)


def _leave() -> None:
    if _under_way is not None:
        _under_way.leave()


def _forget() -> None:
    # A forked child has neither the thread nor what would release its lock.
    global _turn, _under_way
    _turn, _under_way = threading.RLock(), None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
