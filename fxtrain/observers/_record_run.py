"""Records of a run's configuration, environment, sessions and events."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import socket
import sys
import warnings
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fxtrain.core import (
    Control,
    EpochEnd,
    EvalEnd,
    FitBegin,
    FitEnd,
    Interrupted,
    LoopEvent,
    Restored,
    Rewound,
    Saved,
    StepEnd,
    TrainState,
    printable,
)
from fxtrain.disk import append_lines, make_folder, replace_file, set_aside
from fxtrain.observers._record_code import commit_of
from fxtrain.observers._wrapped import rank
from fxtrain.values import jsonable

Seen = FitBegin | Restored | StepEnd | EvalEnd | EpochEnd | Saved | Rewound | Interrupted | FitEnd

_MAX_QUEUED_LINES = 10_000  # while they cannot be written
_MAX_UNREAD = 100  # steps whose request flags may stay unread on the device
_RECORDED_FIELDS: Mapping[type[LoopEvent], tuple[str, ...]] = {
    FitBegin: ("total_steps", "total_epochs", "resumed"),
    Restored: ("path", "missing", "extra", "environment_changes"),
    Saved: ("path", "metrics"),
    Rewound: ("from_step", "to_step", "times"),
    Interrupted: ("cause",),
    FitEnd: ("reason",),
}
"""The recorded events, and which of their fields are recorded."""


def record_run(folder: str | os.PathLike[str], config: Mapping[str, object] | None = None) -> RecordRun:
    """Records the configuration, environment, sessions and events of a run in its folder.

    - ``run.json``: the configuration, and a list of sessions. Each has its environment (versions, device, threads,
      commit), the times and steps of its begin and end, and the reason why it ended. A killed session has no end.
    - ``events.jsonl``: a line for the begin and end of each session, for each checkpoint, rewind and interrupt, and for
      each event at which a callback made requests, with their reasons. Lines stay when the run rewinds.

    With several processes, only rank 0 records.

    Requests whose flags are on an accelerator are read some steps later, to avoid host-device synchronization.

    Both files are synced to the disk before each save. A ``run.json`` damaged by a power cut is moved to
    ``run.json.damaged`` with a warning, and started again. A line of ``events.jsonl`` that a crash tore is moved to
    ``events.jsonl.damaged``. While the disk is full, up to 10,000 lines are queued, and written once there is space.

    Args:
        folder: The folder of the run. It is created if it does not exist.
        config: The configuration of the run, as values that JSON can represent. None keeps that of earlier sessions.

    Raises:
        TypeError: ``config`` contains a value that JSON cannot represent.
        OSError: The folder cannot be created.

    Example:
        >>> import pathlib, tempfile
        >>> folder = pathlib.Path(tempfile.mkdtemp())
        >>> observer = record_run(folder, {"lr": 0.1})
        >>> observer(None, FitBegin(step=0, total_steps=10), Control())
        >>> observer(None, EvalEnd(step=5, metrics={}), Control(stop=True, reason="good enough"))
        >>> observer(None, FitEnd(step=5, reason="good enough"), Control())
        >>> json.loads((folder / "run.json").read_text())["sessions"][0]["reason"]
        'good enough'
        >>> [json.loads(line)["event"] for line in (folder / "events.jsonl").read_text().splitlines()]
        ['FitBegin', 'EvalEnd', 'FitEnd']
    """
    try:
        kept = json.loads(json.dumps(config, allow_nan=False))  # a copy, in case the caller changes it later
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"expected config to contain only values that JSON can represent, got another one ({error}). Use finite "
            "numbers, strings, bools, None, and lists and dicts of these."
        ) from None
    make_folder(Path(folder))
    return RecordRun(Path(folder), kept)


class RecordRun:
    """Records a run. Created by ``record_run``."""

    def __init__(self, folder: Path, config: Mapping[str, object] | None) -> None:
        self._run, self._events = folder / "run.json", folder / "events.jsonl"
        self._config = config
        self._is_silent = rank() != 0
        self._content: dict[str, Any] = {}
        self._is_outdated = False  # whether run.json is out of date
        self._lines: deque[bytes] = deque()  # not yet in events.jsonl
        self._dropped = 0
        self._failure: OSError | None = None  # since the last successful write
        self._contained: OSError | None = None
        self._unread: list[tuple[LoopEvent, Control]] = []

    def __call__(self, state: TrainState | None, event: Seen, control: Control) -> None:
        if isinstance(event, FitBegin):
            self._is_silent = rank() != 0
            if not self._is_silent:
                self._begin(state, event)
        if self._is_silent:
            return
        is_recorded = type(event) in _RECORDED_FIELDS
        if is_recorded or control.kinds:
            self._unread.append((event, control))
        flags = (flag for reasons in control.requests.values() for flag in reasons.values())
        is_readable = is_recorded or not any(isinstance(flag, Tensor) and not flag.is_cpu for flag in flags)
        if self._unread and (is_readable or len(self._unread) >= _MAX_UNREAD):
            self._read()
        if isinstance(event, FitEnd | Interrupted):
            self._end(event)

    def flush(self) -> None:
        """Writes pending lines and syncs them to the disk."""
        self._read()
        self._try(self._write_pending)

    def close(self) -> None:
        """Writes pending lines. Warns about those that cannot be written."""
        self.flush()
        if lost := self._dropped + len(self._lines):
            _warn(f"record_run: {lost} lines of {self._events} could not be written and were lost.")
            self._lines.clear()
            self._dropped = 0

    def take_failure(self) -> Exception | None:
        """Returns the disk error contained since the last call, or None."""
        failure, self._contained = self._contained, None
        return failure

    def _begin(self, state: TrainState | None, event: FitBegin) -> None:
        before = _read_json(self._run)
        sessions = before.get("sessions", [])
        sessions.append({"began": _now(), "from_step": event.step, "environment": _environment(state)})
        config = self._config if self._config is not None else before.get("config")
        self._content = {"config": config, "sessions": sessions}
        self._write()

    def _end(self, event: FitEnd | Interrupted) -> None:
        if not self._content:
            return
        reason = event.reason if isinstance(event, FitEnd) else f"interrupted by {event.cause}"
        end = {"ended": _now(), "to_step": event.step, "reason": reason, "seconds": event.time}
        self._content["sessions"][-1] |= end
        self._write()

    def _write(self) -> None:
        self._is_outdated = True
        self._try(self._write_pending)

    def _write_pending(self) -> None:
        """Writes run.json if it is out of date, and the pending lines."""
        if self._is_outdated:
            replace_file(self._run, json.dumps(self._content, indent=2).encode())
            self._is_outdated = False
        if self._lines:
            append_lines(self._events, b"".join(self._lines))
            self._lines.clear()

    def _try(self, act: Callable[[], None]) -> None:
        try:
            act()
        except OSError as error:
            if self._failure is None:
                self._contained = error
                _warn(
                    f"record_run failed to write to {self._run.parent} and will retry. Up to {_MAX_QUEUED_LINES} lines "
                    f"are queued. Training continues. {type(error).__name__}: {printable(str(error))}"
                )
            self._failure = error
        else:
            self._failure = None

    def _read(self) -> None:
        unread, self._unread = self._unread, []
        for event, control in unread:
            kind = type(event)
            line = {name: getattr(event, name) for name in _RECORDED_FIELDS.get(kind, ())}
            if requests := {request: reasons for request in control.kinds if (reasons := _reasons(control, request))}:
                line["asked"] = requests
            if requests or kind in _RECORDED_FIELDS:
                self._line(
                    {"event": kind.__name__, "step": event.step, "epoch": event.epoch, "time": event.time, **line}
                )
        if self._lines:
            self._try(self._write_pending)

    def _line(self, line: dict[str, object]) -> None:
        self._lines.append(json.dumps(jsonable(line), allow_nan=False).encode() + b"\n")
        if len(self._lines) > _MAX_QUEUED_LINES:
            self._lines.popleft()
            self._dropped += 1


def _read_json(path: Path) -> dict[str, Any]:
    """Returns what earlier sessions wrote, or an empty dict. A damaged file is set aside."""
    if not path.exists():
        return {}
    try:
        found = json.loads(path.read_bytes())
        if isinstance(found, dict) and isinstance(found.get("sessions", []), list):
            return found
    except ValueError:
        pass
    set_aside(path, "is not a valid record of a run, so a new one is started")
    return {}


def _warn(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=4)


def _reasons(control: Control, kind: str) -> list[str]:
    return [reason for reason, flag in control.requests[kind].items() if flag]


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def _environment(state: TrainState | None) -> dict[str, object]:
    device = None if state is None else state.step.device
    return {
        "fxtrain": _version("fxtrain"),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "host": socket.gethostname(),
        "command": [*sys.argv],
        "device": None if device is None else str(device),
        "gpu": torch.cuda.get_device_name(device) if device is not None and device.type == "cuda" else None,
        "threads": torch.get_num_threads(),
        "commit": commit_of(Path()),  # of the working directory
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
