"""JSON lines: what each event published, as one line of a file that any tool can read."""

from __future__ import annotations

import json
import math
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch

from fxtrain.core import EvalStep
from fxtrain.values import Histogram, by_kind
from fxtrain.writers.interface import unwritable

_BUCKETS = 30
_KINDS = ("metrics", "texts", "histograms", "hparams")


def jsonl(path: str | os.PathLike[str]) -> JsonLinesWriter:
    """A writer of one JSON object a line. The folder is made if it is not there; what is in the file is kept.

        {"event": "StepEnd", "step": 12, "epoch": 0.5, "time": 3.2, "metrics": {"train/loss": 0.7}}

    Each event of a step has one line: what is written for it later is joined to that line. ``epoch`` is null where an
    epoch's length is unknown, and ``time`` counts the seconds of a session. ``texts``, ``histograms`` (counts and
    edges) and ``hparams`` are there where there are some. Numbers that JSON does not have are strings, ``"NaN"``,
    ``"Infinity"`` and ``"-Infinity"``, which ``float`` reads. What is written by the verbs alone has no event.

    A line is handed to the operating system as it is written, and put on the disk by ``flush``. A last line that a
    crash tore is removed on opening, with a warning. ``purge`` moves what lies beyond a step to
    ``<name>.dropped.jsonl``, by one atomic replacement of the file.

    Args:
        path: The file.

    Raises:
        OSError: If the file cannot be written.

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


class JsonLinesWriter:
    """Writes JSON lines; made by ``jsonl``."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: BinaryIO | None = None
        # The lines of the latest step, which later ones may be joined to, and where in the file they begin.
        self._step: int | None = None
        self._latest: dict[Any, dict[str, Any]] = {}
        self._begin = 0
        self._opened()

    def write_event(self, event: Any, values: Mapping[str, Any]) -> None:
        """Writes all that an event published."""
        kinds = by_kind(values)
        about = {"event": type(event).__name__, "step": event.step}
        if isinstance(event, EvalStep):
            about["index"] = event.index
        histograms = {name: _buckets(histogram) for name, histogram in kinds.histograms.items()}
        self._write(
            {**about, "epoch": event.epoch, "time": event.time},
            metrics=kinds.scalars,
            texts=kinds.texts,
            histograms=histograms,
            hparams=kinds.hparams,
        )

    def write_scalars(self, step: int, scalars: Mapping[str, Any]) -> None:
        self._write({"step": int(step)}, metrics=scalars)

    def write_texts(self, step: int, texts: Mapping[str, str]) -> None:
        self._write({"step": int(step)}, texts=texts)

    def write_histograms(
        self, step: int, arrays: Mapping[str, Any], num_buckets: Mapping[str, int] | None = None
    ) -> None:
        wanted = num_buckets or {}
        self._write({"step": int(step)}, histograms={k: _buckets(v, wanted.get(k)) for k, v in arrays.items()})

    def write_hparams(self, hparams: Mapping[str, Any]) -> None:
        self._write({}, hparams=hparams)

    def purge(self, step: int) -> None:
        """Moves the lines beyond a step, and those that cannot be read, to ``<name>.dropped.jsonl``."""
        self._opened()
        self.close()
        kept: list[bytes] = []
        dropped: list[bytes] = []
        # The lines of the step itself stay open, so that a resumed run joins to them what belongs there.
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
            # In this order, so that a crash in between loses nothing.
            _put(self._path.with_name(f"{self._path.stem}.dropped{self._path.suffix}"), dropped, "ab")
            new = self._path.with_name(f"{self._path.name}.tmp")
            _put(new, kept, "wb")
            os.replace(new, self._path)
            _sync_folder(self._path.parent)
        self._opened()
        self._step, self._latest, self._begin = step, latest, begin

    def flush(self) -> None:
        if self._file is not None:
            self._file.flush()
            os.fsync(self._file.fileno())

    def close(self) -> None:
        if self._file is not None:
            self.flush()
            self._file.close()
            self._file = None

    def _write(self, about: dict[str, Any], **kinds: Mapping[str, Any]) -> None:
        record = {**about, **{kind: values for kind, values in kinds.items() if values}}
        file, key = self._opened(), _key(record)
        if record.get("step") != self._step:
            self._step, self._latest, self._begin = record.get("step"), {}, file.tell()
        if key not in self._latest:
            self._latest[key] = record
            file.write(_line(record))
        else:
            self._latest[key] = _joined(self._latest[key], record)
            file.truncate(self._begin)
            file.seek(self._begin)
            file.writelines(_line(each) for each in self._latest.values())
        file.flush()

    def _opened(self) -> BinaryIO:
        if self._file is None:
            try:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                self._file = open(self._path, "ab")  # noqa: SIM115
                _mend(self._path, self._file)
            except OSError as error:
                raise unwritable("jsonl", self._path, error) from error
            # Another writer may have been here in between.
            self._step, self._latest, self._begin = None, {}, self._file.seek(0, os.SEEK_END)
        return self._file


def _mend(path: Path, file: BinaryIO) -> None:
    """Removes a last line that has no end."""
    size = file.seek(0, os.SEEK_END)
    tail, begin = b"", size
    with open(path, "rb") as reader:
        while begin and b"\n" not in tail:
            begin = max(begin - 65536, 0)
            reader.seek(begin)
            tail = reader.read(size - begin)
    torn = len(tail) - (tail.rfind(b"\n") + 1)
    if torn:
        file.truncate(size - torn)
        warnings.warn(
            f"{path} ended in the middle of a line, as after a crash; its last {torn} bytes were removed.",
            RuntimeWarning,
            stacklevel=4,
        )


def _read(line: bytes) -> dict[str, Any] | None:
    """What a line says, or None where that cannot be read."""
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
    return json.dumps(_plain(record), allow_nan=False, ensure_ascii=False).encode() + b"\n"


def _plain(value: Any) -> Any:
    """The value in what JSON has."""
    match value:
        case str() | int() | None:
            return value
        case float():
            return value if math.isfinite(value) else "NaN" if math.isnan(value) else f"{'-' * (value < 0)}Infinity"
        case Mapping():
            return {name: _plain(inner) for name, inner in value.items()}
        case list():
            return [_plain(inner) for inner in value]
        case _:  # a 0-d array or tensor
            return _plain(float(value))


def _buckets(array: Any, num: int | None = None) -> dict[str, list[float]]:
    histogram = array if isinstance(array, Histogram) else Histogram(torch.as_tensor(array))
    counts, edges = histogram.buckets(num or _BUCKETS)
    return {"counts": counts.tolist(), "edges": edges.tolist()}


def _put(path: Path, lines: list[bytes], mode: str) -> None:
    """Writes lines, which are on the disk when it returns."""
    with open(path, mode) as file:
        file.writelines(lines)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
