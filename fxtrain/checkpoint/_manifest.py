"""Reads and writes ``manifest.jsonl``: one head line, one line for each leaf, and a checksum line.

The checksum detects disk damage. It does not detect a manifest that was forged or written by another program, so every
field is validated before it is used.
"""

from __future__ import annotations

import functools
import itertools
import json
import math
import pathlib
import re
import reprlib
from collections.abc import Callable, Iterable
from typing import IO, TypedDict, cast

import torch
import xxhash

from fxtrain.checkpoint._errors import CheckpointError, DamagedError
from fxtrain.checkpoint._files import read_at_most
from fxtrain.checkpoint._leaf_table import Leaf, Slice, code_of, offsets, slices_of
from fxtrain.checkpoint._retention import ROLES, Entry, Role
from fxtrain.core import dtype_name

MANIFEST = "manifest.jsonl"
FORMATS = (2, 3)  # 3 has leaves in slices; without any, a manifest has format 2
_MAX_BYTES = 2**28  # size of a manifest: about a million leaves
_MAX_SIZE = 2**63  # size of a leaf or a file in bytes, exclusive
_MAX_DIMENSIONS = 64  # torch cannot copy tensors with more


class Facts(TypedDict):
    """What a manifest states about the checkpoint. ``run``, ``role`` and ``sequence`` are None without a run."""

    run: str | None
    role: Role | None
    sequence: int | None
    step: int | None  # None if the tree is not a state
    time: float  # seconds since the Unix epoch
    metrics: dict[str, float]
    environment: dict[str, str | int]


class Head(Facts):
    """The first line of a manifest."""

    format: int
    bytes: int  # of all leaves, in all files


class Manifest(Head):
    """A manifest with the rows of its leaves."""

    leaves: list[Leaf]


def write_manifest(file: IO[bytes], head: Head, table: Iterable[Leaf]) -> None:
    """Writes the head, one line of JSON for each leaf, and a checksum of all preceding lines.

    Args:
        file: An open binary file.
        head: The facts of the checkpoint.
        table: The rows of the leaves.

    Raises:
        CheckpointError: If there are more leaves than ``read_manifest`` accepts.
    """
    checksum, size = xxhash.xxh3_64(), 0
    for line in itertools.chain([head], table):
        text = json.dumps(line).encode() + b"\n"
        checksum.update(text)
        size += file.write(text)
    file.write(_checksum_line(checksum))
    if size > _MAX_BYTES // 2:  # half of the reader's limit, as a margin
        raise CheckpointError(f"expected a manifest of at most {_MAX_BYTES // 2} bytes, got {size}. Save fewer leaves.")


def read_manifest(path: pathlib.Path) -> Manifest:
    """Returns the head of the manifest in the folder ``path``, with the rows of its leaves under ``"leaves"``.

    Raises:
        CheckpointError: If the manifest cannot be read or has another format version.
        DamagedError: If ``write_manifest`` cannot have written it.
    """
    file = path / MANIFEST
    content = read_at_most(file, _MAX_BYTES)
    text = content[: content.rstrip(b"\n").rfind(b"\n") + 1]
    if content != text + _checksum_line(xxhash.xxh3_64(text)):
        raise DamagedError(f"{file} is damaged: expected the checksum of its content in the last line, got another.")
    try:
        head, *table = [json.loads(line.decode("ascii")) for line in text.split(b"\n")[:-1]]
    except (ValueError, RecursionError) as error:  # the errors of decoding are ValueErrors too
        raise DamagedError(f"{file} is damaged: expected lines of JSON, got {error}.") from None
    expect = functools.partial(_expect, file)
    expect("a head", head, type(head) is dict)
    expect("a format number", head.get("format"), type(head.get("format")) is int)
    if head["format"] not in FORMATS:
        raise CheckpointError(
            f"expected a checkpoint of format {' or '.join(map(str, FORMATS))} at {path}, got format {head['format']}. "
            "Restore it with the version of fxtrain that wrote it."
        )
    _check_head(expect, head)
    _check_table(expect, head, table)
    return cast(Manifest, {**head, "leaves": table})  # every field was checked


def read_entry(entry: Entry) -> Manifest:
    """Returns ``read_manifest(entry.path)``, after comparing it with the folder's name.

    Raises:
        CheckpointError: As ``read_manifest``.
        DamagedError: As ``read_manifest``, or if the folder's name is that of another checkpoint.
    """
    manifest = read_manifest(entry.path)
    for key in ("sequence", "step", "run", "role"):
        if manifest[key] != getattr(entry, key):
            raise DamagedError(
                f"{entry.path} is damaged: expected a manifest with the {key} of the folder's name, "
                f"got {reprlib.repr(manifest[key])}."
            )
    return manifest


Expect = Callable[[str, object, bool], None]


def _expect(file: pathlib.Path, what: str, value: object, holds: bool) -> None:
    if not holds:
        raise DamagedError(f"{file} is damaged: expected {what}, got {reprlib.repr(value)}.")


def _check_head(expect: Expect, head: Head) -> None:
    keys = set(Head.__annotations__)
    expect(f"a head with the keys {sorted(keys)}", sorted(head), set(head) == keys)
    expect("a number of bytes", head["bytes"], _is_size(head["bytes"]))
    expect("a step", head["step"], head["step"] is None or _is_size(head["step"]))
    expect("a time", head["time"], type(head["time"]) is float and math.isfinite(head["time"]))
    metrics, environment = head["metrics"], head["environment"]
    expect("metrics", metrics, type(metrics) is dict and all(type(v) is float for v in metrics.values()))
    known = type(environment) is dict and all(type(v) in (str, int, bool) for v in environment.values())
    expect("an environment", environment, known)
    run, role, sequence = head["run"], head["role"], head["sequence"]
    if (run, role, sequence) != (None, None, None):  # all three are None in checkpoints of fxtrain.save
        expect("a run", run, type(run) is str and re.fullmatch("[0-9a-f]{12}", run) is not None)
        expect("a role", role, type(role) is str and role in ROLES)
        expect("a sequence number", sequence, _is_size(sequence))
        expect("the step of a state", head["step"], head["step"] is not None)


def _check_table(expect: Expect, head: Head, table: list[Leaf]) -> None:
    root = "tree" if head["step"] is None else "state"
    seen: set[str] = set()
    for row in table:
        expect("a row", row, type(row) is dict and set(row) - {"elements"} in _ROW_KEYS)
        path, entries, shape, size = row["path"], row["entries"], row["shape"], row["bytes"]
        expect("entries of a path", entries, type(entries) is list and all(map(_is_entry, entries)))
        expect("a path that matches its entries", path, path == root + code_of(entries))
        expect("a unique path", path, path not in seen)
        seen.add(path)
        dtype = dtype_of(row["dtype"]) if type(row["dtype"]) is str else None
        expect("a dtype", row["dtype"], dtype is not None)
        assert dtype is not None
        expect("a shape", shape, type(shape) is list and len(shape) <= _MAX_DIMENSIONS and all(map(_is_size, shape)))
        # torch computes strides from nonzero lengths, so these must not overflow either.
        whole = math.prod(max(length, 1) for length in shape) * dtype.itemsize
        expect("a shape that a tensor can have", shape, whole < _MAX_SIZE)
        expected = math.prod(shape) * dtype.itemsize
        expect(f"{expected} bytes of {path}", size, type(size) is int and size == expected)
        elements = row.get("elements", [])
        expect("paths of elements", elements, type(elements) is list and all(map(_is_path, elements)))
        expect("a shape that matches its elements", shape, "elements" not in row or shape[-1:] == [len(elements)])
        if "slices" in row:
            expect("leaves in slices in format 3 only", head["format"], head["format"] == 3)
            _check_slices(expect, row)
        for piece in slices_of(row):
            xxh3 = piece["xxh3"]
            expect("a checksum", xxh3, type(xxh3) is str and re.fullmatch("[0-9a-f]{16}", xxh3) is not None)
    _check_offsets(expect, table)
    total = sum(row["bytes"] for row in table)
    expect(f"{total} bytes in total", head["bytes"], head["bytes"] == total)


_ROW_KEYS = tuple(
    {"path", "entries", "dtype", "shape", "bytes", *where} for where in (("offset", "xxh3"), ("axis", "slices"))
)


def _check_slices(expect: Expect, row: Leaf) -> None:
    """Checks that the slices of a leaf cover its axis, each once."""
    axis, slices, shape, path = row.get("axis"), row.get("slices"), row["shape"], row["path"]
    expect("an axis", axis, type(axis) is int and 0 <= axis < len(shape) and shape[axis] > 0)
    expect("slices", slices, type(slices) is list and len(slices) > 0)
    assert axis is not None
    assert slices is not None
    end, row_bytes = 0, row["bytes"] // shape[axis]
    for piece in slices:
        expect("a slice", piece, type(piece) is dict and set(piece) == set(Slice.__annotations__))
        start, length, size = piece["start"], piece["length"], piece["bytes"]
        expect("the number of a part", piece["part"], _is_size(piece["part"]))
        expect(f"a slice of {path} that begins at {end}", start, type(start) is int and start == end)
        expect("a number of rows", length, _is_size(length) and length > 0)
        expected = length * row_bytes
        expect(f"{expected} bytes of a slice of {path}", size, type(size) is int and size == expected)
        end += length
    expect(f"slices of all {shape[axis]} rows of {path}", end, end == shape[axis])


def _check_offsets(expect: Expect, table: list[Leaf]) -> None:
    parts: dict[int, list[tuple[Leaf, Slice]]] = {}
    for row in table:
        for piece in slices_of(row):
            parts.setdefault(piece["part"], []).append((row, piece))
    for pieces in parts.values():
        places = offsets([(dtype_of(row["dtype"]).itemsize, piece["bytes"]) for row, piece in pieces])  # pyright: ignore[reportOptionalMemberAccess]
        for (row, piece), place in zip(pieces, places, strict=True):
            at = piece["offset"]
            expect(f"{row['path']} at the offset {place}", at, type(at) is int and at == place)


def _is_size(value: object) -> bool:
    return type(value) is int and 0 <= value < _MAX_SIZE


def _is_entry(value: object) -> bool:
    match value:
        case ["attribute", str()] | ["key", str() | int()]:  # bool too
            return True
        case ["index", int(index)]:
            return type(index) is int and index >= 0
        case _:
            return False


def _is_path(value: object) -> bool:
    return type(value) is list and all(type(key) in (str, int) for key in value)


@functools.cache
def dtype_of(text: str) -> torch.dtype | None:
    """Returns the dtype whose ``dtype_name`` is ``text``, or None if no dense tensor can have it."""
    dtype = vars(torch).get(text)
    # Quantized dtypes begin with q. Their tensors have a scale, which is not part of the bytes.
    is_dense = isinstance(dtype, torch.dtype) and dtype_name(dtype) == text and not text.startswith("q")
    return dtype if is_dense else None


def _checksum_line(checksum: xxhash.xxh3_64) -> bytes:
    # Compared as text, so that a change of any byte in the file is detected.
    return b'{"xxh3": "%s"}\n' % checksum.hexdigest().encode()
