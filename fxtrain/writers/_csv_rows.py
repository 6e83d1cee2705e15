"""Scalars as a CSV table for spreadsheets and data frames."""

from __future__ import annotations

import io
import os
from collections.abc import Mapping
from csv import DictReader
from csv import reader as read_rows
from csv import writer as row_writer
from pathlib import Path

from fxtrain.core import LoopEvent, check_path
from fxtrain.disk import Appendable, replace_file, set_aside
from fxtrain.values import Value
from fxtrain.writers._append_only import Rewinds, RunLog

_FIRST: tuple[str, ...] = ("step", "epoch", "time")


def csv(path: str | os.PathLike[str]) -> CsvWriter:
    """A writer of scalars with one column per name.

    A new name adds a column, which is empty in earlier rows: the file is then rewritten and replaced atomically.
    ``epoch`` and ``time`` (seconds of the session) are empty where no event provides them.

    Rows are only appended. A step has several rows if its values are written in several calls, and later values take
    the place of earlier ones, as in ``pandas.read_csv(path).groupby("step").last()``. After a rewind, or a resume from
    an earlier step, ``purge`` adds a row with only a step: rows above it of later steps are abandoned. ``read_csv``
    applies both rules.

    The file has one writer at a time, in all processes: from its first row to ``close``, others are refused.

    A row is passed to the operating system when it is written, and synced to the disk by ``flush``. A failed write
    leaves no partial row. If a crash tore the last row, or a power cut filled it with zeros, opening the file moves
    that row to ``<name>.damaged`` with a warning.

    Args:
        path: The file. An existing file is continued.

    Raises:
        OSError: The file cannot be written, or another writer has it open.
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
    check_path("path", path)
    return CsvWriter(Path(path))


class CsvWriter(RunLog):
    """Writes rows. Created by ``csv``."""

    name = "csv"
    kinds = frozenset((float,))

    def put(self, step: int, values: Mapping[str, Value], event: LoopEvent | None) -> None:
        if "step" in values:
            raise ValueError(f"expected names other than 'step', the step column of {self._path}. Rename the value.")
        file = self._opened()
        row: dict[str, str] = {}
        if event is not None:
            row = {"time": _cell(event.time), **({} if event.epoch is None else {"epoch": _cell(event.epoch)})}
        row |= {name: _cell(value) for name, value in values.items() if isinstance(value, bool | int | float)}
        added = [name for name in row if name not in self._columns]
        if added or not file.size:
            self._add_columns(added)
        self._append(step, _line(_in_columns({"step": str(step), **row}, self._columns)))

    def _mark(self, step: int) -> None:
        self._append(step, _line(_in_columns({"step": str(step)}, self._columns)))

    def _steps(self) -> list[int]:
        return [int(row["step"]) for row in read_csv(self._path)]

    def _add_columns(self, names: list[str]) -> None:
        """Rewrites the whole file in one atomic replacement."""
        with open(self._path, newline="", encoding="utf-8", errors="replace") as file:
            rows = list(DictReader(file))
        columns = [*self._columns, *names]
        # The old file stays open and locked until the new one has its name.
        replace_file(self._path, b"".join(map(_line, [columns, *(_in_columns(row, columns) for row in rows)])))
        self.close()
        self._opened()

    def _open(self) -> Appendable:
        """Opens the file at the end of its complete rows, and reads its columns."""
        file = Appendable(self._path)
        try:
            self._columns = self._repaired_columns()
            file.mend("row")
        except BaseException:
            file.close()
            raise
        return file

    def _repaired_columns(self) -> list[str]:
        """Returns the columns of the file, and removes an unfinished line of columns."""
        content = self._path.read_bytes()
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
        if unfinished and content:
            set_aside(self._path, "ended in the middle of a row")
        return header if rows else list(_FIRST)


def read_csv(path: str | os.PathLike[str]) -> list[dict[str, float]]:
    """Returns the scalars of a run that ``csv`` wrote, as one row for each step, without empty cells.

    Rows that a rewind or a resume abandoned are left out, and so are damaged ones. Of a value written several times,
    the last is returned.

    Args:
        path: The file. A run may still append to it.

    Example:
        >>> import pathlib, tempfile
        >>> path = pathlib.Path(tempfile.mkdtemp(), "metrics.csv")
        >>> writer = csv(path)
        >>> for step in (1, 2, 3):
        ...     writer.write_scalars(step, {"loss": 1 / step})
        >>> writer.purge(1)  # the run returns to step 1
        >>> writer.write_scalars(2, {"loss": 5.0})
        >>> writer.close()
        >>> read_csv(path)
        [{'step': 1, 'loss': 1.0}, {'step': 2, 'loss': 5.0}]
    """
    rows: list[tuple[int, dict[str, float]]] = []
    rewinds = Rewinds()
    with open(path, newline="", encoding="utf-8", errors="replace") as file:
        for position, cells in enumerate(DictReader(file)):
            try:
                row = {name: _number(cell) for name, cell in cells.items() if cell}
                step = int(cells["step"])
            except (ValueError, KeyError, TypeError):
                continue
            if len(row) == 1:
                rewinds.add(position, step)
            else:
                rows.append((position, row | {"step": step}))
    found: dict[float, dict[str, float]] = {}
    for position, row in rows:
        if rewinds.keeps(position, int(row["step"])):
            found.setdefault(row["step"], {}).update(row)
    return list(found.values())


def _number(cell: str) -> float:
    try:
        return int(cell)
    except ValueError:
        return float(cell)


def _end_of_header(content: bytes) -> int:
    """Returns the offset after the first newline outside quotes, where the rows begin, or 0 if there is none."""
    end = content.find(b"\n") + 1
    while end and content.count(b'"', 0, end) % 2:
        end = content.find(b"\n", end) + 1
    return end


def _in_columns(row: Mapping[str, str], columns: list[str]) -> list[str]:
    return [row.get(name, "") for name in columns]


def _cell(value: float) -> str:
    return repr(value) if isinstance(value, float) else str(int(value))


def _line(row: list[str]) -> bytes:
    buffer = io.StringIO()
    # The csv module quotes a carriage return in a name only if rows end with one.
    row_writer(buffer, lineterminator="\r\n").writerow(row)
    return buffer.getvalue().removesuffix("\r\n").encode() + b"\n"
