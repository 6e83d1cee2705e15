"""Graphs that Inductor compiles without AOTAutograd.

AOTAutograd analyzes a graph for gradients, views and in-place writes, and traces it again twice. A step's graph from
``make_fx`` is below autograd, and writes only to its inputs, at its end. So it is traced once, with operators replaced
by the simpler ones that Inductor compiles.
"""

from __future__ import annotations

import logging
import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node
from torch.fx.traceback import preserve_node_meta

from fxtrain._torch_internals.collectives import NAMESPACE as COLLECTIVES
from fxtrain._torch_internals.dispatch import Operator, is_in_place
from fxtrain._torch_internals.interface import Interface
from fxtrain._torch_internals.tracing import make_fx

_PURPOSE = "compiling without AOTAutograd"

FORWARD = Interface("torch._inductor.compile_fx.compile_fx_forward", _PURPOSE)
EXTRA = Interface("torch._inductor.compile_fx.create_compiler_config_extra", _PURPOSE)
TABLE = Interface("torch._inductor.decomposition.select_decomp_table", _PURPOSE)
STATE = Interface("torch._inductor.virtualized.V", _PURPOSE)
PATCH = Interface("torch._inductor.config.patch", _PURPOSE)
TRACING = Interface("torch._guards.tracing", _PURPOSE)
CONTEXT = Interface("torch._guards.TracingContext", _PURPOSE)
DISPATCHER = Interface("torch._dispatch.python.enable_python_dispatcher", _PURPOSE)

_log = logging.getLogger(__name__)

_WRITE = torch.ops.aten.copy_.default
_NAMESPACES = ("aten", "prims", "fxtrain", COLLECTIVES)


def compile_decomposed(graph: GraphModule, examples: Sequence[Tensor], options: Mapping[str, object]) -> Any:
    """Compiles a graph into a function of a list of inputs, or returns None for a graph that needs AOTAutograd.

    The generated code is the same as with AOTAutograd.

    Args:
        graph: A graph of operators, from ``make_fx``. It is not modified.
        examples: Fake tensors, one for each input.
        options: Settings of Inductor by name.
    """
    needs = (FORWARD, EXTRA, TABLE, STATE, PATCH, TRACING, CONTEXT, DISPATCHER)
    if not all(each.exists for each in needs) or not _is_simple(graph, examples):
        return None
    mode: Any = getattr(examples[0], "fake_mode", None)
    if mode is None or torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda"):
        return None
    try:
        with PATCH.get()(dict(options)), DISPATCHER.get()(), torch.no_grad():
            # Kernels are named after the operators that they come from.
            with mode, preserve_node_meta():
                simpler = make_fx(Interpreter(graph).run, decomposition_table=TABLE.get()())(*examples)
            simpler.graph.eliminate_dead_code()
            simpler.recompile()
            returned: Any = simpler.graph.output_node().args[0]
            with STATE.get().set_fake_mode(mode), TRACING.get()(CONTEXT.get()(mode)):
                return FORWARD.get()(
                    simpler,
                    list(examples),
                    num_orig_model_outputs=len(returned),
                    num_example_inputs=len(examples),
                    compiler_config_extra=EXTRA.get()(simpler),
                    is_inference=True,
                )
    except Exception as error:
        # AOTAutograd compiles it, or raises an error of its own.
        _log.debug("A graph cannot be compiled without AOTAutograd.", exc_info=error)
        return None


def _is_simple(graph: GraphModule, examples: Sequence[Tensor]) -> bool:
    """Whether a graph has constant sizes, and writes only to its inputs, after all other operators."""
    if not examples:
        return False
    has_written = False
    for node in graph.graph.nodes:
        if node.op == "get_attr" or not all(map(_is_static, _values(node))):
            return False
        if node.op != "call_function" or node.target is operator.getitem:
            continue
        if not isinstance(node.target, Operator) or node.target.namespace not in _NAMESPACES:
            return False
        if node.target is _WRITE and node.args[0].op == "placeholder" and not node.users:
            has_written = True
        elif has_written or is_in_place(node.target):
            return False
    return True


def _values(node: Node) -> Sequence[object]:
    value = node.meta.get("val")
    return value if isinstance(value, list | tuple) else () if value is None else (value,)


def _is_static(value: object) -> bool:
    return not isinstance(value, Tensor) or all(type(size) is int for size in (*value.shape, *value.stride()))
