"""Retention: the names of a folder's checkpoints, and which of one run's checkpoints are kept."""

from __future__ import annotations

import pathlib
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Literal, NamedTuple, get_args

from fxtrain.checkpoint._errors import CheckpointError

Role = Literal["trajectory", "session", "snapshot"]
"""Why a checkpoint was saved.

- ``"trajectory"``: requested by the run itself. Retention counts these.
- ``"session"``: where a session ended. It is deleted once it is none of the ``keep`` newest of all.
- ``"snapshot"``: a target of rewinds only. It is never listed, and its owner says how long it is kept.
"""

ROLES: tuple[Role, ...] = get_args(Role)
UNREADABLE = "unreadable-"
_NAME = re.compile(r"([0-9]{8,})(?:-([0-9a-f]{12}))?(?:-(session|snapshot))?-step-([0-9]{9,})")


class Entry(NamedTuple):
    """A committed checkpoint. The sequence number orders them: after a rewind a later one has a smaller step."""

    sequence: int
    step: int
    run: str  # "" in folders of format 1
    role: Role
    path: pathlib.Path


class Policy(NamedTuple):
    """What is kept; see ``checkpointer``."""

    keep: int | None
    keep_every: int | None
    best: str | None
    mode: str

    def best_of(self, entries: Sequence[Entry], metrics: Callable[[Entry], dict[str, float]]) -> Entry | None:
        """The trajectory checkpoint with the best metric; the oldest of several. A NaN is never the best."""
        if self.best is None:
            return None
        sign = 1 if self.mode == "min" else -1
        scored = [
            (sign * value, entry)
            for entry in entries
            if entry.role == "trajectory" and (value := metrics(entry).get(self.best)) is not None
        ]
        return min((pair for pair in scored if pair[0] == pair[0]), default=(0, None), key=lambda pair: pair[0])[1]

    def to_delete(self, entries: Sequence[Entry], metrics: Callable[[Entry], dict[str, float]]) -> list[Entry]:
        """The checkpoints of one run that are not kept, oldest first.

        Those of the trajectory are counted alone, because a run may rewind to them and must not depend on where it was
        interrupted. Snapshots are kept unless a newer snapshot has the same step.
        """
        regular = [entry for entry in entries if entry.role == "trajectory"]
        kept = {entry for counted in (regular, listed(entries)) for entry in counted[-(self.keep or 0) :]}
        if self.keep_every is not None:
            kept |= {entry for entry in regular if entry.step % self.keep_every == 0}
        best = self.best_of(regular, metrics)
        kept |= set() if best is None else {best}
        kept |= {entry for entry in entries if entry.role == "snapshot"}
        # Of one step and role only the newest save counts, whatever the policy keeps.
        newest = {(entry.step, entry.role): entry for entry in entries}
        kept = {entry for entry in kept if newest[entry.step, entry.role] is entry}
        kept |= _rewind_marks(kept, entries)
        return [entry for entry in entries if entry not in kept]


def name(sequence: int, step: int, run: str, role: Role) -> str:
    """The folder name of a checkpoint."""
    kind = "" if role == "trajectory" else f"-{role}"
    return f"{sequence:08d}-{run}{kind}-step-{step:09d}"


def entries(folder: pathlib.Path) -> list[Entry]:
    """The committed checkpoints of all runs, oldest first."""
    return _named(folder, "")


def unreadable(folder: pathlib.Path) -> list[Entry]:
    """The checkpoints that were set aside, oldest first."""
    return _named(folder, UNREADABLE)


def listed(found: Iterable[Entry]) -> list[Entry]:
    """The entries that users see: all but the snapshots."""
    return [entry for entry in found if entry.role != "snapshot"]


def line(found: Sequence[Entry]) -> list[Entry]:
    """The entries that led to the newest, newest first: without those that a rewind has abandoned.

    A run that rewinds saves the state that it returns to, so every older entry with as many steps or more was
    abandoned. One of the same step and another role is the same state, saved for another reason.
    """
    led: list[Entry] = []
    for entry in reversed(found):
        if not led or entry.step < led[-1].step or (entry.step == led[-1].step and entry.role != led[-1].role):
            led.append(entry)
    return led


def _rewind_marks(kept: Iterable[Entry], found: Sequence[Entry]) -> set[Entry]:
    """The entries without which a kept one that a rewind has abandoned would seem to lead to the newest."""
    led, marks = line(found), set[Entry]()
    while strays := [entry for entry in line(sorted({*kept, *marks})) if entry not in led]:
        marks.add([entry for entry in led if entry.sequence > strays[0].sequence][-1])
    return marks


def _named(folder: pathlib.Path, prefix: str) -> list[Entry]:
    try:
        paths = list(folder.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise CheckpointError(f"expected a folder that can be listed, got {folder}: {error}.") from error
    return sorted(
        Entry(int(match[1]), int(match[4]), match[2] or "", match[3] or "trajectory", path)  # pyright: ignore[reportArgumentType]
        for path in paths
        if path.name.startswith(prefix) and (match := _NAME.fullmatch(path.name.removeprefix(prefix)))
    )
