"""R9: disk faults during a run raise an immediate error that names the folder, and lose no committed checkpoint.

The disk is full, read-only, broken or gone. The run continues once the disk recovers.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import pathlib
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch._dynamo  # imported before forking, because the first gradient would import it in every child

import fxtrain as fx
from benchmarks.reliability import children, shim
from benchmarks.reliability.crash_points import look, values
from benchmarks.reliability.shim import Kind
from benchmarks.reliability.systems import Fxtrain, System, clear
from benchmarks.reliability.table import Cell

FAULTS = {
    "full": (errno.ENOSPC, Kind.GROWS),
    "read-only": (errno.EROFS, Kind.GROWS | Kind.NAMES | Kind.REMOVES),
    "broken": (errno.EIO, Kind.GROWS | Kind.NAMES | Kind.REMOVES | Kind.SYNCS),
}


def disks(system: type[System], *, every: int = 1) -> Cell:
    """Injects each fault from each call of the second save on, and moves the folder away."""
    cell = Cell(detected=0)
    every = max(every // 5, 1)  # a single save has few calls
    for index in range(5):
        values(index)
    calls = children.answer(functools.partial(_in_folder, functools.partial(_counted, system)))
    for what in FAULTS:
        for call in range(1, calls + 1, every):
            result = children.answer(functools.partial(_in_folder, functools.partial(_faulty, system, what, call)))
            cell.add(result["problems"], detected=result["detected"], at=f"{what} from call {call}")
    for what in ("gone", "unmounted"):
        result = children.answer(functools.partial(_in_folder, functools.partial(_gone, system, what)))
        cell.add(result["problems"], detected=result["detected"], at=what)
    if system is Fxtrain:
        for what in FAULTS:
            for on_error in ("raise", "warn"):
                trial = functools.partial(_in_folder, functools.partial(_in_a_run, what, on_error))
                cell.add(children.answer(trial), detected=True, at=f"{what} in fit, on_error={on_error!r}")
    return cell


def _in_folder(trial: Callable[[pathlib.Path], Any]) -> Any:
    with shim.scratch() as parent, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = trial(pathlib.Path(parent) / "run")
        shim.disarm()
        return result


def _counted(system: type[System], folder: pathlib.Path) -> int:
    session = _one_save(system, folder)
    shim.arm(folder)
    session.save(2, values(2))
    session.wait()
    return shim.count()


def _one_save(system: type[System], folder: pathlib.Path) -> System:
    session = system(folder)
    session.save(1, values(1))
    session.wait()
    return session


def _faulty(system: type[System], what: str, call: int, folder: pathlib.Path) -> dict[str, Any]:
    code, kinds = FAULTS[what]
    session = _one_save(system, folder)
    shim.arm(folder, fail_from=call, errno=code, kinds=kinds)
    said: list[str] = []
    with _collected(said):
        session.save(2, values(2))
    named = None
    with _collected(said):
        named = session.latest()  # the first call after the failed save
    first = bool(said)
    with _collected(said):
        session.wait()
    shim.disarm()
    return _judged(system, folder, session, said, named=named, surfaced_at_once=first)


def _gone(system: type[System], what: str, folder: pathlib.Path) -> dict[str, Any]:
    """Moves the folder away, and leaves an empty one in its place if ``what`` is "unmounted"."""
    session = _one_save(system, folder)
    away = folder.with_name("away")
    folder.rename(away)
    if what == "unmounted":
        folder.mkdir()
    said: list[str] = []
    with _collected(said):
        session.save(2, values(2))
    named = None
    with _collected(said):
        named = session.latest()
    first = bool(said)
    with _collected(said):
        session.wait()
    written = [path.name for path in folder.iterdir()] if folder.exists() else []
    clear(folder)
    away.rename(folder)
    result = _judged(system, folder, session, said, named=named, surfaced_at_once=first)
    if written:
        result["problems"].append(f"written into the replaced folder: {', '.join(written)}")
    return result


def _judged(
    system: type[System], folder: pathlib.Path, session: System, said: list[str], *, named: Any, surfaced_at_once: bool
) -> dict[str, Any]:
    """Checks the folder and further saves after the disk has recovered."""
    problems = []
    ours = system is Fxtrain
    if ours and said and not any(str(folder) in text for text in said):
        problems.append(f"the error does not name the folder: {said[0]}")
    found = look(system(folder), range(5))  # as a restarted run
    problems += found.problems
    there = set(found.listed.values())
    if not there & {1, 2}:
        problems.append(f"expected the first or second save, got {found.listed}")
    if not said and 2 not in there:
        problems.append("the second save is missing, and no error was raised")
    if said and not surfaced_at_once:
        problems.append("the error was raised only by wait()")
    if named == 2 and 2 not in there:
        problems.append("latest() returned the second save before it was committed")
    # The run continues in the same session.
    try:
        session.save(3, values(3))
        session.wait()
        after = look(system(folder), range(5))
        if 3 not in after.listed.values() or after.problems:
            problems.append(f"a save after the fault is lost: {after.listed} {after.problems}")
    except Exception as error:
        problems.append(f"a save after the fault fails: {type(error).__name__}: {error}")
    if ours:
        with contextlib.suppress(fx.CheckpointError):
            session.close()
        again = system(folder)
        again.save(4, values(4))
        again.close()
        problems += [f"leftover file after a restart: {name}" for name in again.leftovers()]
    return {"problems": problems, "detected": bool(said)}


class _collected(contextlib.AbstractContextManager):  # noqa: N801
    """Suppresses exceptions of the block, and appends their messages to a list."""

    def __init__(self, said: list[str]) -> None:
        self._said = said

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> bool:
        if isinstance(error, Exception):
            self._said.append(str(error))
        return isinstance(error, Exception)


def _in_a_run(what: str, on_error: str, folder: pathlib.Path) -> list[str]:
    """Trains on a disk that fails at the second of six saves, and resumes once the disk has recovered."""
    code, kinds = FAULTS[what]
    problems = []
    tx = fx.optim.adam(0.1)
    step = fx.train_step(lambda model, batch: (model(batch) - 1).square().mean(), tx)
    start = fx.init(torch.nn.Linear(3, 1), tx, seed=1)
    data = [torch.randn(4, 3, generator=torch.Generator().manual_seed(index)) for index in range(4)]
    told: list[int] = []
    failing = fx.checkpointer(folder, keep=2, on_error=on_error)

    def breaks(state: fx.TrainState, event: fx.StepEnd | fx.Saved, control: Any) -> None:
        if isinstance(event, fx.Saved):
            told.append(event.step)
        elif event.step == 3:
            failing.wait()  # commits the save of step 2, so that only later saves fail
            shim.arm(folder, fail_from=1, errno=code, kinds=kinds)

    def run(checkpointer: Any, *, observers: Any = ()) -> Any:
        return fx.fit(
            start,
            step,
            data,
            steps=12,
            callbacks=fx.when(fx.every(2), fx.callbacks.save()),
            observers=observers,
            checkpointer=checkpointer,
            resume=True,
        )

    wanted = run(fx.checkpointer(folder.with_name("well"))).state
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        try:
            run(failing, observers=[breaks])
            if on_error == "raise":
                problems.append("fit did not raise CheckpointError")
        except fx.CheckpointError as error:
            if on_error == "warn" or str(folder) not in str(error):
                problems.append(f"unexpected error of fit: {error}")
    if on_error == "warn" and not any(str(folder) in str(warning.message) for warning in warned):
        problems.append("no warning names the folder")
    if told != [2]:
        problems.append(f"expected Saved at step 2 only, got {told}")
    shim.disarm()
    if fx.checkpointer(folder).latest() != 2:
        problems.append(f"expected 2 as the latest step, got {fx.checkpointer(folder).latest()}")
    resumed = run(fx.checkpointer(folder)).state
    if not all(torch.equal(a, b) for a, b in zip(fx.tree.leaves(resumed), fx.tree.leaves(wanted), strict=True)):
        problems.append("the resumed run ends in a different state")
    return problems
