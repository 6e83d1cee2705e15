"""R3: committed checkpoints survive a SIGKILL before any file-system call of a save or deletion."""

from __future__ import annotations

import functools
import pathlib
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from benchmarks.reliability import children, shim
from benchmarks.reliability.systems import Save, System, Values, clear, same, values_of, zeros_like
from benchmarks.reliability.table import Cell

# The second save is the best, so all newer ones are worse. A rewound run saves smaller steps, and a resumed run may
# save a step again.
FORWARD = tuple(Save(step, loss) for step, loss in enumerate((0.5, 0.1, 0.6, 0.7, 0.8, 0.4, 0.9), start=1))
WITH_RETURNS = (
    Save(10, 0.5),
    Save(20, 0.1),
    Save(30, 0.6),
    Save(40, 0.7, reopen=True),
    Save(40, 0.8),
    Save(50, 0.9),
    Save(30, 0.4, reopen=True),
    Save(40, 0.3),
    Save(50, 0.05),
)


class Variant(NamedTuple):
    """A retention policy, and whether to wait for each save."""

    best: bool
    waits: bool

    def __str__(self) -> str:
        return f"keep {'best' if self.best else 'latest'}{'' if self.waits else ', not waiting'}"


class Found(NamedTuple):
    """The checkpoints found by a new session."""

    listed: dict[Any, int | None]  # by name, the index of the save with bit-identical values, None if there is none
    problems: list[str]  # errors and warnings
    latest: Any


def variants(system: type[System]) -> list[Variant]:
    """Returns the variants that differ for a system. Waiting makes no difference for synchronous saves."""
    both = [Variant(best=False, waits=True), Variant(best=True, waits=True)]
    return [*both, Variant(best=True, waits=False)] if system.can_rewind else both


def crash_points(system: type[System], *, every: int = 1) -> Cell:
    """Kills a scenario before every ``every``-th file-system call, in each variant."""
    cell = Cell()
    saves = WITH_RETURNS if system.can_rewind else FORWARD
    for index in range(len(saves) + 1):
        values(index)  # fills the cache before the children are forked
    for variant in variants(system):
        with shim.scratch() as parent:
            folder = pathlib.Path(parent) / "run"
            points = children.answer(functools.partial(_counted, system, folder, variant, saves))
            for point in range(1, points + 1, every):
                clear(folder)
                outcome = children.in_child(functools.partial(scenario, system, folder, variant, saves, point))
                cell.add(_problems(system, folder, variant, saves, outcome), at=f"{variant}, before call {point}")
    return cell


def scenario(
    system: type[System],
    folder: pathlib.Path,
    variant: Variant,
    saves: Sequence[Save],
    kill_at: int,
    tell: Callable[[Any], None],
) -> None:
    """Makes the saves in order, and sends the number of committed saves after each."""
    shim.arm(folder, kill_at=kill_at)
    session = system(folder, best=variant.best)
    committed = 0
    for index, save in enumerate(saves):
        if save.reopen:
            session.close()
            tell(committed := index)
            session = system(folder, best=variant.best)
        session.save(save.step, values(index), save.loss)
        if variant.waits:
            session.wait()
            tell(index + 1)
        else:
            committed += _news(session)
            tell(committed)
    session.close()
    tell(len(saves))


def _news(session: Any) -> int:
    return len(session.checkpoints.committed())


def _counted(system: type[System], folder: pathlib.Path, variant: Variant, saves: Sequence[Save]) -> int:
    scenario(system, folder, variant, saves, 0, lambda _: None)
    return shim.count()


def _problems(
    system: type[System],
    folder: pathlib.Path,
    variant: Variant,
    saves: Sequence[Save],
    outcome: children.Outcome,
) -> list[str]:
    """Returns the problems of a folder after a scenario with this outcome."""
    if outcome.error:
        return [f"the scenario itself failed: {outcome.error.splitlines()[-1]}"]
    committed = max(outcome.told, default=0)
    if not outcome.killed and committed != len(saves):
        return ["the scenario ended early"]
    checked = children.in_child(functools.partial(_check, system, folder, variant, saves, committed))
    if checked.error:
        return [f"a new session failed: {checked.error.splitlines()[-1]}"]
    return checked.told[0]


def _check(
    system: type[System],
    folder: pathlib.Path,
    variant: Variant,
    saves: Sequence[Save],
    committed: int,
    tell: Callable[[Any], None],
) -> None:
    session = system(folder, best=variant.best)
    found = look(session, range(len(saves)))
    problems = judge(session, saves, committed, found)
    # One more save must succeed and remove leftover files.
    following = Save(max(save.step for save in saves) + 1, 1.0)
    session.save(following.step, values(len(saves)), following.loss)
    session.wait()
    session.close()
    after = look(system(folder, best=variant.best), range(len(saves) + 1))
    problems += [f"after one more save: {problem}" for problem in after.problems]
    there = sorted({index for index in found.listed.values() if index is not None})
    wanted = session.kept([*(saves[index] for index in there), following])
    if session.manages and {[*there, len(saves)][index] for index in wanted} != set(after.listed.values()):
        problems.append(f"unexpected checkpoints after one more save: {after.listed}")
    problems += [f"leftover file: {name}" for name in session.leftovers()]
    tell(problems)


def look(session: System, indices: Iterable[int]) -> Found:
    """Restores every checkpoint listed by a session."""
    listed: dict[Any, int | None] = {}
    problems = []
    latest = None
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # a checkpoint set aside counts as a loss
        try:
            names = session.listed()
            latest = session.latest()
        except Exception as error:
            return Found({}, [f"listing fails: {_short(error)}"], None)
        for name in names:
            listed[name] = None
            try:
                restored = session.restore(name, zeros_like(values(0)))
            except Exception as error:
                problems.append(f"{name} is listed and cannot be restored: {_short(error)}")
                continue
            listed[name] = next((index for index in indices if same(restored, values(index))), None)
            if listed[name] is None:
                problems.append(f"{name} is restored with values that were never saved")
    return Found(listed, problems, latest)


def judge(session: System, saves: Sequence[Save], committed: int, found: Found) -> list[str]:
    """Returns contradictions to the expectation that at least the first ``committed`` saves are committed."""
    problems = list(found.problems)
    there = {index for index in found.listed.values() if index is not None}
    if not any(session.kept(saves[:count]) <= there for count in range(committed, len(saves) + 1)):
        problems.append(f"expected {committed} committed saves or more, got {found.listed}")
    if committed and found.latest is None:
        problems.append(f"expected a latest checkpoint after {committed} committed saves, got none")
    if found.latest is not None and (found.latest not in found.listed or found.listed[found.latest] is None):
        problems.append(f"the latest checkpoint, {found.latest}, cannot be restored")
    elif found.latest is not None and found.listed[found.latest] != max(there):
        problems.append(f"expected the latest of {found.listed}, got {found.latest}")
    for name, index in found.listed.items():
        if index is not None and isinstance(name, int) and saves[index : index + 1] and saves[index].step != name:
            problems.append(f"{name} has the values of step {saves[index].step}")
    return problems


@functools.cache
def values(index: int) -> Values:
    """Returns the cached values of a save."""
    return values_of(index)


def _short(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".replace("\n", " ")[:160]
