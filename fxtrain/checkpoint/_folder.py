"""Writes a checkpoint folder atomically, and reads its leaves.

All files are written into a temporary folder next to the target and synced to disk. Renaming that folder commits the
checkpoint.
"""

from __future__ import annotations

import contextlib
import os
import pathlib
from collections.abc import Iterator
from typing import IO

import xxhash

from fxtrain.checkpoint._errors import CheckpointError, DamagedError
from fxtrain.checkpoint._files import open_regular, unreadable
from fxtrain.checkpoint._host_copy import Direct, HostCopy
from fxtrain.checkpoint._leaf_table import Leaf, rows
from fxtrain.checkpoint._manifest import FORMAT, MANIFEST, Facts, Head, Manifest, write_manifest
from fxtrain.checkpoint._temporary_folder import unfinished_folder
from fxtrain.disk import sync_folder

LEAVES = "leaves.bin"
FILES = (LEAVES, MANIFEST)
_PIECE = 2**22  # bytes; small enough that a piece is still in the CPU cache when it is written after hashing


def write(path: pathlib.Path, contents: Direct | HostCopy, facts: Facts) -> None:
    """Commits ``contents`` as the folder ``path``.

    Args:
        path: The folder to create.
        contents: The leaves.
        facts: The fields of the manifest's head, except ``format`` and ``bytes``.

    Raises:
        CheckpointError: If the folder exists or cannot be written.
    """
    if path.exists():
        raise CheckpointError(
            f"expected a new folder, got {path}, which exists. Checkpoints are never overwritten. Choose another name."
        )
    try:
        with unfinished_folder(path) as unfinished:
            with _synced(unfinished / LEAVES) as file:
                checksums = _write_leaves(file, contents)
            size = sum(place.size for place in contents.places)
            head: Head = {"format": FORMAT, "bytes": size, **facts}
            with _synced(unfinished / MANIFEST) as file:
                write_manifest(file, head, rows(contents.structure, contents.places, checksums))
            sync_folder(unfinished)
            unfinished.rename(path)
        sync_folder(path.parent)
    except OSError as error:
        raise CheckpointError(
            f"expected a writable folder for the checkpoint {path}, got {error}. Earlier checkpoints are unchanged. "
            "Free disk space, or use another folder."
        ) from error


class Leaves:
    """The open ``leaves.bin`` of a checkpoint.

    Args:
        path: The checkpoint's folder.
        manifest: Its manifest, as ``read_manifest`` returns it.

    Raises:
        CheckpointError: If the file cannot be opened.
        DamagedError: If it is not a regular file, or its size differs from the manifest.
    """

    def __init__(self, path: pathlib.Path, manifest: Manifest) -> None:
        self._path = path / LEAVES
        self._descriptor = open_regular(self._path)
        size = os.fstat(self._descriptor).st_size
        if size != manifest["bytes"]:
            self.close()
            raise DamagedError(f"{self._path} is damaged: expected {manifest['bytes']} bytes, got {size}.")

    def read_into(self, memory: memoryview, row: Leaf) -> None:
        """Reads one leaf into ``memory`` and verifies its checksum. Thread-safe.

        Args:
            memory: A buffer of ``row["bytes"]`` bytes.
            row: The leaf's row in the manifest.

        Raises:
            CheckpointError: If the file cannot be read.
            DamagedError: If the bytes differ from those written.
        """
        checksum, done = xxhash.xxh3_64(), 0
        try:
            while done < row["bytes"]:
                count = os.preadv(self._descriptor, [memory[done : done + _PIECE]], row["offset"] + done)
                if count == 0:
                    break
                checksum.update(memory[done : done + count])
                done += count
        except OSError as error:
            raise unreadable(self._path, error) from None
        if checksum.hexdigest() != row["xxh3"] or done != row["bytes"]:
            raise DamagedError(
                f"{self._path} is damaged: expected {row['bytes']} bytes of {row['path']} with the checksum "
                f"{row['xxh3']}, got {done} bytes with {checksum.hexdigest()}."
            )

    def close(self) -> None:
        """Closes the file."""
        os.close(self._descriptor)


@contextlib.contextmanager
def _synced(path: pathlib.Path) -> Iterator[IO[bytes]]:
    """Opens a new file and syncs it to disk at the end of the block."""
    with open(path, "xb", buffering=_PIECE) as file:
        yield file
        file.flush()
        os.fsync(file.fileno())


def _write_leaves(file: IO[bytes], contents: Direct | HostCopy) -> list[str]:
    checksums = [""] * len(contents.places)
    for index, content in contents.parts():
        checksum = xxhash.xxh3_64()
        for start in range(0, len(content), _PIECE):
            piece = content[start : start + _PIECE]
            checksum.update(piece)
            file.write(piece)
        checksums[index] = checksum.hexdigest()
    return checksums
