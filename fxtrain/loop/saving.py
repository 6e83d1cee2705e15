"""Saving: what the loop has handed to the checkpointer, and what has become of it."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Mapping
from typing import Any

from fxtrain.checkpoint import Committed, Restoration
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
        # By weak references: a step that donates takes the memory only of what nobody else holds.
        self._handed: Callable[[], TrainState | None] = _nothing
        self._on_disk: Callable[[], TrainState | None] = _nothing

    def restored(self, like: TrainState) -> Restoration | None:
        """The newest state there is, if there is any."""
        checkpointer = self._checkpointer
        if not checkpointer.has_any():
            return None
        report: Restoration = checkpointer.read(like, notes=self._notes)
        report.warn(stacklevel=5)
        return report

    def begin(self, state: TrainState, *, on_disk: bool) -> None:
        """What cannot be written to is found out now, and not after an hour."""
        self._on_disk = weakref.ref(state) if on_disk else _nothing
        if self._checkpointer is not None:
            self._checkpointer.reserve(state)

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
        self._checkpointer.save(state, metrics, notes=self._notes)
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
        if committed:
            self._on_disk = self._handed
        return committed

    def is_due_at_the_end(self, state: TrainState) -> bool:
        """Whether ``state`` is not on the disk yet, where it could be."""
        return self._checkpointer is not None and state is not self._on_disk()

    def newest_until(self, step: int) -> int | None:
        """The newest step on the disk that has taken at most so many."""
        return None if self._checkpointer is None else self._checkpointer.newest_until(step)

    def state_at(self, step: int, like: TrainState) -> TrainState:
        """The state of a step on the disk."""
        return self._checkpointer.restore(like, step=step)

    def close(self) -> None:
        """Lets others write."""
        if self._checkpointer is not None:
            self._checkpointer.close()


def _nothing() -> None:
    """The weak reference to no state."""
