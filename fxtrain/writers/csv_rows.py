"""CSV: numbers as a table that spreadsheets and data frames read."""

from __future__ import annotations

import io
import os
import warnings
from collections.abc import Mapping
from csv import DictReader
from csv import reader as read_rows
from csv import writer as row_writer
from pathlib import Path
from typing import Any, BinaryIO

from fxtrain.writers.disk import replace_file
from fxtrain.writers.interface import Backend, unwritable

_FIRST = ("step", "epoch", "time")


def csv(path: str | os.PathLike[str]) -> CsvWriter:
    """A writer of numbers as one row a step, and a column for each name.

    What is written for a step later is joined to its row. A name that appears later adds a column, for which rows
    before it are empty: the file is written anew then, and put in the place of the old one at once. ``epoch`` and
    ``time`` (seconds of a session) are empty where no event says them.

    A row is handed to the operating system as it is written, and put on the disk by ``flush``. A last row that a crash
    tore is removed on opening, with a warning; ``purge`` removes the rows beyond a step.

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


class CsvWriter(Backend):
    """Writes rows; made by ``csv``."""

    kinds = frozenset((float,))

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: BinaryIO | None = None
        self._columns: list[str] = []
        self._row: dict[str, str] = {}  # the last one, which later values may be joined to,
        self._begin = 0  # and where in the file it begins
        self._opened()

    def put(self, step: int, values: Mapping[str, Any], event: Any) -> None:
        self._opened()
        row = {name: _cell(value) for name, value in values.items()}
        if event is not None:
            row |= {"time": _cell(event.time), **({} if event.epoch is None else {"epoch": _cell(event.epoch)})}
        added = [name for name in row if name not in self._columns]
        if added:
            self._add_columns(added)
        file = self._opened()
        if self._row.get("step") == str(step):
            self._row |= row
            file.truncate(self._begin)
        else:
            self._row, self._begin = {"step": str(step), **row}, file.seek(0, os.SEEK_END)
        file.seek(self._begin)
        file.write(_lines([[self._row.get(name, "") for name in self._columns]]))
        file.flush()

    def purge(self, step: int) -> None:
        """Removes the rows beyond a step."""
        self._opened()
        self._rewrite([row for row in self._rows() if int(row["step"]) <= step])

    def flush(self) -> None:
        if self._file is not None:
            self._file.flush()
            os.fsync(self._file.fileno())

    def close(self) -> None:
        if self._file is not None:
            self.flush()
            self._file.close()
            self._file = None

    def _add_columns(self, names: list[str]) -> None:
        rows = self._rows()
        self._columns += names
        self._rewrite(rows)

    def _rewrite(self, rows: list[dict[str, str]]) -> None:
        """The whole file anew, in one replacement."""
        self.close()
        table = [self._columns, *([row.get(name, "") for name in self._columns] for row in rows)]
        replace_file(self._path, _lines(table))
        self._opened()

    def _rows(self) -> list[dict[str, str]]:
        with open(self._path, newline="", encoding="utf-8") as file:
            return list(DictReader(file))

    def _opened(self) -> BinaryIO:
        if self._file is not None:
            return self._file
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(self._path, "ab+")  # noqa: SIM115
            self._file.close()
            self._file = open(self._path, "rb+")  # noqa: SIM115 -- appending would not go back to a row
        except OSError as error:
            raise unwritable("csv", self._path, error) from error
        self._mend(self._file)
        rows = self._rows()
        self._row = rows[-1] if rows else {}
        last = _lines([[self._row.get(name, "") for name in self._columns]]) if rows else b""
        self._begin = self._file.seek(0, os.SEEK_END) - len(last)
        return self._file

    def _mend(self, file: BinaryIO) -> None:
        """Reads the columns, or writes them, and removes a last row that has no end."""
        content = file.read()
        whole = content[: content.rfind(b"\n") + 1]
        if len(whole) < len(content):
            warnings.warn(
                f"{self._path} ended in the middle of a row, as after a crash; its last {len(content) - len(whole)} "
                "bytes were removed.",
                RuntimeWarning,
                stacklevel=5,
            )
            file.truncate(len(whole))
        header = next(read_rows(io.StringIO(whole.decode())), None)
        if header is None:
            self._columns = list(_FIRST)
            file.seek(0)
            file.write(_lines([self._columns]))
            file.flush()
        elif tuple(header[: len(_FIRST)]) != _FIRST:
            file.close()
            self._file = None
            raise ValueError(
                f"{self._path} is there, and its columns {header} do not begin with {', '.join(_FIRST)}: it is "
                "another table. Give another path."
            )
        else:
            self._columns = header


def _cell(value: float) -> str:
    return repr(value) if isinstance(value, float) else str(int(value))


def _lines(rows: list[list[str]]) -> bytes:
    buffer = io.StringIO()
    row_writer(buffer, lineterminator="\n").writerows(rows)
    return buffer.getvalue().encode()
