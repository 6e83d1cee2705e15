"""Saving: what the loop has handed to the checkpointer, and what has become of it."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from fxtrain.checkpoint import Committed, Restoration, Role
from fxtrain.core import LOOP, TrainState
from fxtrain.loop._saved_slots import SavedSlots

_COMPILED_BY = "compiled by"


class Saving:
    """The loop's side of a checkpointer, or of none.

    Args:
        checkpointer: From ``fxtrain.checkpointer``, or None.
        step: The step of the run. What decides the bits of its result is kept by each save as the step reports it
            then, and a resume with another warns.
    """

    def __init__(self, checkpointer: Any, step: Any) -> None:
        self._checkpointer, self._step = checkpointer, step
        self._resumes = False
        self._compiled_by: str | None = None  # of the state that was restored, until the step has compiled
        self._has_snapshots = False  # whether the folder may hold any
        # Weak references, because a step donates only what has no other reference.
        self._handed: Callable[[], TrainState | None] = _nothing
        self._save: Any = None  # of the state handed over last
        self._on_disk: Callable[[], TrainState | None] = _nothing

    def restored(self, like: TrainState) -> Restoration | None:
        """The newest state there is, if there is any."""
        checkpointer, self._resumes = self._checkpointer, True
        if not checkpointer.has_any():
            return None
        report: Restoration = checkpointer.read(like, notes=self._notes() | self._possible())
        report.warn(stacklevel=5)
        before = report.environment.get(_COMPILED_BY)
        if before in self._possible().get(_COMPILED_BY, ()):  # any other has been reported
            self._compiled_by = before
        return report

    def begin(self, state: TrainState) -> None:
        """Refuses now, and not after an hour, a folder of another run or one that cannot be written to."""
        if self._checkpointer is not None:
            self._checkpointer.begin(SavedSlots().into(state), resume=self._resumes)

    def mark_on_disk(self, state: TrainState) -> None:
        """Notes that the state was read from the newest checkpoint."""
        self._on_disk = weakref.ref(state)

    def save(
        self,
        state: TrainState,
        metrics: Mapping[str, float],
        role: Role,
        snapshots: Iterable[int],
        slots: SavedSlots,
    ) -> None:
        """Hands ``state`` over; it may be donated afterwards.

        Args:
            state: To be saved.
            metrics: Of its evaluation, by name.
            role: Why it is saved.
            snapshots: The steps that it lists. Snapshots of other steps are deleted once it is committed.
            slots: Saved with it.
        """
        if self._checkpointer is None:
            warnings.warn(
                "A save was asked for and nothing is saved, because fit was given no checkpointer: give "
                "checkpointer=fxtrain.checkpointer(folder).",
                UserWarning,
                stacklevel=2,
            )
            return
        self._warn_of_another_route()
        self._save = self._checkpointer.save(slots.into(state), metrics, notes=self._notes(), role=role)
        self._handed = weakref.ref(state)
        if self._has_snapshots:
            self._checkpointer.retain_snapshots(snapshots)

    @property
    def under_way(self) -> bool:
        """Whether something was handed over of which there was no news yet."""
        return self._checkpointer is not None and bool(self._checkpointer.saving)

    def news(self, *, wait: bool = False) -> list[Committed]:
        """What has reached the disk since this was last called; an error of the disk is raised here."""
        if not self.under_way:
            return []
        checkpointer = self._checkpointer
        if wait:
            checkpointer.wait()
        committed: list[Committed] = checkpointer.committed()
        if self._save is not None and self._save.committed is not None:  # the news may be of an older save only
            self._on_disk = self._handed
        return committed

    def is_due_at_the_end(self, state: TrainState) -> bool:
        """Whether ``state`` is not on the disk yet, where it could be."""
        return self._checkpointer is not None and state is not self._on_disk()

    def _notes(self) -> dict[str, str]:
        """What decides the bits of the step's result, as text by name. The first call chooses how it is compiled."""
        return {_COMPILED_BY: getattr(self._step, "how", "nothing"), **getattr(self._step, "settings", {})}

    def _possible(self) -> dict[str, tuple[str, ...]]:
        possible = getattr(self._step, "possible", None)
        return {} if possible is None else {_COMPILED_BY: possible}

    def _warn_of_another_route(self) -> None:
        """Warns once if the first call after a resume chose another route than that of the restored state."""
        (now, *others), before = self._possible().get(_COMPILED_BY, ("nothing",)), self._compiled_by
        if before is None or others:
            return
        self._compiled_by = None
        if now != before:
            warnings.warn(
                f"The resumed run may differ in the last bits ({_COMPILED_BY}: {before} at the save, {now} now).",
                UserWarning,
                stacklevel=3,
            )

    # Rewinds

    def snapshots(self) -> set[int]:
        """The steps whose snapshots are on disk."""
        found: set[int] = set() if self._checkpointer is None else self._checkpointer.snapshots()
        self._has_snapshots = bool(found)
        return found

    def save_snapshot(self, state: TrainState) -> None:
        """Hands over a state to rewind to, which stays as it is."""
        if self._checkpointer is not None:
            self._checkpointer.save(state, notes=self._notes(), role="snapshot")
            self._has_snapshots = True

    def read_newest_until(self, step: int, like: TrainState, *, newer_than: int) -> TrainState | None:
        """The newest state of the run's own saves between two steps, the first excluded."""
        if self._checkpointer is None:
            return None
        return _state_of(self._checkpointer.read_newest_until(step, _without_loop(like), newer_than=newer_than))

    def read_snapshot(self, step: int, like: TrainState) -> TrainState | None:
        """The state of a snapshot; None if it is damaged."""
        return _state_of(self._checkpointer.read_snapshot(step, _without_loop(like)))

    def close(self) -> None:
        """Lets others write."""
        if self._checkpointer is not None:
            self._checkpointer.close()


def _nothing() -> None:
    """The weak reference to no state."""


def _without_loop(like: TrainState) -> TrainState:
    """The state without the loop's slots, which come from the checkpoint alone."""
    return like.replace(slots={name: slot for name, slot in like.slots.items() if not name.startswith(LOOP)})


def _state_of(report: Restoration | None) -> TrainState | None:
    if report is None:
        return None
    report.warn(stacklevel=3)
    return SavedSlots.split(report.state)[0]
