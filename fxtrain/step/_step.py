"""Step: what the loop and the compiler must know of a function that moves the state forward."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from fxtrain import tree
from fxtrain.core import TRACED, Control, Due, StepOutput, TrainState
from fxtrain.data import for_step
from fxtrain.fold import Composed, as_composed, attach
from fxtrain.fold._subscription import name_of
from fxtrain.model import refuse_writes, versions
from fxtrain.step._carried import noted, refuse_lost
from fxtrain.step._contract import refuse_unless_step
from fxtrain.step._returned import described


class Step:
    """A pure function ``(state, batch) -> (state, output)``, with what the loop and the compiler must know of it.

    Whatever the function does, the step counts itself, moves the position by one batch, and returns its input
    once ``state.due.stop`` is set: a stopped state is a fixed point. A hand-written function needs none of this.

    A slot of its callbacks that the state lacks, as that of a loss scale, is attached at entry: the result is that of
    ``step(fxtrain.attach(state, step), batch)``. From then on the state keeps its structure.

    Args:
        function: The step. It may be any pure function of this signature.
        callbacks: The callbacks that it folds; their slots enter the compiled graph.
        fires: The traced events at which it folds them.
        settings: What else decides the bits of its result, as text by name. A checkpoint keeps them, and a resume
            with others warns.

    Raises:
        TypeError: If the function does not take a state and a batch. When it runs, if it is called with something else,
            or the function returned anything else.
        ValueError: When it runs, if the function changed the structure of the state, a shape or a dtype.
        RuntimeError: When it runs and is not compiled, if the function wrote into its state in place.

    Example:
        >>> import torch, fxtrain as fx
        >>> @fx.Step
        ... def halve(state, batch):
        ...     return state.replace(params=state.params * 0.5), fx.StepOutput({"size": state.params})
        >>> state, output = halve(fx.init(torch.tensor(8.0)), batch=None)
        >>> float(state.params), int(state.step)
        (4.0, 1)
    """

    def __init__(
        self,
        function: Callable[..., Any],
        *,
        callbacks: Any = (),
        fires: Iterable[type[Any]] = (),
        settings: Mapping[str, str] | None = None,
    ) -> None:
        refuse_unless_step(function)
        self.function = function
        self.callbacks: Composed = as_composed(callbacks)
        self.fires = frozenset(fires)
        self.settings = dict(settings or {})
        unknown = self.fires - set(TRACED)
        if unknown:
            raise ValueError(
                f"fires={sorted(kind.__name__ for kind in unknown)}: a step fires "
                f"{', '.join(kind.__name__ for kind in TRACED)}, and nothing else."
            )
        self._name = name_of(function)
        self.enters = frozenset(self.callbacks.traced_slots)  # the slots that go into the compiled graph
        functools.update_wrapper(self, function, updated=())

    def __call__(self, state: TrainState, batch: Any) -> tuple[TrainState, StepOutput]:
        state = self.attached(state)
        name, before = self._name, versions(state)
        with noted() as written:
            result = self.function(state, for_step(batch))
        new, output = _checked(name, result)
        refuse_writes(name, state, before, "state")
        refuse_lost(name, written, new.params)
        stopped = state.due.stop
        # A step that is not taken asks for nothing.
        control = on_device(output.control, stopped.device).given(~stopped)
        due = state.due
        if "stop" in control.kinds:
            unsaved = due.unsaved | control.any("unsaved") if "unsaved" in control.kinds else due.unsaved
            stop = stopped | control.any("stop")
            # Not `_replace`: inside torch.compile of torch 2.11 an empty tuple comes of it.
            due = Due(due.begin_epoch, due.rewind, due.evaluate, due.end_epoch, due.save, stop, unsaved)
        new = new.replace(step=state.step + 1, position=state.position + 1, due=due)
        _refuse_changes(name, state, new)
        return tree.where(stopped, state, new), StepOutput(output.metrics, control, output.outputs, output.weight)

    def attached(self, state: TrainState) -> TrainState:
        """The state with all slots that this step reads and writes: one it lacks starts as its callback's init says."""
        try:
            missing = self.enters.difference(state.slots)
        except AttributeError:
            raise TypeError(
                f"expected a TrainState as the first argument of {self._name}, got {described(state)}. Call it as "
                "step(state, batch), with a state from fxtrain.init(module, tx)."
            ) from None
        if not missing:
            return state
        return attach(state, [handler for name, handler in self.callbacks.slots.items() if name in missing])

    def enter(self, state: TrainState) -> TrainState:
        """What of the state goes into the compiled graph: slots that only the loop uses stay outside."""
        if self.enters.issuperset(state.slots):
            return state
        return state.replace(slots={name: memory for name, memory in state.slots.items() if name in self.enters})

    def __repr__(self) -> str:
        fires = ", ".join(kind.__name__ for kind in TRACED if kind in self.fires) or "nothing"
        return f"<step {self._name}, fires {fires}>"


def on_device(control: Control | None, device: torch.device) -> Control:
    """The requests with tensors for flags: what leaves a compiled or a vmapped step is tensors."""
    asked = Control() if control is None else control
    return tree.map(lambda leaf: leaf if isinstance(leaf, Tensor) else torch.tensor(leaf, device=device), asked)


def _checked(name: str, result: Any) -> tuple[TrainState, StepOutput]:
    if (
        isinstance(result, tuple)
        and len(result) == 2
        and isinstance(result[0], TrainState)
        and isinstance(result[1], StepOutput)
    ):
        return result
    raise TypeError(f"{name} returned {described(result)}: a step returns (state, fxtrain.StepOutput(metrics)).")


def _refuse_changes(name: str, old: TrainState, new: TrainState) -> None:
    """A state keeps its structure, shapes and dtypes: anything else would be another graph at each step."""
    old_leaves, old_structure = tree.flatten(old)
    new_leaves, new_structure = tree.flatten(new)
    alike = len(old_leaves) == len(new_leaves) and all(
        was.shape == came.shape and was.dtype == came.dtype for was, came in zip(old_leaves, new_leaves, strict=True)
    )
    if torch.compiler.is_dynamo_compiling():
        # Dynamo cannot write paths, and keys that differ are found where the states are joined.
        if not alike:
            raise ValueError(f"{name} changed a shape or a dtype of its state: call it uncompiled to see where.")
        return
    if alike and old_structure == new_structure:
        return
    before = dict(zip(tree.paths(old, "state"), old_leaves, strict=True))
    after = dict(zip(tree.paths(new, "state"), new_leaves, strict=True))
    for path in (*before, *after):
        was, came = before.get(path), after.get(path)
        if was is None or came is None:
            raise ValueError(
                f"{name} {'added' if was is None else 'removed'} {path}: a step keeps the structure of its state. "
                "Give the step a callback that keeps it in a slot: Step(..., callbacks=)."
            )
        if was.shape != came.shape or was.dtype != came.dtype:
            raise ValueError(
                f"{name} changed {path} from {described(was)} to {described(came)}: a step keeps shapes and dtypes."
            )
    raise ValueError(
        f"{name} changed the structure of its state, though every leaf is where it was: a step keeps the model, and "
        "the types of all containers."
    )
