"""Files of a run folder: regular files inside of it, read up to a limit. What cannot be read is noted, not raised."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from typing import BinaryIO

LONGEST = 2**24
"""Bytes of a line, or of a file that is read as a whole."""

_LARGEST = 2**32  # bytes that are read of a file line by line; a sparse file may claim any size
_MAX_FILES = 100_000  # of one subfolder, at any depth
_MAX_PROBLEMS = 1000
_SHOWN_PROBLEMS = 20

_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a FIFO"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
    (stat.S_ISLNK, "a symbolic link"),
)


class UnreadableError(Exception):
    """A file cannot be read; the message is the reason."""


class Problems:
    """What could not be read: of each file the first reason, and how many more there are."""

    def __init__(self) -> None:
        self._found: dict[str, tuple[str, int]] = {}
        self._beyond = 0

    def add(self, file: str, reason: str) -> None:
        """Notes a reason. Only the first one of a file is kept, so memory stays bounded."""
        if file in self._found:
            first, count = self._found[file]
            self._found[file] = first, count + 1
        elif len(self._found) < _MAX_PROBLEMS:
            self._found[file] = reason, 1
        else:
            self._beyond += 1

    def lines(self) -> list[str]:
        """One line for each file, at most twenty, and one that counts the others."""
        lines = [
            f"{file}: {reason}" + (f" ({count - 1:,} more in this file)" if count > 1 else "")
            for file, (reason, count) in list(self._found.items())[:_SHOWN_PROBLEMS]
        ]
        beyond = len(self._found) - len(lines) + self._beyond
        return [*lines, f"and {beyond:,} more"] if beyond else lines


class Folder:
    """The files of a run folder, by paths relative to it. The folder itself may be behind a symbolic link.

    Args:
        path: The folder.

    Raises:
        OSError: If the folder cannot be listed.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.root = os.path.realpath(path, strict=True)
        self.names = frozenset(os.listdir(self.root))
        self.problems = Problems()

    @property
    def name(self) -> str:
        """The name of the folder."""
        return os.path.basename(self.root) or self.root

    def size(self, path: str) -> int | None:
        """The bytes of a file, or None if it cannot be read, which is noted."""
        try:
            return os.stat(self._checked(path)).st_size
        except (OSError, UnreadableError) as error:
            self.problems.add(path, reason(error))
            return None

    def read(self, path: str, limit: int = LONGEST) -> bytes | None:
        """The content of a file, or None if it cannot be read or is larger than ``limit``, which is noted."""
        try:
            with self._opened(path) as file:
                content = file.read(limit + 1)
            if len(content) > limit:
                raise UnreadableError(f"expected at most {limit:,} bytes, got more")
        except (OSError, UnreadableError) as error:
            self.problems.add(path, reason(error))
            return None
        return content

    def lines(self, path: str) -> Iterator[tuple[int, bytes]]:
        """The complete lines of a file, numbered from 1. Overlong lines and a last one without an end are noted."""
        try:
            with self._opened(path) as file:
                # A file that grows while it is read would otherwise have no end.
                yield from self._lines(path, file, min(os.fstat(file.fileno()).st_size, _LARGEST))
                if file.tell() >= _LARGEST:
                    self.problems.add(path, f"expected at most {_LARGEST:,} bytes, got more")
        except (OSError, UnreadableError) as error:
            self.problems.add(path, reason(error))

    def _lines(self, path: str, file: BinaryIO, left: int) -> Iterator[tuple[int, bytes]]:
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
                self.problems.add(path, f"line {number}: expected at most {LONGEST:,} bytes, got more")
            elif not overlong:
                self.problems.add(path, f"line {number}: expected a complete line, got its beginning")
            number += ended

    def walk(self, path: str) -> Iterator[tuple[str, str]]:
        """The files below a subfolder, as folder and name. Links to folders and outside are noted and left out."""
        if os.path.islink(os.path.join(self.root, path)):
            self.problems.add(path, "expected a folder, got a symbolic link")
            return
        folders, count = [path], 0
        while folders:
            folder = folders.pop()
            try:
                with os.scandir(os.path.join(self.root, folder)) as entries:
                    for entry in entries:
                        inside = f"{folder}/{entry.name}"
                        if entry.is_dir(follow_symlinks=False):
                            folders.append(inside)
                        elif not entry.is_symlink() or self._leads_to_a_file(inside):
                            yield folder, entry.name
                        count += 1
                        if count >= _MAX_FILES:
                            self.problems.add(path, f"expected at most {_MAX_FILES:,} files, got more")
                            return
            except OSError as error:
                self.problems.add(folder, reason(error))

    def _leads_to_a_file(self, path: str) -> bool:
        """Whether a symbolic link may be followed; notes why not."""
        try:
            self._checked(path)
        except (OSError, UnreadableError) as error:
            self.problems.add(path, reason(error))
            return False
        return True

    def _checked(self, path: str) -> str:
        """The real path of a regular file inside the folder. Nothing is opened: a device may act on that."""
        real = os.path.realpath(os.path.join(self.root, path), strict=True)
        if os.path.commonpath((real, self.root)) != self.root:
            raise UnreadableError("expected a file of the run, got a symbolic link that leads outside of its folder")
        _refuse_unless_regular(os.stat(real))
        return real

    def _opened(self, path: str) -> BinaryIO:
        # The file may have been replaced since it was checked: a FIFO must not block, nor a link be followed.
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
        raise UnreadableError(f"expected a regular file, got {kind_of_file(info.st_mode)}")


def kind_of_file(mode: int) -> str:
    """What ``st_mode`` says that a file is, in words.

    Example:
        >>> kind_of_file(stat.S_IFIFO)
        'a FIFO'
    """
    return next((name for holds, name in _KINDS if holds(mode)), "another kind of file")


def reason(error: Exception) -> str:
    """Why something could not be read or written, without the path."""
    return (isinstance(error, OSError) and error.strerror) or str(error) or type(error).__name__
