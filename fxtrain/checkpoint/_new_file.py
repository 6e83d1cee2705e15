"""A new file whose content goes to the disk past the page cache.

Written through the page cache, a large checkpoint takes that memory from other files, such as training data, and its
writer waits until the system has found it. Where that is impossible, the file is written like any other.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import pathlib
from types import TracebackType
from typing import Self

CHUNK = 2**22  # bytes; small enough that a chunk is still in the CPU cache when it is copied after hashing
_SMALLEST = 2**23  # bytes; smaller files are faster through the page cache
_REFUSALS = (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.ENOTTY)


class NewFile:
    """A new file that is on the disk when its context ends without an error.

    Args:
        path: The file.
        size: The number of bytes that will be written.

    Raises:
        OSError: If the file exists or cannot be created.

    Example:
        >>> import pathlib, tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = pathlib.Path(folder, "new")
        ...     with NewFile(path, 6) as file:
        ...         file.write(b"abc")
        ...         file.write(b"def")
        ...     path.read_bytes()
        b'abcdef'
    """

    def __init__(self, path: pathlib.Path, size: int) -> None:
        # As ``open`` does, which also audits the call and creates the file with the permissions of the process.
        self._file = open(path, "xb", buffering=0)  # noqa: SIM115
        self._buffer = mmap.mmap(-1, CHUNK)  # whole pages, as direct writes need
        self._count, self._is_direct = 0, False
        if size >= _SMALLEST:
            self._set_direct(True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._flush()
                os.fsync(self._file.fileno())
        finally:
            self._file.close()

    def write(self, content: bytes | memoryview) -> None:
        """Appends bytes.

        Raises:
            OSError: If they cannot be written.
        """
        rest = memoryview(content)
        while rest:
            part = rest[: CHUNK - self._count]
            self._buffer[self._count : self._count + len(part)] = part
            self._count += len(part)
            rest = rest[len(part) :]
            if self._count == CHUNK:
                self._flush()

    def _flush(self) -> None:
        """Writes the buffer."""
        done = 0
        with memoryview(self._buffer) as buffer:
            while done < self._count:
                # Direct writes are of whole blocks. The end of a file, or the rest of an interrupted write, is not.
                if self._is_direct and (done or self._count < CHUNK):
                    self._set_direct(False)
                try:
                    done += self._file.write(buffer[done : self._count]) or 0
                except OSError as error:
                    if not self._is_direct or error.errno not in _REFUSALS:
                        raise
                    self._set_direct(False)
        self._count = 0

    def _set_direct(self, direct: bool) -> None:
        """Switches direct writes off, or on if the system and the file system have them."""
        self._is_direct = False
        flag = getattr(os, "O_DIRECT", 0)
        if not flag:
            return
        import fcntl

        with contextlib.suppress(OSError):
            before = fcntl.fcntl(self._file, fcntl.F_GETFL)
            fcntl.fcntl(self._file, fcntl.F_SETFL, before | flag if direct else before & ~flag)
            self._is_direct = direct
