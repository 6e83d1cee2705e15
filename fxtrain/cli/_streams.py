"""Standard streams that do not raise when their reader is gone."""

from __future__ import annotations

import contextlib
import errno
import io
import sys
from collections.abc import Iterator
from typing import TextIO

from typing_extensions import Buffer

_READER_GONE = frozenset((errno.EPIPE, errno.EIO, errno.ECONNRESET))  # errors of a pipe, a terminal and a socket


class _Lasting(io.FileIO):
    """The raw file of a stream. It drops all output after a failed write."""

    def __init__(self, handle: int) -> None:
        super().__init__(handle, "w", closefd=False)
        self.failure: OSError | None = None

    def write(self, content: Buffer, /) -> int:
        if self.failure is None:
            try:
                return super().write(content)
            except OSError as error:
                self.failure = error
        return memoryview(content).nbytes


@contextlib.contextmanager
def lasting_streams() -> Iterator[list[OSError]]:
    """Drops standard output and error output once a write fails, instead of raising from each ``print``.

    A write fails after ``| head``, for example, or in a closed terminal.

    Characters that the encoding lacks are escaped. Streams that were already replaced, as in a notebook or a test, are
    not changed.

    Yields:
        A list that contains the error of standard output after the context ends. A reader that is gone is not an error.
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


def _lasting(stream: TextIO) -> _Lasting | None:
    """Returns a wrapper of a stream's file, or None if there is no stream or file."""
    try:
        stream.flush()
        return _Lasting(stream.fileno())
    except (AttributeError, OSError, ValueError):  # a process without a console has None as its stream
        return None


def _text(raw: _Lasting, like: TextIO) -> TextIO:
    return io.TextIOWrapper(
        io.BufferedWriter(raw),
        encoding=like.encoding,
        errors="backslashreplace",
        line_buffering=raw.isatty() or like is sys.__stderr__,
        write_through=like is sys.__stderr__,
    )
