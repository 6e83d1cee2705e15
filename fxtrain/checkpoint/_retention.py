"""The folder names of checkpoints, the policy that selects which of a run are kept, and the deletion of others."""

from __future__ import annotations

import collections
import math
import pathlib
import re
import shutil
from collections.abc import Callable, Iterable, Sequence
from typing import Literal, NamedTuple, get_args

from fxtrain.checkpoint._errors import CheckpointError
from fxtrain.checkpoint._temporary_folder import UNFINISHED
from fxtrain.disk import sync_folder

Role = Literal["trajectory", "session", "snapshot"]
"""The purpose of a checkpoint.

- ``"trajectory"``: requested by the run itself. ``keep``, ``keep_every`` and ``best`` apply to these.
- ``"session"``: saved at the end of a session, and kept while it is among the ``keep`` newest of these two roles.
- ``"snapshot"``: only a target of rewinds. It is never listed, and is kept until ``retain_snapshots`` deletes it.
"""

ROLES: tuple[Role, ...] = get_args(Role)
UNREADABLE = "unreadable-"
_DELETED = ".deleted-"
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
        regular = [entry for entry in entries if entry.role == "trajectory"]
        scores = {entry: sign * metrics(entry).get(self.best, math.nan) for entry in regular}
        return min((entry for entry in regular if not math.isnan(scores[entry])), default=None, key=scores.__getitem__)

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


def entries(folder: pathlib.Path, prefix: str = "") -> list[Entry]:
    """Returns the committed checkpoints of all runs, or with ``UNREADABLE`` those set aside, oldest first."""
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


class Deletion:
    """Deletes checkpoints from a folder.

    A failed deletion only wastes disk space, so it is reported as a warning, once for each path.

    Args:
        folder: The folder of the checkpoints.
        warnings: A queue that receives the texts of warnings.
    """

    def __init__(self, folder: pathlib.Path, warnings: collections.deque[str]) -> None:
        self._folder, self._warnings = folder, warnings
        self._warned: set[pathlib.Path] = set()

    def delete(self, entries: Iterable[Entry]) -> None:
        """Deletes the checkpoints in ``entries``."""
        for entry in entries:
            # Renamed first, because an interrupted deletion must not leave a partial checkpoint under a valid name.
            renamed = entry.path.with_name(f"{_DELETED}{entry.path.name}")
            try:
                if entry.path.is_symlink():
                    raise OSError("a symbolic link")
                entry.path.rename(renamed)
                sync_folder(self._folder)
                shutil.rmtree(renamed)
            except OSError as error:
                self.warn_once(
                    entry.path,
                    f"expected to delete the expired checkpoint {entry.path}, got {error}. It still takes disk space.",
                )

    def warn_once(self, path: pathlib.Path, text: str) -> None:
        """Queues the warning ``text``, unless there was one for the same path."""
        if path not in self._warned:
            self._warned.add(path)
            self._warnings.append(text)

    def clear(self) -> None:
        """Deletes partly written and partly deleted checkpoints. Requires the folder lock, so no writer is active."""
        for pattern in (f"{UNFINISHED}*-step-*", f"{_DELETED}*"):
            for path in self._folder.glob(pattern):
                shutil.rmtree(path, ignore_errors=True)
