"""Read: what is in the folder of a run."""

from __future__ import annotations

import csv
import dataclasses
import json
import os
import re
import urllib.parse
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

_NO_METRICS = ("step", "epoch", "time")  # columns of a CSV
_IMAGE = re.compile(r"\d{8,}-\d+\.png$")  # in a table
_MEDIUM = re.compile(r"(\d{8,})(?:-(\d+))?\.(png|gif|wav|md|json)$")


class RunFolderError(Exception):
    """There is no run in a folder, or nothing of it that can be shown."""


@dataclasses.dataclass(frozen=True)
class Mark:
    """What happened at a step.

    Args:
        step: Where.
        kind: ``"improved"``, ``"saved"``, ``"skipped"``, ``"stopped"``, ``"rewound"``, ``"interrupted"`` or
            ``"resumed"``.
        text: What is to be said of it.
    """

    step: int
    kind: str
    text: str


Curve = tuple[list[int], list[float]]  # steps, increasing, and values


@dataclasses.dataclass
class Run:
    """What is in the folder of a run. Steps that a rewind abandoned are not in its curves."""

    name: str
    curves: dict[str, Curve]
    marks: list[Mark]
    texts: dict[str, list[tuple[int, str]]]
    histograms: dict[str, list[tuple[int, list[float], list[float]]]]  # step, counts, edges
    tables: dict[str, tuple[int, dict[str, list[Any]]]]  # the last: step, columns
    confusion: dict[str, tuple[int, list[str], list[list[float]]]]  # the last: step, labels, counts
    media: dict[str, dict[int, list[Path]]]  # images, videos and sounds, by name and step
    config: dict[str, Any]
    sessions: list[dict[str, Any]]
    summary: str  # the page of observers.summary, if it was written there
    result: dict[str, Any]


def read_run(folder: str | os.PathLike[str]) -> Run:
    """What is in the folder of a run, as the writers and observers left it.

    It reads ``metrics.jsonl``, or ``metrics.csv`` where there is none; and, where they are, ``run.json`` and
    ``events.jsonl`` (``observers.record_run``), ``media`` (``writers.media``), ``summary.txt`` and ``result.json``.
    Lines that a crash tore are left out.

    Raises:
        RunFolderError: If there is no such folder, no metrics in it, or nothing in these yet.
    """
    root = Path(folder)
    if not root.is_dir():
        raise RunFolderError(f"{root} is no folder: give that of a run.")
    run = Run(root.resolve().name, {}, [], {}, {}, {}, {}, {}, {}, [], "", {})
    if (root / "metrics.jsonl").exists():
        for line in _lines(root / "metrics.jsonl"):
            _take(run, line)
    elif (root / "metrics.csv").exists():
        _take_rows(run, root / "metrics.csv")
    else:
        raise RunFolderError(
            f"{root} has no metrics.jsonl and no metrics.csv: write them with fxtrain.observers.write("
            "fxtrain.writers.jsonl(folder / 'metrics.jsonl'))."
        )
    facts = _json(root / "run.json")
    run.sessions = facts.get("sessions", [])
    run.config = facts.get("config") or run.config
    run.result = _json(root / "result.json")
    run.summary = _text(root / "summary.txt") if (root / "summary.txt").exists() else ""
    _take_events(run, root / "events.jsonl")
    _take_media(run, root / "media")
    run.marks.sort(key=lambda mark: mark.step)
    if not (run.curves or run.texts or run.histograms or run.tables or run.confusion or run.media or run.sessions):
        raise RunFolderError(f"{root} has nothing in it yet: wait until the run has written something.")
    return run


def _take(run: Run, line: Mapping[str, Any]) -> None:
    step = line.get("step", 0)
    for name, value in line.get("metrics", {}).items():
        _put(*run.curves.setdefault(name, ([], [])), step, float(value))
        if name.endswith("/improved_by"):
            what = name.removesuffix("/improved_by")
            run.marks.append(Mark(step, "improved", f"{what} improved by {float(value):.4g}"))
    for name, markdown in line.get("texts", {}).items():
        run.texts.setdefault(name, []).append((step, markdown))
    for name, found in line.get("histograms", {}).items():
        run.histograms.setdefault(name, []).append((step, found["counts"], found["edges"]))
    for name, columns in line.get("tables", {}).items():
        run.tables[name] = step, columns
    for name, found in line.get("confusion", {}).items():
        run.confusion[name] = step, found["labels"], found["counts"]
    run.config |= line.get("hparams", {})


def _put(steps: list[int], values: list[float], step: int, value: float) -> None:
    """One point for each step, the last one counts; steps that go back have been written by two runs at once."""
    if steps and steps[-1] == step:
        values[-1] = value
    elif not steps or step > steps[-1]:
        steps.append(step)
        values.append(value)


def _take_rows(run: Run, path: Path) -> None:
    # A last line without an end was torn by a crash, and its last number may be another than was meant.
    lines = [line for line in _text(path).splitlines(keepends=True) if line.endswith("\n")]
    for row in csv.DictReader(lines):
        try:
            step = int(row["step"])
            numbers = {name: float(cell) for name, cell in row.items() if name not in _NO_METRICS and cell}
        except (KeyError, TypeError, ValueError):
            continue
        for name, number in numbers.items():
            _put(*run.curves.setdefault(name, ([], [])), step, number)


def _take_events(run: Run, path: Path) -> None:
    saved: list[int] = []
    for line in _lines(path) if path.exists() else ():
        step, kind = line.get("step", 0), line.get("event")
        if kind == "Saved":
            saved.append(step)
        elif kind == "Rewound":
            saved = [each for each in saved if each <= line["to_step"]]
            run.marks.append(Mark(line["from_step"], "rewound", f"back to step {line['to_step']}"))
        elif kind == "Interrupted":
            run.marks.append(Mark(step, "interrupted", f"interrupted by {line['cause']}"))
        elif kind == "FitBegin" and line.get("resumed"):
            # What a killed session did after its last checkpoint is done again.
            saved = [each for each in saved if each <= step]
            run.marks.append(Mark(step, "resumed", "a session went on from here"))
        asked = line.get("asked", {})
        for request, mark in (("skip_update", "skipped"), ("skip_batch", "skipped"), ("stop", "stopped")):
            if request in asked:
                run.marks.append(Mark(step, mark, "; ".join(asked[request])))
    run.marks += [Mark(step, "saved", "checkpoint") for step in saved]


def _take_media(run: Run, folder: Path) -> None:
    in_tables: set[Path] = set()
    known = {(name, step) for name, texts in run.texts.items() for step, _ in texts}
    for path in sorted(folder.rglob("*"), key=_place) if folder.is_dir() else ():
        found = _MEDIUM.match(path.name)
        if found is None:
            continue
        # A folder has the letters that file systems do not take as %XX.
        name, step, kind = urllib.parse.unquote(path.parent.relative_to(folder).as_posix()), int(found[1]), found[3]
        if kind == "md":
            if (name, step) not in known:
                run.texts.setdefault(name, []).append((step, _text(path)))
        elif kind == "json":
            in_tables |= _take_columns(run, name, step, path)
        else:
            run.media.setdefault(name, {}).setdefault(step, []).append(path)
    for name, steps in list(run.media.items()):
        kept = {step: [path for path in paths if path not in in_tables] for step, paths in steps.items()}
        run.media[name] = {step: paths for step, paths in kept.items() if paths}
        if not run.media[name]:
            del run.media[name]


def _place(path: Path) -> tuple[Any, ...]:
    """In the order of names, steps and numbers; numbers are not padded, and steps beyond eight digits neither."""
    found = _MEDIUM.match(path.name)
    return path.parent, int(found[1]) if found else -1, int(found[2] or 0) if found else -1


def _take_columns(run: Run, name: str, step: int, path: Path) -> set[Path]:
    """Takes a table or a matrix; the images that are in it."""
    found = _json(path)
    if "columns" in found:
        # Of images a table has the names of the files beside it.
        columns = {
            column: [path.parent / cell if isinstance(cell, str) and _IMAGE.match(cell) else cell for cell in cells]
            for column, cells in found["columns"].items()
        }
        if name not in run.tables or step >= run.tables[name][0]:
            run.tables[name] = step, columns
        return {cell for cells in columns.values() for cell in cells if isinstance(cell, Path)}
    if "counts" in found and (name not in run.confusion or step >= run.confusion[name][0]):
        run.confusion[name] = step, list(found["labels"]), found["counts"]
    return set()


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    with open(path, encoding="utf-8", errors="replace") as file:  # a crash may tear a letter
        for line in file:
            try:
                found = json.loads(line)
            except ValueError:
                continue
            if isinstance(found, dict):
                yield found


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(_text(path))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace")
