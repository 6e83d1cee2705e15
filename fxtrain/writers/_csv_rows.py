"""Scalars as a CSV table for spreadsheets and data frames."""

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
    """A writer of scalars with one row per step and one column per name.

    Further values of the last row's step are joined to that row. A new name adds a column, which is empty in earlier
    rows: the file is then rewritten and replaced atomically. ``epoch`` and ``time`` (seconds of the session) are empty
    where no event provides them.

    A row is passed to the operating system when it is written, and synced to the disk by ``flush``. A failed write
    leaves no partial row. If a crash tore the last row, or a power cut filled it with zeros, opening the file moves
    that row to ``<name>.damaged`` with a warning. ``purge`` removes the rows after a step.

    Args:
        path: The file. An existing file is continued.

    Raises:
        OSError: The file cannot be written.
        ValueError: The file exists and is not such a table.

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
    """Writes rows. Created by ``csv``."""

    kinds = frozenset((float,))

    def __init__(self, path: Path) -> None:
        self._path = path
        self._columns: list[str] = []
        self._row: dict[str, str] = {}  # the last row, which later values of its step are joined to
        self._begin = 0  # its byte offset in the file
        self._opened()

    def put(self, step: int, values: Mapping[str, Any], event: Any) -> None:
        if "step" in values:
            raise ValueError(f"expected names other than 'step', the step column of {self._path}. Rename the value.")
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
        """Removes the rows after a step, and unreadable rows."""
        self._opened()
        rows = self._rows()
        kept = [row for row in rows if (found := _step(row)) is not None and found <= step]
        if len(kept) < len(rows):
            self._rewrite(self._columns, kept)

    def _rows(self) -> list[dict[str, str]]:
        with open(self._path, newline="", encoding="utf-8", errors="replace") as file:
            return list(DictReader(file))

    def _rewrite(self, columns: list[str], rows: list[dict[str, str]]) -> None:
        """Rewrites the whole file in one atomic replacement."""
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
        """Opens the file at the end of its complete rows. Reads its columns, or writes them, and reads its last row."""
        is_zeros = b"\0" in content and not content.strip(b"\0\r\n")
        rows = 0 if is_zeros else _end_of_header(content)
        header = next(read_rows(io.StringIO(content[: rows or None].decode(errors="replace"), newline="")), [])
        first = _line(list(_FIRST))
        # The file is empty, zeros, or the beginning of the first line.
        unfinished = not rows and (is_zeros or first.startswith(content.rstrip(b"\0")[: len(first) - 1]))
        if not (unfinished or (rows and tuple(header[: len(_FIRST)]) == _FIRST)):
            # Checked before anything is removed, because the file may not belong to a run.
            raise ValueError(
                f"expected the columns of {self._path} to begin with {', '.join(_FIRST)}, got "
                f"{', '.join(header):.60}. Use another path."
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
    """Returns the offset after the first newline outside quotes, where the rows begin, or 0 if there is none."""
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
    # The csv module quotes a carriage return in a name only if rows end with one.
    row_writer(buffer, lineterminator="\r\n").writerow(row)
    return buffer.getvalue().removesuffix("\r\n").encode() + b"\n"
