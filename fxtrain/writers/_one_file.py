"""Files that only grow, by whole records, and the base class of writers to a single file."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from fxtrain.disk import set_aside, sync_folder
from fxtrain.writers._interface import Backend


class Appendable:
    """A file that grows by whole records, open from its creation to ``close``.

    Args:
        path: The file. If it is missing, it is created and its name is synced to the disk.
    """

    def __init__(self, path: Path) -> None:
        is_new = not path.exists()
        # Unbuffered: after a failed write a buffer would keep bytes and write them later.
        self._file = open(path, "rb+", buffering=0, opener=_created)  # noqa: SIM115 -- open until it is closed
        if is_new:
            sync_folder(path.parent)
        self.size = self._file.seek(0, os.SEEK_END)
        self._synced = self.size

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

    def close(self) -> None:
        """Flushes, and closes the file even if the flush fails."""
        try:
            self.flush()
        finally:
            self._file.close()


def mend(path: Path, what: str) -> None:
    """Moves a record that a crash tore, which has no line end, from the end of a file to ``<name>.damaged``.

    Args:
        path: The file, which may be missing.
        what: The kind of record, for the warning.
    """
    if not path.exists():
        return
    tail = b""
    with open(path, "rb") as file:
        size = begin = file.seek(0, os.SEEK_END)
        while begin and b"\n" not in tail:
            begin = max(begin - 65536, 0)
            file.seek(begin)
            tail = file.read(size - begin)
    torn = len(tail) - (tail.rfind(b"\n") + 1)
    if torn:
        set_aside(path, f"ended in the middle of a {what}", size - torn)


def _created(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_CREAT, 0o666)


class OneFile(Backend):
    """A writer to a single file, which is open from the first value on."""

    _file: Appendable | None = None

    def flush(self) -> None:
        """Syncs written values to the disk."""
        if self._file is not None:
            self._file.flush()

    def close(self) -> None:
        """Flushes and closes the file."""
        if self._file is not None:
            file, self._file = self._file, None
            file.close()
