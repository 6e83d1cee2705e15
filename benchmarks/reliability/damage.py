"""R5 and R6: damaged checkpoints are detected, and never cause a silent fresh start."""

from __future__ import annotations

import functools
import pathlib
import random
import shutil
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import fxtrain as fx
from benchmarks.reliability import children, shim
from benchmarks.reliability.systems import Fxtrain, System, Values, same, state_of, values_of, zeros_like
from benchmarks.reliability.table import Cell

OLDER, NEWEST = 1, 2
_PAGE = 4096
Damage = Callable[[pathlib.Path], None]
Damages = Callable[[pathlib.Path], Iterator[tuple[str, Damage]]]  # takes the newest checkpoint, yields named damages


def flips(system: type[System], *, flips: int = 150, seed: int = 0) -> Cell:
    """Flips one random bit of the newest checkpoint per trial, each in a fresh copy."""
    generator = random.Random(seed)

    def damages(newest: pathlib.Path) -> Iterator[tuple[str, Damage]]:
        sizes = [(file, file.stat().st_size) for file in _files(newest)]
        places = [(file, at) for file, size in sizes for at in range(size)]
        for _ in range(flips):
            file, at = generator.choice(places)
            bit = generator.randrange(8)
            yield f"bit {bit} of byte {at} of {file.name}", functools.partial(_flip, _below(file, newest), at, bit)

    return _cell(system, damages)


def damages(system: type[System]) -> Cell:
    """Damages every file in several ways: halved, truncated to zero, missing, a page zeroed, and bytes appended.

    Also empties the checkpoint, and for fxtrain damages all checkpoints together.
    """

    def each(newest: pathlib.Path) -> Iterator[tuple[str, Damage]]:
        for file in _files(newest):
            for change in (_halve, _truncate, _remove, _zero_page, _append):
                yield f"{change.__name__[1:]} {file.name}", functools.partial(_on, change, _below(file, newest))
        yield "empty the checkpoint", _empty

    cell = _cell(system, each)
    if system is Fxtrain:
        for change in (_halve, _truncate, _remove, _zero_page, _append):
            cell.add(
                children.answer(functools.partial(_all_damaged, change)), detected=True, at=f"{change.__name__[1:]} all"
            )
        cell.add(children.answer(_all_set_aside), detected=True, at="one checkpoint set aside, the other deleted")
    return cell


def _cell(system: type[System], damages: Damages) -> Cell:
    cell = Cell(detected=0)
    for what, problems, detected in children.answer(functools.partial(_trials, system, damages)):
        cell.add(problems, detected=detected, at=what)
    return cell


def _trials(system: type[System], damages: Damages) -> list[tuple[str, list[str], bool]]:
    trials = []
    with shim.scratch() as parent:
        whole, copy = pathlib.Path(parent) / "whole", pathlib.Path(parent) / "copy"
        newest = _make(system, whole)
        for what, damage in damages(newest):
            shutil.rmtree(copy, ignore_errors=True)
            shutil.copytree(whole, copy)
            damage(copy / newest.relative_to(whole))
            try:
                result = _read(system, copy, str(newest.relative_to(whole)))
            except Exception as error:
                said = f"unexpected error: {type(error).__name__}: {error}"
                result = {"detected": True, "harmless": True, "problems": [said]}
            problems = result["problems"]
            if not result["detected"] and not result["harmless"]:
                problems = [*problems, "undetected, and the restored values are wrong"]
            elif not result["detected"] and system is Fxtrain:
                # The values are right, but fxtrain must detect any changed byte.
                problems = [*problems, "undetected"]
            trials.append((what, problems, result["detected"]))
    return trials


def _make(system: type[System], folder: pathlib.Path) -> pathlib.Path:
    session = system(folder, keep=2)
    for step in (OLDER, NEWEST):
        session.save(step, _values(step), 1.0)
        session.wait()
    path = session.path(session.latest())
    session.close()
    return path


def _read(system: type[System], folder: pathlib.Path, newest: str) -> dict[str, Any]:
    """Restores in a new session, and returns whether the damage was detected or harmless."""
    if system is Fxtrain:
        return _read_ours(folder, newest)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            session = system(folder, keep=2)
            name = session.latest()
            restored = session.restore(name, zeros_like(_values(NEWEST)))
    except Exception:
        return {"detected": True, "harmless": True, "problems": []}
    return {"detected": False, "harmless": same(restored, _values(NEWEST)), "problems": []}


def _read_ours(folder: pathlib.Path, newest: str) -> dict[str, Any]:
    """Restores a damaged fxtrain checkpoint by its path, and through the run's checkpointer.

    By path it must raise CheckpointError. The checkpointer must set it aside and restore the older one.
    """
    problems = []
    like = state_of(zeros_like(_values(NEWEST)), 0)
    try:
        restored = fx.restore(folder / newest, like=like)
        detected, harmless = False, same(restored.params, _values(NEWEST))
    except fx.CheckpointError as error:
        detected, harmless = True, True
        if newest not in str(error):
            problems.append(f"the error does not name the checkpoint: {error}")
    with fx.checkpointer(folder, keep=2) as checkpoints, warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        restored = checkpoints.restore(like)
        if detected:
            if not same(restored.params, _values(OLDER)):
                problems.append("the older checkpoint was not restored")
            if not any("unreadable-" in str(warning.message) for warning in warned):
                problems.append("no warning names the checkpoint set aside")
            if not (folder / f"unreadable-{newest}").exists():
                problems.append("the damaged checkpoint was not set aside")
            if checkpoints.steps() != [OLDER] or checkpoints.latest() != OLDER:
                problems.append(f"expected step {OLDER} alone, got {checkpoints.steps()}")
    return {"detected": detected, "harmless": harmless, "problems": problems}


def _all_damaged(change: Damage) -> list[str]:
    """Damages all checkpoints. Every restore must fail, and no file may be moved."""
    with shim.scratch() as parent:
        folder = pathlib.Path(parent) / "run"
        _make(Fxtrain, folder)
        for path in folder.glob("*-step-*"):
            for file in _files(path):
                change(file)
        before = _names(folder)
        problems = _unexpected_starts(folder)
        if _names(folder) != before:
            problems.append("files were moved")
        return problems


def _all_set_aside() -> list[str]:
    """Damages the newest checkpoint, which is set aside, then deletes the older one."""
    with shim.scratch() as parent, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        folder = pathlib.Path(parent) / "run"
        newest = _make(Fxtrain, folder)
        _remove(newest / "leaves.bin")
        with fx.checkpointer(folder) as checkpoints:
            checkpoints.restore(state_of(zeros_like(_values(NEWEST)), 0))
        shutil.rmtree(next(folder.glob("0*-step-*")))
        return _unexpected_starts(folder)


def _unexpected_starts(folder: pathlib.Path) -> list[str]:
    """Returns the attempts that succeed or fail with another error although no checkpoint can be restored."""
    tx = fx.optim.sgd(0.1)
    like = zeros_like(_values(NEWEST))
    state = state_of(like, 0).replace(opt_state=tx.init(like))
    step = fx.train_step(lambda model, batch: model(batch), tx)  # never called
    attempts: dict[str, Callable[[], Any]] = {
        "restore": lambda: fx.checkpointer(folder).restore(state),
        "fit": lambda: fx.fit(state, step, [1], steps=1, checkpointer=fx.checkpointer(folder), resume=True),
    }
    problems = []
    for time in ("first", "second"):
        for name, attempt in attempts.items():
            try:
                attempt()
                problems.append(f"{name} succeeded at the {time} attempt")
            except fx.CheckpointError:
                pass
            except Exception as error:
                problems.append(f"{name}: expected CheckpointError at the {time} attempt, got {error!r}")
    return problems


def _names(folder: pathlib.Path) -> list[pathlib.Path]:
    return sorted(path for path in folder.rglob("*") if path.name != ".lock")


def _files(path: pathlib.Path) -> list[pathlib.Path]:
    return (
        [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file() and file.stat().st_size)
    )


def _below(file: pathlib.Path, newest: pathlib.Path) -> str:
    return "" if file == newest else str(file.relative_to(newest))


def _on(change: Damage, inner: str, newest: pathlib.Path) -> None:
    change(newest / inner if inner else newest)


def _flip(inner: str, at: int, bit: int, newest: pathlib.Path) -> None:
    file = newest / inner if inner else newest
    content = bytearray(file.read_bytes())
    content[at] ^= 1 << bit
    file.write_bytes(content)


def _halve(file: pathlib.Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def _truncate(file: pathlib.Path) -> None:
    file.write_bytes(b"")


def _remove(file: pathlib.Path) -> None:
    file.unlink()


def _zero_page(file: pathlib.Path) -> None:
    content = file.read_bytes()
    start = max((len(content) // 2 // _PAGE) * _PAGE, 0)
    file.write_bytes(content[:start] + bytes(len(content[start : start + _PAGE])) + content[start + _PAGE :])


def _append(file: pathlib.Path) -> None:
    file.write_bytes(file.read_bytes() + b"\n{}")


def _empty(newest: pathlib.Path) -> None:
    if newest.is_file():
        _truncate(newest)
    else:
        shutil.rmtree(newest)
        newest.mkdir()


@functools.cache
def _values(step: int) -> Values:
    return values_of(step, kilobytes=16)
