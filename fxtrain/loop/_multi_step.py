"""Strides: steps are taken one by one, or some at once where nothing of the loop's comes in between."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fxtrain import tree
from fxtrain.core import Epoch, StepOutput, TrainState
from fxtrain.loop._interrupts import leaving_compilation


class Strides:
    """Takes steps.

    Args:
        step: What takes them, ``steps_per_call`` at once where it has such.
        data: From ``fxtrain.data.adapt``.
        steps: After how many steps the run ends, or None.
        keep_every: At which steps a state is kept, or None.
    """

    def __init__(self, step: Any, data: Any, *, steps: int | None, keep_every: int | None) -> None:
        self._at_once: int = getattr(step, "steps_per_call", 1)
        self._one = leaving_compilation(step)
        self._several = leaving_compilation(getattr(step, "many", step))
        self._may_differ: bool = data.kinds != 1 or data.free > 0
        self._data, self._steps, self._keep_every = data, steps, keep_every

    def length(self, step: int, position: int, epoch: Epoch) -> int:
        """How many steps to take in one call from a step and a position on."""
        count = self._at_once
        if count == 1:
            return 1
        every = self._keep_every
        if not epoch.length and hasattr(self._data, "snapshot"):
            return 1  # it may end anywhere, and its own iterator state would be ahead of the steps
        fits = (
            (self._steps is None or step + count <= self._steps)
            and (not epoch.length or position - epoch.start + count <= epoch.length)
            and (not every or step // every == (step + count - 1) // every)
        )
        return count if fits else 1

    def take(self, state: TrainState, batches: Sequence[Any]) -> tuple[TrainState, Sequence[StepOutput]]:
        """A step with each batch. Of those taken at once, the ones after a stop count for nothing."""
        if len(batches) == 1:
            state, output = self._one(state, batches[0])
            return state, (output,)
        if len(batches) == self._at_once and (not self._may_differ or _are_alike(batches)):
            return self._several(state, batches)
        outputs: list[StepOutput] = []
        for batch in batches:  # the last of the data, or batches of several shapes
            state, output = self._one(state, batch)
            outputs.append(output)
        return state, outputs


def _are_alike(batches: Sequence[Any]) -> bool:
    return len({tuple(getattr(leaf, "shape", None) for leaf in tree.leaves(batch)) for batch in batches}) == 1
