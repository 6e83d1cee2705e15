"""Compilation by ``torch.compile``, for other backends than Inductor and for steps that cannot be traced."""

from __future__ import annotations

import contextlib
import types
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fxtrain import tree
from fxtrain._torch_internals.dynamo import can_show_to_modes, recompile_limit_error, restoring_saved_tensor_hooks
from fxtrain._torch_internals.interface import is_tested
from fxtrain._torch_internals.kernels import shared_libraries
from fxtrain._torch_internals.tracing import new_fake_mode
from fxtrain.compiler.lowering._executable import Executable
from fxtrain.core import Batch, TrainState, Tree, compiling, warn
from fxtrain.core._tracebacks import is_raised_by_users
from fxtrain.model import CapturedStateError, UnseededError, ValuesNeededError
from fxtrain.rng import untouched
from fxtrain.step import EvalFunction, Step

_TOO_MANY_SIZES = (
    "expected a step that keeps sizes symbolic (dynamic=True), got one that reads a size as a number. Dynamo compiled "
    "a graph for each size up to its limit, and other sizes run uncompiled from now on. Pad to few sizes with "
    "fxtrain.data.bucketed."
)


def compile_by_dynamo(
    step: Step | EvalFunction, state: TrainState, batch: Batch, *, in_place: bool, **options: Any
) -> Executable:
    """Compiles the step by ``torch.compile`` as one graph.

    Takes the arguments of ``trace_step``, but ignores ``in_place``: the executable always returns a new state.
    """
    del in_place
    if not can_show_to_modes():
        raise RuntimeError(
            f"expected a torch whose compiler shows random functions to function modes, got {torch.__version__}."
        )
    _check(step, state, batch)
    # Dynamo's graph disables the hooks while torch.func runs, and an error there leaves them disabled.
    compiled = restoring_saved_tensor_hooks(torch.compile(_own_code(step), fullgraph=True, **options))
    if options["backend"] == "inductor":
        compiled = shared_libraries()(compiled)
    # The first call compiles, so that errors of the compiler are raised here. A newer torch may hide random functions
    # from function modes.
    with contextlib.nullcontext() if is_tested() else untouched():
        compiled(state, batch)
    state_structure, batch_structure = tree.structure(state), tree.structure(batch)
    # At each call, Dynamo's code repeats the attributes that modules set on themselves during the trace.
    model: Any = state.model
    writes = model is not None and model.restore()

    too_many_graphs = recompile_limit_error()
    warned = False

    def run(leaves: Sequence[Tensor], inputs: Sequence[Tensor]) -> tuple[Sequence[Tensor], Tree]:
        nonlocal warned
        arguments = tree.unflatten(state_structure, leaves), tree.unflatten(batch_structure, inputs)
        try:
            result = compiled(*arguments)
        except too_many_graphs:
            # Nothing has been computed yet.
            if not warned:
                warn(_TOO_MANY_SIZES, UserWarning)
            warned = True
            result: Any = step(*arguments)
        if writes and model is not None:
            model.restore()
        return (tree.leaves(result[0]), result[1]) if isinstance(step, Step) else ((), result)

    return Executable(run, None)


def _check(step: Step | EvalFunction, state: TrainState, batch: Batch, *, again: bool = False) -> None:
    """Runs the checks of a first call, which Dynamo's trace skips.

    They run on fake tensors if possible, and otherwise on the uncompiled step.
    """

    def run_without_values() -> None:
        mode = new_fake_mode()
        fakes = tree.map(mode.from_tensor, (state, batch))
        with mode, compiling():
            step(*fakes)

    try:
        run_without_values()
    except (CapturedStateError, UnseededError):
        raise
    except ValuesNeededError:
        step(state, batch)
        if not again:
            _check(step, state, batch, again=True)
    except Exception as error:
        step(state, batch)
        if is_raised_by_users(error) and not fails(run_without_values):
            raise


def fails(function: Callable[[], object]) -> bool:
    """Whether a call raises.

    A user error that does not recur is not the compiler's break_from_error.
    """
    try:
        function()
    except Exception:
        return True
    return False


def _own_code(function: Callable[[TrainState, Batch], Tree]) -> Callable[[TrainState, Batch], Tree]:
    # Dynamo caches graphs per code object, with a limit of 8, and all callable objects share one code object. Without a
    # copy of the code, the ninth step of a notebook would be refused.
    def run(state: TrainState, batch: Batch) -> Any:
        return function(state, batch)

    return types.FunctionType(run.__code__.replace(), run.__globals__, run.__name__, None, run.__closure__)
