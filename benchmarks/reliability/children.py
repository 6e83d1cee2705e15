"""Children: forked from a parent that has imported everything and runs no thread, so that each costs milliseconds."""

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
_PATIENCE = 300.0  # seconds, after which a child hangs


class Outcome(NamedTuple):
    """How a child ended."""

    told: list[Any]  # what it told before
    killed: bool
    error: str  # its traceback, or ""


def in_child(work: Callable[[Tell], None], *, kill_after: float | None = None) -> Outcome:
    """Runs ``work`` in a forked child, and kills it with SIGKILL after so many seconds.

    Args:
        work: Its argument takes anything that is JSON, and has it here at once, whatever becomes of the child.
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
        errors = [f"the child ended with status {status}"]
    return Outcome([text for kind, text in told if kind == "told"], killed, "".join(errors))


def answer(work: Callable[[], Any]) -> Any:
    """What ``work`` returns (JSON) in a child. Its error is raised here."""
    outcome = in_child(lambda tell: tell(work()))
    if outcome.error or not outcome.told:
        raise RuntimeError(f"A child failed:\n{outcome.error or outcome}")
    return outcome.told[0]


def _live(work: Callable[[Tell], None], pipe: int) -> None:
    def write(kind: str, message: Any) -> None:
        line = json.dumps([kind, message]).encode() + b"\n"
        while line:
            line = line[os.write(pipe, line) :]

    # Systems print what they meet, which is what is tried here; errors are told.
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    try:
        work(lambda message: write("told", message))
    except BaseException:
        write("error", traceback.format_exc())
        os._exit(1)
    # No exit handlers: those of the parent are not the child's to run.
    os._exit(0)


def _read(pipe: int, child: int, kill_after: float | None) -> bytes:
    """All that comes until the child's end of the pipe is closed."""
    content = b""
    end = time.monotonic() + (_PATIENCE if kill_after is None else kill_after)
    while True:
        ready, _, _ = select.select([pipe], [], [], max(end - time.monotonic(), 0))
        if not ready:
            os.kill(child, signal.SIGKILL)
            end = time.monotonic() + _PATIENCE
            if kill_after is None:
                raise RuntimeError(f"A child hung for {_PATIENCE} s, after it told {content!r}.")
            continue
        piece = os.read(pipe, 65536)
        if not piece:
            return content
        content += piece
