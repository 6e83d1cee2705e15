"""R11: a save is synced before older files are removed, checked on the log of calls.

A power cut may undo unsynced changes in any order. A file is dirty from its last write to its sync, and a folder from
the last new name in it. The rules:

- Content is clean when it is renamed. Otherwise it could reappear under the new name with missing data.
- The whole folder is clean when a file of an earlier save is removed or renamed.
- The whole folder is clean when a save is reported as committed.
- Files of an earlier save are never overwritten in place.
"""

from __future__ import annotations

import functools
import os
import pathlib
from collections.abc import Callable, Sequence

from benchmarks.reliability import children, shim
from benchmarks.reliability.crash_points import FORWARD, WITH_RETURNS, values
from benchmarks.reliability.shim import Call
from benchmarks.reliability.systems import System
from benchmarks.reliability.table import Cell

BEGIN, COMMITTED = "begin", "committed"  # the notes around each save


def unsynced(calls: Sequence[Call], counts: Callable[[str], bool] = lambda path: True) -> list[str]:
    """Returns one line per violation of the sync rules.

    Args:
        calls: The log of a scenario, with a note ``begin`` before each save and ``committed`` after it.
        counts: Returns whether a path is part of a checkpoint. Other paths may be dirty.
    """
    problems: list[str] = []
    dirty: set[str] = set()
    born: dict[str, int] = {}  # the save that created each file and folder
    save = 0

    def refuse(what: str, paths: set[str]) -> None:
        problems.extend(f"save {save}: {what} while {os.path.basename(path)} is not synced" for path in sorted(paths))
        dirty.difference_update(paths)  # report each path once

    for call in calls:
        path = call.path
        name = os.path.basename(path)
        if call.name == "note":
            save += path == BEGIN
            if path == COMMITTED:
                refuse("reported as committed", dirty)
            continue
        if not counts(path):
            continue
        if call.name in ("remove", "rename") and born.get(path, save) < save:
            refuse(f"{name} of an earlier save is {call.name}d", dirty - {path})
        if call.name == "truncate" and born.get(path, save) < save:
            problems.append(f"save {save}: {name} of an earlier save is overwritten in place")
        match call.name:
            case "sync":
                dirty.discard(path)
            case "create" | "truncate" | "mkdir":
                if path not in born:
                    born[path] = save
                    dirty.add(os.path.dirname(path))
                if call.name != "mkdir":
                    born[path] = save
                    dirty.add(path)
            case "open" | "write":
                dirty.add(path)
            case "remove":
                born.pop(path, None)
                dirty.discard(path)
            case "rename" | "link":
                refuse(f"{name} is renamed", {other for other in dirty if _within(other, path)})
                dirty = {_moved(other, path, call.target) for other in dirty}
                born = {_moved(other, path, call.target): made for other, made in born.items()}
                dirty.add(os.path.dirname(call.target))
    return problems


def synced(system: type[System]) -> Cell:
    """Checks the log of an uninterrupted scenario. Each save is one trial."""
    cell = Cell()
    for best in (False, True):
        # Another writer of the run may have made the folder without syncing its name.
        calls = log(system, best=best, made_before=best)
        commits = sum(call == Call("note", COMMITTED) for call in calls)
        problems = unsynced(calls, counts=part_of_checkpoint)
        bad = {problem.split(":")[0] for problem in problems}
        cell.tried += commits
        cell.lost += len(bad)
        cell.notes += problems
    return cell


def log(system: type[System], *, best: bool, made_before: bool = False) -> list[Call]:
    """Returns the calls of an uninterrupted scenario.

    Args:
        system: The system under test.
        best: Whether to keep the best checkpoint in addition to the newest.
        made_before: Whether another writer made the run folder without a sync.
    """
    with shim.scratch() as parent, shim.log_file() as (descriptor, path):
        outcome = children.in_child(
            functools.partial(_scenario, system, pathlib.Path(parent), best, made_before, descriptor)
        )
        if outcome.error:
            raise RuntimeError(outcome.error)
        return shim.parse(path.read_text())


def part_of_checkpoint(path: str) -> bool:
    """Returns whether a path is part of a checkpoint. Only the lock is not, because a power cut releases it."""
    return os.path.basename(path) != ".lock"


def _scenario(
    system: type[System],
    parent: pathlib.Path,
    best: bool,
    made_before: bool,
    descriptor: int,
    tell: Callable[[object], None],
) -> None:
    shim.arm(parent, log=descriptor)
    run = parent / "runs" / "1"
    if made_before:
        run.mkdir(parents=True)
    session = system(run / "checkpoints", best=best)
    for index, save in enumerate(WITH_RETURNS if system.can_rewind else FORWARD):
        if save.reopen:
            session.close()
            session = system(run / "checkpoints", best=best)
        shim.note(BEGIN)
        session.save(save.step, values(index), save.loss)
        session.wait()
        shim.note(COMMITTED)
    session.close()


def _within(path: str, folder: str) -> bool:
    return path == folder or path.startswith(f"{folder}/")


def _moved(path: str, source: str, target: str) -> str:
    return target + path[len(source) :] if _within(path, source) else path
