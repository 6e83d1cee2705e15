"""Traces a step into one graph and compiles it by Inductor.

Dynamo analyzes bytecode, and guards its assumptions about Python at each call. A step is pure, so only its inputs need
a guard: their structure, shapes, strides, dtypes and devices, which the caller checks. This reduces both dispatch
overhead and compile time.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.fx import GraphModule

from fxtrain import tree
from fxtrain._torch_internals.collectives import NAMESPACE as COLLECTIVES
from fxtrain._torch_internals.dispatch import Operator
from fxtrain._torch_internals.dynamo import backend_named
from fxtrain._torch_internals.inductor import (
    changed_settings,
    has_option,
    instructions_sought,
    mode_options,
)
from fxtrain._torch_internals.interface import Feature, UnsupportedError, supports
from fxtrain._torch_internals.memory import storage_id
from fxtrain._torch_internals.tracing import make_fx, operations_outside_of_function_modes
from fxtrain.compiler.artefacts._folder import Artefacts
from fxtrain.compiler.lowering._compile_thread import compiler_lock
from fxtrain.compiler.lowering._cuda_graphs import Call, CudaCaptures, CudaGraphReplay, only_gpu
from fxtrain.compiler.lowering._executable import Backend, Executable, Origin, run_graph
from fxtrain.compiler.lowering._function_modes import KnownLiterals, OpaqueCTC
from fxtrain.compiler.lowering._inductor import compile_by_inductor, help_inductor, load_compiled
from fxtrain.compiler.lowering._modes import AHEAD, REPLAYED, compile_ahead, load_ahead, without_cuda_graphs
from fxtrain.compiler.lowering._side_effects import detecting_side_effects
from fxtrain.compiler.lowering._stored import Compiled, GraphFiles, Turns
from fxtrain.compiler.lowering._symbolic_sizes import SymbolicSizes, dense
from fxtrain.compiler.passes._concatenation import replace_trivial_concatenations
from fxtrain.compiler.passes._constants import detach_constants, keep_products_with_zero, replace_constants
from fxtrain.compiler.passes._dropout import merge_dropout_masks
from fxtrain.compiler.passes._in_place import replace_in_place
from fxtrain.compiler.passes._matmuls import speed_up_matmuls
from fxtrain.compiler.passes._memory_policy import Memory, limit_memory, report
from fxtrain.compiler.passes._offload import offload
from fxtrain.compiler.passes._offload import report as report_offload
from fxtrain.compiler.passes._operators import register_lowerings
from fxtrain.compiler.passes._recompute import recompute_regions
from fxtrain.compiler.passes._reductions import keep_softmax, reduce_from_memory
from fxtrain.compiler.passes._scalars import hoist_scalars, make_bias_corrections_exact
from fxtrain.compiler.passes._transfer_buckets import Reshard
from fxtrain.compiler.passes._transfers import place_transfers
from fxtrain.core import Batch, TrainState, Tree, compiling, warn
from fxtrain.step import EvalFunction, Step

R = TypeVar("R")

# Inductor's assertions on input sizes repeat what the caller has just checked, and add to the dispatch overhead.
_UNASSERTED = ("size_asserts", "alignment_asserts", "scalar_asserts")

# Inductor tries to fuse each loop that reads a buffer with this many of the next ones. The updates of all parameters
# read the same scalars and are not fused for that, so most of the default of 64 attempts fail.
_ATTEMPTS, _MAX_ATTEMPTS = "max_fusion_buffer_group_pairwise_attempts", 16


def compile_traced(
    step: Callable[[TrainState, Batch], Tree], state: TrainState, batch: Batch, **options: Any
) -> Executable:
    """Compiles the step as one graph, while no other thread compiles. Takes the arguments of ``trace_step``."""
    with compiler_lock():
        return trace_step(step, state, batch, **options)()


def trace_step(
    step: Callable[[TrainState, Batch], Tree],
    state: TrainState,
    batch: Batch,
    *,
    mode: str | None,
    in_place: bool,
    backend: Backend | None = None,
    dynamic: bool = False,
    memory: Memory = "save",
    reshard: Reshard = "after_forward",
    artefacts: Artefacts | None = None,
) -> Callable[[], Executable]:
    """Traces a step and returns a function that compiles it.

    The trace accesses the user's modules. The returned function does not, so it may run in another thread.

    Args:
        step: A ``Step``, which returns a new state and an output, or any other pure function, which returns only an
            output.
        state: The part of a state that enters the graph. Only its structure, shapes, strides, dtypes and devices
            matter.
        batch: A batch, of which the same properties matter.
        mode: As in ``compile``.
        in_place: Whether to write the new state into the old state's buffers. In that case no leaves are returned.
        backend: A backend of ``torch.compile`` in place of Inductor.
        dynamic: Whether the sizes of the batch are symbols.
        memory: Which activations to keep, as in ``compile``.
        reshard: When to free whole parameters of a sharded state, as in ``compile``.
        artefacts: The folder of compiled graphs that the user has named.
    """
    leaves, state_structure = tree.flatten(state)
    inputs, batch_structure = tree.flatten(batch)
    inputs = _distinct(inputs)
    count = len(leaves)
    changed: list[int] = []
    output_structure: Any = None

    def flat(*tensors: Tensor) -> list[Tensor]:
        nonlocal changed, output_structure
        old = tensors[:count]
        # Function modes would slow down the tracer, so they are active only for the step's own calls.
        with detecting_side_effects(), KnownLiterals(), OpaqueCTC(), operations_outside_of_function_modes():
            result: Any = step(tree.unflatten(state_structure, old), tree.unflatten(batch_structure, tensors[count:]))
        moved, output = result if isinstance(step, Step) else ((), result)
        new: list[Tensor] = tree.leaves(moved)
        outputs, output_structure = tree.flatten(output)
        changed = [index for index, leaf in enumerate(new) if leaf is not old[index]]
        values = copy_aliases([*(new[index] for index in changed), *outputs], tensors)
        if not in_place:
            return values
        for index, value in zip(changed, values, strict=False):
            old[index].copy_(value)
        return values[len(changed) :]

    if torch.is_anomaly_enabled():
        warn(
            "torch.autograd.detect_anomaly does not reach into a compiled step. Use it with the uncompiled step, or "
            "observers=[fxtrain.observers.debug()].",
            RuntimeWarning,
        )
    symbolic = SymbolicSizes(leaves, inputs) if dynamic else None
    # Looking for nan would read values that a trace does not have.
    with compiling(), torch.autograd.set_detect_anomaly(False):
        graph = symbolic.trace(flat) if symbolic is not None else make_fx(flat, tracing_mode="fake")(*leaves, *inputs)
    replace_in_place(replace_constants(detach_constants(graph)).graph)
    keep_products_with_zero(graph.graph)
    recomputes = recompute_regions(graph.graph)
    if memory == "offload":
        place = only_gpu((*leaves, *inputs))
        report_offload(step, place, 0 if place is None else offload(graph.graph, place))
    elif memory != "save":
        outcome = limit_memory(graph.graph, memory)
        recomputes |= outcome is not None and outcome.after < outcome.before
        report(step, memory, outcome)
    place_transfers(graph.graph, reshard)
    # Only a training step keeps its masks in memory in any case, for its backward pass.
    if isinstance(step, Step) and symbolic is None and not recomputes:
        merge_dropout_masks(graph.graph)
    # Only Inductor's loops depend on the rest of the graph.
    if backend is None:
        make_bias_corrections_exact(graph.graph)
    replace_trivial_concatenations(graph.graph)
    # These passes compare sizes, which would add conditions on later batches.
    if symbolic is None:
        if backend is None:
            reduce_from_memory(keep_softmax(graph.graph) if isinstance(step, Step) else graph.graph)
        hoist_scalars(speed_up_matmuls(graph.graph))
    # A step that returned new states instead would have other addresses at each call. Other backends may do on the host
    # what a capture leaves out.
    has_graph = (in_place and isinstance(step, Step)) or isinstance(step, EvalFunction)
    # Pinned memory cannot be allocated in a capture.
    is_capturable = mode in REPLAYED and has_graph and not dynamic and backend is None and memory != "offload"
    gpu = only_gpu((*leaves, *inputs)) if is_capturable else None
    read = _without_unread(graph)
    given = (*leaves, *inputs)
    examples = tuple(given[index] for index in read)
    options = _options(graph, examples, mode) if backend is None else {}
    if mode != AHEAD:
        # A reference to the state would keep later steps from donating it.
        examples = given = ()
    structures = read, changed, output_structure
    has_autocast = any(torch.is_autocast_enabled(kind) for kind in ("cpu", "cuda"))

    def compile_traced_graph() -> Executable:
        fakes = [node.meta["val"] for node in graph.graph.nodes if node.op == "placeholder"]
        files = GraphFiles(graph, fakes, {**options, "mode": mode, "autocast": has_autocast}, artefacts)
        if backend is not None:
            call = _compiled_by(backend, graph, fakes)
        elif mode == AHEAD:
            compiler = functools.partial(_with_inductor, Feature.AHEAD, compile_ahead, graph, examples, options)
            call = files.compiled_or_loaded(lambda turns: compiler(), load_ahead)
        else:
            call = _compiled(graph, fakes, options, has_autocast, files, memory == "recompute")
        if gpu is not None:
            call = CudaGraphReplay(call, sum(index < count for index in read), CudaCaptures(gpu))

        run = run_graph(call, *structures, in_place=in_place, is_step=isinstance(step, Step))
        written = changed if in_place else None
        if symbolic is None:
            origin = None if files.key is None else Origin(files.key, read)
            return Executable(run, written, mark=files.mark, origin=origin)
        return Executable(lambda leaves, inputs: run(leaves, dense(inputs)), written, symbolic.conditions())

    return compile_traced_graph


def _without_unread(graph: GraphModule) -> list[int]:
    """Removes inputs that the graph does not read, as each adds dispatch overhead. Returns the indices of the rest."""
    inputs = [node for node in graph.graph.nodes if node.op == "placeholder"]
    read = [index for index, node in enumerate(inputs) if node.users]
    for node in inputs:
        if not node.users:
            graph.graph.erase_node(node)
    # Once, after all passes.
    graph.recompile()
    return read


def _options(graph: GraphModule, examples: Sequence[Tensor], mode: str | None) -> dict[str, Any]:
    """Returns the options of Inductor for a graph."""
    options: dict[str, Any] = {} if mode is None or mode == AHEAD else mode_options(without_cuda_graphs(mode))
    if _has_known_operators_only(graph):
        options |= dict.fromkeys((name for name in _UNASSERTED if has_option(name)), False)
    if _is_better_channels_first(graph, examples):
        options["layout_optimization"] = False
    changed = changed_settings()
    if changed is not None and has_option(_ATTEMPTS) and _ATTEMPTS not in changed:
        options[_ATTEMPTS] = _MAX_ATTEMPTS
    return options


def _compiled(
    graph: GraphModule,
    fakes: Sequence[Tensor],
    options: dict[str, Any],
    has_autocast: bool,
    files: GraphFiles,
    as_whole: bool,
) -> Call:
    """Compiles a graph by Inductor into a function of a tuple of tensors, or loads it."""

    def compile_graph(turns: Turns) -> Compiled:
        arguments = graph, fakes, options, has_autocast, turns, as_whole
        return _with_inductor(Feature.INDUCTOR, compile_by_inductor, *arguments)

    def help_compile(turns: Turns, is_done: Callable[[], bool]) -> None:
        _with_inductor(Feature.INDUCTOR, help_inductor, graph, options, has_autocast, turns, is_done)

    return files.compiled_or_loaded(compile_graph, load_compiled, None if as_whole else help_compile)


def _with_inductor(feature: Feature, function: Callable[..., R], graph: GraphModule, *arguments: object) -> R:
    """Calls a function that compiles a graph by Inductor, which takes seconds to import.

    Raises:
        UnsupportedError: The installed torch lacks an interface of Inductor.
    """
    inputs = graph.graph.find_nodes(op="placeholder")
    with instructions_sought(node.meta["val"] for node in inputs):
        if not supports(Feature.INDUCTOR | feature):
            raise UnsupportedError
        register_lowerings()
        return function(graph, *arguments)


def _compiled_by(backend: Backend, graph: GraphModule, fakes: Sequence[Tensor]) -> Call:
    """Compiles a graph by a backend of ``torch.compile`` into a function of a tuple of tensors."""
    chosen: Any = backend_named(backend) if isinstance(backend, str) else backend
    made = chosen(graph, fakes)
    return lambda tensors: made(*tensors)


def _has_known_operators_only(graph: GraphModule) -> bool:
    """Whether all operators are torch's or fxtrain's, collectives included.

    An operator from elsewhere may return other sizes than its fake implementation declares.
    """
    return all(
        node.target.namespace in ("aten", "prims", "fxtrain", COLLECTIVES)
        for node in graph.graph.nodes
        if isinstance(node.target, Operator)
    )


def _is_better_channels_first(graph: GraphModule, examples: Sequence[Tensor]) -> bool:
    """Whether convolutions should keep their layout, where Inductor would change it to channels-last.

    On a CPU, Inductor's reductions over channels-last layouts, such as those of batch norms, are slow enough to make
    training slower. A forward pass alone is as fast or faster with channels-last.
    """
    backward = torch.ops.aten.convolution_backward.default
    return not any(leaf.is_cuda for leaf in examples) and any(node.target == backward for node in graph.graph.nodes)


def _distinct(inputs: Sequence[Tensor]) -> list[Tensor]:
    """Returns the inputs as distinct objects, as the tracer would merge a tensor that occurs twice into one input."""
    seen = set[int]()
    out: list[Tensor] = []
    for leaf in inputs:
        out.append(leaf.detach() if id(leaf) in seen else leaf)
        seen.add(id(leaf))
    return out


def copy_aliases(values: Sequence[Tensor], inputs: Sequence[Tensor]) -> list[Tensor]:
    """Returns the values with copies of those that share memory with an input or with another value."""
    taken = set(map(storage_id, inputs))
    out: list[Tensor] = []
    for value in values:
        out.append(value.clone() if storage_id(value) in taken else value)
        taken.add(storage_id(value))
    return out
