"""Disk: files that are whole after a crash."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path


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
