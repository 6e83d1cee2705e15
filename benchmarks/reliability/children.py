"""Forked child processes. A child starts in milliseconds, because the parent has imported everything.

The parent must not have threads, because they would not exist in the child.
"""

from __future__ import annotations

import json
import os
import select
import signal
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any, NamedTuple

Tell = Callable[[Any], None]
_PATIENCE = 300.0  # seconds after which a child counts as hung


class Outcome(NamedTuple):
    """The result of a child process."""

    told: list[Any]  # the messages sent by the child
    killed: bool
    error: str  # the traceback of the child, or an empty string


def in_child(work: Callable[[Tell], None], *, kill_after: float | None = None) -> Outcome:
    """Runs ``work`` in a forked child.

    Args:
        work: Called with a function that sends a JSON value to the parent. Values sent before a kill are received.
        kill_after: The number of seconds after which the child is killed with SIGKILL. None kills only a hung child.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        _live(work, writing)
    os.close(writing)
    try:
        content = _read(reading, child, kill_after)
    finally:
        os.close(reading)
        _, status = os.waitpid(child, 0)
    told = [json.loads(line) for line in content.splitlines() if line.endswith(b"]")]
    errors = [text for kind, text in told if kind == "error"]
    killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
    if not killed and status != 0 and not errors:
        errors = [f"the child exited with status {status}"]
    return Outcome([text for kind, text in told if kind == "told"], killed, "".join(errors))


def answer(work: Callable[[], Any]) -> Any:
    """Runs ``work`` in a child, and returns its result, a JSON value.

    Raises:
        RuntimeError: If ``work`` raised an exception. The message contains the traceback.
    """
    outcome = in_child(lambda tell: tell(work()))
    if outcome.error or not outcome.told:
        raise RuntimeError(f"A child failed:\n{outcome.error or outcome}")
    return outcome.told[0]


def _live(work: Callable[[Tell], None], pipe: int) -> None:
    def write(kind: str, message: Any) -> None:
        line = json.dumps([kind, message]).encode() + b"\n"
        while line:
            line = line[os.write(pipe, line) :]

    # Systems print the injected faults to stderr. Tracebacks are sent through the pipe instead.
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    try:
        work(lambda message: write("told", message))
    except BaseException:
        write("error", traceback.format_exc())
        os._exit(1)
    # Skip the exit handlers, because they belong to the parent.
    os._exit(0)


def _read(pipe: int, child: int, kill_after: float | None) -> bytes:
    """Reads the pipe until the child closes it, and kills the child at its deadline."""
    content = b""
    end = time.monotonic() + (_PATIENCE if kill_after is None else kill_after)
    while True:
        ready, _, _ = select.select([pipe], [], [], max(end - time.monotonic(), 0))
        if not ready:
            os.kill(child, signal.SIGKILL)
            end = time.monotonic() + _PATIENCE
            if kill_after is None:
                raise RuntimeError(f"A child hung for {_PATIENCE} s, after sending {content!r}.")
            continue
        piece = os.read(pipe, 65536)
        if not piece:
            return content
        content += piece
