"""File operations that survive a crash or a power failure: content and folder entries are synced to the disk."""

from __future__ import annotations

import contextlib
import errno
import os
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO

# Errors of file systems that cannot sync folders, and of system folders that may not be opened
_NOT_SYNCED = (errno.EACCES, errno.EPERM, errno.EROFS, errno.EINVAL, errno.ENOTSUP, errno.ENOSYS)


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


def put_file(path: Path, lines: Iterable[bytes], mode: str = "wb") -> None:
    """Writes lines to a file and syncs them to the disk. The folder entry of a new file is not synced.

    Args:
        path: The file.
        lines: Lines with their line ends.
        mode: ``"wb"`` to overwrite, ``"ab"`` to append.
    """
    with open(path, mode) as file:
        file.writelines(lines)
        file.flush()
        os.fsync(file.fileno())


def append_lines(path: Path, lines: bytes) -> None:
    """Appends lines to a file, or none if a write fails. They are not synced, except for the entry of a new file.

    A last line that a crash cut short is terminated first, and zeros that a power failure left in place of data are
    removed.

    Args:
        path: The file. It may not exist yet.
        lines: Lines with their line ends.
    """
    is_new = not path.exists()
    with open(path, "ab+", buffering=0) as file:
        size = end = file.tell()
        while end and (last := _byte(file, end - 1)) == b"\0":
            end -= 1
        if end < size:
            file.truncate(end)
        is_torn = end > 0 and last != b"\n"
        rest = memoryview(b"\n" + lines if is_torn else lines)
        try:
            while rest:
                rest = rest[file.write(rest) :]
        except OSError:
            file.truncate(end)
            raise
    if is_new:
        sync_folder(path.parent)


def _byte(file: BinaryIO, place: int) -> bytes:
    file.seek(place)
    return file.read(1)


def replace_file(path: Path, content: bytes) -> None:
    """Replaces a file atomically: after a crash it has either its old content or all of ``content``.

    Args:
        path: The file. It may not exist yet.
        content: The new content.
    """
    new = path.with_name(f"{path.name}.tmp")
    try:
        put_file(new, [content])
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
        put_file(damaged, [content], "ab")
        sync_folder(path.parent)
        file.truncate(begin)
        os.fsync(file.fileno())
    warnings.warn(
        f"{path} {what}, possibly after a crash. Its last {len(content)} bytes were moved to {damaged.name}.",
        RuntimeWarning,
        stacklevel=3,
    )
