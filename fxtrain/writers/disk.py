"""Disk: files that are whole after a crash."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO

from fxtrain.writers.interface import Backend


class OneFile(Backend):
    """A writer into one file, which is open from the first value on."""

    _file: BinaryIO | None = None

    def flush(self) -> None:
        """Puts on the disk what was written."""
        if self._file is not None:
            self._file.flush()
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Flushes, and closes the file."""
        if self._file is not None:
            self.flush()
            self._file.close()
            self._file = None


def put_file(path: Path, lines: Iterable[bytes], mode: str = "wb") -> None:
    """Writes lines, which are on the disk when it returns."""
    with open(path, mode) as file:
        file.writelines(lines)
        file.flush()
        os.fsync(file.fileno())


def replace_file(path: Path, content: bytes) -> None:
    """Puts a new file in the place of an old one: at any moment one of them is there, and whole."""
    new = path.with_name(f"{path.name}.tmp")
    put_file(new, [content])
    os.replace(new, path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Puts on the disk what names a folder has."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
