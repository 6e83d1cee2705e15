"""Record run: what a run is, where it ran, what happened in it and how it ended, in its folder."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import socket
import sys
from collections.abc import Mapping
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
)
from fxtrain.observers.repository import commit_of
from fxtrain.values import plain

Seen = FitBegin | Restored | StepEnd | EvalEnd | EpochEnd | Saved | Rewound | Interrupted | FitEnd

_TOGETHER = 100  # steps whose requests may wait on their device
_TOLD: Mapping[type[Any], tuple[str, ...]] = {
    FitBegin: ("total_steps", "total_epochs", "resumed"),
    Restored: ("path", "missing", "extra", "different"),
    Saved: ("path", "metrics"),
    Rewound: ("from_step", "to_step", "times"),
    Interrupted: ("cause",),
    FitEnd: ("reason",),
}
"""The events of a session, and what of them is written down."""


def record_run(folder: str | os.PathLike[str], config: Mapping[str, Any] | None = None) -> RecordRun:
    """Writes into a folder what makes it tell its own story.

    - ``run.json``: the configuration; the environment (versions, device, threads, commit); and a list of sessions, each
      with when it began, from which step, when it ended, at which step and why. A session that was killed has no end.
    - ``events.jsonl``: a line for each session's begin and end, each checkpoint, rewind and interrupt, and for each
      event at which a callback asked for something: which requests, and the reasons of each. Nothing is taken back
      from it.

    Nothing waits for an accelerator: requests that only it knows are read some steps later.

    Args:
        folder: Of the run. Made if it is not there.
        config: What the run is configured with: what JSON has.

    Raises:
        TypeError: If ``config`` has something in it that JSON has not.
        OSError: If the folder cannot be written to.

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
        kept = json.loads(json.dumps(config, allow_nan=False))  # a copy: what is changed later is no configuration
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"config is written as JSON, which it cannot be: {error}. Give numbers, strings, bools, None, and lists "
            "and dicts of these."
        ) from None
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    return RecordRun(path, kept)


class RecordRun:
    """Writes the story of a run; made by ``record_run``."""

    def __init__(self, folder: Path, config: Mapping[str, Any] | None) -> None:
        self._run, self._events = folder / "run.json", folder / "events.jsonl"
        self._config = config
        self._known: dict[str, Any] = {}
        self._unread: list[tuple[LoopEvent, Control]] = []

    def __call__(self, state: TrainState | None, event: Seen, control: Control) -> None:
        if isinstance(event, FitBegin):
            self._begin(state, event)
        told = type(event) in _TOLD
        if told or control.kinds:
            self._unread.append((event, control))
        at_once = told or not any(isinstance(flag, Tensor) and not flag.is_cpu for flag in _flags(control))
        if self._unread and (at_once or len(self._unread) >= _TOGETHER):
            self._read()
        if isinstance(event, FitEnd | Interrupted):
            self._end(event)

    def close(self) -> None:
        """Writes what is left."""
        self._read()

    def _begin(self, state: TrainState | None, event: FitBegin) -> None:
        before = _read_json(self._run) if self._run.exists() else {}
        sessions = before.get("sessions", [])
        # What a session that was killed began stays as it is: it has no end.
        sessions.append({"began": _now(), "from_step": event.step, "environment": _environment(state)})
        config = self._config if self._config is not None else before.get("config")
        self._known = {"config": config, "sessions": sessions}
        self._write()

    def _end(self, event: FitEnd | Interrupted) -> None:
        if not self._known:
            return
        reason = event.reason if isinstance(event, FitEnd) else f"interrupted by {event.cause}"
        self._known["sessions"][-1] |= {"ended": _now(), "to_step": event.step, "reason": reason, "seconds": event.time}
        self._write()

    def _write(self) -> None:
        new = self._run.with_name("run.json.tmp")
        new.write_text(json.dumps(self._known, indent=2))
        os.replace(new, self._run)

    def _read(self) -> None:
        unread, self._unread = self._unread, []
        for event, control in unread:
            kind = type(event)
            line = {name: getattr(event, name) for name in _TOLD.get(kind, ())}
            if asked := {request: reasons for request in control.kinds if (reasons := _reasons(control, request))}:
                line["asked"] = asked
            if asked or kind in _TOLD:
                self._line({"event": kind.__name__, **_at(event), **line})

    def _line(self, line: dict[str, Any]) -> None:
        with open(self._events, "ab+") as file:
            if file.tell():
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":  # a line that a crash tore ends here
                    file.write(b"\n")
            file.write(json.dumps(plain(line), allow_nan=False).encode() + b"\n")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(
            f"{path} is not what record_run wrote: {error}. Move it away, and the story begins anew."
        ) from error


def _flags(control: Control) -> list[Any]:
    return [flag for reasons in control.requests.values() for flag in reasons.values()]


def _reasons(control: Control, kind: str) -> list[str]:
    return [reason for reason, flag in control.requests[kind].items() if flag]


def _at(event: LoopEvent) -> dict[str, Any]:
    return {"step": event.step, "epoch": event.epoch, "time": event.time}


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def _environment(state: TrainState | None) -> dict[str, Any]:
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
        "commit": commit_of(Path()),  # of the repository that the process runs in
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
