"""Saving: what the loop has handed to the checkpointer, and what has become of it."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Mapping
from typing import Any

from fxtrain.checkpoint import CheckpointError, Committed, Restoration
from fxtrain.core import TrainState


class Saving:
    """The loop's side of a checkpointer, or of none.

    Args:
        checkpointer: From ``fxtrain.checkpointer``, or None.
        settings: What decides the bits of a step's result, as text by name. Each save keeps them, and a resume with
            others warns.
    """

    def __init__(self, checkpointer: Any, settings: Mapping[str, str]) -> None:
        self._checkpointer = checkpointer
        self._notes = dict(settings)
        self._resumes = False
        # Weak references, because a step donates only what has no other reference.
        self._handed: Callable[[], TrainState | None] = _nothing
        self._save: Any = None  # of the state handed over last
        self._on_disk: Callable[[], TrainState | None] = _nothing

    def restored(self, like: TrainState) -> Restoration | None:
        """The newest state there is, if there is any."""
        checkpointer, self._resumes = self._checkpointer, True
        if not checkpointer.has_any():
            return None
        report: Restoration = checkpointer.read(like, notes=self._notes)
        report.warn(stacklevel=5)
        return report

    def begin(self, state: TrainState, *, on_disk: bool) -> None:
        """Refuses now, and not after an hour, a folder of another run or one that cannot be written to."""
        self._on_disk = weakref.ref(state) if on_disk else _nothing
        if self._checkpointer is not None:
            self._checkpointer.begin(state, resume=self._resumes)

    def save(self, state: TrainState, metrics: Mapping[str, float]) -> None:
        """Hands ``state`` over; it may be donated afterwards."""
        if self._checkpointer is None:
            warnings.warn(
                "A save was asked for and nothing is saved, because fit was given no checkpointer: give "
                "checkpointer=fxtrain.checkpointer(folder).",
                UserWarning,
                stacklevel=2,
            )
            return
        self._save = self._checkpointer.save(state, metrics, notes=self._notes)
        self._handed = weakref.ref(state)

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

    def newest_until(self, step: int) -> int | None:
        """The newest step on the disk that has taken at most so many."""
        return None if self._checkpointer is None else self._checkpointer.newest_until(step)

    def state_at(self, step: int, like: TrainState) -> TrainState:
        """The state of a step on the disk, or of the next older one that a rewind can return to if it is damaged."""
        report = self._checkpointer.read_newest_until(step, like)
        if report is None:
            raise CheckpointError(f"expected a readable checkpoint of step {step} or before, got damaged ones only.")
        report.warn(stacklevel=2)
        return report.state

    def close(self) -> None:
        """Lets others write."""
        if self._checkpointer is not None:
            self._checkpointer.close()


def _nothing() -> None:
    """The weak reference to no state."""
