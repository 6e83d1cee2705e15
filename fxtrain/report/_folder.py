"""Reads regular files inside a run folder, up to a size limit. Errors are recorded instead of raised."""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterator
from typing import BinaryIO

LONGEST = 2**24
"""The largest size in bytes of a line, or of a file that is read as a whole."""

_LARGEST = 2**32  # bytes read from a file of lines, because a sparse file may claim any size
_MAX_FILES = 100_000  # in one subfolder, at any depth
_MAX_PROBLEMS = 1000
_SHOWN_PROBLEMS = 20

# By the first character of stat.filemode
_KINDS = {"d": "a folder", "p": "a FIFO", "s": "a socket", "c": "a device", "b": "a device", "l": "a symbolic link"}


class Problems:
    """The problems found while reading a folder: for each file the first problem and the number of others."""

    def __init__(self) -> None:
        self._found: dict[str, tuple[str, int]] = {}
        self._beyond = 0

    def add(self, file: str, reason: str) -> None:
        """Records a problem. Only the first of each file is kept, so memory is bounded.

        Args:
            file: The path of the file, relative to the folder.
            reason: The problem.
        """
        if file in self._found:
            first, count = self._found[file]
            self._found[file] = first, count + 1
        elif len(self._found) < _MAX_PROBLEMS:
            self._found[file] = reason, 1
        else:
            self._beyond += 1

    @contextlib.contextmanager
    def recording(self, file: str, where: str = "") -> Iterator[None]:
        """Records an ``OSError`` or a ``ValueError`` of the context as a problem of a file, instead of raising it.

        Args:
            file: The path of the file, relative to the folder.
            where: The place in the file, with which the problem begins.
        """
        try:
            yield
        except (OSError, ValueError) as error:
            self.add(file, f"{where}{reason(error)}")

    def lines(self) -> list[str]:
        """Returns one line for each of the first twenty files, and a line that counts the others."""
        lines = [
            f"{file}: {reason}" + (f" ({count - 1:,} more in this file)" if count > 1 else "")
            for file, (reason, count) in list(self._found.items())[:_SHOWN_PROBLEMS]
        ]
        beyond = len(self._found) - len(lines) + self._beyond
        return [*lines, f"and {beyond:,} more"] if beyond else lines


class Folder:
    """The files of a run folder, addressed by paths relative to it.

    Args:
        path: The folder, or a symbolic link to it.

    Raises:
        OSError: If the folder cannot be listed.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.root = os.path.realpath(path, strict=True)
        self.names = frozenset(os.listdir(self.root))
        self.problems = Problems()

    def size(self, path: str) -> int | None:
        """Returns the size of a file in bytes. If it cannot be read, records a problem and returns None."""
        with self.problems.recording(path):
            return os.stat(self._checked(path)).st_size
        return None

    def read(self, path: str, limit: int = LONGEST) -> bytes | None:
        """Returns the content of a file. If it cannot be read, records a problem and returns None.

        Args:
            path: The path of the file.
            limit: The largest size accepted, in bytes.
        """
        with self.problems.recording(path), self._opened(path) as file:
            content = file.read(limit + 1)
            if len(content) <= limit:
                return content
            raise ValueError(f"expected at most {limit:,} bytes, got more")
        return None

    def lines(self, path: str, *, quiet: bool = False) -> Iterator[tuple[int, bytes]]:
        """Yields the complete lines of a file with their numbers, from 1.

        Lines that are too long, and a last line without a line end, are skipped and recorded as problems.

        Args:
            path: The path of the file.
            quiet: Whether to record no problems, for a file that is read again.
        """
        problems = Problems() if quiet else self.problems
        with problems.recording(path), self._opened(path) as file:
            # Stops at the current size, because a file that grows while it is read might never end.
            yield from self._lines(path, problems, file, min(os.fstat(file.fileno()).st_size, _LARGEST))
            if file.tell() >= _LARGEST:
                problems.add(path, f"expected at most {_LARGEST:,} bytes, got more")

    def _lines(self, path: str, problems: Problems, file: BinaryIO, left: int) -> Iterator[tuple[int, bytes]]:
        number, overlong = 1, False
        while left > 0 and (part := file.readline(min(LONGEST, left))):
            left -= len(part)
            ended = part.endswith(b"\n")
            if ended and not overlong:
                yield number, part
            elif ended:
                overlong = False
            elif not overlong and left > 0:
                overlong = True
                problems.add(path, f"line {number}: expected at most {LONGEST:,} bytes, got more")
            elif not overlong:
                problems.add(path, f"line {number}: expected a complete line, got a partial one")
            number += ended

    def walk(self, path: str) -> Iterator[tuple[str, str]]:
        """Yields the folder and the name of each file below the subfolder ``path``.

        Symbolic links to folders, or to files outside the run folder, are skipped and recorded as problems.
        """
        if os.path.islink(os.path.join(self.root, path)):
            self.problems.add(path, "expected a folder, got a symbolic link")
            return
        folders, count = [path], 0
        while folders:
            folder = folders.pop()
            with self.problems.recording(folder), os.scandir(os.path.join(self.root, folder)) as entries:
                for entry in entries:
                    inside = f"{folder}/{entry.name}"
                    if entry.is_dir(follow_symlinks=False):
                        folders.append(inside)
                    elif not entry.is_symlink() or self.size(inside) is not None:  # a link to a regular file
                        yield folder, entry.name
                    count += 1
                    if count >= _MAX_FILES:
                        self.problems.add(path, f"expected at most {_MAX_FILES:,} files, got more")
                        return

    def _checked(self, path: str) -> str:
        """Returns the real path of a regular file inside the folder, without opening it.

        Opening a device can have side effects.
        """
        real = os.path.realpath(os.path.join(self.root, path), strict=True)
        if os.path.commonpath((real, self.root)) != self.root:
            raise ValueError("expected a file in the run folder, got a symbolic link to another place")
        _refuse_unless_regular(os.stat(real))
        return real

    def _opened(self, path: str) -> BinaryIO:
        # The file may be replaced after the check, so the open must not block on a FIFO or follow a link.
        flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
        handle = os.open(self._checked(path), flags)
        try:
            _refuse_unless_regular(os.fstat(handle))
            return os.fdopen(handle, "rb")
        except BaseException:
            os.close(handle)
            raise


def _refuse_unless_regular(info: os.stat_result) -> None:
    if not stat.S_ISREG(info.st_mode):
        raise ValueError(f"expected a regular file, got {kind_of_file(info.st_mode)}")


def kind_of_file(mode: int) -> str:
    """Describes the kind of file that an ``st_mode`` encodes.

    Example:
        >>> kind_of_file(stat.S_IFIFO)
        'a FIFO'
    """
    return _KINDS.get(stat.filemode(mode)[0], "another kind of file")


def reason(error: Exception) -> str:
    """Returns the message of an error, without the path that an ``OSError`` includes."""
    return (isinstance(error, OSError) and error.strerror) or str(error) or type(error).__name__
