"""The text to train on, read from files or a named data set and split into training and validation."""

from __future__ import annotations

import dataclasses
import glob
import hashlib
import importlib.util
import itertools
import os
import struct
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fxtrain.cli._errors import CommandError
from fxtrain.core import pluralize

SHARE = 0.05
"""The minimum share of bytes for validation. Whole files can make it up to half as much again."""

LARGEST = 1 << 30
"""The maximum size in bytes. Corpora are held in memory, and a larger one is likely a mistake."""

# Tests of the standard library, and two folders of generated tables. The tables are large and have a pattern that a
# model learns immediately.
_TESTS_AND_TABLES = {"test", "tests", "idle_test", "encodings", "pydoc_data"}
_NOT_STANDARD = {"site-packages", "dist-packages", "__pycache__"}


_NAMES = "stdlib, sklearn, wikitext or datasets:NAME"
_WIKITEXT = "Salesforce/wikitext", "wikitext-2-raw-v1"  # its folder, and the configuration that is read by default


class CorpusError(CommandError):
    """There is no usable text to train on. The message is one line with the reason and a remedy."""


@dataclasses.dataclass(frozen=True, eq=False)
class Corpus:
    """A text split into training and validation.

    Args:
        train: uint8 [bytes].
        validation: uint8 [bytes]. Whole files that are not in ``train``, or the end of each file.
        names: Paths of the files relative to the folder that was read, in order, or names of the splits.
        sizes: Sizes of the files or splits in bytes.
        description: The source and the split, in one line.
        digest: SHA-256 of the two parts in hexadecimal, which detects a resume on a different text.
    """

    train: Tensor
    validation: Tensor
    names: tuple[str, ...]
    sizes: tuple[int, ...]
    description: str
    digest: str


def read_corpus(dataset: str | None = None) -> Corpus:
    """Reads a text and splits it into training and validation. The split is deterministic.

    Validation consists of whole files, selected by a hash of their relative paths, so a new file moves few others. They
    have about a twentieth of the bytes, and no file has more than half of that. If this is impossible, as with a single
    file or a few large ones, validation is the end of each file instead, from the beginning of a line. A data set of
    the ``datasets`` package that has a validation split keeps it.

    Args:
        dataset: One of

            - ``"stdlib"`` or None: the source of this machine's Python standard library, without tests and tables;
            - ``"sklearn"``: scikit-learn's descriptions of the data sets that it ships;
            - ``"wikitext"`` or ``"wikitext:CONFIG"``: read by the ``datasets`` package, configuration
              ``wikitext-2-raw-v1`` by default;
            - ``"datasets:NAME"`` or ``"datasets:NAME:CONFIG"``: any text data set that ``datasets.load_dataset`` reads,
              by its name or the folder of a local copy;
            - a file, a folder including its subfolders, or a glob, in which ``**`` matches nested folders. Hidden,
              unreadable and binary files (with a zero byte near the beginning) of a folder or glob are left out.

    Raises:
        CorpusError: There is no such data set or file, none of the files is text, or they are too large.
    """
    library, _, rest = (dataset or "").partition(":")
    if library == "wikitext":
        return _read_library(_WIKITEXT[0], rest or _WIKITEXT[1])
    if library == "datasets" and rest:
        name, _, configuration = rest.partition(":")
        return _read_library(name, configuration or None)
    origin, found, is_single_file = _find(dataset)
    files, left_out = _read(found, is_single_file)
    if not files:
        if is_single_file:
            raise CorpusError(f"expected a file of text, got {origin}, which is empty or binary. Give another file.")
        if dataset in (None, "stdlib", "sklearn"):
            raise CorpusError(f"expected the files of {origin} on this machine, got none. Give a text: --dataset PATH.")
        got = f"{pluralize(left_out, 'file')} that cannot be read or used as text" if left_out else "no files"
        raise CorpusError(f"expected files of text in {origin}, got {got}. Give a file, a folder or a glob of text.")
    held_out = _held_out({name: len(content) for name, content in files})
    if held_out:
        train = bytearray().join(content for name, content in files if name not in held_out)
        validation = bytearray().join(content for name, content in files if name in held_out)
        how = f"{pluralize(len(held_out), 'file')} selected by their paths"
    else:
        train, validation = _cut([content for _, content in files])
        how = "the end of each file" if len(files) > 1 else "the end of the file"
    origin = origin if is_single_file else f"{origin}, {pluralize(len(files), 'file')}"
    return _corpus(origin, train, validation, how, {name: len(content) for name, content in files})


def _corpus(origin: str, train: bytearray, validation: bytearray, how: str, sizes: dict[str, int]) -> Corpus:
    size = _megabytes(len(train) + len(validation))
    return Corpus(
        train=_tensor(train),
        validation=_tensor(validation),
        names=tuple(sizes),
        sizes=tuple(sizes.values()),
        description=f"{origin}, {size}, of which validation has {_megabytes(len(validation))}: {how}",
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


def _read_library(name: str, configuration: str | None) -> Corpus:
    """Reads a text data set with the ``datasets`` package."""
    origin = name if configuration is None else f"{name} ({configuration})"
    try:
        import datasets  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise CorpusError(
            f"expected the package datasets to read {origin}, got none. Install it: pip install datasets."
        ) from None
    try:
        splits = datasets.load_dataset(name, configuration)
    except Exception as error:  # of many types: no network, no such name, no such configuration, damaged files
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise CorpusError(
            f"expected a data set that datasets.load_dataset reads, got {origin}: {reason[0]} Check the name, or give "
            "the folder of a local copy: --dataset datasets:FOLDER."
        ) from error
    if "train" not in splits:
        raise CorpusError(f"expected a data set with a split train, got {origin} with {', '.join(map(str, splits))}.")
    train = _text_of(splits["train"], origin)
    sizes = {"train": len(train)}
    if "validation" in splits:
        validation = _text_of(splits["validation"], origin)
        sizes["validation"] = len(validation)
        how = "its validation split"
    else:
        train, validation = _cut([bytes(train)])
        how = "the end of its training split"
    return _corpus(origin, train, validation, how, sizes)


def _text_of(split: Any, origin: str) -> bytearray:
    """Returns the text of a split: its rows in order, each with a line end."""
    texts = [name for name, feature in split.features.items() if getattr(feature, "dtype", None) == "string"]
    column = "text" if "text" in texts else texts[0] if len(texts) == 1 else None
    if column is None:
        raise CorpusError(
            f"expected a data set with a column of strings named text, got {origin} with the columns "
            f"{', '.join(split.features)}. Write its text to a file, and give that."
        )
    text = bytearray()
    for batch in split.select_columns(column).iter(1000):
        for row in batch[column]:
            text += row.encode(errors="surrogateescape")
            if not row.endswith("\n"):
                text += b"\n"
        if len(text) > LARGEST:
            raise CorpusError(f"expected at most {_megabytes(LARGEST)} of text, got more in {origin}.")
    return text


def _cut(files: list[bytes]) -> tuple[bytearray, bytearray]:
    """Splits each file near its end into training and validation."""
    cuts = [_split_offset(content) for content in files]
    train = bytearray().join(content[:cut] for content, cut in zip(files, cuts, strict=True))
    return train, bytearray().join(content[cut:] for content, cut in zip(files, cuts, strict=True))


def _find(text: str | None) -> tuple[str, Iterable[tuple[str, Path]], bool]:
    """Returns a name for the text, its files with their names, and whether the user named a single file."""
    if text in (None, "stdlib"):
        version = ".".join(map(str, sys.version_info[:2]))
        root = Path(sysconfig.get_path("stdlib"))
        sources = ((n, p) for n, p in _walk(root, skip=_TESTS_AND_TABLES | _NOT_STANDARD) if n.endswith(".py"))
        return f"the Python {version} standard library", sources, False
    if text == "sklearn":
        found = importlib.util.find_spec("sklearn")  # found without importing it
        if found is None or found.origin is None:
            raise CorpusError(
                "expected scikit-learn for the data set sklearn, got none. Install it: pip install scikit-learn."
            )
        root = Path(found.origin).parent / "datasets" / "descr"
        sources = ((n, p) for n, p in _walk(root, skip=_NOT_STANDARD) if n.endswith(".rst"))
        return "scikit-learn's descriptions of data sets", sources, False
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
            f"expected a file, a folder, a glob or the name of a data set ({_NAMES}), got {text!r}, which does not "
            "exist. Check the path or the name."
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
