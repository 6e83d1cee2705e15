"""The state that a run is at, with its counters and pending requests as Python values."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fxtrain import tree
from fxtrain.core import SNAPSHOTS, Control, Donated, Due, Epoch, TrainState
from fxtrain.core._state import FIELDS
from fxtrain.loop._transfer import copied_to_host


class Difference(NamedTuple):
    """An older state, as a newer one and what it had instead: it holds nothing else of the older one's."""

    newer: TrainState
    fields: dict[str, Any]  # those that have changed, but for the slots, as they were
    slots: dict[str, Any]  # likewise
    names: tuple[str, ...]  # of all slots that there were

    @classmethod
    def between(cls, old: TrainState, new: TrainState) -> Difference:
        """``old``, by what is another in ``new``."""
        changed = {name: was for name in FIELDS if (was := getattr(old, name)) is not getattr(new, name)}
        changed.pop("slots", None)
        slots = {name: was for name, was in old.slots.items() if new.slots.get(name) is not was}
        return cls(new, changed, slots, tuple(old.slots))

    def older(self) -> TrainState:
        """The older state, whole."""
        slots = {**self.newer.slots, **self.slots}
        return self.newer.replace(**self.fields, slots={name: slots[name] for name in self.names})


class Branch(NamedTuple):
    """Where a run was."""

    state: TrainState | Difference
    due: dict[str, Any]
    unread: tuple[Callable[[], Control], ...]
    why: tuple[str, ...]
    step: int
    position: int
    epoch: Epoch
    snapshots: tuple[int, ...]

    @property
    def is_taken(self) -> bool:
        """Whether a step has taken the memory of what is needed to come back."""
        state = self.state.newer if isinstance(self.state, Difference) else self.state
        return type(state) is Donated


def _on_its_way(control: Control) -> Callable[[], Control]:
    """The request to stop, with flags on the host once it is called; what it then waits for is these flags alone."""
    control = control.with_log({})
    flags = [flag for flag in tree.leaves(control) if isinstance(flag, Tensor) and flag.is_cuda]
    if not flags:
        return lambda: control
    arrived = copied_to_host(flags)

    def read() -> Control:
        copies = {id(flag): copy for flag, copy in zip(flags, arrived(), strict=True)}
        return tree.map(lambda leaf: copies.get(id(leaf), leaf), control)

    return read


class Current:
    """Keeps both sides alike: tensors in the state, which a save or the next step sees, and Python values, which the
    loop reads at no cost.

    Args:
        state: Where the run begins.
        late: Whether the device's requests to stop are read one step late, so that the loop never waits for it.
        why: Reasons of a stop that was pending when the state was saved.
    """

    def __init__(self, state: TrainState, *, late: bool, why: tuple[str, ...] = ()) -> None:
        self.late = late
        # None of these is changed in place, so that a branch, of which there is one at each step, can hold them.
        self.due: dict[str, Any] = {}
        self.unread: tuple[Callable[[], Control], ...] = ()  # requests to stop, their flags on their way here
        self.why = why  # the reasons to stop
        self.take(state)

    def take(self, state: TrainState) -> None:
        """Makes ``state`` the current one, and reads its counters: the only time that the loop waits for them."""
        self.state = state
        self.step, self.position = int(state.step), int(state.position)
        self.epoch = Epoch.of(state) or Epoch(done=0, start=0, length=0)
        retained = state.slots[SNAPSHOTS].tolist() if SNAPSHOTS in state.slots else []
        self.snapshots: tuple[int, ...] = tuple(step for step in retained if step >= 0)
        self.due = {name: value.item() for name, value in state.due._asdict().items()}

    def branch(self) -> Branch:
        """What ``abandon`` returns to."""
        where = (self.state, self.due, self.unread, self.why, self.step, self.position, self.epoch, self.snapshots)
        return tuple.__new__(Branch, where)  # past the function that a NamedTuple has for it, as this is in each step

    def abandon(self, branch: Branch) -> None:
        """Forgets all that happened since."""
        state, self.due, self.unread, self.why, self.step, self.position, self.epoch, self.snapshots = branch
        self.state = state.older() if isinstance(state, Difference) else state

    def thin(self, branch: Branch) -> Branch:
        """The branch, holding no more than what has changed since: a step that is given the state takes its memory only
        where nobody else has it."""
        if branch.state is self.state:
            return branch
        assert not isinstance(branch.state, Difference)
        return branch._replace(state=Difference.between(branch.state, self.state))

    def set(self, **changes: Any) -> None:
        """Changes what is due, on both sides."""
        changed = {name: value for name, value in changes.items() if self.due[name] != value}
        if changed:
            self.due = {**self.due, **changed}
            device = self.state.step.device
            tensors = {name: torch.tensor(value, device=device) for name, value in changed.items()}
            self.state = self.state.replace(due=self.state.due._replace(**tensors))

    def move_to(self, position: int) -> None:
        """Moves the data position without a step."""
        self.position = position
        self.state = self.state.replace(position=torch.full_like(self.state.position, position))

    def count(self, epoch: Epoch) -> None:
        """Sets the epoch that the run is in."""
        if epoch != Epoch.of(self.state):
            self.epoch, self.state = epoch, epoch.into(self.state)

    def list_snapshots(self, steps: Sequence[int], count: int) -> None:
        """Sets the steps of the retained states: int64 [count] in the state, -1 where there is none."""
        self.snapshots = tuple(steps[-count:])
        listed = [*self.snapshots, *[-1] * (count - len(self.snapshots))]
        if SNAPSHOTS not in self.state.slots or self.state.slots[SNAPSHOTS].tolist() != listed:
            self.state = self.state.with_slot(SNAPSHOTS, torch.tensor(listed, device=self.state.step.device))

    def forget_stop(self) -> None:
        """Clears a stop that has been carried out, so that the state can be trained further."""
        self.set(stop=False, unsaved=False)

    def stop(self, reason: str) -> None:
        """The loop's own request to stop."""
        self.why = (*self.why, reason)
        self.set(stop=True)

    def ask(self, control: Control) -> None:
        """Joins what was asked into what is due."""
        if not control.kinds:
            return
        late = {"stop", "unsaved"}.intersection(control.kinds) if self.late and _on_device(control) else ()
        if late:
            # Set where the flags are, so that the next step is a fixed point; read when they have arrived.
            due = self.state.due
            stop, unsaved = due.stop | control.any("stop"), due.unsaved | control.any("unsaved")
            self.state = self.state.replace(due=due._replace(stop=stop, unsaved=unsaved))
            self.unread = (*self.unread, _on_its_way(control))
        for kind in control.kinds:
            if kind in late or kind not in Due._fields:
                continue
            if kind == "end_epoch" and self.due["begin_epoch"]:  # between two epochs, as in an evaluation there
                continue
            if kind == "rewind":
                self.set(rewind=max(self.due["rewind"], *(int(steps) for steps in control.rewind.values())))
            elif control.any(kind):
                self.set(**{kind: True})
                if kind == "stop":
                    self.why = (*self.why, *control.reasons("stop"))

    def read_flags(self, count: int | None = None) -> bool:
        """Reads the oldest ``count`` stop requests whose flags were left on the device, by default all of them.

        Returns whether the run is to stop.
        """
        count = len(self.unread) if count is None else count
        read, self.unread = self.unread[:count], self.unread[count:]
        for asked in read:
            control = asked()
            if control.any("stop"):
                self.why = (*self.why, *control.reasons("stop"))
                unsaved = self.due["unsaved"] or bool(control.any("unsaved"))
                self.due = {**self.due, "stop": True, "unsaved": unsaved}
        return self.due["stop"]

    @property
    def anything_due(self) -> bool:
        """Whether the next step has to wait for something."""
        due = self.due
        return bool(due["rewind"] or due["evaluate"] or due["end_epoch"] or due["save"] or due["stop"])


def _on_device(control: Control) -> bool:
    """Whether a stop depends on a tensor, which the loop may have to wait for."""
    return any(isinstance(flag, Tensor) for flag in control.stop.values())
