"""Reads the folder of a run."""

from __future__ import annotations

import os
from array import array
from collections.abc import Callable, Mapping
from pathlib import PurePosixPath
from typing import TypeVar

from fxtrain.core import truncate
from fxtrain.report import _validation as validation
from fxtrain.report._downsampling import BoundedSeries, Curve, Items, Points, evenly
from fxtrain.report._folder import LONGEST, Folder, reason
from fxtrain.report._logged import Files, Logged, shortened_text
from fxtrain.report._run import Mark, Run, RunFolderError, Sampled, Session

_SHOWN_TEXTS = 20  # per name, evenly spaced
_SHOWN_HISTOGRAMS = 100
_MAX_SUMMARY = 2**20  # bytes
_MAX_SESSIONS = 1000
_MAX_MARKS = 20_000  # per kind
_MAX_REASONS = 20  # per request
_REQUESTS = (("skip_update", "skipped"), ("skip_batch", "skipped"), ("stop", "stopped"))
_SESSION_TEXTS = ("began", "from_step", "ended", "to_step", "reason")
_FILES = ("metrics.jsonl", "metrics.csv", "run.json", "events.jsonl", "media")

_Checked = TypeVar("_Checked")


def read_run(folder: str | os.PathLike[str]) -> Run:
    """Reads the folder of a run, as written by writers and observers.

    Reads ``metrics.jsonl``, or ``metrics.csv`` if the former has no metrics. Also reads ``run.json`` and
    ``events.jsonl`` (``observers.record_run``), ``media`` (``writers.media``), ``summary.txt`` and ``result.json``.

    Damaged content never raises or blocks. Files that are damaged, not regular, or outside the folder are skipped and
    listed in ``run.folder.problems``. Values of long runs are downsampled to about a gigabyte: curves keep their
    extremes, and texts and histograms are evenly spaced.

    Args:
        folder: The run folder.

    Raises:
        RunFolderError: If the folder does not exist, or contains no run or no readable values.

    Example:
        >>> import pathlib, tempfile, fxtrain.report as report
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = pathlib.Path(folder, "metrics.jsonl").write_text('{"step": 1, "metrics": {"train/loss": 0.5}}\\n')
        ...     report.read_run(folder).curves
        {'train/loss': ([1], [0.5])}
    """
    try:
        found = Folder(folder)
    except (OSError, ValueError) as error:
        raise RunFolderError(
            f"expected a run folder, got {os.fspath(folder)!s} ({reason(error)}). Check the path."
        ) from None
    metrics, events = Logged(found), Events(found)
    if "metrics.jsonl" in found.names:
        metrics.read_lines("metrics.jsonl")
    if "metrics.csv" in found.names and not metrics.curves.series:
        metrics.read_rows("metrics.csv")
    if "events.jsonl" in found.names:
        events.read("events.jsonl")
    media, texts = metrics.read_media("media") if "media" in found.names else ({}, {})
    facts, result = (_object(found, name) for name in ("run.json", "result.json"))
    improved = metrics.improved.series.values()
    num_improved = sum(items.count for items in improved)
    run = Run(
        name=os.path.basename(found.root) or found.root,
        curves=_curves(metrics.curves),
        marks=sorted(
            [*(mark for items in improved for _, mark in items.items), *events.marks()], key=lambda mark: mark.step
        ),
        texts=_texts(found, metrics, texts),
        histograms={
            name: Sampled(evenly(items.items, _SHOWN_HISTOGRAMS), items.count)
            for name, items in metrics.histograms.series.items()
        },
        tables=metrics.tables,
        confusion=metrics.confusion,
        media=media,
        captions=metrics.captions,
        config=_field(found, facts, "config", validation.mapping) or metrics.hparams,
        sessions=_sessions(found, facts),
        summary=(_read_text(found, "summary.txt", _MAX_SUMMARY) or "") if "summary.txt" in found.names else "",
        result=result,
        counts=events.counts() | ({"improved": num_improved} if num_improved else {}),
        folder=found,
        about=_field(found, facts, "run", validation.mapping) or {},
        clocks=_curves(metrics.clocks),
    )
    if not (run.curves or run.texts or run.histograms or run.tables or run.confusion or run.media or run.sessions):
        raise RunFolderError(_why_nothing(found))
    return run


def _curves(found: BoundedSeries[Points]) -> dict[str, Curve]:
    return {name: (points.steps, points.values) for name, points in found.series.items()}


def _why_nothing(folder: Folder) -> str:
    problems = folder.problems.lines()
    if problems:
        said = "; ".join(problems[:3])
        return f"expected a run in {folder.root}, got only unreadable files ({said}). Restore these files."
    if folder.names.isdisjoint(_FILES):
        return (
            f"expected a run in {folder.root}, got none of {', '.join(_FILES)}. Write metrics with "
            "fxtrain.observers.write(fxtrain.writers.jsonl(folder / 'metrics.jsonl'))."
        )
    return f"expected logged values in {folder.root}, got none. Wait until the run has logged its first values."


class Events:
    """The marks of a run, by kind. Checkpoints abandoned by a rewind or a resumed session are omitted.

    Args:
        folder: The run folder.
    """

    def __init__(self, folder: Folder) -> None:
        self._folder = folder
        self._saved = array("q")
        self._marks: dict[str, Items[Mark]] = {}

    def read(self, path: str) -> None:
        """Reads events from the JSON Lines file ``path``."""
        for count, content in self._folder.lines(path):
            with self._folder.problems.recording(path, f"line {count}: "):
                self._add(validation.mapping(validation.parsed(content)))

    def marks(self) -> list[Mark]:
        """Returns the retained marks: first all kinds except checkpoints, each in order of time, then checkpoints."""
        saved = [Mark(step, "saved", "checkpoint") for step in self._saved]
        return [mark for items in self._marks.values() for _, mark in items.items] + saved

    def counts(self) -> dict[str, int]:
        """Returns the number of marks of each kind, including those that were dropped to save memory."""
        counts = {kind: items.count for kind, items in self._marks.items()}
        return counts | ({"saved": len(self._saved)} if self._saved else {})

    def _add(self, line: dict[str, object]) -> None:
        step, kind = validation.step(line.get("step")), line.get("event")
        if kind == "Saved":
            self._saved.append(step)
        elif kind == "Rewound":
            first, to = validation.step(line.get("from_step")), validation.step(line.get("to_step"))
            self._keep_saved(to)
            self._mark(first, "rewound", f"back to step {to}")
        elif kind == "Interrupted":
            self._mark(step, "interrupted", f"interrupted by {validation.words(line.get('cause'))}")
        elif kind == "FitBegin" and line.get("resumed"):
            # The resumed session repeats the steps that a killed session took after its last checkpoint.
            self._keep_saved(step)
            self._mark(step, "resumed", "a session resumed here")
        asked = validation.mapping(line.get("asked", {}))
        for request, mark in _REQUESTS:
            if request in asked:
                reasons = [validation.words(each) for each in validation.listed(asked[request])[:_MAX_REASONS]]
                self._mark(step, mark, "; ".join(reasons))

    def _keep_saved(self, last: int) -> None:
        self._saved = array("q", (step for step in self._saved if step <= last))

    def _mark(self, step: int, kind: str, text: str) -> None:
        items = self._marks.setdefault(kind, Items())
        # Stored by index, because steps decrease after a rewind.
        items.put(items.count, Mark(step, kind, truncate(text, validation.MAX_WORDS)))
        if items.cost > _MAX_MARKS:
            items.thin()


def _texts(folder: Folder, metrics: Logged, files: Files) -> dict[str, Sampled[str]]:
    """Returns the texts from metrics, and from text files for other steps. Only files that are shown are read."""
    found: dict[str, Sampled[str]] = {}
    for name in {**metrics.texts.series, **files}:
        lines = metrics.texts.series.get(name)
        known: dict[int, str | PurePosixPath] = {step: paths[-1] for step, paths in files.get(name, {}).items()}
        known |= dict(lines.items) if lines is not None else {}
        shown = [(step, _text(folder, known[step])) for step in evenly(sorted(known), _SHOWN_TEXTS)]
        items = [(step, text) for step, text in shown if text is not None]
        if items:
            found[name] = Sampled(items, max(len(known), lines.count if lines is not None else 0))
    return found


def _text(folder: Folder, text: str | PurePosixPath) -> str | None:
    return text if isinstance(text, str) else _read_text(folder, str(text), LONGEST)


def _read_text(folder: Folder, path: str, limit: int) -> str | None:
    content = folder.read(path, limit)
    if content is not None:
        with folder.problems.recording(path):
            return shortened_text(validation.decoded(content))
    return None


def _object(folder: Folder, name: str) -> dict[str, object]:
    content = folder.read(name) if name in folder.names else None
    if content is not None:
        with folder.problems.recording(name):
            return validation.mapping(validation.parsed(content))
    return {}


def _sessions(folder: Folder, facts: dict[str, object]) -> list[Session]:
    sessions = _field(folder, facts, "sessions", validation.listed) or []
    found: list[Session] = []
    for session in sessions[-_MAX_SESSIONS:]:
        known = _field(folder, {"a session": session}, "a session", validation.mapping)
        if known is not None:
            seconds = _field(folder, known, "seconds", validation.seconds)
            environment = _field(folder, known, "environment", validation.mapping)
            texts = {name: validation.words(known.get(name)) for name in _SESSION_TEXTS}
            found.append(Session(**texts, seconds=seconds or 0.0, environment=environment or {}))
    return found


def _field(
    folder: Folder, facts: Mapping[str, object], name: str, checked: Callable[[object], _Checked]
) -> _Checked | None:
    """Returns a validated field of ``run.json``, or None if it is missing or invalid. The latter is a problem."""
    if facts.get(name) is not None:
        with folder.problems.recording("run.json", f"{name}: "):
            return checked(facts[name])
    return None
