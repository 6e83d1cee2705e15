"""The folder names of checkpoints, and the policy that selects which checkpoints of a run are kept."""

from __future__ import annotations

import pathlib
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Literal, NamedTuple, get_args

from fxtrain.checkpoint._errors import CheckpointError

Role = Literal["trajectory", "session", "snapshot"]
"""The purpose of a checkpoint.

- ``"trajectory"``: requested by the run itself. ``keep``, ``keep_every`` and ``best`` apply to these.
- ``"session"``: saved at the end of a session, and kept while it is among the ``keep`` newest of these two roles.
- ``"snapshot"``: only a target of rewinds. It is never listed, and is kept until ``retain_snapshots`` deletes it.
"""

ROLES: tuple[Role, ...] = get_args(Role)
UNREADABLE = "unreadable-"
_NAME = re.compile(r"([0-9]{8,})(?:-([0-9a-f]{12}))?(?:-(session|snapshot))?-step-([0-9]{9,})")


class Entry(NamedTuple):
    """A committed checkpoint. Entries are ordered by sequence number, because a rewind makes the step decrease."""

    sequence: int
    step: int
    run: str  # empty in folders of format 1
    role: Role
    path: pathlib.Path


class RetentionPolicy(NamedTuple):
    """The retention policy. See ``checkpointer`` for the fields."""

    keep_newest: int | None
    keep_every: int | None
    best: str | None
    mode: str

    def best_of(self, entries: Sequence[Entry], metrics: Callable[[Entry], dict[str, float]]) -> Entry | None:
        """Returns the oldest trajectory checkpoint with the best metric, or None. NaN values are ignored."""
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
        """Returns the checkpoints of one run that have expired, oldest first.

        Session checkpoints do not displace trajectory checkpoints, because a rewind may return to the latter and must
        not depend on where the run was interrupted. Snapshots are kept unless a newer snapshot has the same step.

        Args:
            entries: All checkpoints of the run, oldest first.
            metrics: Returns the metrics of a checkpoint.
        """
        regular = [entry for entry in entries if entry.role == "trajectory"]
        kept = {entry for counted in (regular, listed(entries)) for entry in counted[-(self.keep_newest or 0) :]}
        if self.keep_every is not None:
            kept |= {entry for entry in regular if entry.step % self.keep_every == 0}
        best = self.best_of(regular, metrics)
        kept |= set() if best is None else {best}
        kept |= {entry for entry in entries if entry.role == "snapshot"}
        # Only the newest save of each step and role is ever kept.
        newest = {(entry.step, entry.role): entry for entry in entries}
        kept = {entry for entry in kept if newest[entry.step, entry.role] is entry}
        kept |= _rewind_marks(kept, entries)
        return [entry for entry in entries if entry not in kept]


def name(sequence: int, step: int, run: str, role: Role) -> str:
    """Returns the folder name of a checkpoint."""
    kind = "" if role == "trajectory" else f"-{role}"
    return f"{sequence:08d}-{run}{kind}-step-{step:09d}"


def entries(folder: pathlib.Path) -> list[Entry]:
    """Returns the committed checkpoints of all runs, oldest first."""
    return _named(folder, "")


def unreadable(folder: pathlib.Path) -> list[Entry]:
    """Returns the checkpoints of all runs that were set aside as unreadable, oldest first."""
    return _named(folder, UNREADABLE)


def listed(found: Iterable[Entry]) -> list[Entry]:
    """Returns the entries that users see, which are all except snapshots."""
    return [entry for entry in found if entry.role != "snapshot"]


def timeline(found: Sequence[Entry]) -> list[Entry]:
    """Returns the entries on the timeline of the newest one, newest first, without those abandoned by a rewind.

    A run saves the state that it rewinds to, so an older entry with the same or a larger step was abandoned. An older
    entry with the same step and another role holds the same state, and stays.
    """
    led: list[Entry] = []
    for entry in reversed(found):
        if not led or entry.step < led[-1].step or (entry.step == led[-1].step and entry.role != led[-1].role):
            led.append(entry)
    return led


def _rewind_marks(kept: Iterable[Entry], found: Sequence[Entry]) -> set[Entry]:
    """Returns the entries that must be kept so that ``timeline`` excludes all kept entries abandoned by a rewind."""
    led, marks = timeline(found), set[Entry]()
    while strays := [entry for entry in timeline(sorted({*kept, *marks})) if entry not in led]:
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
