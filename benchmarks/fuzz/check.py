"""Runs a program uninterrupted, interrupted and resumed, and applies every law."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pathlib
import tempfile
from collections.abc import Iterator

from benchmarks.fuzz import laws
from benchmarks.fuzz.program import Program, depends_on_sessions
from benchmarks.fuzz.session import Session, Shared, delivered_exit, session

_TWICE = 8  # one in eight programs is run twice, because equal programs must give equal runs


@dataclasses.dataclass(frozen=True)
class Verdict:
    """The result of checking a program.

    Args:
        program: The checked program.
        problems: One line per violated law.
        refused: Whether fxtrain rejected the program with a documented error.
    """

    program: Program
    problems: tuple[str, ...]
    refused: bool = False


def check(program: Program) -> Verdict:
    """Runs all sessions of a program, and returns the violated laws."""
    with _scratch() as folder:
        return _checked(program, folder)


def whole_session(program: Program) -> Session:
    """Runs a program uninterrupted, on the plainest path."""
    with _scratch() as folder:
        return session(program.plain, folder)


@contextlib.contextmanager
def _scratch() -> Iterator[pathlib.Path]:
    """Yields a temporary folder, in shared memory if available."""
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="fxtrain-fuzz-", dir=memory, ignore_cleanup_errors=True) as folder:
        yield pathlib.Path(folder)


def _checked(program: Program, folder: pathlib.Path) -> Verdict:
    plain, shared = program.plain, Shared()
    whole = session(plain, folder / "whole", shared=shared)
    if laws.is_refused(whole):
        return Verdict(program, (), refused=True)
    found = [f"whole: {line}" for line in laws.every_session(plain, whole)]
    if whole.result is None:
        return Verdict(program, tuple(found))
    if program.seed % _TWICE == 0:
        found += [
            f"twice: {line}" for line in _differences(plain, whole, session(plain, folder / "twice", shared=shared))
        ]

    cut = folder / "cut"
    sessions: list[Session] = []
    for number, each in enumerate((*program.cuts, None)):
        path = plain if program.alternates and number % 2 else program
        sessions.append(session(path.replace(observed=program.observed), cut, each, shared=shared))
        found += [f"session {number + 1}: {line}" for line in laws.ends_process(sessions[-1], delivered_exit())]
        if each is not None and each.damage:
            _damage(program, cut)
    for number, each in enumerate(sessions):
        found += [f"session {number + 1}: {line}" for line in laws.every_session(program, each)]
    final = sessions[-1]
    if final.result is None:
        return Verdict(program, tuple(found))
    reasons = [each.result.reason for each in sessions if each.result is not None]
    found += laws.same_end(whole, final, reasons)
    found += laws.same_trajectory(program, whole, sessions)
    found += laws.same_history(whole, sessions)
    found += laws.same_files(program, folder / "whole", cut)
    is_saved = program.saves and not any("skip_final_save" in dict(told.asked) for told in whole.events)
    if is_saved and not depends_on_sessions(program):
        found += laws.saved_last(program, cut, final)
        again = session(program, cut, shared=shared)
        found += [f"again: {line}" for line in laws.every_session(program, again)]
        found += laws.does_nothing(again, final, whole)
        found += [f"again: {line}" for line in laws.same_files(program, folder / "whole", cut)]
    return Verdict(program, tuple(found))


def _damage(program: Program, folder: pathlib.Path) -> None:
    """Flips one bit of the newest checkpoint, if there is an older one to resume from."""
    saved = sorted(path for path in (folder / "checkpoints").glob("[0-9]*-step-*") if "-snapshot-" not in path.name)
    if len(saved) < 2:
        return
    largest = max((path for path in saved[-1].rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)


def _differences(program: Program, first: Session, second: Session) -> list[str]:
    if second.result is None:
        return [f"the second run raised {second.error!r}"]
    found = laws.same_end(first, second, [second.result.reason])
    return found + laws.same_trajectory(program, first, [second])
