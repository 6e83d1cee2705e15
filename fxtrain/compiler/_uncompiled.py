"""Uncompiled: a step as it is, with the interface of a compiled one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from fxtrain import tree
from fxtrain.compiler._trace import Artefact
from fxtrain.core import TrainState
from fxtrain.model import forward_by
from fxtrain.step import EvalFunction, Step


def uncompiled(
    step: Step | EvalFunction, state: TrainState, batch: Any, *, in_place: bool, wrap: Any = None
) -> Artefact:
    """The step itself.

    Args:
        step: The step.
        state: What enters of a state.
        batch: A batch.
        in_place: Whether the new state's leaves are written over the old one's.
        wrap: As ``forward_by`` takes it.
    """
    state_structure, batch_structure = tree.structure(state), tree.structure(batch)

    def run(leaves: Sequence[Tensor], inputs: Sequence[Tensor]) -> tuple[Sequence[Tensor], Any]:
        with forward_by(wrap):
            result: Any = step(tree.unflatten(state_structure, leaves), tree.unflatten(batch_structure, inputs))
        if not isinstance(step, Step):
            return (), result
        moved, output = result
        new = tree.leaves(moved)
        if not in_place:
            return new, output
        # All are computed, and apart from the old leaves, before the first is written over.
        values = [value if value is old else value.clone() for value, old in zip(new, leaves, strict=True)]
        output = tree.map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, output)
        for old, value in zip(leaves, values, strict=True):
            if value is not old:
                old.copy_(value)
        return (), output

    writes = in_place and isinstance(step, Step)
    return Artefact(run, range(state_structure.num_leaves) if writes else None)
