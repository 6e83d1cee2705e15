"""Rewinds: the states that a run can return to, in memory and on disk, and the return itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch

from fxtrain import tree
from fxtrain.core import LOOP, REWINDS, Rewound, TrainState
from fxtrain.core._slots import MEMBERS
from fxtrain.data import Source
from fxtrain.loop._checkpoint_slots import CheckpointSlots
from fxtrain.loop._cursor import Cursor
from fxtrain.loop._emitter import Emitter
from fxtrain.loop._epoch_metrics import EpochMetrics
from fxtrain.loop._epochs import announce
from fxtrain.loop._plan import Plan
from fxtrain.loop._types import Events

if TYPE_CHECKING:
    from fxtrain.loop._shared_checkpointer import CheckpointStore


class Snapshots:
    """Retains snapshots of the state: in memory, and on disk next to each checkpoint.

    The steps of the retained states are part of the state (``Cursor.snapshots``), and a checkpoint is saved with the
    snapshots that it lists. A resumed run therefore rewinds to the same step as an uninterrupted one.

    Args:
        plan: The options of the run.
        checkpointer: What to save to, or None.
        copied: Whether to copy the states, because the step donates them.
        notes: Returns the notes to save with each snapshot.
    """

    def __init__(
        self, plan: Plan, checkpointer: CheckpointStore | None, *, copied: bool, notes: Callable[[], dict[str, str]]
    ) -> None:
        self._every, self._count = plan.snapshot_every, plan.snapshots
        self._on_host, self._copied = plan.snapshots_on_host, copied
        self._checkpointer, self._notes = checkpointer, notes
        self._may_be_on_disk = False
        self._in_memory: dict[int, tuple[TrainState, EpochMetrics]] = {}
        self._on_disk: set[int] = set()

    def begin(self, now: Cursor) -> None:
        """Drops listed snapshots that are not on disk, for example those of a run without a checkpointer."""
        if self._every or now.snapshots:
            found: set[int] = set() if self._checkpointer is None else self._checkpointer.snapshots()
            self._may_be_on_disk = bool(found)
            self._on_disk = found.intersection(now.snapshots)
            now.list_snapshots([step for step in now.snapshots if step in self._on_disk], self._count)

    def is_due(self, now: Cursor) -> bool:
        """Whether the current state is to be retained."""
        return bool(self._every) and now.step % self._every == 0 and now.step not in now.snapshots

    def retain(self, now: Cursor) -> None:
        """Retains the current state, and drops the oldest snapshot if there are too many."""
        now.list_snapshots([*now.snapshots, now.step], self._count)
        state = now.state
        if self._on_host:
            state = tree.map(lambda leaf: leaf.to("cpu", copy=True), state)
        elif self._copied:
            state = state.copy()
        self._in_memory[now.step] = state, now.metrics.copy()
        self._drop_unlisted(now.snapshots)

    def save(self, listed: Sequence[int]) -> None:
        """Saves the listed snapshots that are not on disk, before the checkpoint that lists them."""
        if self._checkpointer is None:
            return
        for step in listed:
            if step not in self._on_disk and step in self._in_memory:
                state, measured = self._in_memory[step]
                self._checkpointer.save(measured.added_to(state), notes=self._notes(), role="snapshot")
                self._may_be_on_disk = True
                self._on_disk.add(step)

    def delete_unlisted(self, listed: Sequence[int]) -> None:
        """Deletes the other snapshots on disk, once the checkpoint whose save has just begun is committed."""
        if self._checkpointer is not None and self._may_be_on_disk:
            self._checkpointer.retain_snapshots(listed)

    def newest_until(self, step: int, now: Cursor) -> tuple[TrainState, EpochMetrics] | None:
        """Returns the newest state of ``step`` or before, on the device of the current one; None if there is none.

        With it come the metrics of its epoch.

        A snapshot is preferred to a checkpoint of the same step. Damaged ones are skipped.
        """
        # Without the loop's slots, so that they are read from the checkpoint.
        slots = {name: slot for name, slot in now.state.slots.items() if not name.startswith(LOOP)}
        like, reader = now.state.replace(slots=slots), self._checkpointer
        for listed in [*sorted((s for s in now.snapshots if s <= step), reverse=True), -1]:
            report = None if reader is None else reader.read_newest_until(step, like, newer_than=listed)
            if report is None and listed in self._in_memory:
                state, measured = self._in_memory[listed]
                return tree.map(lambda leaf: leaf.to(like.step.device), state), measured.copy()
            if report is None and reader is not None and listed in self._on_disk:
                report = reader.read_snapshot(listed, like)
            if report is not None:
                report.warn()
                state, saved = CheckpointSlots.split(report.state)
                return state, saved.epoch_metrics or EpochMetrics()
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
        self._in_memory = {step: kept for step, kept in self._in_memory.items() if step in listed}
        self._on_disk.intersection_update(listed)


def rewind(emitter: Emitter, snapshots: Snapshots, data: Source) -> Events[None]:
    """Returns to the newest state that is old enough for the pending request, or stops if there is none.

    Args:
        emitter: Emits ``Rewound``.
        snapshots: The states to rewind to.
        data: The data source.
    """
    now = emitter.now
    old, old_epoch, steps = now.state, now.epoch.done, now.due["rewind"]
    found = snapshots.newest_until(now.step - steps, now)
    now.set(rewind=0, evaluate=False, end_epoch=False, save=False)
    if found is None:
        now.stop(f"a rewind of {steps} steps was requested at step {now.step}, but no retained state is that old")
        return
    target, measured = found
    if MEMBERS in old.slots:
        from fxtrain.loop._members import with_stopped

        target = with_stopped(target, old)
    to_step = int(target.step)
    times: dict[int, int] = dict(old.slots[REWINDS].tolist()) if REWINDS in old.slots else {}
    times[to_step] = times.get(to_step, 0) + 1
    yield from emitter.emit(
        Rewound,
        from_step=now.step,
        to_step=to_step,
        abandoned=range(int(target.position), now.position),
        times=times[to_step],
    )
    now.read_flags()
    # Only slots written at this event, and a request to stop, survive the rewind.
    surviving = {name: slot for name, slot in now.state.slots.items() if slot is not old.slots.get(name)}
    surviving[REWINDS] = torch.tensor(sorted(times.items()), device=old.step.device)
    due, retained, length = now.due, now.snapshots, now.epoch.length
    now.take(target.replace(slots={**target.slots, **surviving}))
    now.metrics = measured
    # Keep the epoch length if it was found after the snapshot.
    if not now.epoch.length:
        now.count(now.epoch._replace(length=length))
    if now.epoch.done < old_epoch:
        emitter.epoch_began = emitter.time()
    announce(data, now.epoch)
    now.snapshots = retained
    snapshots.roll_back(now)
    # Save again, so the folder marks the abandoned steps and a resume starts from the new timeline.
    now.set(stop=due["stop"], skip_final_save=due["skip_final_save"], save=emitter.plan.checkpointer is not None)
    if times[to_step] > (limit := emitter.plan.rewind_limit):
        now.stop(f"rewound to step {to_step} {times[to_step]} times, more than rewind_limit={limit} allows")
