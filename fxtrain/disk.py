"""Files and folders that are whole after a crash or a power cut: only what was synced can be relied on."""

from __future__ import annotations

import contextlib
import errno
import os
import warnings
from collections.abc import Iterable
from pathlib import Path

# What a file system answers that does not sync folders, or for a folder of the system that may not be opened
_NOT_SYNCED = (errno.EACCES, errno.EPERM, errno.EROFS, errno.EINVAL, errno.ENOTSUP, errno.ENOSYS)


def make_folder(path: Path) -> None:
    """Makes a folder and those above it as needed, and brings the names of all of them to the disk.

    Other programs make folders too and may not sync their names, so this does not depend on who made them.
    """
    path.mkdir(parents=True, exist_ok=True)
    # As it is written, and as it is behind symbolic links: a power cut may take either.
    for start in dict.fromkeys([path.absolute(), path.resolve()]):
        for folder in (start, *start.parents):
            if os.path.ismount(folder):  # its name is not on a disk
                break
            try:
                sync_folder(folder.parent)
            except OSError as error:
                if error.errno not in _NOT_SYNCED:
                    raise


def sync_folder(folder: Path) -> None:
    """Brings the names in a folder to the disk."""
    _sync(folder)


def sync_file(path: Path) -> None:
    """Brings the content of a file to the disk, whichever handle wrote it."""
    _sync(path)


def put_file(path: Path, lines: Iterable[bytes], mode: str = "wb") -> None:
    """Writes lines, which are on the disk when it returns. The name of a new file is not: sync its folder."""
    with open(path, mode) as file:
        file.writelines(lines)
        file.flush()
        os.fsync(file.fileno())


def replace_file(path: Path, content: bytes) -> None:
    """Replaces a file atomically: the old content or the new is there at any moment, whole."""
    new = path.with_name(f"{path.name}.tmp")
    try:
        put_file(new, [content])
        os.replace(new, path)
    except Exception:
        with contextlib.suppress(OSError):
            new.unlink()
        raise
    sync_folder(path.parent)


def set_aside(path: Path, what: str, begin: int = 0) -> None:
    """Moves the damaged end of a file, from byte ``begin`` on, to ``<name>.damaged``, with a warning.

    Args:
        path: The file. It is cut there.
        what: What is wrong with it, in words that follow its name.
        begin: Where the damage begins.
    """
    damaged = path.with_name(f"{path.name}.damaged")
    with open(path, "rb+") as file:
        file.seek(begin)
        content = file.read()
        # In this order, so that a crash in between loses nothing.
        put_file(damaged, [content], "ab")
        sync_folder(path.parent)
        file.truncate(begin)
        os.fsync(file.fileno())
    warnings.warn(
        f"{path} {what}, as after a crash; its last {len(content)} bytes were moved to {damaged.name}.",
        RuntimeWarning,
        stacklevel=3,
    )


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
