"""Runs functions in separate processes, which are killed together with their child processes."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

_SERVED = multiprocessing.get_context("forkserver")


def prepare() -> None:
    """Imports torch and its compiler once, for all processes that are started later."""
    _SERVED.set_forkserver_preload(["torch", "torch._dynamo", "torch._inductor.compile_fx", "fxtrain"])


def result_of(function: Callable[..., dict[str, Any]], *args: Any, timeout: float) -> dict[str, Any]:
    """Returns the function's result, or ``{"error": ...}`` if its process crashes or times out.

    Args:
        function: A module-level function that returns a picklable dict.
        *args: Its arguments, picklable.
        timeout: Seconds until the process and its child processes are killed.
    """
    receiver, sender = _SERVED.Pipe(duplex=False)
    process = _SERVED.Process(target=_send, args=(sender, function, args))
    process.start()
    sender.close()
    try:
        if not receiver.poll(timeout):
            return {"error": f"took longer than {timeout:.0f} s"}
        return receiver.recv()
    except EOFError:
        process.join()
        return {"error": f"ended with exit code {process.exitcode}"}
    finally:
        assert process.pid is not None
        # The group includes compiler processes. It does not exist until the process creates it, so both are killed.
        for end in (os.killpg, os.kill):
            with contextlib.suppress(ProcessLookupError):
                end(process.pid, signal.SIGKILL)
        process.join()
        receiver.close()


def _send(sender: Connection, function: Callable[..., dict[str, Any]], args: tuple[Any, ...]) -> None:
    os.setsid()
    threading.Thread(target=_end_with_parent, daemon=True).start()
    sender.send(function(*args))


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os.killpg(0, signal.SIGKILL)
