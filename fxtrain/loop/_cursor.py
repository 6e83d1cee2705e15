"""The current state of a run, with its counters and pending requests as Python values."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fxtrain.core import EVALUATED, SNAPSHOTS, Control, Donated, Due, Epoch, TrainState, Tree
from fxtrain.core._device_tensors import tensor_on
from fxtrain.core._slots import MEMBERS
from fxtrain.core._state import FIELDS
from fxtrain.loop._epoch_metrics import EpochMetrics
from fxtrain.loop._transfer import start_copy_of_flags


class Delta(NamedTuple):
    """An older state, stored as a newer one plus the old values that differ, and without other references to it."""

    newer: TrainState
    fields: dict[str, object]  # old values of changed fields, except slots
    slots: dict[str, Tree]  # old values of changed slots
    names: tuple[str, ...]  # names of all old slots

    @classmethod
    def between(cls, old: TrainState, new: TrainState) -> Delta:
        """Returns ``old`` as a difference from ``new``."""
        changed = {name: was for name in FIELDS if (was := getattr(old, name)) is not getattr(new, name)}
        changed.pop("slots", None)
        slots = {name: was for name, was in old.slots.items() if new.slots.get(name) is not was}
        return cls(new, changed, slots, tuple(old.slots))

    def older(self) -> TrainState:
        """Returns the complete older state."""
        slots = {**self.newer.slots, **self.slots}
        return self.newer.replace(**self.fields, slots={name: slots[name] for name in self.names})


class Mark(NamedTuple):
    """A point of the run to roll back to."""

    state: TrainState | Delta
    due: dict[str, int]
    unread: tuple[Callable[[], Control], ...]
    why: tuple[str, ...]
    step: int
    position: int
    epoch: Epoch
    snapshots: tuple[int, ...]
    metrics: EpochMetrics

    @property
    def is_taken(self) -> bool:
        """Whether the state was donated to a step, so that rolling back is impossible."""
        state = self.state.newer if isinstance(self.state, Delta) else self.state
        return type(state) is Donated


class Cursor:
    """The current state. Counters and requests are mirrored as Python values, so reading them never synchronizes.

    Args:
        state: The initial state.
        lag: After how many steps stop flags on the device are read, 0 or 1. By default 1 on an accelerator, where an
            immediate read would synchronize with the device.
        why: Reasons of a stop that was pending when the state was saved.
        metrics: Metrics of the current epoch. A rollback restores the object and not its content, so steps are added
            only right before the next mark.

    Attributes:
        is_batch: Whether the state is that of a batch of runs. It can be read after the state was donated.
    """

    def __init__(self, state: TrainState, metrics: EpochMetrics, *, lag: int | None, why: tuple[str, ...] = ()) -> None:
        self.is_batch = MEMBERS in state.slots
        self._reads_late = bool(lag) if lag is not None else state.step.device.type != "cpu"
        # None of these is mutated in place, because a mark, made at each step, references them.
        self.due: dict[str, int] = {}  # flags are bools
        self.unread: tuple[Callable[[], Control], ...] = ()  # stop requests whose flags are being copied to the host
        self.why = why  # reasons to stop
        self.metrics = metrics
        self.take(state)
        self.set_mark()

    def take(self, state: TrainState) -> None:
        """Makes ``state`` the current one, and reads its counters, which synchronizes with the device."""
        self.state = state
        self.step, self.position = int(state.step), int(state.position)
        self.epoch = Epoch.from_state(state) or Epoch(done=0, start=0, length=0)
        retained = state.slots[SNAPSHOTS].tolist() if SNAPSHOTS in state.slots else []
        self.snapshots: tuple[int, ...] = tuple(step for step in retained if step >= 0)
        self.due = {name: value.item() for name, value in state.due._asdict().items()}

    def mark(self) -> Mark:
        """Returns the current point, for ``roll_back``."""
        # Bypasses the NamedTuple constructor, which is slower, because this runs at each step.
        point = (
            self.state,
            self.due,
            self.unread,
            self.why,
            self.step,
            self.position,
            self.epoch,
            self.snapshots,
            self.metrics,
        )
        return tuple.__new__(Mark, point)

    def set_mark(self) -> None:
        """Marks the current point, to which an error rolls back."""
        self.marked = self.mark()

    def mark_as_delta(self) -> None:
        """Turns the marked point into a delta from the current state, before a step takes the state.

        Apart from old values, it then references only the current state object, so a step can donate the state.
        """
        if self.marked.state is not self.state:
            assert not isinstance(self.marked.state, Delta)
            self.marked = self.marked._replace(state=Delta.between(self.marked.state, self.state))

    def roll_back(self, mark: Mark) -> None:
        """Rolls back to ``mark``."""
        state, self.due, self.unread, self.why, self.step, self.position, self.epoch, self.snapshots, metrics = mark
        self.metrics = metrics
        self.state = state.older() if isinstance(state, Delta) else state

    def set(self, **changes: int) -> None:
        """Changes pending requests, in the state and in the mirror."""
        changed = {name: value for name, value in changes.items() if self.due[name] != value}
        if changed:
            self.due = {**self.due, **changed}
            device = self.state.step.device
            tensors = {name: tensor_on(device, value) for name, value in changed.items()}
            self.state = self.state.replace(due=self.state.due._replace(**tensors))

    def move_to(self, position: int) -> None:
        """Sets the data position without taking a step."""
        self.position = position
        self.state = self.state.replace(position=torch.full_like(self.state.position, position))
        if self.is_batch:
            from fxtrain.loop._members import moved

            self.state = moved(self.state)

    def count(self, epoch: Epoch) -> None:
        """Sets the current epoch."""
        if epoch != Epoch.from_state(self.state):
            self.epoch, self.state = epoch, epoch.written_to(self.state)

    def last_evaluation(self) -> dict[str, Tensor] | None:
        """Returns a copy of the metrics of the last evaluation, sorted by name, or None before the first."""
        last = self.state.slots.get(EVALUATED)
        return None if last is None else {name: value.clone() for name, value in sorted(last["metrics"].items())}

    def list_snapshots(self, steps: Sequence[int], count: int) -> None:
        """Sets the steps of the retained snapshots: int64 [count] in the state, padded with -1."""
        self.snapshots = tuple(steps[-count:])
        listed = [*self.snapshots, *[-1] * (count - len(self.snapshots))]
        if SNAPSHOTS not in self.state.slots or self.state.slots[SNAPSHOTS].tolist() != listed:
            self.state = self.state.with_slot(SNAPSHOTS, tensor_on(self.state.step.device, listed))

    def stop(self, reason: str) -> None:
        """Requests a stop on behalf of the loop."""
        self.why = (*self.why, reason)
        self.set(stop=True)

    def ask(self, control: Control) -> None:
        """Merges requests into the pending ones."""
        if not control.kinds:
            return
        # A read of a tensor may synchronize with the device.
        reads_late = self._reads_late and any(isinstance(flag, Tensor) for flag in control.stop.values())
        late = ("stop", "skip_final_save") if reads_late else ()
        if reads_late:
            # Set on the device, so that the next step is a fixed point. The flags are read once they are copied.
            due = self.state.due
            stop, skip_final_save = due.stop | control.any("stop"), due.skip_final_save | control.any("skip_final_save")
            self.state = self.state.replace(due=due._replace(stop=stop, skip_final_save=skip_final_save))
            self.unread = (*self.unread, start_copy_of_flags(control))
        for kind in control.kinds:
            if kind in late or kind not in Due._fields:
                continue
            # Between two epochs, as during an evaluation there, there is no epoch to end.
            if kind == "end_epoch" and self.due["begin_epoch"]:
                continue
            if kind == "rewind":
                self.set(rewind=max(self.due["rewind"], *(int(steps) for steps in control.rewind.values())))
            elif control.any(kind):
                self.set(**{kind: True})
                if kind == "stop":
                    self.why = (*self.why, *control.reasons("stop"))

    def read_flags(self, count: int | None = None) -> bool:
        """Reads the oldest ``count`` stop requests with flags on the device, all by default.

        Returns:
            Whether a stop is pending.
        """
        count = len(self.unread) if count is None else count
        read, self.unread = self.unread[:count], self.unread[count:]
        for asked in read:
            control = asked()
            if control.any("stop"):
                self.why = (*self.why, *control.reasons("stop"))
                skip_final_save = self.due["skip_final_save"] or bool(control.any("skip_final_save"))
                self.due = {**self.due, "stop": True, "skip_final_save": skip_final_save}
        return bool(self.due["stop"])

    @property
    def anything_due(self) -> bool:
        """Whether a request must be handled before the next step."""
        due = self.due
        return bool(due["rewind"] or due["evaluate"] or due["end_epoch"] or due["save"] or due["stop"])
