"""Files that a failed write leaves unchanged, and the base class of writers to a single file."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import BinaryIO

from fxtrain.disk import replace_file, sync_folder
from fxtrain.writers._interface import Backend


class Appendable:
    """A file that grows by whole records, open from its creation to ``close``.

    Args:
        path: The file. If it is missing, it is created and its name is synced to the disk.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        is_new = not path.exists()
        self._file = self._opened()
        if is_new:
            sync_folder(path.parent)
        self.size = self._file.seek(0, os.SEEK_END)
        self._synced = self.size

    def append(self, record: bytes) -> None:
        """Adds a record at the end."""
        self.put(self.size, record)

    def put(self, begin: int, records: bytes) -> None:
        """Replaces everything from byte ``begin`` on by ``records``. After an ``OSError`` the file is unchanged.

        Synced bytes are never overwritten in place, because a power cut could destroy the old and the new ones.
        """
        if begin < self._synced:
            self._replace(begin, records)
            return
        before = self._read(begin)
        try:
            self._write(begin, records)
            if len(records) < len(before):
                self._file.truncate(begin + len(records))
        except BaseException:
            # Restoring the old bytes needs no additional disk space.
            with contextlib.suppress(OSError):
                self._write(begin, before)
                self._file.truncate(self.size)
            raise
        self.size = begin + len(records)

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

    def _opened(self) -> BinaryIO:
        # Unbuffered: after a failed write a buffer would keep bytes and write them later.
        return open(self._path, "rb+", buffering=0, opener=lambda path, flags: os.open(path, flags | os.O_CREAT, 0o666))

    def _replace(self, begin: int, records: bytes) -> None:
        with open(self._path, "rb") as file:
            head = file.read(begin)
        replace_file(self._path, head + records)
        self._file.close()
        self._file = self._opened()
        self.size = self._synced = begin + len(records)

    def _read(self, begin: int) -> bytes:
        if begin == self.size:
            return b""
        self._file.seek(begin)
        return self._file.read(self.size - begin)

    def _write(self, begin: int, records: bytes) -> None:
        self._file.seek(begin)
        rest = memoryview(records)
        while rest:
            rest = rest[self._file.write(rest) :]


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
