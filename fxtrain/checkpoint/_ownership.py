"""Determines which run a folder's checkpoints belong to, and whether a session may add to them."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Callable, Iterable, Sequence
from typing import NoReturn

import xxhash
from torch import Tensor

from fxtrain import tree
from fxtrain.checkpoint import _retention as retention
from fxtrain.checkpoint._errors import CheckpointError
from fxtrain.checkpoint._host_copy import host_bytes
from fxtrain.checkpoint._leaf_table import Leaf, slices_of
from fxtrain.checkpoint._manifest import read_entry
from fxtrain.checkpoint._retention import Entry
from fxtrain.core import TrainState

_MOST_STEPS_SHOWN = 12


class Ownership:
    """Selects the run that a checkpointer writes for, based on the checkpoints it has written and read.

    Args:
        folder: The folder of the checkpoints.
        overwrite: Whether a new run may begin in a folder with checkpoints of another run.
    """

    def __init__(self, folder: pathlib.Path, *, overwrite: bool) -> None:
        self._folder, self._overwrite = folder, overwrite
        self._last: Entry | None = None  # the last checkpoint written or read
        self._newest: Entry | None = None  # the newest checkpoint of its run at that time

    def wrote(self, entry: Entry) -> None:
        """Records that this checkpointer committed ``entry``."""
        self._last = self._newest = entry

    def has_read(self, entry: Entry, found: Sequence[Entry]) -> None:
        """Records that this checkpointer restored ``entry`` from a folder with the checkpoints ``found``."""
        self._last, self._newest = entry, _newest_listed(found)

    @property
    def last(self) -> Entry | None:
        """The last checkpoint written or read."""
        return self._last

    def run_of_session(self, is_saved_as: Callable[[Entry], bool], found: Sequence[Entry], *, resume: bool) -> str:
        """Returns the run of a session.

        Args:
            is_saved_as: Whether a checkpoint has the session's first state, as ``is_saved_as``.
            found: All checkpoints in the folder, oldest first.
            resume: Whether the session was asked to resume.

        Raises:
            CheckpointError: If the folder belongs to another run.
        """
        if resume and not retention.listed(found):  # the run was interrupted before its first checkpoint
            return newest_run(found) or _new_run()
        last = self._last_if_current(found)
        if last is not None and (resume or is_saved_as(last)):
            return last.run
        if resume:  # another process has saved since the state was read, and its work must not be overwritten
            self._refuse(found)
        return self._new_run_beside(found)

    def run_of_save(self, found: Sequence[Entry]) -> str:
        """Returns the run of a save outside of a session.

        Raises:
            CheckpointError: If the folder belongs to a run that this object has not read from.
        """
        last = self._last_if_current(found)
        return last.run if last is not None else self._new_run_beside(found)

    def _last_if_current(self, found: Sequence[Entry]) -> Entry | None:
        """Returns the last checkpoint written or read, or None if another writer has saved since."""
        return self._last if self._newest is not None and self._newest == _newest_listed(found) else None

    def _new_run_beside(self, found: Sequence[Entry]) -> str:
        if found and not self._overwrite:
            self._refuse(found)
        return _new_run()

    def _refuse(self, found: Sequence[Entry]) -> NoReturn:
        aside = [entry for entry in found if entry.path.name.startswith(retention.UNREADABLE)]
        committed = [entry for entry in found if entry not in aside]
        described = [f"checkpoints of steps {shown(committed)}"] if committed else []
        described += [f"{len(aside)} that were set aside as unreadable"] if aside else []
        raise CheckpointError(
            f"expected a folder without checkpoints of another run, got {self._folder} with {' and '.join(described)}. "
            "To resume that run, call fit(..., resume=True), or restore its newest checkpoint with this checkpointer "
            "and continue from the restored state. To keep it, give another folder. To replace it, create the "
            "checkpointer with overwrite=True."
        )


def contents(folder: pathlib.Path) -> list[Entry]:
    """Returns the checkpoints of all runs, including those set aside as unreadable, oldest first."""
    return sorted([*retention.entries(folder), *retention.entries(folder, retention.UNREADABLE)])


def newest_run(found: Sequence[Entry]) -> str | None:
    """Returns the run that wrote the newest checkpoint, or None if there is no checkpoint."""
    return found[-1].run if found else None


def shown(entries: Iterable[Entry]) -> str:
    """Returns the steps of checkpoints as text for a message. Of many steps only the first and last ones are shown."""
    texts = [str(step) for step in sorted({entry.step for entry in entries})]
    if len(texts) > _MOST_STEPS_SHOWN:
        texts = [*texts[:3], "...", *texts[-6:]]
    return ", ".join(texts) or "none"


def _new_run() -> str:
    # From the operating system, because a run must not read or advance the generators of torch and Python.
    return os.urandom(6).hex()


def _newest_listed(found: Sequence[Entry]) -> Entry | None:
    run = newest_run(found)
    own = [entry for entry in retention.listed(found) if entry.run == run]
    return next((entry for entry in reversed(own) if not entry.path.name.startswith(retention.UNREADABLE)), None)


def is_saved_as(state: TrainState, entry: Entry) -> bool:
    """Returns whether the step of ``state`` equals a checkpoint's, and its seed and parameters are bitwise equal.

    A state of step 0 never counts as saved, because every new run begins with one.
    """
    if entry.step == 0 or int(state.step) != entry.step:
        return False
    try:
        saved = {row["path"]: row for row in read_entry(entry)["leaves"]}
    except CheckpointError:
        return False
    given: dict[str, Tensor] = {"state.seed": state.seed}
    given.update(zip(tree.paths(state.params, "state.params"), tree.leaves(state.params), strict=True))
    return all(path in saved and _is_content(leaf, saved[path]) for path, leaf in given.items())


def _is_content(leaf: Tensor, row: Leaf) -> bool:
    """Returns whether a leaf has the checksums of a row."""
    if list(leaf.shape) != row["shape"]:
        return False
    axis = row.get("axis")
    return all(
        xxhash.xxh3_64(
            host_bytes(leaf if axis is None else leaf.narrow(axis, piece["start"], piece["length"]))
        ).hexdigest()
        == piece["xxh3"]
        for piece in slices_of(row)
    )
