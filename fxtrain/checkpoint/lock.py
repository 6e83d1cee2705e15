"""The lock of a folder: one run writes into it at a time."""

from __future__ import annotations

import contextlib
import os
import pathlib
import socket
import warnings
import weakref

from fxtrain.checkpoint.errors import CheckpointError
from fxtrain.checkpoint.folder import make_folder

_NAME = ".lock"


class FolderLock:
    """Held from ``take`` to ``release``, or until the process ends, however it ends."""

    def __init__(self, folder: pathlib.Path) -> None:
        self._folder = folder
        self._descriptor: int | None = None

    def take(self) -> None:
        """Takes the lock, unless it is held; makes the folder.

        Raises:
            CheckpointError: If another writer holds it, the folder cannot be written to, or it is not the folder
                any more that the lock was taken in.
        """
        if self._descriptor is not None:
            self._check_same(self._descriptor)
            return
        try:
            make_folder(self._folder)
            descriptor = os.open(self._folder / _NAME, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise CheckpointError(
                f"{self._folder} cannot be written to ({error}): make it writable, or give another folder."
            ) from error
        try:
            _lock(descriptor)
        except BlockingIOError:
            holder = os.pread(descriptor, 200, 0).decode(errors="replace").strip() or "another process"
            os.close(descriptor)
            raise CheckpointError(
                f"{self._folder} is being written to by {holder}, and two writers would delete each other's "
                "checkpoints: give each run a folder of its own, or end the other one (`close()` a checkpointer that "
                "is not needed any more)."
            ) from None
        except BaseException:
            os.close(descriptor)
            raise
        with contextlib.suppress(OSError):  # on a full disk the lock holds without its note
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
        self._descriptor = descriptor
        _HELD.add(self)

    def release(self) -> None:
        """Lets others write."""
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            os.close(descriptor)

    def _check_same(self, descriptor: int) -> None:
        try:
            there = os.path.samestat(os.fstat(descriptor), os.stat(self._folder / _NAME))
        except OSError:
            there = False
        if not there:
            raise CheckpointError(
                f"{self._folder} is not the folder any more that this run has been saving to: it was moved or deleted, "
                "or what it was mounted on has vanished. Bring it back, and resume."
            )

    def __del__(self) -> None:
        self.release()


_HELD: weakref.WeakSet[FolderLock] = weakref.WeakSet()


def _lock(descriptor: int) -> None:
    try:
        import fcntl
    except ImportError:  # not Unix: nothing keeps two writers apart
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError as error:
        warnings.warn(
            f"This file system has no locks ({error}): see to it yourself that one run writes into a folder.",
            UserWarning,
            stacklevel=2,
        )


def _forget() -> None:
    # A worker that outlives its killed parent must not keep the folder locked.
    for lock in list(_HELD):
        lock.release()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
