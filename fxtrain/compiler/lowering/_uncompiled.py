"""An uncompiled step with the interface of a compiled one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from fxtrain import tree
from fxtrain.compiler.lowering._executable import Executable
from fxtrain.core import Batch, TrainState, Tree
from fxtrain.model import forward_wrapped_by
from fxtrain.step import EvalFunction, Step


def uncompiled(
    step: Step | EvalFunction, state: TrainState, batch: Batch, *, in_place: bool, wrap: Any = None
) -> Executable:
    """Returns an executable that runs the step uncompiled.

    Args:
        step: The step.
        state: The part of a state that enters the step.
        batch: A batch.
        in_place: Whether to write the new state into the old state's buffers.
        wrap: As in ``forward_wrapped_by``.
    """
    state_structure, batch_structure = tree.structure(state), tree.structure(batch)

    def run(leaves: Sequence[Tensor], inputs: Sequence[Tensor]) -> tuple[Sequence[Tensor], Tree]:
        with forward_wrapped_by(wrap):
            result: Any = step(tree.unflatten(state_structure, leaves), tree.unflatten(batch_structure, inputs))
        if not isinstance(step, Step):
            return (), result
        moved, output = result
        new = tree.leaves(moved)
        if not in_place:
            return new, output
        # Cloned before the first write, because new values may be views of old leaves.
        values = [value if value is old else value.clone() for value, old in zip(new, leaves, strict=True)]
        output = tree.map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, output)
        for old, value in zip(leaves, values, strict=True):
            if value is not old:
                old.copy_(value)
        return (), output

    writes = in_place and isinstance(step, Step)
    return Executable(run, range(state_structure.num_leaves) if writes else None)
