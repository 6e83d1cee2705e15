"""An exclusive lock on a folder, so that only one run writes to it at a time."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import pathlib
import socket
import stat
from typing import NoReturn

from fxtrain.checkpoint._errors import CheckpointError
from fxtrain.core import warn
from fxtrain.disk import close_in_children, make_folder, try_lock

_NAME = ".lock"
_NOTE = b"process "


class FolderLock:
    """An exclusive lock, held from ``take`` until ``release`` or until the process ends for any reason.

    Args:
        folder: The folder to lock. ``take`` creates it.
    """

    def __init__(self, folder: pathlib.Path) -> None:
        self._folder = folder
        self._file: io.FileIO | None = None

    def take(self) -> None:
        """Acquires the lock and creates the folder. If this object holds the lock, checks that it is still valid.

        Raises:
            CheckpointError: If another writer holds the lock, the folder cannot be written to, the path no longer
                leads to the folder that was locked, or another file has the lock file's name.
        """
        if self._file is not None and not self._file.closed:
            self._check_same(self._file)
            return
        # The file object owns the descriptor, so an exception at any line closes it and releases the lock.
        file: io.FileIO | None = None
        try:
            make_folder(self._folder)
            file = io.FileIO(str(self._folder / _NAME), "r+", opener=_open)
            self._claim(file)
            self._file = file
            close_in_children(file)
        except OSError as error:
            if error.errno == errno.ELOOP:
                self._refuse("a symbolic link")
            raise CheckpointError(
                f"expected a writable folder at {self._folder}, got {error}. Make it writable, or use another folder."
            ) from error
        finally:
            if file is not None and self._file is not file:
                file.close()

    def release(self) -> None:
        """Releases the lock, if it is held."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _claim(self, file: io.FileIO) -> None:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            self._refuse("something that is not a regular file")
        content = os.pread(file.fileno(), 200, 0).strip(b"\0\n")  # a power cut can leave zeros
        if not (content.startswith(_NOTE) or _NOTE.startswith(content)):
            self._refuse("a file with other content")
        is_locked = try_lock(file.fileno())
        if is_locked is None and os.name != "nt":
            warn(
                f"expected a file system with locks at {self._folder}, got one without. Make sure that only one run "
                "writes to it.",
                UserWarning,
            )
        if is_locked is False:
            holder = content.decode(errors="replace").strip() or "another process"
            raise CheckpointError(
                f"expected exclusive access to {self._folder}, got a lock held by {holder}. Two writers would delete "
                "each other's checkpoints. Give each run its own folder, end the other run, or close() the other "
                "checkpointer."
            )
        with contextlib.suppress(OSError):  # the lock works without its note, which a full disk may not hold
            os.ftruncate(file.fileno(), 0)
            os.pwrite(file.fileno(), b"%s%d on %s\n" % (_NOTE, os.getpid(), socket.gethostname().encode()), 0)

    def _refuse(self, what: str) -> NoReturn:
        raise CheckpointError(f"expected the lock of a folder at {self._folder / _NAME}, got {what}. Move it away.")

    def _check_same(self, file: io.FileIO) -> None:
        try:
            there = os.path.samestat(os.fstat(file.fileno()), os.lstat(self._folder / _NAME))
        except OSError:
            there = False
        if not there:
            raise CheckpointError(
                f"expected {self._folder} to be the folder that this run has been saving to, got another one or none. "
                "It may have been moved, deleted or unmounted. Bring it back and resume the run."
            )

    def __del__(self) -> None:
        self.release()


def _open(path: str, flags: int) -> int:
    # Following a link could overwrite an unrelated file, and opening a FIFO would block.
    flags |= os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    return os.open(path, flags, 0o666)
