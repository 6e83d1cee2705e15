"""Analyzes a step on copies of its inputs."""

from __future__ import annotations

import reprlib
import time
import warnings
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from fxtrain import tree
from fxtrain._torch_internals.inductor import kernel_count
from fxtrain.compiler import Compiled, compile  # noqa: A004
from fxtrain.compiler._recompiles import described, described_in_order
from fxtrain.compiler.lowering._executable import Run
from fxtrain.compiler.lowering._graph_breaks import break_from_error
from fxtrain.compiler.lowering._muted_logs import without_torch_messages
from fxtrain.compiler.lowering._routes import Choice
from fxtrain.core import Batch, StepFn, TrainState, check_int, check_train_state, describe
from fxtrain.core._shard import holds_shards
from fxtrain.core._short_tracebacks import with_short_traceback
from fxtrain.data import for_step, to_device
from fxtrain.diagnostics._explanation import Explanation
from fxtrain.fold import as_composed, attach
from fxtrain.model import ValuesNeededError, captured_values
from fxtrain.step import EvalFunction, Step

_WARMUP_CALLS = 3


@with_short_traceback
def explain(step: StepFn | EvalFunction, state: TrainState, batch: Batch, *, calls: int = 30) -> Explanation:
    """Reports what a step computes, what it costs, and what keeps it from being one graph.

    The step is traced, compiled once more (with the options of ``step``, or the defaults of ``compile``) and called,
    all on copies: ``state``, ``batch`` and ``step`` are not modified. It takes about as long as a first step.

    Side effects of the step's Python code, such as printing, happen while it is traced, and not in later calls.

    Args:
        step: From ``train_step`` or ``eval_step``, compiled or not, or any pure function of that signature. If it has a
            mesh, all ranks must call ``explain``.
        state: A state from ``init`` or of a run, sharded or not.
        batch: One batch, or the examples of this rank.
        calls: The number of calls to measure. 0 compiles nothing and measures no time.

    Returns:
        A report, to be displayed or read field by field. ``route`` names the route that ``compile`` takes. A step that
        cannot be one graph is no error here: ``breaks`` lists the places and what to do about them.

    Raises:
        TypeError: ``calls`` is not an int.
        ValueError: ``calls`` is negative.
        Exception: The step raises it uncompiled.

    Example:
        >>> import torch, fxtrain as fx
        >>> def loss_fn(model, batch):
        ...     loss = model(batch).square().mean()
        ...     if loss > 1:
        ...         loss = loss.sqrt()
        ...     return loss
        >>> tx = fx.optim.sgd(0.1)
        >>> state = fx.init(torch.nn.Linear(2, 1), tx)
        >>> found = fx.explain(fx.train_step(loss_fn, tx), state, torch.ones(4, 2), calls=0)
        >>> found.route, found.reads[0].code
        ('inductor, traced with checks', 'if loss > 1:')
        >>> better = fx.train_step(lambda model, batch: model(batch).square().mean(), tx)
        >>> fx.explain(better, state, torch.ones(4, 2), calls=0)
        Explanation of <step train_step(<lambda>), fires Microbatch, Gradients, Updated>
          route       inductor, traced: the step as one graph
          graphs      1, no breaks
          operations  ...
          FLOPs       32.0: addmm 16.0, mm 16.0
          state       50 B: params 12 B, rest 38 B
          ...
    """
    # Imported here, because it loads the compiler.
    from fxtrain.diagnostics._activations import Activations, activations
    from fxtrain.diagnostics._analysis import Counts, counted, found_by_dynamo, found_by_running, joined, trace

    check_train_state(state, "explain(step, state, batch)", takes_shards=True)
    check_int("calls", calls, minimum=0)
    like = step if isinstance(step, Compiled) else compile(step)
    pure = like.step
    state, batch = _attached(pure, state).copy(), tree.clone(to_device(for_step(batch), state.step.device))
    entered = pure.enter(state)
    # Read before the copy is donated.
    assumed, in_order, sizes = described(entered, batch), described_in_order(entered, batch), _sizes(state)

    counts, kept, breaks, graphs = Counts(), Activations(), [], 1
    try:
        try:
            graph = trace(pure, entered, batch)
        except ValuesNeededError:
            pure(entered, batch)
            graph = trace(pure, entered, batch)
        counts = counted(graph)
        kept = activations(graph, like.memory) if isinstance(pure, Step) else kept
    except Exception as error:
        # Running the step raises its own error, if it has one.
        breaks, graphs = [break_from_error(error), *found_by_running(pure, state, batch)], 0
    with without_torch_messages():
        if "traced" not in like.route:
            graphs, breaks = found_by_dynamo(pure, entered, batch)
        choice = _choice(like, pure, entered, batch) if breaks else like._routes.choice
    if breaks and choice.found is not None and not any(each.where for each in breaks):
        breaks = [choice.found, *found_by_running(pure, state, batch)]

    seconds: dict[str, float] = {}
    first, kernels = None, None
    if calls and _is_one_graph(choice):
        seconds, first, kernels, choice = _compiled(like, state, batch, calls)
    elif calls:
        seconds = {"uncompiled": float(np.median(_call(pure, state, batch, calls)[0]))}
    reads = []
    if _is_one_graph(choice):
        graphs, breaks, reads = 1, [], breaks
    found = choice.found
    return Explanation(
        step=repr(pure),
        route=choice.route.name if choice.route is not None else "none",
        outcome=choice.route.outcome if choice.route is not None else "the first call raises an error",
        cause=" | ".join(part for part in (found.where, found.code) if part) or found.reason if found else "",
        graphs=graphs,
        breaks=joined(breaks),
        reads=joined(reads),
        **counts._asdict(),
        **kept._asdict(),
        kernels=kernels,
        state_bytes=sizes,
        batch_bytes=tree.nbytes(batch),
        seconds=seconds,
        first_seconds=first,
        assumed=assumed,
        varied=_varied([*like._recompiles.known, in_order]),
        constants=_constants(pure),
    )


def _attached(pure: Step | EvalFunction, state: TrainState) -> TrainState:
    def with_slots(seen: TrainState) -> TrainState:
        return attach(seen, as_composed(pure))

    if not holds_shards(state.params):
        return with_slots(state)
    from fxtrain.distributed._opened import on_opened  # keeps the import of fxtrain fast

    return on_opened(state, with_slots)


def _choice(like: Compiled, pure: Step | EvalFunction, state: TrainState, batch: Batch) -> Choice:
    try:
        return like._routes.choose(pure, state, batch)
    except Exception as error:
        return Choice(None, break_from_error(error))


def _is_one_graph(choice: Choice) -> bool:
    return choice.route is not None and (choice.route.is_whole or choice.route.has_otherwise)


def _compiled(
    like: Compiled, state: TrainState, batch: Batch, calls: int
) -> tuple[dict[str, float], float, int | None, Choice]:
    """Returns median seconds by part, the seconds of the first call, the number of kernels, and the route."""
    device = state.step.device
    graph_seconds: list[float] = []

    def timed(run: Run) -> Run:
        def timed_run(leaves: Sequence[Tensor], inputs: Sequence[Tensor]) -> tuple[Sequence[Tensor], object]:
            began = _now(device)
            result = run(leaves, inputs)
            graph_seconds.append(_now(device) - began)
            return result

        return timed_run

    # A copy, so that the given step keeps its graphs.
    compiled = like.fresh(timed)
    before = kernel_count()
    with warnings.catch_warnings():
        # The report contains it.
        warnings.filterwarnings("ignore", message="(?s).*cannot be traced as one graph")
        (first,), state = _call(compiled, state, batch, 1)
    after = kernel_count() if "inductor" in like.route else None
    written = None if before is None or after is None else after - before
    whole_seconds, _ = _call(compiled, state, batch, _WARMUP_CALLS + calls)
    whole, graph = float(np.median(whole_seconds[_WARMUP_CALLS:])), float(np.median(graph_seconds[1 + _WARMUP_CALLS :]))
    return {"calling": max(whole - graph, 0.0), "graph": graph}, first, written, compiled._routes.choice


def _call(step: StepFn | EvalFunction, state: TrainState, batch: Batch, calls: int) -> tuple[list[float], TrainState]:
    """Returns the seconds of each of several calls, and the state after them."""
    device = state.step.device
    seconds: list[float] = []
    for _ in range(calls):
        began = _now(device)
        result = step(state, batch)
        seconds.append(_now(device) - began)
        state = result[0] if isinstance(result, tuple) else state
    return seconds, state


def _now(device: torch.device) -> float:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter()


def _constants(step: Step | EvalFunction) -> dict[str, str]:
    """Returns the values that user functions read besides their arguments, as text by name."""
    found = {
        name: value
        for name, value in captured_values(step.function)
        if not type(value).__module__.startswith("fxtrain.")
    }
    return {name: _as_text(value) for name, value in sorted(found.items())}


def _as_text(value: object) -> str:
    if isinstance(value, Tensor):
        return describe(value)
    if isinstance(value, torch.nn.Module):
        return f"a module of type {type(value).__name__}"
    return reprlib.repr(value)


def _varied(known: list[dict[str, str]]) -> dict[str, tuple[str, ...]]:
    """Returns the leaves that differ between graphs, with all their kinds."""
    paths = {path: None for kinds in known for path in kinds}
    found = {path: tuple(dict.fromkeys(kinds.get(path, "absent") for kinds in known)) for path in paths}
    return {path: kinds for path, kinds in found.items() if len(kinds) > 1}


def _sizes(state: TrainState) -> dict[str, int]:
    parts = {name: tree.nbytes(getattr(state, name)) for name in ("params", "buffers", "opt_state", "slots")}
    return {**parts, "rest": tree.nbytes(state) - sum(parts.values())}
