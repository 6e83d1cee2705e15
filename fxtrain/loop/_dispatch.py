"""Takes steps one by one, or several per dispatch where the loop has nothing to do in between."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from fxtrain import tree
from fxtrain.core import Batch, Epoch, StepOutput, TrainState
from fxtrain.data import Source
from fxtrain.loop._interrupts import leaving_compilation
from fxtrain.loop._types import LoopStep
from fxtrain.step import take_steps

Many = Callable[[TrainState, Sequence[Batch]], tuple[TrainState, Sequence[StepOutput]]]


class Dispatch:
    """Takes one step, or ``steps_per_call`` steps, per dispatch.

    Args:
        step: A step, compiled or not.
        data: From ``fxtrain.data.as_source``.
        steps: Total number of steps of the run, or None.
        snapshot_every: Steps between two snapshots, or None.
    """

    def __init__(self, step: LoopStep, data: Source, *, steps: int | None, snapshot_every: int | None) -> None:
        self._steps_per_call: int = getattr(step, "steps_per_call", 1)
        self._one = leaving_compilation(step)
        many: Many | None = getattr(step, "multi_step", None)
        self._many = None if many is None else leaving_compilation(many)
        self._may_differ: bool = data.num_shapes != 1 or data.dynamic_dims > 0
        self._data, self._steps, self._snapshot_every = data, steps, snapshot_every

    def length(self, step: int, position: int, epoch: Epoch) -> int:
        """Returns how many steps to take in the next dispatch."""
        count = self._steps_per_call
        if count == 1:
            return 1
        every = self._snapshot_every
        if not epoch.length and self._data.has_snapshots:
            # The epoch may end at any batch, and the iterator state of the data would be ahead of the steps.
            return 1
        fits = (
            (self._steps is None or step + count <= self._steps)
            and (not epoch.length or position - epoch.start + count <= epoch.length)
            and (not every or step // every == (step + count - 1) // every)
        )
        return count if fits else 1

    def take(self, state: TrainState, batches: Sequence[Batch]) -> tuple[TrainState, Sequence[StepOutput]]:
        """Takes one step per batch. In a multi-step dispatch, outputs after a stop are invalid."""
        if (
            self._many is not None
            and 1 < len(batches) == self._steps_per_call
            and (not self._may_differ or _are_alike(batches))
        ):
            return self._many(state, batches)
        # A single batch, the last batches of the data, or batches of several shapes.
        return take_steps(self._one, state, batches)


def _are_alike(batches: Sequence[Batch]) -> bool:
    return len({tuple(getattr(leaf, "shape", None) for leaf in tree.leaves(batch)) for batch in batches}) == 1
