"""A compiled step without a compiler: the call path, the donation and the multi-step calls of ``fx.compile``, eagerly.

Compiling takes seconds, and most of what can go wrong in the loop does not depend on the kernels. Here the artefact
that a compiler would make is a Python function that computes the new state and copies it over the old leaves.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from fxtrain import tree
from fxtrain.compile.compiled import Compiled
from fxtrain.compile.traced import Artefact
from fxtrain.core import TrainState
from fxtrain.step import Step


def interpreted(step: Step, *, donate: bool, steps_per_call: int) -> Compiled:
    """``step`` with the interface of a compiled one.

    Args:
        step: The step.
        donate: Whether ``fit`` gets a variant that overwrites the state it is given.
        steps_per_call: As for ``fx.compile``.
    """
    made = _made(step, steps_per_call, donate=False)
    return made if donate else undonating(made)


def undonating(step: Compiled) -> Compiled:
    """``step`` without its donating twin, so that ``fit`` uses it as it is."""
    step.donating = lambda: step
    return step


def _made(step: Step, steps_per_call: int, *, donate: bool) -> Compiled:
    return Compiled(
        step,
        _artefact,
        how=lambda: "interpreter",
        on_recompile="allow",
        steps_per_call=steps_per_call,
        twin=lambda: _made(step, steps_per_call, donate=True),
        donate=donate,
        dynamic=False,
    )


def _artefact(step: Any, state: TrainState, batch: Any, *, in_place: bool) -> Artefact:
    structures = tree.structure(state), tree.structure(batch)

    def run(leaves: Sequence[Tensor], inputs: Sequence[Tensor]) -> tuple[Sequence[Tensor], Any]:
        new, output = step(tree.unflatten(structures[0], leaves), tree.unflatten(structures[1], inputs))
        return tree.leaves(new), output

    if not in_place:
        return Artefact(run, None)

    def run_in_place(leaves: Sequence[Tensor], inputs: Sequence[Tensor]) -> tuple[Sequence[Tensor], Any]:
        new, output = run(leaves, inputs)
        # All are computed before the first is overwritten. What the step only handed on may be a view of an old leaf.
        values = [leaf.clone() for leaf in new]
        output = tree.map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, output)
        for old, value in zip(leaves, values, strict=True):
            old.copy_(value)
        return (), output

    return Artefact(run_in_place, range(len(tree.leaves(state))))
