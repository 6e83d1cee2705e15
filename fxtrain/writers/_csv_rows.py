"""CSV: numbers as a table that spreadsheets and data frames read."""

from __future__ import annotations

import io
import os
from collections.abc import Iterable, Mapping
from csv import DictReader
from csv import reader as read_rows
from csv import writer as row_writer
from pathlib import Path
from typing import Any

from fxtrain.disk import make_folder, replace_file, set_aside
from fxtrain.writers._interface import unwritable
from fxtrain.writers._one_file import Appendable, OneFile

_FIRST: tuple[str, ...] = ("step", "epoch", "time")


def csv(path: str | os.PathLike[str]) -> CsvWriter:
    """A writer of numbers as one row a step, and a column for each name.

    What is written for a step later is joined to its row. A name that appears later adds a column, for which rows
    before it are empty: the file is written anew then, and put in the place of the old one at once. ``epoch`` and
    ``time`` (seconds of a session) are empty where no event says them.

    A row is handed to the operating system as it is written, and put on the disk by ``flush``; a failed write leaves no
    part of a row. A last row that a crash tore, or a power cut filled with zeros, is moved to ``<name>.damaged`` on
    opening, with a warning; ``purge`` removes the rows beyond a step.

    Args:
        path: The file. If it is there already, it goes on.

    Raises:
        OSError: If the file cannot be written.
        ValueError: If it is there and is no such table.

    Example:
        >>> import pathlib, tempfile
        >>> path = pathlib.Path(tempfile.mkdtemp(), "metrics.csv")
        >>> writer = csv(path)
        >>> writer.write_scalars(1, {"loss": 0.5})
        >>> writer.write_scalars(2, {"loss": 0.25, "accuracy": 0.9})
        >>> print(path.read_text(), end="")
        step,epoch,time,loss,accuracy
        1,,,0.5,
        2,,,0.25,0.9
        >>> writer.close()
    """
    return CsvWriter(Path(path))


class CsvWriter(OneFile):
    """Writes rows; made by ``csv``."""

    kinds = frozenset((float,))

    def __init__(self, path: Path) -> None:
        self._path = path
        self._columns: list[str] = []
        self._row: dict[str, str] = {}  # the last one, which later values may be joined to,
        self._begin = 0  # and where in the file it begins
        self._opened()

    def put(self, step: int, values: Mapping[str, Any], event: Any) -> None:
        if "step" in values:
            raise ValueError(f"{self._path} has the step in its column 'step': log this under another name.")
        self._opened()
        row: dict[str, str] = {}
        if event is not None:
            row = {"time": _cell(event.time), **({} if event.epoch is None else {"epoch": _cell(event.epoch)})}
        row |= {name: _cell(value) for name, value in values.items()}
        added = [name for name in row if name not in self._columns]
        if added:
            self._rewrite([*self._columns, *added], self._rows())
        file = self._opened()
        joins = self._row.get("step") == str(step)
        whole, begin = (self._row | row, self._begin) if joins else ({"step": str(step), **row}, file.size)
        file.put(begin, _line(_in_columns(whole, self._columns)))
        self._row, self._begin = whole, begin

    def purge(self, step: int) -> None:
        """Removes the rows beyond a step, and those that cannot be read."""
        self._opened()
        rows = self._rows()
        kept = [row for row in rows if (found := _step(row)) is not None and found <= step]
        if len(kept) < len(rows):
            self._rewrite(self._columns, kept)

    def _rows(self) -> list[dict[str, str]]:
        with open(self._path, newline="", encoding="utf-8", errors="replace") as file:
            return list(DictReader(file))

    def _rewrite(self, columns: list[str], rows: list[dict[str, str]]) -> None:
        """The whole file anew, in one replacement."""
        self.close()
        replace_file(self._path, _lines([columns, *(_in_columns(row, columns) for row in rows)]))
        self._opened()

    def _opened(self) -> Appendable:
        if self._file is None:
            try:
                make_folder(self._path.parent)
                self._take_up(self._path.read_bytes() if self._path.exists() else b"")
            except OSError as error:
                raise unwritable("csv", self._path, error) from error
        assert self._file is not None
        return self._file

    def _take_up(self, content: bytes) -> None:
        """Opens the file at the end of its whole rows, and reads the columns, or writes them, and the last row."""
        is_zeros = b"\0" in content and not content.strip(b"\0\r\n")
        rows = 0 if is_zeros else _end_of_header(content)
        header = next(read_rows(io.StringIO(content[: rows or None].decode(errors="replace"), newline="")), [])
        first = _line(list(_FIRST))
        unfinished = not rows and (
            is_zeros or first.startswith(content.rstrip(b"\0")[: len(first) - 1])
        )  # or empty, or zeros
        if not (unfinished or (rows and tuple(header[: len(_FIRST)]) == _FIRST)):
            # Before anything is removed: it may be somebody's whole file.
            raise ValueError(
                f"{self._path} is there, and its columns {header} do not begin with {', '.join(_FIRST)}: it is "
                "another table. Give another path."
            )
        size = content.rfind(b"\n") + 1 if rows else 0
        if size < len(content):
            set_aside(self._path, "ended in the middle of a row", size)
        file = Appendable(self._path)
        if not rows:
            header, rows, size = list(_FIRST), len(first), len(first)
            file.append(first)
        self._file, self._columns = file, header
        self._begin = max(content.rfind(b"\n", 0, max(size - 1, 0)) + 1, rows)
        last = content[self._begin : size].decode(errors="replace")
        self._row = dict(zip(header, next(read_rows([last]), []), strict=False))


def _end_of_header(content: bytes) -> int:
    """Where the rows begin: after the first line end outside of quotes; 0 if there is none."""
    end = content.find(b"\n") + 1
    while end and content.count(b'"', 0, end) % 2:
        end = content.find(b"\n", end) + 1
    return end


def _step(row: Mapping[str, str]) -> int | None:
    try:
        return int(row["step"])
    except ValueError:
        return None


def _in_columns(row: Mapping[str, str], columns: list[str]) -> list[str]:
    return [row.get(name, "") for name in columns]


def _cell(value: float) -> str:
    return repr(value) if isinstance(value, float) else str(int(value))


def _lines(rows: Iterable[list[str]]) -> bytes:
    return b"".join(map(_line, rows))


def _line(row: list[str]) -> bytes:
    buffer = io.StringIO()
    # Only where rows end with it is a carriage return in a name quoted.
    row_writer(buffer, lineterminator="\r\n").writerow(row)
    return buffer.getvalue().removesuffix("\r\n").encode() + b"\n"
