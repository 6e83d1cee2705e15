"""The file of one compiled graph: a header, the files of its code, and a checksum of both."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

from fxtrain.disk import sync_folder

SUFFIX = ".fxc"
_MAGIC = b"fxtrain compiled graph 1\n"
_CHECKSUM_BYTES = 64
_MAX_HEADER_BYTES = 2**20
_ABANDONED_SECONDS = 24 * 3600.0


class DamagedFileError(ValueError):
    """A file is not the whole file of a compiled graph."""


class Entry(NamedTuple):
    """A compiled graph.

    Args:
        header: Values that JSON can hold: where the graph was compiled, and how its code is called.
        files: The files of its code by name.
    """

    header: dict[str, Any]
    files: dict[str, bytes]


def write_entry(path: Path, entry: Entry) -> None:
    """Writes a file atomically and syncs it to the disk. Any number of processes may write it at the same time."""
    sizes = [[name, len(content)] for name, content in entry.files.items()]
    header = json.dumps({**entry.header, "files": sizes}).encode()
    body = b"".join([header, b"\n", *entry.files.values()])
    put(path, b"".join([_MAGIC, hashlib.sha256(body).hexdigest().encode(), b"\n", body]))


def read_entry(path: Path) -> Entry:
    """Reads a file.

    Raises:
        DamagedFileError: The file is incomplete, or changed, or from another program.
        OSError: The file cannot be read.
    """
    content = path.read_bytes()
    begin = len(_MAGIC) + _CHECKSUM_BYTES + 1
    if not content.startswith(_MAGIC):
        raise DamagedFileError("is not a file of a compiled graph")
    if hashlib.sha256(content[begin:]).hexdigest().encode() != content[len(_MAGIC) : begin - 1]:
        raise DamagedFileError("is damaged: its checksum differs")
    line, _, rest = content[begin:].partition(b"\n")
    try:
        header, files, place = json.loads(line), dict[str, bytes](), 0
        for name, size in header.pop("files"):
            files[name] = rest[place : place + size]
            place += size
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedFileError("has a header that fxtrain did not write") from error
    return Entry(header, files)


def read_header(path: Path) -> dict[str, Any]:
    """Reads only the header of a file, without verifying it. Empty if that is impossible."""
    with contextlib.suppress(OSError, ValueError), open(path, "rb") as file:
        if file.read(len(_MAGIC)) == _MAGIC:
            file.seek(_CHECKSUM_BYTES + 1, os.SEEK_CUR)
            found = json.loads(file.readline(_MAX_HEADER_BYTES))
            return found if isinstance(found, dict) else {}
    return {}


def put(path: Path, content: bytes) -> None:
    """Writes a file under a unique name, syncs it to the disk, and renames it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(path.parent)
    handle, name = tempfile.mkstemp(suffix=".tmp", prefix=f".{path.name}.", dir=path.parent)
    try:
        with open(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        # Readable by others, because ranks may run as different users.
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise
    sync_folder(path.parent)


def _remove_abandoned(folder: Path) -> None:
    """Removes unfinished files of processes that were killed long ago."""
    for path in folder.glob(f".*{SUFFIX}.*.tmp"):
        with contextlib.suppress(OSError):
            if time.time() - path.stat().st_mtime > _ABANDONED_SECONDS:
                path.unlink()


def extracted(folder: Path, content: bytes, suffix: str) -> Path:
    """Returns a file in ``folder`` with this content, named by its hash. Writes it if it is missing or differs."""
    path = folder / f"{hashlib.sha256(content).hexdigest()[:40]}{suffix}"
    with contextlib.suppress(OSError):
        if path.read_bytes() == content:
            return path
    put(path, content)
    return path
