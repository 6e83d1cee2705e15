"""The values of each event as one JSON line, in a file that any tool can read."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fxtrain.core import EvalStep, LoopEvent, RunInfo, WallClock, check_path, timestamp, utc_now
from fxtrain.disk import Appendable
from fxtrain.values import ConfusionMatrix, Histogram, HParams, Table, Text, Value, jsonable
from fxtrain.writers._append_only import REWOUND, Rewinds, RunLog

_KINDS = ("metrics", "texts", "histograms", "tables", "confusion", "hparams", "run")


def jsonl(path: str | os.PathLike[str], *, clock: WallClock | None = utc_now) -> JsonLinesWriter:
    """A writer of one JSON object per line. Creates missing folders, and keeps existing lines.

        {"event": "StepEnd", "step": 12, "epoch": 0.5, "time": 3.2, "timestamp": "2024-01-01T12:00:00.000+00:00",
         "metrics": {"train/loss": 0.7}}

    Each call has one line. ``epoch`` is null if the length of an epoch is unknown. ``time`` is in seconds of the
    session, at the event. ``timestamp`` is the date and time in ISO 8601 at which the line was written, about a second
    after the event at most. ``texts``, ``histograms`` (counts and edges), ``tables`` (columns), ``confusion`` (labels
    and counts), ``hparams`` and ``run`` (its name and other facts) are present if there are any. Non-finite floats are
    the strings ``"NaN"``, ``"Infinity"`` and ``"-Infinity"``, which ``float`` can parse. Values written without an
    event have no ``event``, ``epoch`` and ``time``.

    Lines are only appended. A value that is written again for its event and step takes the place of the earlier one
    when the file is read. After a rewind, or a resume from an earlier step, ``purge`` adds the line
    ``{"rewound_to": 10}``: values above it of steps after 10 are abandoned. ``read_jsonl`` applies both rules.

    The file has one writer at a time, in all processes: from its first line to ``close``, others are refused.

    A line is passed to the operating system when it is written, and synced to the disk by ``flush``. A failed write
    leaves no partial line. If a crash tore the last line, or a power cut filled it with zeros, opening the file moves
    that line to ``<name>.damaged`` with a warning.

    Args:
        path: The file.
        clock: Returns the date and time of a line, with a time zone. None leaves it out, so that equal calls write
            equal lines.

    Raises:
        OSError: The file cannot be written, or another writer has it open.
        ValueError: ``clock`` returns no datetime with a time zone.

    Example:
        >>> import pathlib, tempfile
        >>> path = pathlib.Path(tempfile.mkdtemp(), "metrics.jsonl")
        >>> writer = jsonl(path, clock=None)
        >>> writer.write_scalars(1, {"loss": float("inf")})
        >>> path.read_text()
        '{"step": 1, "metrics": {"loss": "Infinity"}}\\n'
        >>> writer.close()
    """
    check_path("path", path)
    return JsonLinesWriter(Path(path), clock)


class JsonLinesWriter(RunLog):
    """Writes JSON lines. Created by ``jsonl``."""

    name = "jsonl"
    kinds = frozenset((float, Text, Histogram, Table, ConfusionMatrix, HParams, RunInfo))

    def __init__(self, path: Path, clock: WallClock | None) -> None:
        self._clock = clock
        self._stamp()  # raises the error of a wrong clock before any value is written
        super().__init__(path)

    def put(self, step: int, values: Mapping[str, Value], event: LoopEvent | None) -> None:
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
                    kinds.setdefault("tables", {})[name] = value.texts()
                case ConfusionMatrix():
                    counts = value.counts.tolist()
                    kinds.setdefault("confusion", {})[name] = {"labels": list(value.labels), "counts": counts}
                case HParams():
                    kinds.setdefault("hparams", {}).update(value.flat())
                case RunInfo():
                    kinds.setdefault("run", {}).update(value.given())
                case _:
                    kinds.setdefault("metrics", {})[name] = value
        if event is None and kinds.keys() == {"hparams"}:
            about = {}  # a configuration belongs to no step
        self._append(step, _line(about | self._stamp() | {kind: kinds[kind] for kind in _KINDS if kind in kinds}))

    def _mark(self, step: int) -> None:
        self._append(step, _line({REWOUND: step} | self._stamp()))

    def _stamp(self) -> dict[str, object]:
        return {} if self._clock is None else {"timestamp": timestamp(self._clock)}

    def _steps(self) -> list[int]:
        return [record.get("step", 0) for record in read_jsonl(self._path)]

    def _open(self) -> Appendable:
        file = Appendable(self._path)
        file.mend("line")
        return file


def _line(record: Mapping[str, object]) -> bytes:
    return json.dumps(jsonable(record), allow_nan=False, ensure_ascii=False).encode() + b"\n"


def read_jsonl(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Returns the values of a run that ``jsonl`` wrote, as one record for each event of a step.

    Values that a rewind or a resume abandoned are left out, and so are damaged lines. Of a value written several times,
    the last is returned.

    Args:
        path: The file. A run may still append to it.

    Example:
        >>> import pathlib, tempfile
        >>> path = pathlib.Path(tempfile.mkdtemp(), "metrics.jsonl")
        >>> writer = jsonl(path)
        >>> for step in (1, 2, 3):
        ...     writer.write_scalars(step, {"loss": 1 / step})
        >>> writer.purge(1)  # the run returns to step 1
        >>> writer.write_scalars(2, {"loss": float("inf")})
        >>> writer.close()
        >>> [(record["step"], record["metrics"]) for record in read_jsonl(path)]
        [(1, {'loss': 1.0}), (2, {'loss': inf})]
    """
    with open(path, "rb") as file:
        lines = [(position, record) for position, line in enumerate(file) if (record := _read(line)) is not None]
    rewinds = Rewinds()
    for position, record in lines:
        if REWOUND in record:
            rewinds.add(position, record[REWOUND])
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    for position, record in lines:
        if REWOUND in record or not rewinds.keeps(position, record.get("step", 0)):
            continue
        if "metrics" in record:
            record["metrics"] = {
                name: float(value) if isinstance(value, str) else value for name, value in record["metrics"].items()
            }
        key = record.get("event"), record.get("step"), record.get("index")
        before = found.get(key, {})
        joined = {kind: before.get(kind, {}) | record[kind] for kind in _KINDS if kind in record}
        found[key] = before | record | joined
    return list(found.values())


def _read(line: bytes) -> dict[str, Any] | None:
    """Returns the record of a line, or None if the line is damaged."""
    try:
        record = json.loads(line)
    except ValueError:
        return None
    is_record = isinstance(record, dict) and all(isinstance(record.get(key, 0), int) for key in ("step", REWOUND))
    return record if is_record else None
