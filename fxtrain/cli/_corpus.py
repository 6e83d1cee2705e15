"""The text to train on: files, cut into a part for training and a part for validation."""

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

SHARE = 0.05
"""The share of the bytes that validation gets, at least; whole files may make it half as much again."""

LARGEST = 1 << 30
"""Bytes. Corpora are held in memory, and more than this is taken for a mistake."""

# Beside the code that people wrote, the standard library has its tests, and two folders of tables that a program
# wrote: a model would learn their pattern at once, and they are a sixth of the rest.
_NOT_WRITTEN = {"test", "tests", "idle_test", "encodings", "pydoc_data"}
_NOT_STANDARD = {"site-packages", "dist-packages", "__pycache__"}


class CorpusError(Exception):
    """There is no text to train on. The message says why, and what to do, in one line."""


@dataclasses.dataclass(frozen=True, eq=False)
class Corpus:
    """A text in two parts.

    Args:
        train: uint8 [bytes].
        validation: uint8 [bytes]. No file's text is in both, or the end of each file is here.
        names: The files, by their paths relative to what was read, in order.
        sizes: Each file's bytes.
        description: What was read and how it was cut, in one line.
        digest: SHA-256 of the two parts, in hexadecimal. A run resumed on another text has another digest.
    """

    train: Tensor
    validation: Tensor
    names: tuple[str, ...]
    sizes: tuple[int, ...]
    description: str
    digest: str

    @property
    def files(self) -> int:
        """How many files there are."""
        return len(self.names)


def read_corpus(text: str | None = None) -> Corpus:
    """Reads a text and cuts it in two; the same files always give the same two parts.

    Validation is made of whole files, drawn by a hash of their relative paths, so that a new file moves few
    others. Where that cannot give it about a twentieth of the bytes, with no file more than half of it (one
    file, or a few large ones), validation is the end of each file instead, from the beginning of a line on.

    Args:
        text: A file, a folder (with its subfolders), or a glob (``**`` crosses folders). Of a folder or a glob,
            what is hidden, unreadable or no text (a zero byte near its beginning) is left out. None is the
            source of the Python standard library on this machine, without its tests and generated tables.

    Raises:
        CorpusError: If nothing is there, or nothing of it is text, or it is too much to hold.
    """
    origin, found, chosen = _find(text)
    files, left_out = _read(found, chosen)
    if not files:
        if chosen:
            raise CorpusError(f"{origin} is empty, or no text: give a file of text.")
        if text is None:
            raise CorpusError(f"There is no source of {origin} on this machine: name a text with --text PATH.")
        what = f"{origin} has {_count(left_out)}, and none is readable text" if left_out else f"{origin} has no files"
        raise CorpusError(f"{what}: name a file, a folder or a glob of text.")
    size = sum(len(content) for _, content in files)
    held_out = _held_out({name: len(content) for name, content in files})
    if held_out:
        train = bytearray().join(content for name, content in files if name not in held_out)
        validation = bytearray().join(content for name, content in files if name in held_out)
        how = f"{_count(len(held_out))} drawn by their paths"
    else:
        cuts = [_cut(content) for _, content in files]
        train = bytearray().join(content[:cut] for (_, content), cut in zip(files, cuts, strict=True))
        validation = bytearray().join(content[cut:] for (_, content), cut in zip(files, cuts, strict=True))
        how = "the end of each file" if len(files) > 1 else "the end of it"
    parts = f"{_megabytes(size)}, of which validation has {_megabytes(len(validation))}: {how}"
    return Corpus(
        train=_tensor(train),
        validation=_tensor(validation),
        names=tuple(name for name, _ in files),
        sizes=tuple(len(content) for _, content in files),
        description=f"{origin}, {parts}" if chosen else f"{origin}, {_count(len(files))}, {parts}",
        digest=_digest(train, validation),
    )


def check_fits(corpus: Corpus, *, batch_size: int, length: int) -> None:
    """Refuses a corpus that is too short for one batch of training, or for one sequence of validation.

    A sequence of ``length`` bytes takes one more, the last one's successor.

    Args:
        corpus: The corpus.
        batch_size: Sequences in a batch.
        length: Bytes in a sequence.

    Raises:
        CorpusError: If it is too short.
    """
    wanted = batch_size * length + 1
    if len(corpus.train) < wanted:
        raise CorpusError(
            f"The training text has {len(corpus.train)} bytes, and one batch of {batch_size} sequences of {length} "
            f"takes {wanted}: give more text, or make the batch or the length smaller."
        )
    if len(corpus.validation) < length + 1:
        raise CorpusError(
            f"The validation text has {len(corpus.validation)} bytes, and one sequence of {length} takes "
            f"{length + 1}: give more text, or make the length smaller."
        )


def _find(text: str | None) -> tuple[str, Iterable[tuple[str, Path]], bool]:
    """What to call it, its files by name, and whether it is one file that was chosen by name."""
    if text is None:
        version = ".".join(map(str, sys.version_info[:2]))
        root = Path(sysconfig.get_path("stdlib"))
        sources = ((n, p) for n, p in _walk(root, skip=_NOT_WRITTEN | _NOT_STANDARD) if n.endswith(".py"))
        return f"the Python {version} standard library", sources, False
    # os.path answers where pathlib raises: on what may not be looked at, and on what is no name at all.
    path = os.path.expanduser(text)
    if os.path.isdir(path):
        return text, _walk(Path(path), skip={"__pycache__"}), False
    if os.path.isfile(path):
        return text, [(os.path.basename(path), Path(path))], True
    if os.path.exists(path):
        raise CorpusError(f"{text} is neither a file nor a folder: copy what it gives to a file first.")
    if not glob.has_magic(path):
        raise CorpusError(f"There is no file or folder {text!r}: check the path, or leave --text out.")
    matches = {Path(match) for match in glob.glob(path, recursive=True) if os.path.isfile(match)}
    fixed = Path(*itertools.takewhile(lambda part: not glob.has_magic(part), Path(path).parts))
    found = [(match.relative_to(fixed).as_posix(), match) for match in matches]
    if not found:
        raise CorpusError(f"No file matches {text!r}: check the pattern, and keep the shell from expanding it.")
    return text, found, False


def _walk(root: Path, *, skip: set[str]) -> Iterator[tuple[str, Path]]:
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = (name for name in subfolders if name not in skip and not name.startswith("."))
        for name in names:
            path = Path(folder, name)
            if not name.startswith(".") and os.path.isfile(path):  # no pipe, which would be waited for
                yield path.relative_to(root).as_posix(), path


def _read(found: Iterable[tuple[str, Path]], chosen: bool) -> tuple[list[tuple[str, bytes]], int]:
    files: list[tuple[str, bytes]] = []
    left_out, total = 0, 0
    for name, path in sorted(found):
        try:
            with path.open("rb") as stream:
                content = stream.read(8192)
                if content and b"\0" not in content:
                    content += stream.read(LARGEST - total)
                else:
                    content = b""
        except OSError as error:
            if chosen:
                raise CorpusError(f"{path} cannot be read ({error.strerror}): give a file that can.") from error
            content = b""
        if content:
            files.append((name, content))
        else:
            left_out += 1
        total += len(content)
        if total > LARGEST:
            raise CorpusError(f"The text has more than {_megabytes(LARGEST)}: name a part of it.")
    return files, left_out


def _held_out(sizes: dict[str, int]) -> set[str]:
    """The files of validation, or none where whole files will not do."""
    target = SHARE * sum(sizes.values())
    held_out: set[str] = set()
    taken = 0
    for name in sorted(sizes, key=lambda name: hashlib.sha256(name.encode(errors="surrogateescape")).digest()):
        if taken < target and sizes[name] <= target / 2:
            held_out.add(name)
            taken += sizes[name]
    return held_out if taken >= target else set()


def _cut(content: bytes) -> int:
    """Where validation begins: at a line's beginning, if one is near."""
    cut = round(len(content) * (1 - SHARE))
    line = content.rfind(b"\n", round(len(content) * (1 - 2 * SHARE)), cut) + 1
    return line or cut


def _tensor(content: bytearray) -> Tensor:
    # An empty buffer is refused by frombuffer. The tensor shares the bytearray's memory: no copy.
    return torch.frombuffer(content, dtype=torch.uint8) if content else torch.empty(0, dtype=torch.uint8)


def _digest(train: bytearray, validation: bytearray) -> str:
    digest = hashlib.sha256(struct.pack("<QQ", len(train), len(validation)))
    digest.update(train)
    digest.update(validation)
    return digest.hexdigest()


def _count(files: int) -> str:
    return "1 file" if files == 1 else f"{files} files"


def _megabytes(size: int) -> str:
    return f"{size} bytes" if size < 100_000 else f"{size / 1e6:.1f} MB"
