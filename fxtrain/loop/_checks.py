"""Checks of arguments and callbacks, made before the first step."""

from __future__ import annotations

import contextlib
import inspect
import os
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from fxtrain import tree
from fxtrain._torch_internals.tracing import new_fake_mode
from fxtrain.core import CHANGED_AT_END, LOOP, TRACED, StepBegin, TrainState, describe, did_you_mean
from fxtrain.core._members import members_of, summarized
from fxtrain.core._rank import rank
from fxtrain.data import Source, map_tensors, to_device
from fxtrain.equivalents import refuse_foreign_callback
from fxtrain.fold import Composed
from fxtrain.loop._types import EvalFn, LoopStep
from fxtrain.step import EvalFunction, Step
from fxtrain.step._check_function import place_of, refuse_unless_step, takes_model
from fxtrain.values import KINDS_BY_NAME, Kind, is_kept

_CHECKPOINTER = "checkpointer(best=...)"


def check_state(state: object, order: str) -> None:
    """Raises unless ``state`` is a TrainState with values.

    Args:
        state: The argument passed as the state.
        order: The call with its arguments in order, for errors.

    Raises:
        TypeError: If it is not a TrainState. The message says how to make one from it.
        ValueError: If the state is on the meta device, or the call is inside torch.autocast, where a step would not be
            a function of its arguments.
    """
    if not isinstance(state, TrainState):
        if not isinstance(state, nn.Module):
            refuse_foreign_callback(order, "a TrainState as the first argument", state)
        raise TypeError(
            f"expected a TrainState as the first argument of {order}, got {describe(state)}. {_state_of(state)}"
        )
    leaves = tree.leaves(state)
    empty = next((index for index, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.is_meta), None)
    if empty is not None:
        raise ValueError(
            f"expected a state with values, got {tree.paths(state, 'state')[empty]} on the meta device, where tensors "
            "have none. Materialize the module before fxtrain.init: module.to_empty(device=...), then load its weights."
        )
    if torch.is_autocast_enabled(state.step.device.type):
        raise ValueError(
            f'expected {order} outside of torch.autocast, got a call inside. Give precision="bf16" or "fp16" to '
            "fxtrain.train_step and fxtrain.eval_step."
        )


def check_mesh(mesh: object) -> None:
    """Raises TypeError unless ``mesh`` is None or a mesh."""
    if mesh is None:
        return
    from fxtrain.distributed import Mesh  # keeps the import of fxtrain fast

    if not isinstance(mesh, Mesh):
        raise TypeError(f"expected mesh to be a Mesh, got {describe(mesh)}. Make one: fxtrain.distributed.mesh().")


def check_unchanged_at_end(state: TrainState) -> None:
    """Raises ValueError if callbacks changed the state at the ``FitEnd`` of another run."""
    if CHANGED_AT_END in state.slots:
        raise ValueError(
            "expected a state to continue training from, got result.state of a run whose callbacks changed it at "
            "FitEnd, for example to restore the best weights. Continue from result.continue_from. To start a new run "
            "from these weights: fxtrain.load_state_dict(fxtrain.init(module, tx), fxtrain.state_dict(result.state))."
        )


def check_step(step: object) -> None:
    """Raises TypeError unless ``step`` is a training step. The message says how to make one."""
    if not isinstance(step, nn.Module):
        refuse_foreign_callback("fit(state, step, data)", "a step as the second argument", step)
    if isinstance(step, TrainState) or not callable(step):
        optimizer = isinstance(step, torch.optim.Optimizer)
        order = "Give the arguments in this order: fit(state, step, data)."
        remedy = "Make a step: fxtrain.train_step(loss_fn, tx)." if optimizer else order
        raise TypeError(
            f"expected a step as the second argument of fit(state, step, data), got {describe(step)}. {remedy}"
        )
    if isinstance(getattr(step, "step", step), EvalFunction):
        raise TypeError(
            f"expected a training step, got {step!r}, which evaluates. Make one with fxtrain.train_step(loss_fn, tx), "
            "and give this one as eval_step=."
        )
    if not hasattr(step, "fires"):
        refuse_unless_step(step)


def check_eval_step(eval_step: object) -> None:
    """Raises TypeError unless ``eval_step`` is an evaluation step. The message says how to make one."""
    if not callable(eval_step) or isinstance(eval_step, type | nn.Module | TrainState):
        what = describe(eval_step)
    elif isinstance(getattr(eval_step, "step", eval_step), Step):
        what = f"{eval_step!r}, which trains"
    elif takes_model(eval_step):
        what = f"the function {place_of(eval_step)}"
    else:
        return
    raise TypeError(f"expected eval_step from fxtrain.eval_step, got {what}. Make one: fxtrain.eval_step(loss_fn).")


def check_checkpointer(checkpointer: object) -> None:
    """Raises TypeError unless ``checkpointer`` is a checkpointer or None. The message says how to make one."""
    if isinstance(checkpointer, str | os.PathLike):
        raise TypeError(
            f"expected a checkpointer, got the path {os.fspath(checkpointer)!r}. Make one: "
            f"fxtrain.checkpointer({os.fspath(checkpointer)!r})."
        )
    refuse_foreign_callback("checkpointer", "a checkpointer", checkpointer)
    if inspect.isfunction(checkpointer) or isinstance(checkpointer, type):
        raise TypeError(
            f"expected a checkpointer, got {checkpointer.__name__} itself. Call it: fxtrain.checkpointer(folder)."
        )
    if checkpointer is not None and not (hasattr(checkpointer, "save") and hasattr(checkpointer, "close")):
        raise TypeError(
            f"expected a checkpointer, got {describe(checkpointer)}. Make one: fxtrain.checkpointer(folder)."
        )


def check_needs(
    callbacks: Composed,
    state: TrainState,
    step: LoopStep,
    eval_step: EvalFn | None,
    eval_data: Source | None,
    best: str | None,
) -> None:
    """Raises before the first step if a callback needs something that the run does not provide.

    Args:
        callbacks: All callbacks of the run.
        state: The initial state.
        step: The step.
        eval_step: The evaluation step, or None.
        eval_data: The evaluation data, or None.
        best: The evaluation metric by which the checkpointer selects the best checkpoint, or None.

    Raises:
        ValueError: The message names the callback, the missing metric, slot or event, and the available ones.
    """
    count = getattr(step, "steps_per_call", 1)
    for handler in callbacks.handlers:
        if count > 1 and StepBegin in handler.events:
            raise ValueError(
                f"expected no callback on StepBegin with steps_per_call={count}, got {handler.name}. Subscribe to "
                "StepEnd or compile with steps_per_call=1."
            )
        for event in handler.needs.events:
            if event not in step.fires:
                fires = ", ".join(kind.__name__ for kind in TRACED if kind in step.fires) or "none"
                raise ValueError(
                    f"expected a step that fires {event.__name__} for {handler.name}, got one that fires {fires}. "
                    "Declare the events of a hand-written step: fxtrain.Step(function, callbacks=..., fires=...)."
                )
        for slot in handler.needs.slots:
            if slot not in state.slots:
                there = ", ".join(repr(slot) for slot in state.slots if not slot.startswith(LOOP)) or "none"
                raise ValueError(
                    f"expected the slot {slot!r} in the state for {handler.name}, got {there}. Give fit the callback "
                    "that keeps it."
                )
        for check in handler.needs.checks:
            check(state)
    check: Callable[[TrainState], None] | None = getattr(getattr(step, "step", step), "check_state", None)
    if check is not None:
        check(state)
    needed = [(metric, handler.name) for handler in callbacks.handlers for metric in handler.needs.eval_metrics]
    needed += [] if best is None else [(best, _CHECKPOINTER)]
    if not needed:
        return
    if eval_step is None:
        metric, reader = needed[0]
        raise ValueError(
            f"expected the metric {metric!r} at EvalEnd for {reader}, got no evaluation. Give fit an eval_step and "
            "eval_data."
        )
    measured, members = _measured(eval_step, state, eval_data), members_of(state)
    for metric, reader in needed:
        names = shown = measured
        if reader == _CHECKPOINTER and members is not None:  # callbacks see the metrics of one member
            names = [key for name in measured for key in summarized(name, members.step)]
            shown = [key for name in measured for key in summarized(name, members.step[:1])]
        if names and metric not in names:
            raise ValueError(
                f"expected the metric {metric!r} at EvalEnd for {reader}, got {', '.join(map(repr, shown))}."
                f"{did_you_mean(metric, shown)} Return it from eval_step, or name one of these."
            )


def check_written(callbacks: Composed, kept: frozenset[Kind]) -> None:
    """Raises on rank 0 if a callback needs a kind of values written that no writer of the run keeps.

    Args:
        callbacks: All callbacks of the run.
        kept: The kinds that the observers keep.

    Raises:
        ValueError: The message names the callback, the kind, and the writers that keep it.
    """
    for handler in callbacks.handlers:
        for name in handler.needs.written:
            if not is_kept(KINDS_BY_NAME[name], kept) and rank() == 0:
                there = ", ".join(other for other, kind in KINDS_BY_NAME.items() if is_kept(kind, kept))
                raise ValueError(
                    f"expected a writer of {name} for {handler.name}, got "
                    f"{f'writers of {there}' if there else 'none'}. "
                    f"Give fxtrain.observers.write one that keeps them: {', '.join(_writers_of(name))}."
                )


def _writers_of(name: str) -> list[str]:
    """Returns the functions of ``fxtrain.writers`` that make a writer of this kind of values."""
    from fxtrain import writers  # here and in the next lines, because it keeps the import of fxtrain fast
    from fxtrain.writers._asynchronous import AsynchronousWriter
    from fxtrain.writers._multi import MultiWriter

    found: list[str] = []
    for made_by in writers.__all__:
        function = getattr(writers, made_by)
        made = getattr(function, "__globals__", {}).get(getattr(function, "__annotations__", {}).get("return"))
        if made not in (MultiWriter, AsynchronousWriter) and is_kept(KINDS_BY_NAME[name], getattr(made, "kinds", ())):
            found.append(f"fxtrain.writers.{made_by}")
    return found


def _measured(eval_step: EvalFn, state: TrainState, data: Source | None) -> list[str]:
    """Returns the names of the evaluation's metrics, or none if they are unknown before an evaluation."""
    # A stream may yield its first batch only once.
    if data is None or data.epoch_length is None:
        return []
    with contextlib.suppress(Exception):  # the first evaluation raises it again, or then finds a missing metric
        batch = to_device(data[0], state.step.device)
        pure: EvalFn | None = getattr(eval_step, "step", None)
        if pure is None:  # not in the fake mode, which imports the compiler and takes seconds
            return list(eval_step(state, batch).metrics)
        with new_fake_mode() as mode:
            return list(pure(tree.map(mode.from_tensor, state), map_tensors(mode.from_tensor, batch)).metrics)
    return []


def _state_of(value: object) -> str:
    """Returns advice on how to make a state from a value."""
    if isinstance(value, nn.Module):
        return "Make one of the module: fxtrain.init(module, tx)."
    if isinstance(getattr(value, "continue_from", None), TrainState):
        return "Continue from the state in it: result.continue_from."
    if isinstance(value, Mapping) and all(isinstance(leaf, Tensor) for leaf in value.values()):
        return "Load the weights into one: fxtrain.load_state_dict(fxtrain.init(module, tx), weights)."
    if inspect.isfunction(value):
        return f"If {place_of(value)} returns a TrainState, call it, as in fxtrain.init(module, tx)."
    return "Make one with fxtrain.init(module, tx), and give the arguments in this order."
