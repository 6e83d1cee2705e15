"""Saves and restores the states of a run through its checkpointer, and tracks saves in the background."""

from __future__ import annotations

import json
import warnings
import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fxtrain.checkpoint import Committed, Restoration, Role
from fxtrain.core import BATCH, DATA, LOOP, STOP_REASONS, TrainState
from fxtrain.loop._batches import LastBatch

_COMPILED_BY = "compiled by"


class SavedSlots(NamedTuple):
    """State of a session at a save.

    Only checkpoints have these slots, because a state in memory must not depend on whether it was saved.

    Args:
        batch: The batch read last; None before the first one.
        data: Iterator state of the data source, uint8 [n]; None where the source has none.
        stop_reasons: Why a pending stop was requested.
    """

    batch: LastBatch | None = None
    data: Tensor | None = None
    stop_reasons: tuple[str, ...] = ()

    def added_to(self, state: TrainState) -> TrainState:
        """Returns the state with these slots, as it is saved."""
        device = state.step.device
        state = state.with_slot(BATCH, torch.tensor(self.batch or (-1, 0), device=device))
        if self.data is not None:
            state = state.with_slot(DATA, self.data)
        if self.stop_reasons:
            text = json.dumps(list(dict.fromkeys(self.stop_reasons))).encode()
            state = state.with_slot(STOP_REASONS, torch.tensor(list(text), dtype=torch.uint8, device=device))
        return state

    @classmethod
    def split(cls, state: TrainState) -> tuple[TrainState, SavedSlots]:
        """Splits a restored state into the state of the run and these slots."""
        slots = dict(state.slots)
        batch, data, reasons = (slots.pop(name, None) for name in (BATCH, DATA, STOP_REASONS))
        last = None if batch is None else LastBatch(*batch.tolist())
        saved = cls(
            batch=last if last is not None and last.index >= 0 else None,
            data=data,
            stop_reasons=() if reasons is None else tuple(json.loads(bytes(reasons.tolist()))),
        )
        return (state if len(slots) == len(state.slots) else state.replace(slots=slots)), saved


class Saving:
    """The loop's interface to a checkpointer, if there is one.

    Args:
        checkpointer: From ``fxtrain.checkpointer``, or None.
        step: The step of the run. Each save records its compile mode and settings, which affect results bitwise. A
            resume with others warns.
    """

    def __init__(self, checkpointer: Any, step: Any) -> None:
        self._checkpointer, self._step = checkpointer, step
        self._resumes = False
        self._compiled_by: str | None = None  # compile mode of the restored state, until the step has compiled
        self._has_snapshots = False  # whether the folder may hold snapshots
        # Weak references, because a step donates only states without other references.
        self._handed: Callable[[], TrainState | None] = _nothing
        self._save: Any = None  # save of the state in `_handed`
        self._on_disk: Callable[[], TrainState | None] = _nothing

    def restored(self, like: TrainState) -> Restoration | None:
        """Returns the newest saved state, or None if there is none."""
        checkpointer, self._resumes = self._checkpointer, True
        if not checkpointer.has_any():
            return None
        report: Restoration = checkpointer.read(like, notes=self._notes() | self._possible())
        report.warn(stacklevel=5)
        before = report.environment.get(_COMPILED_BY)
        if before in self._possible().get(_COMPILED_BY, ()):  # any other is reported above
            self._compiled_by = before
        return report

    def begin(self, state: TrainState) -> None:
        """Raises if the folder belongs to another run or cannot be written to, before training starts."""
        if self._checkpointer is not None:
            self._checkpointer.begin(SavedSlots().added_to(state), resume=self._resumes)

    def mark_on_disk(self, state: TrainState) -> None:
        """Records that the state was read from the newest checkpoint."""
        self._on_disk = weakref.ref(state)

    def save(
        self,
        state: TrainState,
        metrics: Mapping[str, float],
        role: Role,
        snapshots: Iterable[int],
        slots: SavedSlots,
    ) -> None:
        """Starts a save. The state may be donated afterwards.

        Args:
            state: The state to save.
            metrics: Metrics of its evaluation, by name.
            role: Why it is saved.
            snapshots: Steps of the snapshots that it lists. Others are deleted once the save is committed.
            slots: Slots to save with it.
        """
        if self._checkpointer is None:
            warnings.warn(
                "expected a checkpointer for a save requested by a callback, got None, so nothing is saved. Give fit "
                "checkpointer=fxtrain.checkpointer(folder).",
                UserWarning,
                stacklevel=2,
            )
            return
        self._warn_of_another_route()
        self._save = self._checkpointer.save(slots.added_to(state), metrics, notes=self._notes(), role=role)
        self._handed = weakref.ref(state)
        if self._has_snapshots:
            self._checkpointer.retain_snapshots(snapshots)

    @property
    def under_way(self) -> bool:
        """Whether a save has started that ``news`` has not returned yet."""
        return self._checkpointer is not None and bool(self._checkpointer.saving)

    def news(self, *, wait: bool = False) -> list[Committed]:
        """Returns the saves committed since the last call. Raises the errors of saves in the background."""
        if not self.under_way:
            return []
        checkpointer = self._checkpointer
        if wait:
            checkpointer.wait()
        committed: list[Committed] = checkpointer.committed()
        if self._save is not None and self._save.committed is not None:  # the committed saves may be older ones
            self._on_disk = self._handed
        return committed

    def is_due_at_the_end(self, state: TrainState) -> bool:
        """Whether there is a checkpointer and ``state`` is not on disk yet."""
        return self._checkpointer is not None and state is not self._on_disk()

    def _notes(self) -> dict[str, str]:
        """Returns everything that affects the step's results bitwise, as text by name.

        The compile mode is chosen at the step's first call.
        """
        return {_COMPILED_BY: getattr(self._step, "route", "nothing"), **getattr(self._step, "settings", {})}

    def _possible(self) -> dict[str, tuple[str, ...]]:
        possible = getattr(self._step, "possible", None)
        return {} if possible is None else {_COMPILED_BY: possible}

    def _warn_of_another_route(self) -> None:
        """Warns once if the first call after a resume chose another compile mode than the restored state had."""
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
        """Returns the steps of the snapshots on disk."""
        found: set[int] = set() if self._checkpointer is None else self._checkpointer.snapshots()
        self._has_snapshots = bool(found)
        return found

    def save_snapshot(self, state: TrainState) -> None:
        """Saves a snapshot, whose state is not modified."""
        if self._checkpointer is not None:
            self._checkpointer.save(state, notes=self._notes(), role="snapshot")
            self._has_snapshots = True

    def read_newest_until(self, step: int, like: TrainState, *, newer_than: int) -> TrainState | None:
        """Returns the run's newest saved state with ``newer_than < its step <= step``; None if there is none."""
        if self._checkpointer is None:
            return None
        return _state_of(self._checkpointer.read_newest_until(step, _without_loop(like), newer_than=newer_than))

    def read_snapshot(self, step: int, like: TrainState) -> TrainState | None:
        """Returns the state of a snapshot; None if it is damaged."""
        return _state_of(self._checkpointer.read_snapshot(step, _without_loop(like)))

    def close(self) -> None:
        """Closes the checkpointer, so that other runs can write to the folder."""
        if self._checkpointer is not None:
            self._checkpointer.close()


def _nothing() -> None:
    """A weak reference to no state."""


def _without_loop(like: TrainState) -> TrainState:
    """Returns the state without the loop's slots, so that they are read from the checkpoint."""
    return like.replace(slots={name: slot for name, slot in like.slots.items() if not name.startswith(LOOP)})


def _state_of(report: Restoration | None) -> TrainState | None:
    if report is None:
        return None
    report.warn(stacklevel=3)
    return SavedSlots.split(report.state)[0]
