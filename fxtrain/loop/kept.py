"""Kept: the states that a run can go back to."""

from __future__ import annotations

from fxtrain import tree
from fxtrain.core import TrainState
from fxtrain.loop.saving import Saving


class Kept:
    """Older states, in memory, and on the disk where the run saves.

    Args:
        every: Keep a state each so many steps; None keeps none in memory.
        count: How many, the newest.
        on_host: Whether to keep them in the memory of the host.
        copied: Whether to copy them, as the step writes over the states that it is given.
        saving: What knows the states on the disk.
    """

    def __init__(self, every: int | None, count: int, *, on_host: bool, copied: bool, saving: Saving) -> None:
        self._every, self._count, self._on_host, self._copied = every, count, on_host, copied
        self._saving = saving
        self._states: list[tuple[int, TrainState]] = []  # by their step, oldest first

    def keep(self, step: int, state: TrainState) -> None:
        """Keeps the state of this step, if it is one to keep."""
        if not self._every or step % self._every or step in (kept for kept, _ in self._states):
            return
        if self._on_host:
            state = tree.map(lambda leaf: leaf.to("cpu", copy=True), state)
        elif self._copied:
            state = state.copy()
        self._states = [*self._states, (step, state)][-self._count :]

    def newest_until(self, step: int, like: TrainState) -> TrainState | None:
        """The newest state that has taken at most so many steps, where ``like`` lives."""
        in_memory = next(((kept, state) for kept, state in reversed(self._states) if kept <= step), None)
        on_disk = self._saving.newest_until(step)
        if on_disk is not None and (in_memory is None or on_disk > in_memory[0]):
            return self._saving.state_at(on_disk, like=like)
        if in_memory is None:
            return None
        return tree.map(lambda leaf: leaf.to(like.step.device), in_memory[1])

    def forget_after(self, step: int) -> None:
        """Forgets in memory what is newer."""
        self._states = [(kept, state) for kept, state in self._states if kept <= step]
