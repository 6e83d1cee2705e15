"""Compiles a graph by Inductor, as a whole or as a program of smaller graphs, and loads what was compiled."""

from __future__ import annotations

import itertools
import logging
import operator
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from fxtrain._torch_internals.collectives import is_collective
from fxtrain._torch_internals.dispatch import grad_mode_setter
from fxtrain._torch_internals.inductor import (
    compile_graph,
    compiled_graph_class,
    count_kernels,
    has_option,
    kernel_count,
    linked_at_the_end,
)
from fxtrain.compiler.artefacts._file import Entry
from fxtrain.compiler.lowering._cuda_graphs import Call
from fxtrain.compiler.lowering._light_code import NotStorableError, light_files, load_light_code
from fxtrain.compiler.lowering._stored import Compiled, Turns
from fxtrain.compiler.passes import _programs as programs
from fxtrain.compiler.passes._splitting import split

_Function = Callable[[list[Tensor]], Sequence[Tensor]]
"""A compiled graph: a function that empties the list of its inputs."""

_EMPTY = types.CellType()
_REORDERS = "reorder_for_peak_memory"  # a setting of Inductor

_log = logging.getLogger(__name__)


def compile_by_inductor(
    graph: GraphModule,
    examples: Sequence[Tensor],
    options: dict[str, Any],
    has_autocast: bool,
    turns: Turns,
    as_whole: bool = False,
) -> Compiled:
    """Compiles a graph into a function of a tuple of tensors.

    Args:
        graph: A graph from ``make_fx``.
        examples: Fake tensors, one for each input.
        options: Settings of Inductor by name.
        has_autocast: Whether autocast is active.
        turns: The turns of processes that compile the same graph.
        as_whole: Whether to compile repeated parts each time. A call of a part cannot reuse the memory of its inputs
            for its results, as a whole graph can.
    """
    is_bare = _is_bare(graph, has_autocast)
    program = _split(graph) if is_bare and not as_whole else None
    if program is None:
        compiled = _compiled(graph, examples, options, is_bare)
        return compiled._replace(call=_without_gradients(compiled.call))
    parts: list[Compiled] = []
    with linked_at_the_end():
        for index, part in enumerate(program.graphs):
            with turns(index, waits=True):
                parts.append(_compiled_part(part, options))

    def files() -> dict[str, bytes]:
        return {f"{index}/{name}": file for index, part in enumerate(parts) for name, file in part.files().items()}

    function = _program([part.call for part in parts], program.calls, program.outputs)
    kernels = [part.header["kernels"] for part in parts]
    header = {"kernels": kernels, "calls": program.calls, "outputs": program.outputs}
    return Compiled(_without_gradients(function), files, header)


def help_inductor(
    graph: GraphModule, options: dict[str, Any], has_autocast: bool, turns: Turns, is_done: Callable[[], bool]
) -> None:
    """Compiles parts of a graph into Inductor's cache, while another process compiles them in the opposite order.

    Args:
        graph: As for ``compile_by_inductor``.
        options: As for ``compile_by_inductor``.
        has_autocast: As for ``compile_by_inductor``.
        turns: As for ``compile_by_inductor``.
        is_done: Whether the graph is compiled.
    """
    program = _split(graph) if _is_bare(graph, has_autocast) else None
    parts = [] if program is None else list(enumerate(program.graphs))
    for index, part in reversed(parts):
        with turns(index, waits=False) as is_ours:
            if is_done():
                return
            if is_ours:
                made = _compiled_part(part, options)
                # The kernels are counted when the whole graph is loaded.
                count_kernels(-made.header["kernels"])


def load_compiled(entry: Entry) -> Call:
    """Returns the function of a compiled graph.

    Raises:
        Exception: A library cannot be loaded here.
    """
    if "calls" not in entry.header:
        return _without_gradients(load_light_code(entry.files, entry.header["kernels"]))
    parts: list[dict[str, bytes]] = [{} for _ in entry.header["kernels"]]
    for path, file in entry.files.items():
        index, _, name = path.partition("/")
        parts[int(index)][name] = file
    functions = list(map(load_light_code, parts, entry.header["kernels"]))
    calls = [programs.Call(*call) for call in entry.header["calls"]]
    return _without_gradients(_program(functions, calls, entry.header["outputs"]))


def _is_bare(graph: GraphModule, has_autocast: bool) -> bool:
    """Whether a graph can do without torch's wrappers, which pass constants to it and switch off autocast."""
    return not has_autocast and next(itertools.chain(graph.buffers(), graph.parameters()), None) is None


def _split(graph: GraphModule) -> programs.Program | None:
    """Returns a program for a graph. A graph that cannot be split is compiled as a whole."""
    try:
        return split(graph)
    except Exception as error:
        _log.debug("A graph cannot be split into repeated parts.", exc_info=error)
        return None


def _compiled_part(part: GraphModule, options: Mapping[str, Any]) -> Compiled:
    """Compiles one graph of a program."""
    nodes = part.graph.nodes
    examples = [node.meta["val"] for node in nodes if node.op == "placeholder"]
    # To save memory, Inductor would start a transfer only where it waits for it.
    if has_option(_REORDERS) and any(is_collective(node.target) for node in nodes):
        options = {**options, _REORDERS: False}
    return _compiled(part, examples, options, is_bare=True)


def _compiled(graph: GraphModule, examples: Sequence[Tensor], options: Mapping[str, Any], is_bare: bool) -> Compiled:
    """Compiles one graph into a function of a list of tensors, without torch's wrappers if it does not need them."""
    returned: Any = graph.graph.output_node().args[0]
    before = kernel_count()
    executable: Any = compile_graph(graph, examples, options)
    kernels = (kernel_count() or 0) - (before or 0)
    bare = _unwrapped(executable, len(returned)) if is_bare else None

    def files() -> dict[str, bytes]:
        if bare is None:
            raise NotStorableError("it contains constants or needs torch's wrappers")
        return light_files(bare.current_callable, bare.source_code)

    function = (lambda tensors: executable(*tensors)) if bare is None else bare.current_callable
    return Compiled(function, files, {"kernels": kernels})


def _unwrapped(executable: Callable[..., object], outputs: int) -> Any:
    """Returns Inductor's graph below AOTAutograd's wrappers, or None if it cannot be found.

    The wrappers handle views, mutations and tensor subclasses, at the cost of dispatch overhead. A step's graph needs
    none of this: ``copy_aliases`` copies views, and Inductor itself writes leaves in place.
    """
    kind = compiled_graph_class()
    found, seen, todo = [], set[int](), [executable]
    while todo:
        part = todo.pop()
        if id(part) in seen or isinstance(part, type):
            continue
        seen.add(id(part))
        if isinstance(part, kind):
            found.append(part)
            continue
        closure = [cell.cell_contents for cell in getattr(part, "__closure__", None) or () if cell != _EMPTY]
        todo += filter(callable, [*closure, *getattr(part, "__dict__", {}).values()])
    return found[0] if len(found) == 1 and len(found[0].output_strides or ()) == outputs else None


def _without_gradients(call: Callable[[list[Tensor]], Any]) -> Call:
    """Returns Inductor's function with gradients switched off, which it expects."""
    set_grad_enabled = grad_mode_setter()

    def run(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        if not torch.is_grad_enabled():
            return call(list(tensors))
        set_grad_enabled(False)
        try:
            return call(list(tensors))
        finally:
            set_grad_enabled(True)

    return run


def _program(functions: Sequence[_Function], calls: Sequence[programs.Call], outputs: Sequence[int]) -> _Function:
    """Returns the function of a program."""
    steps = [(functions[call.graph], _picking(call.reads), call.frees) for call in calls]
    pick_outputs = _picking(outputs)

    def run(tensors: list[Tensor]) -> Sequence[Tensor]:
        slots: list[Any] = [*tensors]
        tensors.clear()
        for function, pick, frees in steps:
            inputs = list(pick(slots))
            # The function alone holds what it may free.
            for slot in frees:
                slots[slot] = None
            slots += function(inputs)
        return pick_outputs(slots)

    return run


def _picking(slots: Sequence[int]) -> Callable[[list[Any]], Sequence[Any]]:
    """Returns a function that returns the elements of a list at these indices."""
    return operator.itemgetter(*slots) if len(slots) > 1 else lambda values: [values[slot] for slot in slots]
