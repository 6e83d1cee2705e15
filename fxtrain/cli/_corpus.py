"""The text to train on, read from files and split into training and validation."""

from __future__ import annotations

import dataclasses
import glob
import hashlib
import itertools
import os
import struct
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from fxtrain.core import pluralize

SHARE = 0.05
"""The minimum share of bytes for validation. Whole files can make it up to half as much again."""

LARGEST = 1 << 30
"""The maximum size in bytes. Corpora are held in memory, and a larger one is likely a mistake."""

# Tests of the standard library, and two folders of generated tables. The tables are large and have a pattern that a
# model learns immediately.
_TESTS_AND_TABLES = {"test", "tests", "idle_test", "encodings", "pydoc_data"}
_NOT_STANDARD = {"site-packages", "dist-packages", "__pycache__"}


class CorpusError(Exception):
    """There is no usable text to train on. The message is one line with the reason and a remedy."""


@dataclasses.dataclass(frozen=True, eq=False)
class Corpus:
    """A text split into training and validation.

    Args:
        train: uint8 [bytes].
        validation: uint8 [bytes]. Whole files that are not in ``train``, or the end of each file.
        names: Paths of the files relative to the folder that was read, in order.
        sizes: Sizes of the files in bytes.
        description: The source and the split, in one line.
        digest: SHA-256 of the two parts in hexadecimal, which detects a resume on a different text.
    """

    train: Tensor
    validation: Tensor
    names: tuple[str, ...]
    sizes: tuple[int, ...]
    description: str
    digest: str


def read_corpus(text: str | None = None) -> Corpus:
    """Reads a text and splits it into training and validation. The split is deterministic.

    Validation consists of whole files, selected by a hash of their relative paths, so a new file moves few others. They
    have about a twentieth of the bytes, and no file has more than half of that. If this is impossible, as with a single
    file or a few large ones, validation is the end of each file instead, from the beginning of a line.

    Args:
        text: A file, a folder including its subfolders, or a glob, in which ``**`` matches nested folders. Hidden,
            unreadable and binary files (with a zero byte near the beginning) of a folder or glob are left out. None
            reads the source of this machine's Python standard library, without tests and generated tables.

    Raises:
        CorpusError: There is no file, none of the files is text, or they are too large.
    """
    origin, found, is_single_file = _find(text)
    files, left_out = _read(found, is_single_file)
    if not files:
        if is_single_file:
            raise CorpusError(f"expected a file of text, got {origin}, which is empty or binary. Give another file.")
        if text is None:
            raise CorpusError(
                f"expected the source of {origin} on this machine, got none. Give a text with --text PATH."
            )
        got = f"{pluralize(left_out, 'file')} that cannot be read or used as text" if left_out else "no files"
        raise CorpusError(f"expected files of text in {origin}, got {got}. Give a file, a folder or a glob of text.")
    size = sum(len(content) for _, content in files)
    held_out = _held_out({name: len(content) for name, content in files})
    if held_out:
        train = bytearray().join(content for name, content in files if name not in held_out)
        validation = bytearray().join(content for name, content in files if name in held_out)
        how = f"{pluralize(len(held_out), 'file')} selected by their paths"
    else:
        cuts = [_split_offset(content) for _, content in files]
        train = bytearray().join(content[:cut] for (_, content), cut in zip(files, cuts, strict=True))
        validation = bytearray().join(content[cut:] for (_, content), cut in zip(files, cuts, strict=True))
        how = "the end of each file" if len(files) > 1 else "the end of the file"
    parts = f"{_megabytes(size)}, of which validation has {_megabytes(len(validation))}: {how}"
    return Corpus(
        train=_tensor(train),
        validation=_tensor(validation),
        names=tuple(name for name, _ in files),
        sizes=tuple(len(content) for _, content in files),
        description=f"{origin}, {parts}" if is_single_file else f"{origin}, {pluralize(len(files), 'file')}, {parts}",
        digest=_digest(train, validation),
    )


def check_fits(corpus: Corpus, *, batch_size: int, length: int) -> None:
    """Raises unless a corpus is long enough for one training batch and one validation sequence.

    A sequence of ``length`` bytes needs one more byte, the target of the last one.

    Args:
        corpus: The corpus.
        batch_size: Sequences per batch.
        length: Bytes per sequence.

    Raises:
        CorpusError: The corpus is too short.
    """
    needed = batch_size * length + 1
    if len(corpus.train) < needed:
        raise CorpusError(
            f"expected at least {needed} bytes of training text, for one batch of {batch_size} sequences of {length}, "
            f"got {len(corpus.train)}. Give more text, or reduce the batch size or the length."
        )
    if len(corpus.validation) < length + 1:
        raise CorpusError(
            f"expected at least {length + 1} bytes of validation text, for one sequence of {length}, got "
            f"{len(corpus.validation)}. Give more text, or reduce the length."
        )


def _find(text: str | None) -> tuple[str, Iterable[tuple[str, Path]], bool]:
    """Returns a name for the text, its files with their names, and whether the user named a single file."""
    if text is None:
        version = ".".join(map(str, sys.version_info[:2]))
        root = Path(sysconfig.get_path("stdlib"))
        sources = ((n, p) for n, p in _walk(root, skip=_TESTS_AND_TABLES | _NOT_STANDARD) if n.endswith(".py"))
        return f"the Python {version} standard library", sources, False
    # os.path returns False where pathlib raises, for inaccessible paths and invalid names.
    path = os.path.expanduser(text)
    if os.path.isdir(path):
        return text, _walk(Path(path), skip={"__pycache__"}), False
    if os.path.isfile(path):
        return text, [(os.path.basename(path), Path(path))], True
    if os.path.exists(path):
        raise CorpusError(
            f"expected a file or a folder, got {text}, which is neither. Copy its content to a file first."
        )
    if not glob.has_magic(path):
        raise CorpusError(
            f"expected a file, a folder or a glob, got {text!r}, which does not exist. Check the path, or omit --text."
        )
    matches = {Path(match) for match in glob.glob(path, recursive=True) if os.path.isfile(match)}
    fixed = Path(*itertools.takewhile(lambda part: not glob.has_magic(part), Path(path).parts))
    found = [(match.relative_to(fixed).as_posix(), match) for match in matches]
    if not found:
        raise CorpusError(f"expected a pattern that matches a file, got {text!r}. Check it, and quote it in the shell.")
    return text, found, False


def _walk(root: Path, *, skip: set[str]) -> Iterator[tuple[str, Path]]:
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = (name for name in subfolders if name not in skip and not name.startswith("."))
        for name in names:
            path = Path(folder, name)
            if not name.startswith(".") and os.path.isfile(path):  # opening a pipe would block
                yield path.relative_to(root).as_posix(), path


def _read(found: Iterable[tuple[str, Path]], is_single_file: bool) -> tuple[list[tuple[str, bytes]], int]:
    files: list[tuple[str, bytes]] = []
    total = 0
    found = sorted(found)
    for name, path in found:
        try:
            with path.open("rb") as stream:
                content = stream.read(8192)
                content = b"" if b"\0" in content else content + stream.read(LARGEST - total)
        except OSError as error:
            if is_single_file:
                raise CorpusError(
                    f"expected a readable file, got {path} ({error.strerror}). Give another one."
                ) from error
            content = b""
        if content:
            files.append((name, content))
        total += len(content)
        if total > LARGEST:
            raise CorpusError(f"expected at most {_megabytes(LARGEST)} of text, got more. Give a part of it.")
    return files, len(found) - len(files)


def _held_out(sizes: dict[str, int]) -> set[str]:
    """Returns the validation files, or an empty set if whole files cannot be used."""
    target = SHARE * sum(sizes.values())
    held_out: set[str] = set()
    taken = 0
    for name in sorted(sizes, key=lambda name: hashlib.sha256(name.encode(errors="surrogateescape")).digest()):
        if taken < target and sizes[name] <= target / 2:
            held_out.add(name)
            taken += sizes[name]
    return held_out if taken >= target else set()


def _split_offset(content: bytes) -> int:
    """Returns the offset at which validation begins, at the beginning of a line if one is near."""
    cut = round(len(content) * (1 - SHARE))
    line = content.rfind(b"\n", round(len(content) * (1 - 2 * SHARE)), cut) + 1
    return line or cut


def _tensor(content: bytearray) -> Tensor:
    # frombuffer shares the memory of the bytearray, and rejects an empty one.
    return torch.frombuffer(content, dtype=torch.uint8) if content else torch.empty(0, dtype=torch.uint8)


def _digest(train: bytearray, validation: bytearray) -> str:
    digest = hashlib.sha256(struct.pack("<QQ", len(train), len(validation)))
    digest.update(train)
    digest.update(validation)
    return digest.hexdigest()


def _megabytes(size: int) -> str:
    return f"{size} bytes" if size < 100_000 else f"{size / 1e6:.1f} MB"
