"""Reads regular files, with errors that distinguish damaged files from I/O failures."""

from __future__ import annotations

import errno
import os
import pathlib
import stat

from fxtrain.checkpoint._errors import CheckpointError, DamagedError

# Errors of paths that are not regular files. Any other error may be temporary, so it is not reported as damage.
_NO_FILE = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENXIO, errno.ENODEV)


def open_regular(path: pathlib.Path) -> int:
    """Opens the regular file at ``path`` for reading and returns its descriptor.

    Symbolic links are followed, because callers verify the content.

    Raises:
        CheckpointError: If the file cannot be opened.
        DamagedError: If the file is missing or not a regular file.
    """
    try:
        # Without O_NONBLOCK a FIFO would block until another process writes to it.
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    except OSError as error:
        raise unreadable(path, error) from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise DamagedError(f"expected a regular file at {path}, got another kind of file.")
    return descriptor


def read_at_most(path: pathlib.Path, limit: int) -> bytes:
    """Returns the content of a regular file.

    Args:
        path: The file.
        limit: The largest size accepted, in bytes.

    Raises:
        CheckpointError: If the file cannot be read.
        DamagedError: If the file is missing, not a regular file, or longer than ``limit``.
    """
    with open(open_regular(path), "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size > limit:
            raise DamagedError(f"{path} is damaged: expected at most {limit} bytes, got {size}.")
        try:
            return file.read(size)
        except OSError as error:
            raise unreadable(path, error) from None


def unreadable(path: pathlib.Path, error: OSError) -> CheckpointError:
    """Returns the error for a file that could not be opened or read: a ``DamagedError`` unless it may be temporary."""
    if isinstance(error, FileNotFoundError | NotADirectoryError):
        return DamagedError(
            f"expected a checkpoint at {path.parent}, got no {path.name} in it. "
            "Give a folder written by fxtrain.save or a checkpointer."
        )
    if error.errno in _NO_FILE:
        return DamagedError(f"expected a regular file at {path}, got another kind of file ({error.strerror}).")
    return CheckpointError(
        f"expected a readable file at {path}, got {error}. The checkpoint may be undamaged. Make the file readable, or "
        "move its folder away to restore an older checkpoint."
    )
