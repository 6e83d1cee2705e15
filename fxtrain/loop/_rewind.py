"""The states that a run can rewind to."""

from __future__ import annotations

from collections.abc import Sequence

from fxtrain import tree
from fxtrain.core import TrainState
from fxtrain.loop._cursor import Cursor
from fxtrain.loop._saving import Saving


class Snapshots:
    """Retains snapshots of the state: in memory, and on disk next to each checkpoint.

    The steps of the retained states are part of the state (``Cursor.snapshots``), and a checkpoint is saved with the
    snapshots that it lists. A resumed run therefore rewinds to the same step as an uninterrupted one.

    Args:
        every: Retain a state at steps that are multiples of ``every``; None retains none.
        count: Number of snapshots to retain, the newest ones.
        on_host: Whether to retain them in host memory.
        copied: Whether to copy them, because the step donates its state.
        saving: The checkpoints of the run.
    """

    def __init__(self, every: int | None, count: int, *, on_host: bool, copied: bool, saving: Saving) -> None:
        self._every, self._count, self._on_host, self._copied = every, count, on_host, copied
        self._saving = saving
        self._in_memory: dict[int, TrainState] = {}
        self._on_disk: set[int] = set()

    def begin(self, now: Cursor) -> None:
        """Drops listed snapshots that are not on disk, for example those of a run without a checkpointer."""
        if self._every or now.snapshots:
            self._on_disk = set(now.snapshots) & self._saving.snapshots()
            now.list_snapshots([step for step in now.snapshots if step in self._on_disk], self._count)

    def is_due(self, now: Cursor) -> bool:
        """Whether the current state is to be retained."""
        return bool(self._every) and now.step % self._every == 0 and now.step not in now.snapshots

    def retain(self, now: Cursor) -> None:
        """Retains the current state, and drops the oldest snapshot if there are too many."""
        now.list_snapshots([*now.snapshots, now.step][-self._count :], self._count)
        state = now.state
        if self._on_host:
            state = tree.map(lambda leaf: leaf.to("cpu", copy=True), state)
        elif self._copied:
            state = state.copy()
        self._in_memory[now.step] = state
        self._drop_unlisted(now.snapshots)

    def save(self, listed: Sequence[int]) -> None:
        """Saves the listed snapshots that are not on disk, before the checkpoint that lists them."""
        for step in listed:
            if step not in self._on_disk and step in self._in_memory:
                self._saving.save_snapshot(self._in_memory[step])
                self._on_disk.add(step)

    def newest_until(self, step: int, now: Cursor) -> TrainState | None:
        """Returns the newest state of ``step`` or before, on the device of the current one; None if there is none.

        A snapshot is preferred to a checkpoint of the same step. Damaged ones are skipped.
        """
        like = now.state
        for listed in [*sorted((s for s in now.snapshots if s <= step), reverse=True), -1]:
            newer = self._saving.read_newest_until(step, like, newer_than=listed)
            if newer is not None:
                return newer
            if listed in self._in_memory:
                return tree.map(lambda leaf: leaf.to(like.step.device), self._in_memory[listed])
            if listed in self._on_disk and (state := self._saving.read_snapshot(listed, like)) is not None:
                return state
        return None

    def roll_back(self, now: Cursor) -> None:
        """Drops the snapshots that are newer than the state that the run has rewound to.

        Args:
            now: The state after the rewind, with the list of snapshots from before.
        """
        left = [step for step in now.snapshots if step <= now.step]
        now.list_snapshots(left, self._count)
        self._drop_unlisted(left)

    def _drop_unlisted(self, listed: Sequence[int]) -> None:
        self._in_memory = {step: state for step, state in self._in_memory.items() if step in listed}
        self._on_disk.intersection_update(listed)
