"""Saves and restores the states of a run through its checkpointer, and tracks saves in the background."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from fxtrain.checkpoint import Committed, Restoration, Role, Save
from fxtrain.core import SaveBegin, Saved, TrainState, warn
from fxtrain.data import Source
from fxtrain.loop._checkpoint_slots import CheckpointSlots
from fxtrain.loop._emitter import Emitter
from fxtrain.loop._evaluation import Evaluations
from fxtrain.loop._rewind import Snapshots
from fxtrain.loop._types import Events, LoopStep

if TYPE_CHECKING:
    from fxtrain.loop._shared_checkpointer import CheckpointStore

_COMPILED_BY = "compiled by"
_RANKS = "ranks"


class Checkpoints:
    """The loop's interface to a checkpointer, if there is one.

    Args:
        checkpointer: What to save to, or None.
        step: The step of the run. Each save records its compile mode and settings, which affect results bitwise. A
            resume with others warns.
        size: Number of ranks, which affects results bitwise too.
    """

    def __init__(self, checkpointer: CheckpointStore | None, step: LoopStep, size: int = 1) -> None:
        self.checkpointer, self._step = checkpointer, step
        self._ranks = {_RANKS: str(size)}
        self._resumes = False
        self._compiled_by: str | None = None  # compile mode of the restored state, until the step has compiled
        # Weak references, because a step donates only states without other references.
        self._handed: Callable[[], TrainState | None] = lambda: None
        self._save: Save | None = None  # save of the state in `_handed`
        self._on_disk: Callable[[], TrainState | None] = lambda: None

    def restored(self, like: TrainState) -> Restoration | None:
        """Returns the newest saved state, or None if there is none."""
        checkpointer, self._resumes = self.checkpointer, True
        if checkpointer is None or not checkpointer.has_any():
            return None
        report = checkpointer.read(like, notes=self._ranks | self.notes() | self._possible())
        report.warn()
        before = report.environment.get(_COMPILED_BY)
        if before in self._possible().get(_COMPILED_BY, ()):  # any other is reported above
            self._compiled_by = before
        return report

    def begin(self, state: TrainState) -> None:
        """Raises if the folder belongs to another run or cannot be written to, before training starts."""
        if self.checkpointer is not None:
            self.checkpointer.begin(CheckpointSlots().added_to(state), resume=self._resumes)

    def mark_on_disk(self, state: TrainState) -> None:
        """Records that the state was read from the newest checkpoint."""
        self._on_disk = weakref.ref(state)

    def save(self, state: TrainState, metrics: Mapping[str, float], role: Role, slots: CheckpointSlots) -> None:
        """Starts a save. The state may be donated afterwards.

        Args:
            state: The state to save.
            metrics: Metrics of its evaluation, by name.
            role: Why it is saved.
            slots: Slots to save with it.
        """
        if self.checkpointer is None:
            warn(
                "expected a checkpointer for a save requested by a callback, got None, so nothing is saved. Give fit "
                "checkpointer=fxtrain.checkpointer(folder).",
                UserWarning,
            )
            return
        self._warn_of_another_route()
        self._save = self.checkpointer.save(slots.added_to(state), metrics, notes=self.notes(), role=role)
        self._handed = weakref.ref(state)

    @property
    def under_way(self) -> bool:
        """Whether a save has started that ``news`` has not returned yet."""
        return self.checkpointer is not None and bool(self.checkpointer.saving)

    def news(self, *, wait: bool = False) -> list[Committed]:
        """Returns the saves committed since the last call. Raises the errors of saves in the background."""
        if self.checkpointer is None or not self.under_way:
            return []
        if wait:
            self.checkpointer.wait()
        committed = self.checkpointer.committed()
        if self._save is not None and self._save.committed is not None:  # the committed saves may be older ones
            self._on_disk = self._handed
        return committed

    def is_due_at_the_end(self, state: TrainState) -> bool:
        """Whether there is a checkpointer and ``state`` is not on disk yet."""
        return self.checkpointer is not None and state is not self._on_disk()

    def notes(self) -> dict[str, str]:
        """Returns everything that affects the step's results bitwise, as text by name.

        The compile mode is chosen at the step's first call.
        """
        notes = {_COMPILED_BY: getattr(self._step, "route", "nothing"), **getattr(self._step, "settings", {})}
        return notes if self._ranks[_RANKS] == "1" else notes | self._ranks

    def _possible(self) -> dict[str, tuple[str, ...]]:
        possible = getattr(self._step, "possible_routes", None)
        return {} if possible is None else {_COMPILED_BY: possible}

    def _warn_of_another_route(self) -> None:
        """Warns once if the first call after a resume chose another compile mode than the restored state had."""
        (now, *others), before = self._possible().get(_COMPILED_BY, ("nothing",)), self._compiled_by
        if before is None or others:
            return
        self._compiled_by = None
        if now != before:
            warn(
                f"The resumed run may differ in the last bits ({_COMPILED_BY}: {before} at the save, {now} now).",
                UserWarning,
            )

    def close(self) -> None:
        """Closes the checkpointer, so that other runs can write to the folder."""
        if self.checkpointer is not None:
            self.checkpointer.close()


class Saves:
    """Handles the requests to save.

    Args:
        emitter: Emits ``SaveBegin`` and ``Saved``, and has the observers, which are flushed before a save.
        checkpoints: The checkpoints of the run.
        snapshots: The snapshots that are saved with a checkpoint.
        evaluations: The evaluations, whose metrics are saved.
        data: The data source.
    """

    def __init__(
        self, emitter: Emitter, checkpoints: Checkpoints, snapshots: Snapshots, evaluations: Evaluations, data: Source
    ) -> None:
        self._now, self._publish, self._reader, self._emit = emitter.now, emitter.publish, emitter.reader, emitter.emit
        self._checkpoints, self._snapshots, self._evaluations, self._data = checkpoints, snapshots, evaluations, data

    def handle(self) -> Events[None]:
        """Saves the current state, as a callback requested."""
        self._now.set(save=False)
        yield from self.save("trajectory")
        yield from self.report()

    def save(self, role: Role) -> Events[None]:
        """Emits ``SaveBegin``, and saves the current state."""
        if self._checkpoints.checkpointer is not None:
            try:
                yield from self._emit(SaveBegin, role=role)
            except Exception:
                if role == "session":  # no other save follows
                    self._start(role)
                raise
        self._start(role)

    def _start(self, role: Role) -> None:
        """Saves the current state, after flushing the observers and saving the snapshots that it lists."""
        now = self._now
        self._publish.flush(now.step)
        self._snapshots.save(now.snapshots)
        slots = self._slots() if self._checkpoints.checkpointer is not None else CheckpointSlots()
        self._checkpoints.save(now.state, self._evaluations.metrics_of_this_step(), role, slots)
        self._snapshots.delete_unlisted(now.snapshots)

    def _slots(self) -> CheckpointSlots:
        now = self._now
        return CheckpointSlots(
            batch=self._reader.last_batch(),
            data=self._data.snapshot(now.epoch.data_index(now.position)),
            stop_reasons=now.why if now.due["stop"] else (),
            epoch_metrics=now.metrics,
        )

    def save_last(self) -> Events[None]:
        """Waits for the saves under way, and saves the final state of the session unless it is on disk."""
        yield from self.report(wait=True)
        if self._checkpoints.is_due_at_the_end(self._now.state) and not self._now.due["skip_final_save"]:
            # A pending save request, such as one that waits for an evaluation, stays due.
            yield from self.save("session")
            yield from self.report(wait=True)

    def report(self, *, wait: bool = False) -> Events[None]:
        """Emits ``Saved`` for each checkpoint committed since the last call."""
        for step, path, measured in self._checkpoints.news(wait=wait):
            yield from self._emit(Saved, step=step, path=str(path), metrics=measured)
