"""One checkpoint on disk: a folder with the leaves' bytes and a manifest. It is there whole, or not at all.

Everything is written into a folder beside it, brought to the disk, and then renamed: the one step that commits.
"""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import shutil
import zlib
from collections.abc import Iterator, Mapping
from typing import IO, Any

from fxtrain.checkpoint.contents import Direct, Snapshot
from fxtrain.checkpoint.errors import CheckpointError, DamagedError
from fxtrain.checkpoint.table import Leaf, rows

LEAVES = "leaves.bin"
MANIFEST = "manifest.json"
UNFINISHED = ".unfinished-"
_FORMAT = 1
_PIECE = 2**20  # bytes that are summed and written while they are in the processor's cache


def write(path: pathlib.Path, contents: Direct | Snapshot, facts: Mapping[str, Any]) -> None:
    """Commits ``contents`` as the folder ``path``.

    Raises:
        CheckpointError: If it is there already, or cannot be written.
    """
    if path.exists():
        raise CheckpointError(f"{path} is there already, and a checkpoint is never overwritten: choose another name.")
    unfinished = path.with_name(f"{UNFINISHED}{path.name}-{os.getpid()}")
    try:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir()
        try:
            with _synced(unfinished / LEAVES) as file:
                checksums = _write_leaves(file, contents)
            table = rows(contents.structure, contents.places, checksums)
            manifest = {"format": _FORMAT, "bytes": sum(row["bytes"] for row in table), **facts, "leaves": table}
            with _synced(unfinished / MANIFEST) as file:
                file.write(_with_checksum(json.dumps(manifest).encode()))
            sync_folder(unfinished)
            unfinished.rename(path)
        except BaseException:
            shutil.rmtree(unfinished, ignore_errors=True)
            raise
        sync_folder(path.parent)
    except OSError as error:
        raise CheckpointError(
            f"The checkpoint {path} could not be written ({error}). Nothing that was saved before is touched: make "
            "room, or give another folder."
        ) from error


def read_manifest(path: pathlib.Path) -> dict[str, Any]:
    """What the checkpoint says of itself.

    Raises:
        CheckpointError: If it is no checkpoint, or one of another version.
        DamagedError: If its manifest is not what was written.
    """
    try:
        content = (path / MANIFEST).read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise DamagedError(f"{path} is no checkpoint: there is no {MANIFEST} in it.") from None
    except OSError as error:
        raise DamagedError(f"{path / MANIFEST} cannot be read: {error}.") from None
    text, _, _ = content.partition(b"\n")
    if content != _with_checksum(text):
        raise DamagedError(f"{path / MANIFEST} is damaged: its checksum is not that of its content.")
    manifest = json.loads(text)
    if manifest["format"] != _FORMAT:
        raise CheckpointError(
            f"{path} has the format {manifest['format']}, and this version of fxtrain reads {_FORMAT}: read it with "
            "the version that wrote it."
        )
    return manifest


class Leaves:
    """The file of the leaves' bytes, open to be read.

    Raises:
        DamagedError: If it is not as long as it was.
    """

    def __init__(self, path: pathlib.Path, manifest: Mapping[str, Any]) -> None:
        self._path = path / LEAVES
        try:
            self._descriptor = os.open(self._path, os.O_RDONLY)
        except OSError as error:
            raise DamagedError(f"{self._path} cannot be read: {error}.") from None
        size = os.fstat(self._descriptor).st_size
        if size != manifest["bytes"]:
            self.close()
            raise DamagedError(f"{self._path} is damaged: it has {size} bytes, and {manifest['bytes']} were written.")

    def read_into(self, memory: memoryview, row: Leaf) -> None:
        """Fills ``memory`` with one leaf.

        Raises:
            DamagedError: If its bytes are not those that were written.
        """
        checksum, done = 0, 0
        try:
            while done < row["bytes"]:
                count = os.preadv(self._descriptor, [memory[done : done + _PIECE]], row["offset"] + done)
                if count == 0:
                    break
                checksum = zlib.crc32(memory[done : done + count], checksum)
                done += count
        except OSError as error:
            raise DamagedError(f"{self._path} cannot be read: {error}.") from None
        if checksum != row["crc32"] or done != row["bytes"]:
            raise DamagedError(f"{self._path} is damaged: the bytes of {row['path']} are not those that were written.")

    def close(self) -> None:
        """Closes the file."""
        os.close(self._descriptor)


def make_folder(path: pathlib.Path) -> None:
    """Makes a folder, with those above it as needed; their names reach the disk."""
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for folder in reversed(missing):
        sync_folder(folder.parent)


def sync_folder(folder: pathlib.Path) -> None:
    """Brings the names in ``folder`` to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _synced(path: pathlib.Path) -> Iterator[IO[bytes]]:
    """A new file, which has reached the disk when the block is left."""
    with open(path, "xb", buffering=_PIECE) as file:
        yield file
        file.flush()
        os.fsync(file.fileno())


def _write_leaves(file: IO[bytes], contents: Direct | Snapshot) -> list[int]:
    checksums = [0] * len(contents.places)
    for index, content in contents.parts():
        for start in range(0, len(content), _PIECE):
            piece = content[start : start + _PIECE]
            checksums[index] = zlib.crc32(piece, checksums[index])
            file.write(piece)
    return checksums


def _with_checksum(text: bytes) -> bytes:
    # Two lines of JSON. The checksum is compared as text, so that no byte of the file can change unseen.
    return b'%s\n{"crc32": "%08x"}\n' % (text, zlib.crc32(text))
