"""Graphs that Inductor compiles without AOTAutograd.

AOTAutograd analyzes a graph for gradients, views and in-place writes, and traces it twice. A step's graph from
``make_fx`` is below autograd, and its results share no memory. So it is traced once, with operators replaced by the
simpler ones that Inductor compiles.
"""

from __future__ import annotations

import inspect
import itertools
import logging
import operator
from collections.abc import Sequence
from typing import Any, TypeGuard

import torch
from torch import Tensor
from torch.func import functionalize
from torch.fx import Graph, GraphModule, Interpreter, Node
from torch.fx.traceback import preserve_node_meta

from fxtrain._torch_internals.collectives import NAMESPACE as COLLECTIVES
from fxtrain._torch_internals.dispatch import Operator, hides_writes, is_in_place, is_last_write, is_view
from fxtrain._torch_internals.interface import Interface
from fxtrain._torch_internals.tracing import make_fx

_PURPOSE = "compiling without AOTAutograd"

FORWARD = Interface("torch._inductor.compile_fx.compile_fx_forward", _PURPOSE)
EXTRA = Interface("torch._inductor.compile_fx.create_compiler_config_extra", _PURPOSE)
TABLE = Interface("torch._inductor.decomposition.select_decomp_table", _PURPOSE)
STATE = Interface("torch._inductor.virtualized.V", _PURPOSE)
TRACING = Interface("torch._guards.tracing", _PURPOSE)
CONTEXT = Interface("torch._guards.TracingContext", _PURPOSE)
DISPATCHER = Interface("torch._dispatch.python.enable_python_dispatcher", _PURPOSE)

_log = logging.getLogger(__name__)

_WRITE = torch.ops.aten.copy_.default
_NAMESPACES = ("aten", "prims", "fxtrain", COLLECTIVES)


def compile_decomposed(graph: GraphModule, examples: Sequence[Tensor], settings: object) -> Any:
    """Compiles a graph into a function of a list of inputs, or returns None for a graph that needs AOTAutograd.

    The generated code is the same as with AOTAutograd.

    Args:
        graph: A graph of operators, from ``make_fx``. It is not modified.
        examples: Fake tensors, one for each input.
        settings: The module of Inductor's settings, in which those for this graph are set.
    """
    needs = (FORWARD, EXTRA, TABLE, STATE, TRACING, CONTEXT, DISPATCHER)
    if not examples or not all(each.exists for each in needs) or not _is_simple(graph):
        return None
    mode: Any = getattr(examples[0], "fake_mode", None)
    if mode is None or torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda"):
        return None
    run: Any = Interpreter(graph).run if _writes_last(graph) else functionalize(Interpreter(graph).run)
    try:
        with DISPATCHER.get()(), torch.no_grad():
            # Kernels are named after the operators that they come from.
            with mode, preserve_node_meta():
                simpler = make_fx(run, decomposition_table=TABLE.get()())(*examples)
            _rename_overwritten(simpler.graph)
            simpler.graph.eliminate_dead_code()
            simpler.recompile()
            if not (_is_simple(simpler) and _writes_last(simpler)):
                return None
            returned: Any = simpler.graph.output_node().args[0]
            with STATE.get().set_fake_mode(mode), TRACING.get()(CONTEXT.get()(mode)):
                return FORWARD.get()(
                    simpler,
                    list(examples),
                    num_orig_model_outputs=len(returned),
                    num_example_inputs=len(examples),
                    compiler_config_extra=EXTRA.get()(settings if _takes_settings() else simpler),
                    is_inference=True,
                )
    except Exception as error:
        # AOTAutograd compiles it, or raises an error of its own.
        _log.debug("A graph cannot be compiled without AOTAutograd.", exc_info=error)
        return None


def _takes_settings() -> bool:
    """Whether ``EXTRA`` is a function of the settings, as in torch 2.11, instead of the graph."""
    return next(iter(inspect.signature(EXTRA.get()).parameters)) == "config"


def _is_simple(graph: GraphModule) -> bool:
    """Whether a graph has constant sizes, no constants, and only operators of torch and fxtrain."""
    return all(
        node.op != "get_attr"
        and all(map(_is_static, _values(node)))
        and (node.op != "call_function" or node.target is operator.getitem or _is_known(node.target))
        for node in graph.graph.nodes
    )


def _writes_last(graph: GraphModule) -> bool:
    """Whether a graph writes only to its inputs, by copies that come after all other operators."""
    operators = [node for node in graph.graph.nodes if isinstance(node.target, Operator)]
    copies = list(itertools.takewhile(is_last_write, reversed(operators)))
    others = [node.target for node in operators[: len(operators) - len(copies)]]
    return not any(is_in_place(target) or hides_writes(target) for target in others)


def _rename_overwritten(graph: Graph) -> None:
    """Removes writes to intermediate results that share no memory: what reads them later, reads the new value.

    The simpler operators of a batch norm write its new statistics in this way.
    """
    places = {node: place for place, node in enumerate(graph.nodes)}
    writes = graph.find_nodes(op="call_function", target=_WRITE)
    overwritten = {write.args[0] for write in writes}
    for write in writes:
        old, new, *_ = write.args
        # A value that is itself overwritten later would be read too late.
        if new in overwritten or not (_is_fresh(old) and _is_fresh(new) and _has_same_layout(old, new)):
            continue
        for reader in [*old.users, *write.users]:
            if reader is not write and places[reader] > places[write]:
                reader.replace_input_with(old, new)
                reader.replace_input_with(write, new)
        graph.erase_node(write)


def _is_fresh(node: object) -> TypeGuard[Node]:
    """Whether no other node is a view of the memory of a node."""
    return (
        isinstance(node, Node)
        and isinstance(node.target, Operator)
        and not any(map(is_view, [node.target, *(user.target for user in node.users)]))
        and operator.getitem not in {user.target for user in node.users}
    )


def _has_same_layout(one: Node, other: Node) -> bool:
    a, b = one.meta.get("val"), other.meta.get("val")
    return (
        isinstance(a, Tensor)
        and isinstance(b, Tensor)
        and (a.shape, a.dtype, a.stride(), a.device) == (b.shape, b.dtype, b.stride(), b.device)
    )


def _is_known(target: object) -> bool:
    return isinstance(target, Operator) and target.namespace in _NAMESPACES


def _values(node: Node) -> Sequence[object]:
    value = node.meta.get("val")
    return value if isinstance(value, list | tuple) else () if value is None else (value,)


def _is_static(value: object) -> bool:
    return not isinstance(value, Tensor) or all(type(size) is int for size in (*value.shape, *value.stride()))
