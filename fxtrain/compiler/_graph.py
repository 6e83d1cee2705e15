"""Graph: a step for one structure of state and batch, with all that has to be known to call it."""

from __future__ import annotations

import operator
import weakref
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from fxtrain import tree
from fxtrain.compiler._flatten import OtherStructureError, Walk, walk_like
from fxtrain.compiler._ownership import is_foreign, is_sole, shared
from fxtrain.compiler._trace import Artefact
from fxtrain.core import TrainState, bury
from fxtrain.core._state import build
from fxtrain.step import EvalFunction, Step

Kind = tuple[Any, ...]

Found = tuple[list[Tensor], list[Any], list[Tensor], bool]
"""The leaves and the containers of a state, the leaves of a batch, and whether the state's are those it wrote last."""


class Graph:
    """One compiled artefact.

    Args:
        step: What is compiled.
        state: A state like those it is for.
        batch: A batch like those it is for.
        artefact: What was made of it.
        donate: Whether it takes the old state.
        dynamic: Whether it is for batches of any sizes.
    """

    def __init__(
        self,
        step: Step | EvalFunction,
        state: TrainState,
        batch: Any,
        artefact: Artefact,
        *,
        donate: bool,
        dynamic: bool,
    ) -> None:
        leaves, self._structure = tree.flatten(step.enter(state))
        inputs, batch_structure = tree.flatten(batch)
        self._donate, self._conditions = donate, artefact.conditions
        self._step, self._taker = step, repr(step)
        self._is_step = isinstance(step, Step)
        self._kinds_of_batch = loose_kinds if dynamic else kinds
        self._kinds, self._batch_kinds = kinds(leaves), self._kinds_of_batch(inputs)
        without = frozenset[str]() if isinstance(step, Step) else frozenset({"opt_state", "slots"})
        slots = step.enters if isinstance(step, Step) else None
        self._walk = walk_like(state, without=without, slots=slots) or _general(self._structure, step.enter)
        walk_batch = walk_like(batch, exact=not dynamic)
        self._walk_batch = walk_batch or _general(batch_structure, lambda batch: batch)
        self._is_checked = walk_batch is not None and not dynamic
        self._seen: list[weakref.ref[Tensor]] = []  # the leaves it has written; they stay the same
        self.run_by(artefact)

    def find(self, state: TrainState, batch: Any) -> Found | None:
        """What to call it with; None if state or batch is of another kind."""
        try:
            leaves, containers = self._walk(state)
            inputs, _ = self._walk_batch(batch)
        except OtherStructureError:
            return None
        if not self._is_checked and self._kinds_of_batch(inputs) != self._batch_kinds:
            return None
        if self._conditions is not None and not self._conditions(inputs):
            return None
        known = len(self._seen) > 0 and all(map(operator.is_, map(operator.call, self._seen), leaves))
        return (leaves, containers, inputs, known) if known or kinds(leaves) == self._kinds else None

    def broken(self, batch: Any) -> list[str] | None:
        """The conditions on sizes that a batch breaks, as code; None if the graph is for one size of each tensor."""
        if self._conditions is None:
            return None
        try:
            inputs, _ = self._walk_batch(batch)
        except OtherStructureError:
            return None
        if self._kinds_of_batch(inputs) != self._batch_kinds:
            return None
        return self._conditions.broken(inputs, tree.paths(batch, "batch"))

    def __call__(
        self, state: TrainState, leaves: list[Tensor], containers: list[Any], inputs: list[Tensor], known: bool
    ) -> Any:
        """The step, for what ``find`` found."""
        if not self._in_place:
            new, output = self._run(leaves, inputs)
            if not self._is_step:
                return output
            result = self._state(state, new), output
            if self._donate:
                bury(state, self._taker)
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
        bury(state, self._taker)
        _, output = self._run(leaves, inputs)
        return after, output

    def run_by(self, artefact: Artefact) -> None:
        """Exchanges the artefact for another of the same step, state and batch."""
        self._run, self._in_place = artefact.run, artefact.written is not None
        self._written = artefact.written or ()
        self._seen = []

    def raise_uncompiled(self, found: Found, batch: Any) -> None:
        """Raises what the uncompiled step raises for inputs that failed, such as an index out of range.

        Its traceback leads to the user's line, where a kernel's error names a generated file. A donated state may have
        been overwritten in part, so the result is dropped and only an error counts.
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


def kinds(leaves: Sequence[Tensor]) -> list[Kind]:
    """What a graph assumes of each tensor."""
    return [(leaf.shape, leaf.dtype, leaf.stride(), leaf.device) for leaf in leaves]


def loose_kinds(leaves: Sequence[Tensor]) -> list[Kind]:
    """What a graph for any sizes assumes."""
    return [(leaf.ndim, leaf.dtype, leaf.device) for leaf in leaves]


def _general(structure: Any, enter: Callable[[Any], Any]) -> Walk:
    """For nodes that no walk can be written for."""

    def walk(node: Any) -> tuple[list[Any], list[Any]]:
        leaves, found = tree.flatten(enter(node))
        if found != structure or not all(isinstance(leaf, Tensor) for leaf in leaves):
            raise OtherStructureError
        # Nobody knows who holds what, so all of it counts as held elsewhere, and this list with it.
        return leaves, [leaves]

    return walk
