"""The command ``fxtrain runs``, which lists the runs in a folder."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import math
import pathlib
import socket
from collections.abc import Sequence
from typing import Annotated, Literal

import psutil
import tyro

from fxtrain.cli._arguments import Configurable, parse
from fxtrain.cli._errors import CommandError
from fxtrain.core import did_you_mean, format_number, printable, truncate
from fxtrain.report import Run, RunFolderError, read_run
from fxtrain.report._folder import reason
from fxtrain.report._run import Session

_COLUMNS = ("run", "state", "step", "best", "began", "reason")
_MAX_REASON = 100  # characters
_INTERRUPTED = "interrupted by "


@dataclasses.dataclass(frozen=True)
class Options(Configurable):
    """Lists the runs in a folder, oldest first: state, last step, best metric, begin, and why the last session ended.

    A run is running, finished, or interrupted, by a signal, an error or a kill. It is unknown whether a run on another
    machine is running.

    Example: fxtrain runs runs --metric eval/accuracy --mode max

    Exit codes: 0 if there are runs, 2 if there are none.
    """

    folder: Annotated[pathlib.Path, tyro.conf.Positional] = pathlib.Path("runs")
    """The folder of the folders of runs, or of one run."""
    metric: str | None = None
    """The metric of the column "best". Defaults to eval/loss, or to train/loss for a run without evaluations."""
    mode: Literal["min", "max"] = "min"
    """Whether the smallest or the largest value is the best."""


def main(arguments: Sequence[str]) -> int:
    """Runs the command and returns its exit code."""
    options = parse(Options, "runs", arguments)
    runs = sorted(_read(options.folder), key=lambda run: run.sessions[0]["began"] if run.sessions else "")
    known = {name for run in runs for name in run.curves}
    if options.metric is not None and options.metric not in known:
        raise CommandError(
            f"expected --metric to be a metric of a run, got {options.metric!r}."
            f"{did_you_mean(options.metric, sorted(known)) or ' The runs have ' + ', '.join(sorted(known)) + '.'}"
        )
    rows = [_COLUMNS, *(_row(run, options) for run in runs)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(_COLUMNS))]
    for row in rows:
        print("  ".join(map(str.ljust, row, widths)).rstrip())
    return 0


def _read(folder: pathlib.Path) -> list[Run]:
    expected = f"expected a folder of runs, got {folder}"
    try:
        inside = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    except (OSError, ValueError) as error:
        raise CommandError(f"{expected} ({reason(error)}). Check the path.") from None
    found: list[Run] = []
    for path in (folder, *inside):
        with contextlib.suppress(RunFolderError):  # another folder
            found.append(read_run(path))
    if not found:
        raise CommandError(f"{expected}, which has none. Check the path.")
    return found


def _row(run: Run, options: Options) -> tuple[str, ...]:
    last = run.sessions[-1] if run.sessions else None
    state, why = _state(last)
    began = run.sessions[0]["began"] if run.sessions else ""
    shown = (run.name, state, str(_step(run, last)), _best(run, options), _minute(began), truncate(why, _MAX_REASON))
    return tuple(printable(" ".join(text.split())) for text in shown)


def _state(session: Session | None) -> tuple[str, str]:
    if session is None:
        return "unknown", "it has no record (fxtrain.observers.record_run)"
    if session["ended"]:
        was_interrupted = session["reason"].startswith(_INTERRUPTED)
        return "interrupted" if was_interrupted else "finished", session["reason"]
    host = session["environment"].get("host")
    if host != socket.gethostname():
        return "unknown", f"no end was recorded on {truncate(str(host), _MAX_REASON)}"
    return ("running", "") if _is_alive(session) else ("interrupted", "killed: its end was not recorded")


def _is_alive(session: Session) -> bool:
    """Whether the process of a session exists. A process that is younger than the session has reused its number."""
    process = session["environment"].get("process")
    try:
        began = datetime.datetime.fromisoformat(session["began"]).timestamp()
        return isinstance(process, int) and psutil.Process(process).create_time() <= began + 1
    except (psutil.Error, ValueError, OverflowError):
        return False


def _step(run: Run, last: Session | None) -> int:
    steps = [curve[0][-1] for curve in run.curves.values() if curve[0]]
    ended = last["to_step"] if last is not None else ""
    return int(ended) if ended.isdecimal() else max(steps, default=0)


def _best(run: Run, options: Options) -> str:
    name = options.metric or next((each for each in ("eval/loss", "train/loss") if each in run.curves), None)
    values = [value for value in run.curves.get(name, ((), ()))[1] if not math.isnan(value)] if name else []
    if not values:
        return ""
    return f"{name} {format_number(min(values) if options.mode == 'min' else max(values))}"


def _minute(began: str) -> str:
    return began[:16].replace("T", " ")
