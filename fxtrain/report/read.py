"""Read: what is in the folder of a run."""

from __future__ import annotations

import csv
import dataclasses
import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

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
        RunFolderError: If there is no such folder, or no metrics in it.
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
    run.summary = (root / "summary.txt").read_text() if (root / "summary.txt").exists() else ""
    _take_events(run, root / "events.jsonl")
    _take_media(run, root / "media")
    run.marks.sort(key=lambda mark: mark.step)
    return run


def _take(run: Run, line: Mapping[str, Any]) -> None:
    step = line.get("step", 0)
    for name, value in line.get("metrics", {}).items():
        steps, values = run.curves.setdefault(name, ([], []))
        if not steps or step >= steps[-1]:
            _put(steps, values, step, float(value))
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
    """One point for each step: the last one counts."""
    if steps and steps[-1] == step:
        values[-1] = value
    else:
        steps.append(step)
        values.append(value)


def _take_rows(run: Run, path: Path) -> None:
    with open(path, newline="") as file:
        for row in csv.DictReader(file):
            step = int(row["step"])
            for name, cell in row.items():
                if name not in ("step", "epoch", "time") and cell:
                    _put(*run.curves.setdefault(name, ([], [])), step, float(cell))


def _take_events(run: Run, path: Path) -> None:
    if not path.exists():
        return
    for line in _lines(path):
        step, kind = line.get("step", 0), line.get("event")
        if kind == "Saved":
            run.marks.append(Mark(step, "saved", "checkpoint"))
        elif kind == "Rewound":
            to_step = line["to_step"]
            abandoned = ("saved", "improved")
            run.marks = [mark for mark in run.marks if mark.step <= to_step or mark.kind not in abandoned]
            run.marks.append(Mark(line["from_step"], "rewound", f"back to step {to_step}"))
        elif kind == "Interrupted":
            run.marks.append(Mark(step, "interrupted", f"interrupted by {line['cause']}"))
        elif kind == "FitBegin" and line.get("resumed"):
            run.marks.append(Mark(step, "resumed", "a session went on from here"))
        asked = line.get("asked", {})
        for request, mark in (("skip_update", "skipped"), ("skip_batch", "skipped"), ("stop", "stopped")):
            if request in asked:
                run.marks.append(Mark(step, mark, "; ".join(asked[request])))


def _take_media(run: Run, folder: Path) -> None:
    for path in sorted(folder.rglob("*")) if folder.is_dir() else ():
        found = _MEDIUM.match(path.name)
        if found is None:
            continue
        name, step, kind = str(path.parent.relative_to(folder)), int(found[1]), found[3]
        if kind == "md":
            known = run.texts.setdefault(name, [])
            if all(step != before for before, _ in known):
                known.append((step, path.read_text()))
        elif kind == "json":
            _take_columns(run, name, step, path)
        else:
            run.media.setdefault(name, {}).setdefault(step, []).append(path)
    for steps in run.media.values():
        for paths in steps.values():
            paths.sort(key=lambda path: int((_MEDIUM.match(path.name) or [0, 0, 0])[2] or 0))


def _take_columns(run: Run, name: str, step: int, path: Path) -> None:
    found = _json(path)
    if "columns" in found:
        # Of images a table has the names of the files beside it.
        run.tables[name] = (
            step,
            {
                column: [
                    path.parent / cell if isinstance(cell, str) and _MEDIUM.match(cell) else cell for cell in cells
                ]
                for column, cells in found["columns"].items()
            },
        )
    elif "counts" in found:
        run.confusion[name] = step, list(found["labels"]), found["counts"]


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    with open(path, encoding="utf-8") as file:
        for line in file:
            try:
                found = json.loads(line)
            except ValueError:
                continue
            if isinstance(found, dict):
                yield found


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
