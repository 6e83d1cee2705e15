"""The result of lowering: a function of the leaves of a state and of a batch, and the uncompiled step in this form."""

from __future__ import annotations

import operator
from collections.abc import Callable, Hashable, Iterable, Sequence, Sized
from pathlib import Path
from typing import Any, NamedTuple

from optree import PyTreeSpec
from torch import Tensor
from torch.fx import GraphModule

from fxtrain import tree
from fxtrain.compiler.lowering._symbolic_sizes import Conditions
from fxtrain.core import Batch, TrainState, Tree
from fxtrain.model import forward_wrapped_by
from fxtrain.step import EvalFunction, Step

Backend = str | Callable[[GraphModule, Sequence[Tensor]], Callable[..., object]]
"""A backend of ``torch.compile``: its name, or a function from a graph and example inputs to a compiled function."""

Kind = tuple[Hashable, ...]

Run = Callable[[Sequence[Tensor], Sequence[Tensor]], tuple[Sequence[Tensor], Tree]]
"""Maps the leaves of a state and of a batch to the leaves of the new state, if there is one, and the output."""


class Origin(NamedTuple):
    """A compiled graph in files.

    Args:
        graph: The hash of the graph.
        read: Indices of its inputs among the leaves of the state and of the batch.
    """

    graph: str
    read: Sequence[int]


class Executable(NamedTuple):
    """A compiled step, without the checks of its inputs.

    Args:
        run: The function.
        written: Indices of the state leaves that it updates in place; None if it returns new ones.
        conditions: Conditions on the sizes of batches, if they are symbolic.
        is_uncompiled: Whether it runs the step as it is, so that there is nothing to check.
        graphs: Its graphs, if later calls may add some. None otherwise.
        mark: The file whose existence says that it has passed its check on this machine, if it can be recognized.
        origin: The graph that it calls, if there are files of that graph.
    """

    run: Run
    written: Sequence[int] | None
    conditions: Conditions | None = None
    is_uncompiled: bool = False
    graphs: Sized | None = None
    mark: Path | None = None
    origin: Origin | None = None


def kinds(leaves: Iterable[Tensor]) -> list[Kind]:
    """Returns what a graph assumes of each tensor: its shape, dtype, strides and device."""
    return [(leaf.shape, leaf.dtype, leaf.stride(), leaf.device) for leaf in leaves]


def run_graph(
    call: Callable[[Sequence[Tensor]], Sequence[Tensor]],
    read: Sequence[int],
    changed: Sequence[int],
    output: PyTreeSpec,
    *,
    in_place: bool,
    is_step: bool,
) -> Run:
    """Returns the ``run`` function of a compiled graph.

    Args:
        call: Maps the graph's inputs to the changed leaves of the state, unless it writes them in place, and the
            leaves of the output.
        read: Indices of the inputs among the leaves of the state and of the batch.
        changed: Indices of the state leaves that the step replaces.
        output: The structure of the output.
        in_place: Whether the graph writes the new state into the old state's buffers.
        is_step: Whether the step returns a state.
    """
    pick: Any = operator.itemgetter(*read) if len(read) > 1 else lambda tensors: tuple(tensors[i] for i in read)
    unflatten = tree.generate_unflatten(output)
    if in_place or not is_step:

        def run(leaves: Sequence[Tensor], inputs: Sequence[Tensor]) -> tuple[Sequence[Tensor], Tree]:
            return (), unflatten(call(pick((*leaves, *inputs))))
    else:
        returned = len(changed)

        def run(leaves: Sequence[Tensor], inputs: Sequence[Tensor]) -> tuple[Sequence[Tensor], Tree]:
            values = call(pick((*leaves, *inputs)))
            new = list(leaves)
            for index, value in zip(changed, values, strict=False):
                new[index] = value
            return new, unflatten(values[returned:])

    return run


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
    written = range(state_structure.num_leaves) if writes else None
    return Executable(run, written, is_uncompiled=wrap is None)
