"""The routes that ``compile`` tries, in order. Importing this module loads the compiler's passes."""

from __future__ import annotations

import functools

from fxtrain._torch_internals.interface import Feature
from fxtrain.compiler.artefacts._folder import Artefacts
from fxtrain.compiler.lowering._dynamo import compile_by_dynamo
from fxtrain.compiler.lowering._executable import Backend, uncompiled
from fxtrain.compiler.lowering._modes import AHEAD, without_cuda_graphs
from fxtrain.compiler.lowering._recall import Recall
from fxtrain.compiler.lowering._regions import compile_in_regions
from fxtrain.compiler.lowering._routes import Route, Routes
from fxtrain.compiler.lowering._specialization import compile_specialized
from fxtrain.compiler.lowering._trace import compile_traced, trace_step
from fxtrain.compiler.passes._memory_policy import Memory
from fxtrain.compiler.passes._transfer_buckets import Reshard


def routes_to(
    backend: Backend | None,
    mode: str | None,
    *,
    dynamic: bool,
    fullgraph: bool,
    memory: Memory = "save",
    reshard: Reshard = "after_forward",
    artefacts: Artefacts | None = None,
    runs_uncompiled: bool = False,
    is_rehearsal: bool = False,
) -> Routes:
    """Returns the routes for the options of ``compile``, which describes the other arguments.

    Args:
        artefacts: The folder of compiled graphs that the user has named.
        runs_uncompiled: Whether the first call may run the step uncompiled, for a check or to recognize it.
        is_rehearsal: Whether graphs are run operation by operation instead of being compiled.
    """
    graphs = {"memory": memory, "reshard": reshard}
    rehearsal = functools.partial(
        routes_to, backend, mode, dynamic=dynamic, fullgraph=fullgraph, **graphs, is_rehearsal=True
    )
    has_traces = backend is None
    chosen = backend or "inductor"
    title = chosen if isinstance(chosen, str) else getattr(chosen, "__name__", type(chosen).__name__)
    suffix = "" if mode is None else f", {mode}"
    needs = Feature.TRACED | Feature.INDUCTOR if has_traces else Feature.TRACED
    tracing = needs | Feature.AHEAD if mode == AHEAD else needs
    if is_rehearsal:
        backend, chosen, mode = "eager", "eager", None
    # Without a limit to its memory, because the uncompiled step may need more.
    is_recalled = runs_uncompiled and has_traces and not dynamic and memory == "save"
    traced = Route(
        f"{title}, traced{suffix}",
        functools.partial(compile_traced, mode=mode, backend=backend, dynamic=dynamic, artefacts=artefacts, **graphs),
        "the step as one graph",
        True,
        trace=functools.partial(trace_step, mode=mode, backend=backend, dynamic=dynamic, artefacts=artefacts, **graphs),
        needs=tracing | Feature.SYMBOLIC if dynamic else tracing,
        recall=Recall(mode, artefacts) if is_recalled else None,
    )
    online = None if mode == AHEAD else mode
    if chosen == "inductor" and online is not None:
        online = without_cuda_graphs(online)
    checked = Route(
        f"{title}, traced with checks{suffix}",
        functools.partial(compile_specialized, mode=mode, backend=backend, artefacts=artefacts, **graphs),
        "the step as one graph for the values that Python reads, which the graph checks at each call",
        False,
        has_otherwise=True,
        needs=tracing,
    )
    dynamo = Route(
        f"{title}, dynamo{suffix}" if has_traces else f"{title}{suffix}",
        functools.partial(compile_by_dynamo, backend=chosen, mode=online, dynamic=dynamic),
        "the step as one graph by torch.compile, which checks its assumptions at each call",
        True,
    )
    around = functools.partial(compile_in_regions, backend=backend, mode=online)
    regions = Route(
        f"{title}, regions{suffix}",
        functools.partial(around, forward="compiled"),
        "the loss function in several graphs by torch.compile, the optimizer and the traced callbacks as one",
        False,
        needs=needs,
    )
    eager = Route(
        f"{title}, eager forward{suffix}",
        functools.partial(around, forward=None),
        "the optimizer and the traced callbacks as one graph, with uncompiled forward and backward passes",
        False,
        needs=needs,
    )
    nothing = Route("uncompiled", uncompiled, "nothing, so the step runs uncompiled", False)
    # The routes left out if ``dynamic`` is set would compile a graph for each size.
    traces = [traced] if dynamic else [traced, checked]
    others = [nothing] if dynamic else [regions, eager, nothing]
    routes = [*(traces if has_traces else ()), dynamo, *others]
    return Routes(routes, fullgraph=fullgraph, rehearsal=None if is_rehearsal else rehearsal)
