"""The interface between step functions and the loop, with checks of hand-written ones."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fxtrain import tree
from fxtrain._torch_internals.tracing import is_traced
from fxtrain.core import TRACED, Batch, Callback, Control, Due, Event, StepFn, StepOutput, TrainState, describe, name_of
from fxtrain.core._shard import holds_shards
from fxtrain.core._short_tracebacks import shorten_traceback
from fxtrain.data import for_step
from fxtrain.fold import Composed, as_composed, attach, compose
from fxtrain.model import refuse_in_place_writes, versions
from fxtrain.step._callbacks import refused, traced_others
from fxtrain.step._check_function import refuse_unless_step
from fxtrain.step._gradients import recording_replaced, refuse_lost

if TYPE_CHECKING:
    from fxtrain.distributed import Mesh


class Step:
    """A pure function ``(state, batch) -> (state, output)``, with the attributes that the loop and the compiler need.

    The step increments ``state.step`` and ``state.position``, and returns its input once ``state.due.stop`` is set: a
    stopped state is a fixed point. A hand-written function does none of this itself.

    Slots of its callbacks that the state lacks, such as that of a loss scale, are attached on entry, as by
    ``step(fxtrain.attach(state, step), batch)``. From then on the state keeps its structure.

    Args:
        function: Any pure function with this signature.
        callbacks: The callbacks that it folds. Their slots enter the compiled graph.
        fires: The traced events at which it folds them.
        rebuild: Returns this step with other callbacks in place of ``callbacks``. Without it, ``fit`` cannot add traced
            callbacks to the step.
        settings: Other settings on which the result depends bitwise, as strings by name. Checkpoints store them, and
            resuming with others warns.
        description: What else describes the step in summaries and logs, such as its optimizer, by name. Values are
            converted to text when they are read.
        check_state: ``check_state(state)`` raises if the step cannot train such a state. ``fit`` calls it before the
            first step, and the first call of the step does.
        mesh: The ranks over which the step averages, from ``fxtrain.distributed.mesh``.
        takes_shards: Whether the function takes sharded states, as that of ``train_step`` with a mesh does.

    Raises:
        TypeError: If the function does not take a state and a batch. When it runs, if its arguments or its result have
            other types.
        ValueError: If an event in ``fires`` is not traced. When it runs, if the function changes the structure of the
            state, a shape or a dtype.
        RuntimeError: When it runs uncompiled, if the function writes into its state in place, or discards the frozen
            parameters that its forward pass wrote.

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
        function: StepFn,
        *,
        callbacks: Callback | Iterable[Callback] = (),
        fires: Iterable[type[Event]] = (),
        rebuild: Callable[[Composed], Step] | None = None,
        settings: Mapping[str, str] | None = None,
        description: Mapping[str, object] | None = None,
        check_state: Callable[[TrainState], None] | None = None,
        mesh: Mesh | None = None,
        takes_shards: bool = False,
    ) -> None:
        refuse_unless_step(function)
        self.function = function
        self.callbacks: Composed = as_composed(callbacks)
        self.fires = frozenset(fires)
        self.mesh, self.takes_shards = mesh, takes_shards
        self.settings = dict(settings or {})
        self._description = dict(description or {})
        self._rebuild = rebuild
        self.check_state = check_state
        self._is_state_checked = check_state is None
        unknown = self.fires - set(TRACED)
        if unknown:
            raise ValueError(
                f"expected fires to contain only {', '.join(kind.__name__ for kind in TRACED)}, got "
                f"{', '.join(sorted(kind.__name__ for kind in unknown))}."
            )
        self._name = name_of(function)
        self._of_members: Step | None = None
        # Names of the slots that enter the compiled graph.
        self.enters = frozenset(self.callbacks.traced_slots)
        functools.update_wrapper(self, function, updated=())

    def __call__(self, state: TrainState, batch: Batch) -> tuple[TrainState, StepOutput]:
        try:
            return self._take(state, batch)
        except Exception as error:
            if not torch.compiler.is_dynamo_compiling():
                shorten_traceback(error)
            raise

    def _take(self, state: TrainState, batch: Batch) -> tuple[TrainState, StepOutput]:
        is_dynamo = torch.compiler.is_dynamo_compiling()
        if not (is_dynamo or self.takes_shards) and holds_shards(getattr(state, "params", None)):
            raise TypeError(
                f"expected a state with whole tensors for {self._name}, got a sharded one. Only the step of "
                "train_step(..., mesh=mesh) takes sharded states. Use a replicated state for other steps."
            )
        state = self.attached(state)
        # Not in a trace, which would record the operations of the check. A compiled step makes it before. The test for
        # Dynamo is first, because Dynamo would guard the attribute, and recompile after another call has set it.
        if not torch.compiler.is_dynamo_compiling() and not self._is_state_checked and not is_traced():
            self._is_state_checked = True
            assert self.check_state is not None
            self.check_state(state)
        name, before = self._name, versions(state)
        with recording_replaced() as replaced:
            result = self.function(state, for_step(batch))
        new, output = _checked(name, result)
        refuse_in_place_writes(name, state, before, "state")
        refuse_lost(name, replaced, new.params)
        stopped = state.due.stop
        # A stopped step makes no requests.
        control = on_device(output.control, stopped.device).gated(~stopped)
        due = state.due
        if "stop" in control.kinds:
            skip_final_save = due.skip_final_save
            if "skip_final_save" in control.kinds:
                skip_final_save = skip_final_save | control.any("skip_final_save")
            stop = stopped | control.any("stop")
            # Not `_replace`, which returns an empty tuple inside torch.compile of torch 2.11.
            due = Due(due.begin_epoch, due.rewind, due.evaluate, due.end_epoch, due.save, stop, skip_final_save)
        new = new.replace(step=state.step + 1, position=state.position + 1, due=due)
        _refuse_changes(name, state, new)
        return tree.where(stopped, state, new), StepOutput(output.metrics, control, output.outputs, output.weight)

    @property
    def description(self) -> dict[str, str]:
        """The description and the settings of the step as text by name, for summaries and logs.

        That of ``train_step`` has ``loss``, ``optimizer``, ``learning_rate`` or ``learning_rate/<group>``,
        ``accumulate``, ``steps_per_update``, ``precision`` and ``unused``, if they are set. A compiled step also has
        ``compiled`` and ``donation``.
        """
        described = {name: str(value) for name, value in self._description.items()}
        return {**described, **self.settings, **described}

    def with_callbacks(self, callbacks: Callback | Iterable[Callback]) -> Step:
        """Returns this step with the traced callbacks among ``callbacks`` folded after its own.

        ``fit`` calls this with its callbacks. Callbacks that the step already folds are not added again. If there are
        no others, the step itself is returned.

        Args:
            callbacks: Callbacks for any events.

        Raises:
            ValueError: If the step was made without ``rebuild`` and a callback has to be added.
        """
        others = traced_others(self.callbacks, as_composed(callbacks))
        if not others:
            return self
        if self._rebuild is None:
            raise refused(others[0])
        return self._rebuild(compose(self.callbacks, *others))

    def over_members(self, lift: Callable[[Composed], Composed]) -> Step:
        """Returns the step of a batch of runs. The same object is returned each time.

        Args:
            lift: Maps callbacks of one run to those of a batch.

        Raises:
            ValueError: If the step has a mesh.
        """
        if self.mesh is not None:
            raise ValueError(
                f"expected a step without a mesh for a batch of runs, got {self._name} with one. Give each rank runs "
                "of its own, or train one run on the mesh."
            )
        if self._of_members is None:
            from fxtrain.step._members import MembersStep  # keeps the import of fxtrain fast

            self._of_members = MembersStep(self, lift)
        return self._of_members

    def attached(self, state: TrainState) -> TrainState:
        """Returns the state with all slots of this step. Missing ones are initialized by their callbacks.

        Raises:
            TypeError: If ``state`` is not a TrainState.
        """
        try:
            missing = self.enters.difference(state.slots)
        except AttributeError:
            raise TypeError(
                f"expected a TrainState as the first argument of {self._name}, got {describe(state)}. Call it as "
                "step(state, batch), with a state from fxtrain.init(module, tx)."
            ) from None
        if not missing:
            return state
        callbacks = [handler for name, handler in self.callbacks.slots.items() if name in missing]
        if torch.compiler.is_dynamo_compiling() or not holds_shards(state.params):
            return attach(state, callbacks)
        from fxtrain.distributed._opened import on_opened  # keeps the import of fxtrain fast

        return on_opened(state, lambda seen: attach(seen, callbacks))

    def enter(self, state: TrainState) -> TrainState:
        """Returns the part of the state that enters the compiled graph, without slots that only the loop uses."""
        if self.enters.issuperset(state.slots):
            return state
        return state.replace(slots={name: slot for name, slot in state.slots.items() if name in self.enters})

    def __repr__(self) -> str:
        fires = ", ".join(kind.__name__ for kind in TRACED if kind in self.fires) or "nothing"
        return f"<step {self._name}, fires {fires}>"


class ManySteps(Step):
    """A function ``(state, batches) -> (state, outputs)`` that applies a step to each batch in turn.

    One graph of it takes several steps per dispatch, for models so small that dispatch overhead dominates.

    Args:
        step: The step.
        count: Number of batches per call, for its name.

    Example:
        >>> import torch, fxtrain as fx
        >>> tx = fx.optim.sgd(0.5)
        >>> step = fx.train_step(lambda model, batch: (model["w"] - batch).square(), tx)
        >>> state, batches = fx.init({"w": torch.tensor(0.0)}, tx), torch.tensor([1.0, 3.0]).unbind()
        >>> state, outputs = ManySteps(step, 2)(state, batches)
        >>> [float(output.metrics["loss"]) for output in outputs], int(state.step)
        ([1.0, 4.0], 2)
    """

    def __init__(self, step: Step, count: int) -> None:
        super().__init__(
            step.function,
            callbacks=step.callbacks,
            fires=step.fires,
            description=step.description,
            mesh=step.mesh,
            takes_shards=step.takes_shards,
        )
        self.step, self.count = step, count

    def __call__(self, state: TrainState, batch: Sequence[Batch]) -> tuple[TrainState, Any]:
        return take_steps(self.step, state, batch)

    def __repr__(self) -> str:
        return f"<{self.count} of {self.step!r}>"


def take_steps(
    step: Callable[[TrainState, Batch], tuple[TrainState, StepOutput]], state: TrainState, batches: Sequence[Batch]
) -> tuple[TrainState, Sequence[StepOutput]]:
    """Applies a step to each batch in turn, and returns the last state and all outputs."""
    outputs: list[StepOutput] = []
    for batch in batches:
        state, output = step(state, batch)
        outputs.append(output)
    return state, tuple(outputs)


def on_device(control: Control | None, device: torch.device) -> Control:
    """Returns the requests with flags as tensors on a device, because compiled and vmapped steps return only tensors.

    Args:
        control: Requests with bools or tensors. None stands for no requests.
        device: Device of the flags that are not tensors yet.
    """
    requests = Control() if control is None else control
    return tree.map(lambda leaf: leaf if isinstance(leaf, Tensor) else torch.tensor(leaf, device=device), requests)


def _checked(name: str, result: object) -> tuple[TrainState, StepOutput]:
    if (
        isinstance(result, tuple)
        and len(result) == 2
        and isinstance(result[0], TrainState)
        and isinstance(result[1], StepOutput)
    ):
        return result
    raise TypeError(f"expected {name} to return (state, fxtrain.StepOutput(metrics)), got {describe(result)}.")


def _refuse_changes(name: str, old: TrainState, new: TrainState) -> None:
    """Raises if structure, shapes or dtypes of the state changed, because each change would recompile the step."""
    old_leaves, old_structure = tree.flatten(old)
    new_leaves, new_structure = tree.flatten(new)
    alike = len(old_leaves) == len(new_leaves) and all(
        was.shape == now.shape and was.dtype == now.dtype for was, now in zip(old_leaves, new_leaves, strict=True)
    )
    if torch.compiler.is_dynamo_compiling():
        # Dynamo cannot trace the formatting of paths. Keys that differ raise in tree.where.
        if not alike:
            raise ValueError(
                f"expected {name} to keep the shapes and dtypes of its state, got others. Call it uncompiled to see "
                "where."
            )
        return
    if alike and old_structure == new_structure:
        return
    before = dict(zip(tree.paths(old, "state"), old_leaves, strict=True))
    after = dict(zip(tree.paths(new, "state"), new_leaves, strict=True))
    for path in (*before, *after):
        was, now = before.get(path), after.get(path)
        if now is None:
            raise ValueError(f"expected {name} to keep the structure of its state, got one without {path}.")
        if was is None:
            raise ValueError(
                f"expected {name} to keep the structure of its state, got one with {path}. Keep new values in a slot "
                "of a callback: Step(..., callbacks=)."
            )
        if was.shape != now.shape or was.dtype != now.dtype:
            raise ValueError(
                f"expected {name} to keep shapes and dtypes, got {describe(now)} at {path}, which was {describe(was)}."
            )
    raise ValueError(
        f"expected {name} to keep the model and the types of all containers in its state, got others with the same "
        "leaves."
    )
