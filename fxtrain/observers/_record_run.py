"""Records of a run's configuration, environment, sessions and events."""

from __future__ import annotations

import functools
import importlib.metadata
import inspect
import json
import operator
import os
import platform
import socket
import sys
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fxtrain.core import (
    SESSION,
    TRAJECTORY,
    Control,
    EpochEnd,
    EvalEnd,
    EvalStep,
    FitBegin,
    FitEnd,
    Interrupted,
    LoopEvent,
    Restored,
    Rewound,
    Saved,
    StepBegin,
    StepEnd,
    TrainState,
    WallClock,
    matching,
    plain_config,
    printable,
    timestamp,
    utc_now,
    warn,
)
from fxtrain.core._rank import rank
from fxtrain.disk import append_lines, make_folder, replace_file, set_aside, sync_file
from fxtrain.observers._record_code import commit_of
from fxtrain.values import jsonable

Seen = FitBegin | Restored | StepEnd | EvalEnd | EpochEnd | Saved | Rewound | Interrupted | FitEnd

_MAX_QUEUED_LINES = 10_000  # while they cannot be written
_MAX_UNWRITTEN_LINES = 100  # while they can be written
_MAX_UNREAD = 100  # steps whose request flags may stay unread on the device
_MAX_HELD_SECONDS = 1.0  # by the loop's clock; a write at each step would slow down the run
_RECORDED_FIELDS: Mapping[type[Any], tuple[str, ...]] = {
    FitBegin: ("total_steps", "total_epochs", "resumed"),
    Restored: ("path", "missing", "extra", "environment_changes"),
    Saved: ("path", "metrics"),
    Rewound: ("from_step", "to_step", "times"),
    Interrupted: ("cause",),
    FitEnd: ("reason",),
}
"""The events that are always recorded, and which of their fields are recorded."""
_CHOSEN_FIELDS: Mapping[type[Any], tuple[str, ...]] = {StepBegin: ("position",), EvalStep: ("index",)}


def record_run(
    folder: str | os.PathLike[str],
    config: Mapping[str, object] | None = None,
    *,
    events: str | Sequence[str] = ("EpochBegin", "EpochEnd", "EvalBegin", "EvalEnd"),
    clock: WallClock = utc_now,
) -> RecordRun:
    """Records the configuration, environment, sessions and events of a run in its folder.

    - ``run.json``: the facts of ``fit(run=...)``, the configuration, and a list of sessions. Each has its environment
      (versions, device, threads, commit), the times and steps of its begin and end, and the reason why it ended. A
      killed session has no end.
    - ``events.jsonl``: a line for the begin and end of each session, for each checkpoint, rewind and interrupt, for the
      events of ``events``, and for each other event at which a callback made requests, with their reasons. Each has the
      event, step, epoch, seconds of the session, and date and time in ISO 8601. Lines stay when the run rewinds.

    With several processes, only rank 0 records.

    Requests whose flags are on an accelerator are read some steps later, to avoid host-device synchronization.

    Lines are written about a second later at most, without waiting for the disk. Both files are synced to the disk
    before each save and at the end of a session. A ``run.json``
    damaged by a power cut is moved to ``run.json.damaged`` with a warning, and started again. A last line of
    ``events.jsonl`` that a crash tore is moved to ``events.jsonl.damaged``. While the disk is full, up to 10,000 lines
    are queued, and written once there is space.

    Args:
        folder: The folder of the run. It is created if it does not exist.
        config: The configuration of the run, as in ``RunInfo``. Defaults to that of ``fit(run=...)``, or else to
            that of earlier sessions.
        events: Shell patterns of the names of events to record even if nothing was requested at them. ``"*"`` records
            every event of the loop, which is two lines for each step. Events inside the compiled step are not recorded.
        clock: Returns the current date and time, with a time zone.

    Raises:
        TypeError: ``config`` contains a value of another type than ``RunInfo`` accepts.
        ValueError: A pattern of ``events`` matches no event, or ``clock`` returns no datetime with a time zone.
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
    kept = None if config is None else plain_config(config)
    names = [kind.__name__ for kind in _LOOP_EVENTS]
    chosen = frozenset(_LOOP_EVENTS[index] for index in matching(names, events, "event"))
    timestamp(clock)  # raises the error of a wrong clock
    make_folder(Path(folder))
    return RecordRun(Path(folder), kept, chosen, clock)


_LOOP_EVENTS: tuple[type[LoopEvent], ...] = (*TRAJECTORY, *SESSION)


class RecordRun:
    """Records a run. Created by ``record_run``."""

    def __init__(
        self, folder: Path, config: Mapping[str, object] | None, chosen: frozenset[type[LoopEvent]], clock: WallClock
    ) -> None:
        subscribed = functools.reduce(operator.or_, chosen, Seen)
        given = [inspect.Parameter(name, inspect.Parameter.POSITIONAL_ONLY) for name in ("state", "event", "control")]
        given[1] = given[1].replace(annotation=subscribed)
        vars(self)["__signature__"] = inspect.Signature(given)  # the subscription
        self._run, self._events = folder / "run.json", folder / "events.jsonl"
        self._config = config
        self._is_silent = rank() != 0
        self._content: dict[str, Any] = {}
        self._is_outdated = False  # whether run.json is out of date
        self._lines: deque[bytes] = deque()  # not yet in events.jsonl
        self._dropped = 0
        self._failure: OSError | None = None  # since the last successful write
        self._contained: OSError | None = None
        self._chosen, self._clock = chosen, clock
        self._names = {kind.__name__ for kind in (*chosen, *_RECORDED_FIELDS)}
        self._unread: list[tuple[dict[str, object], Control]] = []  # lines, to complete with the requests
        self._write_time = 0.0
        self._is_unsynced = False  # whether events.jsonl has lines that are not synced to the disk

    def __call__(self, state: TrainState | None, event: LoopEvent, control: Control) -> None:
        if isinstance(event, FitBegin):
            self._is_silent = rank() != 0
            if not self._is_silent:
                self._begin(state, event)
        if self._is_silent:
            return
        kind = type(event)
        if kind in _RECORDED_FIELDS or kind in self._chosen or control.kinds:
            self._unread.append((self._line(event), control))
        flags = (flag for reasons in control.requests.values() for flag in reasons.values())
        is_readable = control.kinds and not any(isinstance(flag, Tensor) and not flag.is_cpu for flag in flags)
        is_due = kind in _RECORDED_FIELDS or event.time - self._write_time >= _MAX_HELD_SECONDS
        # Flags on the host are read at once, because the next step may reuse their buffers.
        if self._unread and (is_due or is_readable or len(self._unread) >= _MAX_UNREAD):
            self._read()
        if self._lines and (is_due or (len(self._lines) >= _MAX_UNWRITTEN_LINES and self._failure is None)):
            self._write_time = event.time
            self._try(self._write_pending)
        if isinstance(event, FitEnd | Interrupted):
            self._end(event)

    def flush(self) -> None:
        """Writes pending lines and syncs them to the disk."""
        self._read()
        self._try(self._sync)

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
        sessions.append({"began": timestamp(self._clock), "from_step": event.step, "environment": _environment(state)})
        config, run = self._config, event.run
        if config is None:
            config = run.config if run is not None and run.config else before.get("config")
        about = before.get("run") if run is None else run.given()
        self._content = {"run": about, "config": config, "sessions": sessions}
        self._write()

    def _end(self, event: FitEnd | Interrupted) -> None:
        if not self._content:
            return
        reason = event.reason if isinstance(event, FitEnd) else f"interrupted by {event.cause}"
        end = {"ended": timestamp(self._clock), "to_step": event.step, "reason": reason, "seconds": event.time}
        self._content["sessions"][-1] |= end
        self._write()

    def _write(self) -> None:
        self._is_outdated = True
        self._try(self._sync)

    def _sync(self) -> None:
        self._write_pending()
        if self._is_unsynced:
            sync_file(self._events)
            self._is_unsynced = False

    def _write_pending(self) -> None:
        """Writes run.json if it is out of date, and the pending lines."""
        if self._is_outdated:
            replace_file(self._run, json.dumps(jsonable(self._content), indent=2).encode())
            self._is_outdated = False
        if self._lines:
            append_lines(self._events, b"".join(self._lines), sync=False)
            self._is_unsynced = True
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
        for line, control in unread:
            if requests := {request: reasons for request in control.kinds if (reasons := _reasons(control, request))}:
                line["asked"] = requests
            if requests or line["event"] in self._names:
                self._lines.append(json.dumps(jsonable(line), allow_nan=False).encode() + b"\n")
                if len(self._lines) > _MAX_QUEUED_LINES:
                    self._lines.popleft()
                    self._dropped += 1

    def _line(self, event: LoopEvent) -> dict[str, object]:
        kind = type(event)
        about = {"event": kind.__name__, "step": event.step, "epoch": event.epoch, "time": event.time}
        fields = _RECORDED_FIELDS.get(kind) or _CHOSEN_FIELDS.get(kind, ())
        return about | {"timestamp": timestamp(self._clock)} | {name: getattr(event, name) for name in fields}


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
    warn(message, RuntimeWarning)


def _reasons(control: Control, kind: str) -> list[str]:
    return [reason for reason, flag in control.requests[kind].items() if flag]


def _environment(state: TrainState | None) -> dict[str, object]:
    device = None if state is None else state.step.device
    return {
        "fxtrain": _version("fxtrain"),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "host": socket.gethostname(),
        "process": os.getpid(),
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
