"""Files that are read: regular ones only, and errors that tell damage from a disk that does not answer."""

from __future__ import annotations

import errno
import os
import pathlib
import stat

from fxtrain.checkpoint._errors import CheckpointError, DamagedError

_PIECE = 2**22
# What the system answers where no regular file is. Any other error may pass, so it is not damage.
_NO_FILE = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENXIO, errno.ENODEV)


def open_regular(path: pathlib.Path) -> int:
    """A descriptor of the file at ``path``, open to be read. Symbolic links are followed: the content is verified.

    Raises:
        CheckpointError: If it cannot be opened.
        DamagedError: If there is no regular file.
    """
    try:
        # Without O_NONBLOCK a FIFO would block until another process writes to it.
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    except OSError as error:
        raise unreadable(path, error) from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise DamagedError(f"{path} cannot be read: expected a regular file, got something else.")
    return descriptor


def read_at_most(path: pathlib.Path, limit: int) -> bytes:
    """The content of a regular file.

    Raises:
        CheckpointError: If it cannot be read.
        DamagedError: If there is no regular file, or it is longer than ``limit`` bytes.
    """
    descriptor = open_regular(path)
    try:
        pieces: list[bytes] = []
        size = os.fstat(descriptor).st_size
        while size <= limit and (piece := os.read(descriptor, _PIECE)):
            pieces.append(piece)
            size = max(size, sum(map(len, pieces)))
    except OSError as error:
        raise unreadable(path, error) from None
    finally:
        os.close(descriptor)
    if size > limit:
        raise DamagedError(f"{path} is damaged: expected at most {limit} bytes, got {size}.")
    return b"".join(pieces)


def unreadable(path: pathlib.Path, error: OSError) -> CheckpointError:
    """The error for a file that could not be opened or read."""
    if isinstance(error, FileNotFoundError | NotADirectoryError):
        return DamagedError(f"{path.parent} is no checkpoint: there is no {path.name} in it.")
    if error.errno in _NO_FILE:
        return DamagedError(f"{path} cannot be read: expected a regular file, got something else ({error.strerror}).")
    return CheckpointError(
        f"{path} cannot be read ({error}). It may be whole: make it readable, or move its folder away to restore an "
        "older one."
    )
