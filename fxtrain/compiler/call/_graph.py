"""A compiled step for one structure of state and batch, with the checks of its inputs."""

from __future__ import annotations

import operator
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from optree import PyTreeSpec
from torch import Tensor

from fxtrain import tree
from fxtrain.compiler.call._memory import is_foreign, is_sole, shared
from fxtrain.compiler.check._mismatch import MiscompiledError
from fxtrain.compiler.lowering._executable import Executable, Kind, kinds
from fxtrain.core import Batch, TrainState, Tree, invalidate
from fxtrain.core._state import build, validate
from fxtrain.step import EvalFunction, Step
from fxtrain.tree import Flatten, OtherStructureError, generate_flatten

Found = tuple[list[Tensor], list[Any], list[Tensor], bool]
"""Leaves and containers of a state, leaves of a batch, and whether the graph itself wrote these state leaves last."""


class Graph:
    """One compiled executable and the structure that it accepts.

    Args:
        step: The step that was compiled.
        state: An example of the states that it accepts.
        batch: An example of the batches that it accepts.
        executable: The compiled executable.
        donate: Whether it donates the old state.
        dynamic: Whether it accepts batches of other sizes.
        check: Whether its first calls are checked against the uncompiled step.
    """

    def __init__(
        self,
        step: Step | EvalFunction,
        state: TrainState,
        batch: Batch,
        executable: Executable,
        *,
        donate: bool,
        dynamic: bool,
        check: bool,
    ) -> None:
        leaves, self._structure = tree.flatten(step.enter(state))
        inputs, batch_structure = tree.flatten(batch)
        self._checked_structures = (self._structure, batch_structure) if check else None
        self._donate, self._conditions = donate, executable.conditions
        self._step, self._taker = step, repr(step)
        self._is_step = isinstance(step, Step)
        self._is_dynamic = dynamic
        self._kinds_of_batch = loose_kinds if dynamic else kinds
        self._kinds, self._batch_kinds = kinds(leaves), self._kinds_of_batch(inputs)
        without = frozenset[str]() if self._is_step else frozenset({"opt_state"})
        self._flatten = generate_flatten(state, without=without, slots=step.enters) or _general(
            self._structure, step.enter
        )
        flatten_batch = generate_flatten(batch, exact=not dynamic, ordered=True)
        self._flatten_batch = flatten_batch or _general(batch_structure, lambda batch: batch)
        self._is_checked = flatten_batch is not None and not dynamic
        self._seen: list[weakref.ref[Tensor]] = []  # the state leaves that it updates in place
        self.replace_executable(executable)

    def find(self, state: TrainState, batch: Batch) -> Found | None:
        """Returns the inputs of the executable, or None if it does not accept this state or batch."""
        try:
            leaves, containers = self._flatten(state)
            inputs, _ = self._flatten_batch(batch)
        except OtherStructureError:
            return None
        if not self._is_checked and (self._kinds_of_batch(inputs) != self._batch_kinds or any(map(_is_lazy, inputs))):
            return None
        if self._conditions is not None and not self._conditions(inputs):
            return None
        known = len(self._seen) > 0 and all(map(operator.is_, map(operator.call, self._seen), leaves))
        return (leaves, containers, inputs, known) if known or kinds(leaves) == self._kinds else None

    def broken(self, batch: Batch) -> list[str] | None:
        """Returns the conditions on sizes that a batch breaks, as code.

        None if the sizes are not symbolic, or if the batch differs in more than its sizes.
        """
        if self._conditions is None:
            return None
        try:
            inputs, _ = self._flatten_batch(batch)
        except OtherStructureError:
            return None
        if self._kinds_of_batch(inputs) != self._batch_kinds:
            return None
        return self._conditions.broken(inputs, tree.paths(batch, "batch"))

    def __call__(
        self, state: TrainState, leaves: list[Tensor], containers: list[object], inputs: list[Tensor], known: bool
    ) -> Any:
        """Takes the step with the inputs that ``find`` returned."""
        if not self._in_place:
            new, output = self._run(leaves, inputs)
            if not self._is_step:
                return output
            result = self._state(state, new), output
            if self._donate:
                invalidate(state, self._taker)
            return result
        if known and is_sole(leaves, containers, self._written):
            after = build(TrainState, state.__dict__)
        else:
            leaves = [
                leaf.clone() if elsewhere or is_foreign(leaf) else leaf
                for leaf, elsewhere in zip(leaves, shared(leaves, containers), strict=True)
            ]
            after = self._state(state, leaves)
            self._seen = [weakref.ref(leaf) for leaf in leaves]
        invalidate(state, self._taker)
        try:
            _, output = self._run(leaves, inputs)
        except MiscompiledError:
            # The check has restored the leaves.
            validate(state, after)
            raise
        return after, output

    def replace_executable(self, executable: Executable) -> None:
        """Replaces the executable with another one of the same step, state and batch."""
        self._run, self._in_place = executable.run, executable.written is not None
        # Ranks of a mesh may find different marks, and must check together.
        is_marked = self._step.mesh is None and executable.mark is not None and executable.mark.exists()
        has_passed = executable.is_uncompiled or is_marked
        if self._checked_structures is not None and not has_passed:
            from fxtrain.compiler.check._first_calls import CheckedRun

            def finish() -> None:
                self._run = executable.run

            options = {"is_dynamic": self._is_dynamic, "finish": finish}
            self._run = CheckedRun(self._step, *self._checked_structures, executable, **options)
        self._written = executable.written or ()
        self._seen = []

    def raise_uncompiled(self, found: Found, batch: Batch) -> None:
        """Raises what the uncompiled step raises for inputs that failed, such as an index out of range.

        Its traceback leads to the user's line, whereas a kernel's error names a generated file. A donated state may be
        partly overwritten, so a result is discarded and only an error counts.
        """
        try:
            self._step(tree.unflatten(self._structure, found[0]), batch)
        except Exception as error:
            raise error from None

    def _state(self, old: TrainState, leaves: Sequence[Tensor]) -> TrainState:
        new: TrainState = tree.unflatten(self._structure, leaves)
        if len(new.slots) == len(old.slots):
            return new
        return build(TrainState, {**new.__dict__, "slots": {**old.slots, **new.slots}})


def loose_kinds(leaves: Sequence[Tensor]) -> list[Kind]:
    """Returns what a graph of symbolic sizes assumes of each tensor: its rank, dtype and device."""
    return [(leaf.ndim, leaf.dtype, leaf.device) for leaf in leaves]


def _is_lazy(leaf: Tensor) -> bool:
    """Whether the values of a tensor are those in its memory only once they are conjugated or negated."""
    return leaf.is_conj() or leaf.is_neg()


def _general(structure: PyTreeSpec, enter: Callable[[Tree], Tree]) -> Flatten:
    """Returns a slower function, for trees with nodes that ``generate_flatten`` does not support."""

    def flatten(node: Tree) -> tuple[list[Tensor], list[object]]:
        leaves, found = tree.flatten(enter(node))
        if found != structure or not all(isinstance(leaf, Tensor) for leaf in leaves):
            raise OtherStructureError
        # The containers are unknown. The list of leaves, which is referenced twice, makes all leaves count as shared.
        return leaves, [leaves]

    return flatten


def refuse_sparse(batch: Batch) -> None:
    """Raises for a batch with a sparse tensor."""
    for path, leaf in zip(tree.paths(batch, "batch"), tree.leaves(batch), strict=True):
        if leaf.layout != torch.strided:
            raise ValueError(
                f"expected dense tensors in the batch of a compiled step, got {path} with the layout "
                f"{str(leaf.layout).removeprefix('torch.')}. Pass its indices and values as tensors, make it dense, or "
                "leave the step uncompiled."
            )
