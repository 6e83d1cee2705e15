"""The values of each event as one JSON line, in a file that any tool can read."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fxtrain.core import EvalStep
from fxtrain.disk import make_folder, put_file, replace_file, set_aside
from fxtrain.values import ConfusionMatrix, Histogram, HParams, Table, Text, plain
from fxtrain.writers._interface import unwritable
from fxtrain.writers._one_file import Appendable, OneFile

_KINDS = ("metrics", "texts", "histograms", "tables", "confusion", "hparams")


def jsonl(path: str | os.PathLike[str]) -> JsonLinesWriter:
    """A writer of one JSON object per line. Creates missing folders, and keeps existing lines.

        {"event": "StepEnd", "step": 12, "epoch": 0.5, "time": 3.2, "metrics": {"train/loss": 0.7}}

    Each event of a step has one line, and further values of the event are joined to that line. ``epoch`` is null if the
    length of an epoch is unknown. ``time`` is in seconds of the session. ``texts``, ``histograms`` (counts and edges),
    ``tables`` (columns), ``confusion`` (labels and counts) and ``hparams`` are present if there are any. Non-finite
    floats are the strings ``"NaN"``, ``"Infinity"`` and ``"-Infinity"``, which ``float`` can parse. Values written
    without an event have no ``event``, ``epoch`` and ``time``.

    A line is passed to the operating system when it is written, and synced to the disk by ``flush``. A failed write
    leaves no partial line. If a crash tore the last line, or a power cut filled it with zeros, opening the file moves
    that line to ``<name>.damaged`` with a warning. ``purge`` moves the lines after a step to ``<name>.dropped.jsonl``,
    and replaces the file atomically.

    Args:
        path: The file.

    Raises:
        OSError: The file cannot be written.

    Example:
        >>> import pathlib, tempfile
        >>> path = pathlib.Path(tempfile.mkdtemp(), "metrics.jsonl")
        >>> writer = jsonl(path)
        >>> writer.write_scalars(1, {"loss": float("inf")})
        >>> path.read_text()
        '{"step": 1, "metrics": {"loss": "Infinity"}}\\n'
        >>> writer.close()
    """
    return JsonLinesWriter(Path(path))


class JsonLinesWriter(OneFile):
    """Writes JSON lines. Created by ``jsonl``."""

    kinds = frozenset((float, Text, Histogram, Table, ConfusionMatrix, HParams))

    def __init__(self, path: Path) -> None:
        self._path = path
        # The lines of the latest step, which further values may be joined to, and their byte offset in the file.
        self._step: int | None = None
        self._latest: dict[Any, dict[str, Any]] = {}
        self._begin = 0
        self._opened()

    def put(self, step: int, values: Mapping[str, Any], event: Any) -> None:
        about: dict[str, Any] = {"step": step}
        if event is not None:
            about = {"event": type(event).__name__, "step": step, "epoch": event.epoch, "time": event.time}
        if isinstance(event, EvalStep):
            about["index"] = event.index
        kinds: dict[str, dict[str, Any]] = {}
        for name, value in values.items():
            match value:
                case Text():
                    kinds.setdefault("texts", {})[name] = value.markdown
                case Histogram():
                    counts, edges = value.buckets()
                    kinds.setdefault("histograms", {})[name] = {"counts": counts.tolist(), "edges": edges.tolist()}
                case Table():
                    kinds.setdefault("tables", {})[name] = _columns(value)
                case ConfusionMatrix():
                    counts = value.counts.tolist()
                    kinds.setdefault("confusion", {})[name] = {"labels": list(value.labels), "counts": counts}
                case HParams():
                    kinds.setdefault("hparams", {}).update(value.flat())
                case _:
                    kinds.setdefault("metrics", {})[name] = value
        if event is None and kinds.keys() == {"hparams"}:
            about = {}  # a configuration belongs to no step
        self._write({**about, **{kind: kinds[kind] for kind in _KINDS if kind in kinds}})

    def purge(self, step: int) -> None:
        """Moves the lines after a step, and unreadable lines, to ``<name>.dropped.jsonl``."""
        self._opened()
        self.close()
        kept: list[bytes] = []
        dropped: list[bytes] = []
        # A resumed run may still join values to the lines of the step itself.
        latest: dict[Any, dict[str, Any]] = {}
        begin = size = 0
        with open(self._path, "rb") as file:
            for line in file:
                record = _read(line)
                if record is None or record.get("step", step) > step:
                    dropped.append(line)
                    continue
                kept.append(line)
                size += len(line)
                if record.get("step") == step:
                    latest[_key(record)] = record
                else:
                    latest, begin = {}, size
        if dropped:
            # In this order, a crash between the two loses nothing.
            put_file(self._path.with_name(f"{self._path.stem}.dropped{self._path.suffix}"), dropped, "ab")
            replace_file(self._path, b"".join(kept))
        self._opened()
        self._step, self._latest, self._begin = step, latest, begin

    def _write(self, record: dict[str, Any]) -> None:
        file, step, key = self._opened(), record.get("step"), _key(record)
        latest, begin = (self._latest, self._begin) if step == self._step else ({}, file.size)
        if key not in latest:
            latest = {**latest, key: record}
            file.append(_line(record))
        else:
            latest = {**latest, key: _joined(latest[key], record)}
            file.put(begin, b"".join(_line(each) for each in latest.values()))
        self._step, self._latest, self._begin = step, latest, begin

    def _opened(self) -> Appendable:
        if self._file is None:
            try:
                make_folder(self._path.parent)
                _mend(self._path)
                self._file = Appendable(self._path)
            except OSError as error:
                raise unwritable("jsonl", self._path, error) from error
            # Another writer may have changed the file since.
            self._step, self._latest, self._begin = None, {}, self._file.size
        return self._file


def _mend(path: Path) -> None:
    """Sets aside a last line that has no line end."""
    if not path.exists():
        return
    tail = b""
    with open(path, "rb") as file:
        size = begin = file.seek(0, os.SEEK_END)
        while begin and b"\n" not in tail:
            begin = max(begin - 65536, 0)
            file.seek(begin)
            tail = file.read(size - begin)
    torn = len(tail) - (tail.rfind(b"\n") + 1)
    if torn:
        set_aside(path, "ended in the middle of a line", size - torn)


def _read(line: bytes) -> dict[str, Any] | None:
    """Returns the record of a line, or None if the line is unreadable."""
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) else None


def _key(record: Mapping[str, Any]) -> Any:
    return record.get("event"), record.get("index")


def _joined(before: dict[str, Any], later: dict[str, Any]) -> dict[str, Any]:
    united = {k: {**before.get(k, {}), **later.get(k, {})} for k in _KINDS if k in before or k in later}
    return {**before, **later, **united}


def _line(record: dict[str, Any]) -> bytes:
    return json.dumps(plain(record), allow_nan=False, ensure_ascii=False).encode() + b"\n"


def _columns(table: Table) -> dict[str, list[Any]]:
    """Returns the columns, with a placeholder for each image."""
    cells = table.cells()
    return {name: cell if isinstance(cell, list) else ["(image)"] * len(cell) for name, cell in cells.items()}
