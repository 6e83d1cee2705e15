"""Standard streams that outlast their readers: work goes on when ``head`` has read enough, or a terminal is closed."""

from __future__ import annotations

import contextlib
import errno
import io
import sys
from collections.abc import Iterator
from typing import Any, TextIO

_READER_GONE = frozenset((errno.EPIPE, errno.EIO, errno.ECONNRESET))  # of a pipe, a terminal, a socket


class _Lasting(io.FileIO):
    """The raw file of a stream. Once a write fails, output is dropped."""

    def __init__(self, handle: int) -> None:
        super().__init__(handle, "w", closefd=False)
        self.failure: OSError | None = None

    def write(self, content: Any, /) -> int:
        if self.failure is None:
            try:
                return super().write(content)
            except OSError as error:
                self.failure = error
        return memoryview(content).nbytes


@contextlib.contextmanager
def lasting_streams() -> Iterator[list[OSError]]:
    """Drops standard output and errors once they cannot be written, in place of raising from each ``print``.

    Characters that the encoding does not have are written as escapes. Streams that were replaced before, as in a
    notebook or a test, are left alone.

    Yields:
        A list, which has the failure of standard output at the end, unless its reader has just gone.
    """
    output, errors = sys.stdout, sys.stderr
    raw = _lasting(output) if output is sys.__stdout__ else None
    raw_errors = _lasting(errors) if errors is sys.__stderr__ else None
    failures: list[OSError] = []
    if raw is not None:
        sys.stdout = _text(raw, output)
    if raw_errors is not None:
        sys.stderr = _text(raw_errors, errors)
    try:
        yield failures
    finally:
        if raw is not None:
            sys.stdout.flush()
            if raw.failure is not None and raw.failure.errno not in _READER_GONE:
                failures.append(raw.failure)
        sys.stdout, sys.stderr = output, errors


def _lasting(stream: TextIO | None) -> _Lasting | None:
    """None where there is no such stream, or no file behind it."""
    if stream is None:
        return None
    try:
        stream.flush()
        return _Lasting(stream.fileno())
    except (OSError, ValueError):
        return None


def _text(raw: _Lasting, like: TextIO) -> TextIO:
    buffered = io.BufferedWriter(raw)
    return io.TextIOWrapper(
        buffered,
        encoding=like.encoding,
        errors="backslashreplace",
        line_buffering=raw.isatty() or like is sys.__stderr__,
        write_through=like is sys.__stderr__,
    )
