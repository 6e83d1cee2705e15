"""File operations that survive a crash or a power failure: content and folder entries are synced to the disk."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import shutil
import stat
import time
import weakref
from pathlib import Path

from fxtrain.core import warn

# Errors of file systems that cannot sync folders, and of system folders that may not be opened
_NOT_SYNCED = (errno.EACCES, errno.EPERM, errno.EROFS, errno.EINVAL, errno.ENOTSUP, errno.ENOSYS)

_LOCK_ATTEMPTS = 5
_LOCK_SECONDS = 0.005  # between two attempts


def make_folder(path: Path) -> None:
    """Creates a folder and its missing parents, and syncs the folder entries of all of them to the disk.

    Entries are synced even if the folders existed, because the program that created them may not have synced them.
    """
    path.mkdir(parents=True, exist_ok=True)
    # Both the path as given and the path behind symbolic links, because a power failure may lose either.
    for start in dict.fromkeys([path.absolute(), path.resolve()]):
        for folder in (start, *start.parents):
            if os.path.ismount(folder):  # a mount point has no entry on a disk
                break
            try:
                sync_folder(folder.parent)
            except OSError as error:
                if error.errno not in _NOT_SYNCED:
                    raise


def sync_folder(folder: Path) -> None:
    """Syncs the entries of a folder to the disk."""
    sync_file(folder)


def sync_file(path: Path) -> None:
    """Syncs the content of a file to the disk, whichever handle wrote it."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _put(path: Path, content: bytes, mode: str) -> None:
    """Writes content to a file and syncs it to the disk. The folder entry of a new file is not synced."""
    with open(path, mode) as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


class Appendable:
    """A file that grows by whole records, open and locked from its creation to ``close``.

    Args:
        path: The file. If it is missing, it is created and its name is synced to the disk.

    Raises:
        BlockingIOError: Another ``Appendable``, of this or another process, has the file open.
    """

    def __init__(self, path: Path) -> None:
        is_new = not path.exists()
        self._path, self._file = path, _open_locked(path)
        try:
            if is_new:
                sync_folder(path.parent)
            self._to_end()
        except BaseException:
            self._file.close()
            raise

    def _to_end(self) -> None:
        self.size = self._synced = self._file.seek(0, os.SEEK_END)

    def mend(self, what: str) -> None:
        """Moves a record that a crash tore, which has no line end, from the end of the file to ``<name>.damaged``.

        Args:
            what: The kind of record, for the warning.
        """
        tail = b""
        with open(self._path, "rb") as file:
            size = begin = file.seek(0, os.SEEK_END)
            while begin and b"\n" not in tail:
                begin = max(begin - 65536, 0)
                file.seek(begin)
                tail = file.read(size - begin)
        torn = len(tail) - (tail.rfind(b"\n") + 1)
        if torn:
            set_aside(self._path, f"ended in the middle of a {what}", size - torn)
        self._to_end()

    def append(self, record: bytes) -> None:
        """Adds a record at the end. After an ``OSError`` the file is unchanged."""
        try:
            self._file.seek(self.size)
            rest = memoryview(record)
            while rest:
                rest = rest[self._file.write(rest) :]
        except BaseException:
            with contextlib.suppress(OSError):
                self._file.truncate(self.size)
            raise
        self.size += len(record)

    def flush(self) -> None:
        """Syncs written records to the disk."""
        if self._synced < self.size:
            os.fsync(self._file.fileno())
            self._synced = self.size

    def close(self, *, sync: bool = True) -> None:
        """Closes the file, even if syncing its records to the disk first fails.

        Args:
            sync: Whether to sync them.
        """
        try:
            if sync:
                self.flush()
        finally:
            self._file.close()


def _open_locked(path: Path) -> io.FileIO:
    """Opens a file for appending, creates it if it is missing, and locks it where the file system has locks."""
    while True:
        # Unbuffered: after a failed write a buffer would keep bytes and write them later.
        file = io.FileIO(path, "r+", opener=_created)
        try:
            if not _locked_soon(file.fileno()):
                raise BlockingIOError(
                    f"expected exclusive access to {path}, got a file that another writer has open. Close that writer, "
                    "use it in place of this one, or use another path."
                )
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
                    close_in_children(file)
                    return file
        except BaseException:
            file.close()
            raise
        file.close()  # another writer replaced the file since it was opened


def _locked_soon(descriptor: int) -> bool:
    """Locks an open file, and waits a moment for a process that only checks it. Returns whether it may be written."""
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        return True  # a device such as /dev/null
    for _ in range(_LOCK_ATTEMPTS):
        if try_lock(descriptor) is not False:
            return True
        time.sleep(_LOCK_SECONDS)
    return False


def _created(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_CREAT, 0o666)


def is_open_here(path: Path) -> bool:
    """Returns whether an ``Appendable`` of this process has a file open."""
    there = os.stat(path)
    return any(os.path.samestat(os.fstat(file.fileno()), there) for file in _LOCKED if not file.closed)


_LOCKED: weakref.WeakSet[io.FileIO] = weakref.WeakSet()


def close_in_children(file: io.FileIO) -> None:
    """Closes a locked file in forked children, because one that outlives its parent would keep the file locked."""
    _LOCKED.add(file)


def _close_locked() -> None:
    for file in list(_LOCKED):
        file.close()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_locked)


def append_lines(path: Path, lines: bytes, *, sync: bool = True) -> None:
    """Appends lines to a file. After an ``OSError`` the file has none of them, unless only their sync failed.

    The end of a line that a crash tore is moved to ``<name>.damaged`` first, with a warning.

    Args:
        path: The file. It may not exist yet.
        lines: Lines with their line ends.
        sync: Whether to sync them to the disk, which takes milliseconds.
    """
    file = Appendable(path)
    try:
        file.mend("line")
        file.append(lines)
    finally:
        file.close(sync=sync)


def replace_file(path: Path, content: bytes) -> None:
    """Replaces a file atomically: after a crash it has either its old content or all of ``content``.

    Args:
        path: The file. It may not exist yet.
        content: The new content.
    """
    new = path.with_name(f"{path.name}.tmp")
    try:
        _put(new, content, "wb")
        os.replace(new, path)
    except Exception:
        with contextlib.suppress(OSError):
            new.unlink()
        raise
    sync_folder(path.parent)


def try_lock(descriptor: int) -> bool | None:
    """Locks an open file or folder for this process, without waiting.

    Args:
        descriptor: The descriptor. Closing it releases the lock.

    Returns:
        Whether the lock was acquired, or None if the system or the file system has no locks.
    """
    try:
        import fcntl

        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except (ImportError, OSError):
        return None
    return True


def set_aside(path: Path, what: str, begin: int = 0) -> None:
    """Moves the damaged end of a file to ``<name>.damaged``, with a warning.

    Args:
        path: The file, which is truncated.
        what: The damage, as a predicate that follows the file's name in the warning.
        begin: Offset of the damage in bytes.
    """
    damaged = path.with_name(f"{path.name}.damaged")
    with open(path, "rb+") as file:
        file.seek(begin)
        content = file.read()
        # Append first and truncate last, so that a crash in between loses nothing.
        _put(damaged, content, "ab")
        sync_folder(path.parent)
        file.truncate(begin)
        os.fsync(file.fileno())
    warn(
        f"{path} {what}, possibly after a crash. Its last {len(content)} bytes were moved to {damaged.name}.",
        RuntimeWarning,
    )


def replace_folder(new: Path, path: Path) -> None:
    """Replaces a folder by another one whose files are synced, with two renames.

    A crash between the two leaves the old folder beside, and ``restore_replaced`` puts it back.

    Args:
        new: The new folder, in the same parent folder.
        path: The folder. It may not exist yet.
    """
    old = _replaced(path)
    restore_replaced(path)
    shutil.rmtree(old, ignore_errors=True)
    if path.exists():
        path.rename(old)
    new.rename(path)
    sync_folder(path.parent)
    shutil.rmtree(old, ignore_errors=True)


def restore_replaced(path: Path) -> None:
    """Puts back a folder that a crash in ``replace_folder`` left without its name."""
    old = _replaced(path)
    if old.exists() and not path.exists():
        old.rename(path)
        sync_folder(path.parent)


def _replaced(path: Path) -> Path:
    return path.with_name(f".replaced-{path.name}")
