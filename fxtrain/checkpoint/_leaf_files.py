"""Reads leaves, or a rank's rows of them, from the data files of a checkpoint, and verifies the bytes."""

from __future__ import annotations

import math
import os
import pathlib
from collections.abc import Callable
from typing import NamedTuple

import torch
import xxhash
from torch import Tensor

from fxtrain.checkpoint._errors import CheckpointError, DamagedError
from fxtrain.checkpoint._files import open_regular, unreadable
from fxtrain.checkpoint._host_copy import bytes_of
from fxtrain.checkpoint._leaf_table import Leaf, Slice, file_of, slices_of
from fxtrain.checkpoint._manifest import Manifest, dtype_of
from fxtrain.core._bits import as_bytes

CHUNK_BYTES = 2**22  # small enough that a chunk is still in the CPU cache when it is copied or written after hashing


class Rows(NamedTuple):
    """Some rows of a leaf along an axis: those of a rank."""

    axis: int
    start: int
    length: int

    def shape_in(self, shape: list[int]) -> list[int]:
        """Returns the shape of these rows of a leaf."""
        return [self.length if axis == self.axis else size for axis, size in enumerate(shape)]


class LeafFiles:
    """The data files of a checkpoint.

    Args:
        path: The checkpoint's folder.
        manifest: Its manifest, as ``read_manifest`` returns it.

    Raises:
        CheckpointError: If a file cannot be opened.
        DamagedError: If one is missing or not a regular file, or its size differs from the manifest.
    """

    def __init__(self, path: pathlib.Path, manifest: Manifest) -> None:
        self._path = path
        sizes = {0: 0}
        for row in manifest["leaves"]:
            for piece in slices_of(row):
                sizes[piece["part"]] = sizes.get(piece["part"], 0) + piece["bytes"]
        # The files of other ranks are opened for each slice, because they may be more than a process can open.
        self._main = self._opened(0)
        try:
            for part, expected in sizes.items():
                self._check_size(part, expected)
        except BaseException:
            self.close()
            raise

    def read(self, row: Leaf, rows: Rows | None = None) -> Tensor:
        """Returns a leaf, or some rows of it, on the host. See ``read_into``."""
        memory, fill = self.prepare(row, rows)
        fill()
        return memory

    def prepare(self, row: Leaf, rows: Rows | None = None) -> tuple[Tensor, Callable[[], None]]:
        """Allocates memory for a leaf. Returns it with a thread-safe function that reads and verifies the leaf.

        Of a leaf in slices, only those that have some of the rows are read, each to its end, because its checksum is
        that of all its bytes. Memory is needed for the rows, and for a chunk of a slice.

        Args:
            row: The leaf's row in the manifest.
            rows: What to read. None for all.

        Raises:
            CheckpointError: If the memory cannot be allocated. The function raises it if a file cannot be read, and a
                ``DamagedError`` if the bytes differ from those written.
        """
        shape = row["shape"] if rows is None else rows.shape_in(row["shape"])
        # Each leaf has a separate allocation, because results of kernels can depend bitwise on the alignment of inputs.
        try:
            leaf = torch.empty(shape, dtype=dtype_of(row["dtype"]), device="cpu")
        except (RuntimeError, TypeError) as error:
            raise CheckpointError(f"expected {row['bytes']} bytes of memory for {row['path']}, got {error}.") from error

        def fill() -> None:
            for piece in slices_of(row):
                self._read_slice(leaf, row, piece, rows)

        return leaf, fill

    def verify(self, row: Leaf) -> None:
        """Reads a leaf without keeping it.

        Raises:
            CheckpointError: If a file cannot be read.
            DamagedError: If the bytes differ from those written.
        """
        for piece in slices_of(row):
            self._read_bytes(row, piece, memoryview(bytearray(piece["bytes"])))

    def close(self) -> None:
        """Closes the files."""
        os.close(self._main)

    def _read_slice(self, leaf: Tensor, row: Leaf, piece: Slice, rows: Rows | None) -> None:
        """Reads the part of a slice that belongs to ``leaf``, if there is any."""
        stored = _box(row, piece)
        wanted = [slice(0, size) for size in row["shape"]]
        if rows is not None:
            wanted[rows.axis] = slice(rows.start, rows.start + rows.length)
        if stored == wanted:
            return self._read_bytes(row, piece, bytes_of(leaf))
        both = [slice(max(a.start, b.start), min(a.stop, b.stop)) for a, b in zip(stored, wanted, strict=True)]
        if any(each.start >= each.stop for each in both):
            return None
        # As bytes, because torch cannot copy all dtypes.
        size = leaf.element_size()
        target = as_bytes(leaf).view(*leaf.shape, size)
        target = target[tuple(_shifted(one, base) for one, base in zip(both, wanted, strict=True))]
        if target.is_contiguous() and both == stored:
            return self._read_bytes(row, piece, bytes_of(target))
        shape = [each.stop - each.start for each in stored]
        inner = math.prod(shape[1:]) * size
        count = min(shape[0], max(1, CHUNK_BYTES // inner))
        buffer = torch.empty(count, *shape[1:], size, dtype=torch.uint8, device="cpu")
        local = [_shifted(one, base) for one, base in zip(both, stored, strict=True)]

        def copy(done: int, length: int) -> None:
            first, last = max(local[0].start, done), min(local[0].stop, done + length)
            if first < last:
                source = buffer[(slice(first - done, last - done), *local[1:])]
                target[first - local[0].start : last - local[0].start].copy_(source)

        return self._read_bytes(row, piece, bytes_of(buffer), lambda done, got: copy(done // inner, got // inner))

    def _read_bytes(
        self, row: Leaf, piece: Slice, memory: memoryview, then: Callable[[int, int], None] | None = None
    ) -> None:
        """Reads a slice and verifies its checksum.

        Args:
            row: The row of the leaf.
            piece: The slice.
            memory: Memory for the slice, or with ``then`` for a chunk of it.
            then: Called for each chunk in ``memory``, with its begin and its number of bytes.
        """
        file = self._path / file_of(piece["part"])
        descriptor = self._main if piece["part"] == 0 else open_regular(file)
        checksum, done, total = xxhash.xxh3_64(), 0, piece["bytes"]
        try:
            while done < total:
                begin, size = (done, CHUNK_BYTES) if then is None else (0, len(memory))
                chunk = memory[begin : begin + min(size, total - done)]
                count = _read_full(descriptor, chunk, piece["offset"] + done)
                checksum.update(chunk[:count])
                if then is not None and count == len(chunk):
                    then(done, count)
                done += count
                if count < len(chunk):
                    break
        except OSError as error:
            raise unreadable(file, error) from None
        finally:
            if descriptor != self._main:
                os.close(descriptor)
        if checksum.hexdigest() != piece["xxh3"] or done != total:
            raise DamagedError(
                f"{file} is damaged: expected {total} bytes of {row['path']} with the checksum {piece['xxh3']}, got "
                f"{done} bytes with {checksum.hexdigest()}."
            )

    def _opened(self, part: int) -> int:
        return open_regular(self._path / file_of(part))

    def _check_size(self, part: int, expected: int) -> None:
        descriptor = self._opened(part) if part else self._main
        size = os.fstat(descriptor).st_size
        if part:
            os.close(descriptor)
        if size != expected:
            raise DamagedError(f"{self._path / file_of(part)} is damaged: expected {expected} bytes, got {size}.")


def _read_full(descriptor: int, memory: memoryview, offset: int) -> int:
    """Fills ``memory`` from a file. Returns the number of bytes read, fewer at the end of the file."""
    done = 0
    while done < len(memory) and (count := os.preadv(descriptor, [memory[done:]], offset + done)):
        done += count
    return done


def _box(row: Leaf, piece: Slice) -> list[slice]:
    """Returns the range of a slice along each axis."""
    box = [slice(0, size) for size in row["shape"]]
    if "axis" in row:
        box[row["axis"]] = slice(piece["start"], piece["start"] + piece["length"])
    return box


def _shifted(one: slice, base: slice) -> slice:
    return slice(one.start - base.start, one.stop - base.start)
