"""Writes a checkpoint folder atomically.

All files are written into a temporary folder next to the target and synced to disk. Renaming that folder commits the
checkpoint.
"""

from __future__ import annotations

import contextlib
import os
import pathlib
import re
from collections.abc import Iterator
from typing import IO

import xxhash

from fxtrain.checkpoint._errors import CheckpointError
from fxtrain.checkpoint._host_copy import Direct, HostCopy
from fxtrain.checkpoint._leaf_files import CHUNK_BYTES
from fxtrain.checkpoint._leaf_table import file_of, rows
from fxtrain.checkpoint._manifest import FORMATS, MANIFEST, Facts, Head, write_manifest
from fxtrain.checkpoint._parts import OtherParts, Written
from fxtrain.checkpoint._temporary_folder import unfinished_folder
from fxtrain.disk import sync_folder

_BUFFER_BYTES = 2**20  # of small leaves, which are written together

_FILE = re.compile(rf"{re.escape(MANIFEST)}|leaves(-[1-9][0-9]*)?\.bin")


def is_file(name: str) -> bool:
    """Whether a checkpoint can have a file of this name."""
    return _FILE.fullmatch(name) is not None


def write(path: pathlib.Path, contents: Direct | HostCopy, facts: Facts, others: OtherParts | None = None) -> None:
    """Commits ``contents`` as the folder ``path``.

    Args:
        path: The folder to create.
        contents: The leaves, of a sharded state the slices of this rank.
        facts: The fields of the manifest's head, except ``format`` and ``bytes``.
        others: The other ranks, which write parts of a sharded state.

    Raises:
        CheckpointError: If the folder exists or cannot be written, or if another rank cannot write its part.
    """
    if os.path.lexists(path):
        raise CheckpointError(
            f"expected a new folder, got {path}, which exists. Checkpoints are never overwritten. Choose another name."
        )
    try:
        with (
            unfinished_folder(path) as unfinished,
            contextlib.nullcontext() if others is None else others.writing(unfinished),
        ):
            written = write_part(unfinished, 0, contents)
            sliced = {} if others is None else others.sliced(unfinished, written)
            checksums = [each.xxh3 for each in written]
            table = list(rows(contents.structure, contents.places, checksums, sliced))
            size = sum(row["bytes"] for row in table)
            head: Head = {"format": FORMATS[bool(sliced)], "bytes": size, **facts}
            with _synced(unfinished / MANIFEST) as file:
                write_manifest(file, head, table)
            sync_folder(unfinished)
            unfinished.rename(path)
        sync_folder(path.parent)
    except OSError as error:
        raise CheckpointError(
            f"expected a writable folder for the checkpoint {path}, got {error}. Earlier checkpoints are unchanged. "
            "Free disk space, or use another folder."
        ) from error


def write_part(folder: pathlib.Path, part: int, contents: Direct | HostCopy) -> list[Written]:
    """Writes the data file of a part, synced to disk. Returns what was written, in the order of the leaves."""
    checksums = [""] * len(contents.places)
    with _synced(folder / file_of(part), buffering=_BUFFER_BYTES) as file:
        for index, content in contents.parts():
            checksum = xxhash.xxh3_64()
            for start in range(0, len(content), CHUNK_BYTES):
                chunk = content[start : start + CHUNK_BYTES]
                checksum.update(chunk)
                file.write(chunk)
            checksums[index] = checksum.hexdigest()
    pairs = zip(contents.places, checksums, strict=True)
    return [Written(place.offset, place.size, checksum) for place, checksum in pairs]


@contextlib.contextmanager
def _synced(path: pathlib.Path, *, buffering: int = -1) -> Iterator[IO[bytes]]:
    """Opens a new file, as ``open`` does, and syncs it to disk at the end of the block."""
    with open(path, "xb", buffering=buffering) as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
