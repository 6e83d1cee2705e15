"""R1 and R2: an interrupted run, resumed in a new process, is bit-identical to the uninterrupted run.

The comparison covers the last checkpoint and all trajectory events, with their metrics, requests, logs and a checksum
of every leaf of the state.
"""

from __future__ import annotations

import json
import pathlib
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from typing import Any

from benchmarks.reliability.exact_run import STEPS
from benchmarks.reliability.table import Cell
from fxtrain.checkpoint._manifest import read_manifest

Run = tuple[list[str], dict[str, str]]  # one line per event, and the checksums of the last checkpoint by path


def _python(arguments: list[str]) -> Any:
    """Runs Python with these arguments in a new process."""
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=False)


class Exactness:
    """Compares interruptions of a run with the uninterrupted run.

    Args:
        folder: The folder for checkpoints and records.
        data: The data source, a kind of ``exact_run.data``.
        compiled: Whether the steps are compiled.
        python: Runs Python with the given arguments. Returns an object with ``returncode`` and ``stderr``.
    """

    def __init__(
        self,
        folder: pathlib.Path,
        *,
        data: str = "arrays",
        compiled: bool = False,
        python: Callable[[list[str]], Any] = _python,
    ) -> None:
        self._folder = folder
        self._compiled = compiled
        self._python = python
        self._whole = folder / "whole"
        self.lines, self.last = self._run(self._whole, data)

    def resumed(self, steps: Iterable[int], data: str) -> list[str]:
        """Resumes in a new process after each of these steps, and returns one line per step with a difference."""
        return [problem for step in steps if (problem := self._resumed(step, data)) is not None]

    def interrupted(self, kinds: Iterable[str], data: str) -> list[str]:
        """Sends a signal after an event of each of these kinds, in the middle of the run, and resumes.

        Returns one line per kind with a difference.
        """
        problems: list[str] = []
        for kind in kinds:
            places = [index for index, line in enumerate(self.lines) if _event(line) == kind]
            at = places[len(places) // 2]
            folder = self._folder / f"interrupted-{at}"
            before, _ = self._run(folder, data, "--stop-at", str(at), wanted_code=143)
            lines, last = self._run(folder, data)
            # An interrupted evaluation is repeated from its beginning. No other event is repeated.
            cut_short = sum(_event(line).startswith("Eval") for line in set(before) & set(lines))
            told = before[: len(before) - cut_short] + lines
            if told != self.lines or last != self.last:
                problems.append(f"interrupted after {kind}: {_difference(told, self.lines)}")
            shutil.rmtree(folder)
        return problems

    def _resumed(self, step: int, data: str) -> str | None:
        folder = self._folder / f"resumed-{step}"
        folder.mkdir()
        (checkpoint,) = self._whole.glob(f"*-step-{step:09d}")
        shutil.copytree(checkpoint, folder / checkpoint.name)
        lines, last = self._run(folder, data)
        shutil.rmtree(folder)
        wanted = self._after(step)
        if lines == wanted and last == self.last:
            return None
        return f"resumed after step {step}: {_difference(lines, wanted)}"

    def _after(self, step: int) -> list[str]:
        """Returns the events after a step and after everything due at that step."""
        end = next(
            i for i, line in enumerate(self.lines) if _event(line) == "StepEnd" and json.loads(line)["step"] == step
        )
        begins = (i for i, line in enumerate(self.lines) if i > end and _event(line) in ("EpochBegin", "StepBegin"))
        return self.lines[next(begins, len(self.lines)) :]

    def _run(self, folder: pathlib.Path, data: str, *options: str, wanted_code: int = 0) -> Run:
        record = self._folder / "record"
        record.write_text("")
        arguments = ["-m", "benchmarks.reliability.exact_run", str(folder), str(record), "--data", data]
        arguments += [*options, *(["--compiled"] if self._compiled else [])]
        done = self._python(arguments)
        if done.returncode != wanted_code:
            raise RuntimeError(f"python {' '.join(arguments)} ended with {done.returncode}:\n{done.stderr}")
        newest = max(folder.glob("[0-9]*"))
        checksums = {row["path"]: row.get("xxh3", "") for row in read_manifest(newest)["leaves"]}
        return record.read_text().splitlines(), checksums


def exact(every: int) -> Cell:
    """R1: interrupts eager and compiled runs after every ``every`` steps, and at every kind of trajectory event."""
    cell = Cell()
    for compiled in (False, True):
        with tempfile.TemporaryDirectory() as folder:
            run = Exactness(pathlib.Path(folder), compiled=compiled)
            for step in all_steps(every):
                cell.add(run.resumed([step], "arrays"))
            for kind in (
                "EpochBegin",
                "StepBegin",
                "StepEnd",
                "EvalBegin",
                "EvalStepBegin",
                "EvalStep",
                "EvalEnd",
                "EpochEnd",
            ):
                cell.add(run.interrupted([kind], "arrays"))
    return cell


def exact_data(every: int) -> Cell:
    """R2: interrupts runs with prefetched data, and resumes them with or without prefetching or workers."""
    cell = Cell()
    pairs = [("arrays", "prefetch"), ("prefetch", "arrays"), ("workers=0", "workers=0"), ("workers=2", "workers=2")]
    pairs += [("workers=0", "workers=2"), ("workers=2", "prefetch workers=0")]
    for before, after in pairs:
        with tempfile.TemporaryDirectory() as folder:
            run = Exactness(pathlib.Path(folder), data=before)
            for step in all_steps(every):
                cell.add(run.resumed([step], after), at=f"{before}, then {after}")
    return cell


def all_steps(every: int) -> list[int]:
    """Returns the steps to interrupt at, over the whole run."""
    return list(range(every, STEPS + 1, every))


def _event(line: str) -> str:
    return line[len('{"event": "') :].partition('"')[0]


def _difference(got: list[str], wanted: list[str]) -> str:
    for a, b in zip(got, wanted, strict=False):
        if a != b:
            return f"expected {b[:200]}, got {a[:200]}"
    return f"expected {len(wanted)} events and an equal last checkpoint, got {len(got)} events"
