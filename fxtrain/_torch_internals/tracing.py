"""The tracer ``make_fx``, fake tensors, and symbolic sizes."""

from __future__ import annotations

import contextlib
import functools
import threading
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from fxtrain._torch_internals.dispatch import NO_FUNCTION_MODES, fake_mode, is_recorded
from fxtrain._torch_internals.interface import Feature, Interface

if TYPE_CHECKING:
    # Only for annotations, because the import is slow.
    from torch._subclasses import FakeTensor as FakeTensor

MAKE_FX = Interface("torch.fx.experimental.proxy_tensor.make_fx", "tracing a step", Feature.TRACED)
PROXY_MODE = Interface("torch.fx.experimental.proxy_tensor.get_proxy_mode", "reading values in a trace", Feature.TRACED)
PROXY_SLOT = Interface("torch.fx.experimental.proxy_tensor.get_proxy_slot", "reading values in a trace", Feature.TRACED)
UNRECORDED = Interface(
    "torch.fx.experimental.proxy_tensor.disable_proxy_modes_tracing", "computations outside of a graph", Feature.TRACED
)
FAKE_MODE = Interface("torch._subclasses.FakeTensorMode", "running a step without values", Feature.TRACED)
KNOWN_TRUE = Interface("torch.fx.experimental.symbolic_shapes.statically_known_true", "comparing sizes", Feature.TRACED)
SHAPE_ENV = Interface("torch.fx.experimental.symbolic_shapes.ShapeEnv", "batches of many sizes", Feature.SYMBOLIC)
DYNAMIC = Interface("torch.fx.experimental.symbolic_shapes.DimDynamic", "batches of many sizes", Feature.SYMBOLIC)
SYMBOLS = Interface(
    "torch.fx.experimental.symbolic_shapes.StatelessSymbolicContext", "batches of many sizes", Feature.SYMBOLIC
)
INTERPRETER = Interface("torch.fx.experimental.symbolic_shapes.SYMPY_INTERP", "conditions on sizes", Feature.SYMBOLIC)
SOURCE = Interface("torch._dynamo.source.ConstantSource", "batches of many sizes", Feature.SYMBOLIC)
DEVICE = Interface("torch.ops.prim.device.default", "fast reads of devices in a trace")
DECOMPOSITIONS = Interface("torch._decomp.get_decompositions", "operators in terms of simpler ones", Feature.SYMBOLIC)
IS_COMPILING = Interface("torch.compiler._is_compiling_flag", "telling libraries that a step is traced", Feature.TRACED)

TRACER_MODULES = ("torch.overrides", "torch._tensor", "torch.fx.experimental.proxy_tensor")
"""The modules of torch between a traced operation and the code that called it."""


class Recorder(Protocol):
    """What notes the operations of a thread while they run."""

    def pause(self) -> AbstractContextManager[object]:
        """Returns a context whose operations are not noted."""
        ...

    def refuse(self, what: str) -> None:
        """Gives up, because something is noted on nodes of a graph that operations do not show."""
        ...


class _ThreadRecorder(threading.local):
    current: Recorder | None = None


_recorder = _ThreadRecorder()


@contextlib.contextmanager
def recorded_by(recorder: Recorder) -> Iterator[None]:
    """A context in which a step takes the paths of a trace in this thread, though its tensors have values."""
    before, _recorder.current = _recorder.current, recorder
    try:
        yield
    finally:
        _recorder.current = before


def current_recorder() -> Recorder | None:
    """Returns the innermost recorder of this thread."""
    return _recorder.current


def is_traced() -> bool:
    """Whether this thread's step is traced: recorded by ``make_fx`` or another recorder, or run on fake tensors.

    Not inside Dynamo.
    """
    return _recorder.current is not None or is_recorded() or fake_mode() is not None


def has_symbolic_sizes() -> bool:
    """Whether a step is traced with symbolic sizes. Not inside Dynamo."""
    mode = fake_mode()
    return getattr(mode, "shape_env", None) is not None and not getattr(mode, "static_shapes", True)


def make_fx(function: Callable[..., object], **options: object) -> Callable[..., torch.fx.GraphModule]:
    """Returns a function that traces ``function`` for example tensors. Tensors it captures become constants."""
    # The mode that is left out notes in each node which function of torch was called. It sees each access to an
    # attribute, too, and nothing reads its notes.
    return MAKE_FX.get()(function, _allow_non_fake_inputs=True, _disable_torch_fn_metadata_mode=True, **options)


def unrecorded() -> AbstractContextManager[object]:
    """A context whose operations neither ``make_fx`` nor another recorder records."""
    if _recorder.current is not None:
        return _recorder.current.pause()
    return UNRECORDED.get()() if UNRECORDED.exists and is_recorded() else contextlib.nullcontext()


def tracer() -> Any:
    """Returns the tracer that records this thread's operations, with its ``graph`` and its ``root``, or None."""
    mode = PROXY_MODE.get()()
    return None if mode is None else mode.tracer


def node_of(tensor: Tensor) -> torch.fx.Node | None:
    """Returns the graph node that computes a tensor, or None if it is not in the graph that is traced."""
    current = tracer()
    proxy = None if current is None else PROXY_SLOT.get()(tensor, current, None)
    return None if proxy is None else proxy.proxy.node


@contextlib.contextmanager
def marking_nodes(mark: Callable[[torch.fx.Node], None]) -> Iterator[None]:
    """Calls ``mark`` with each graph node that the block adds, in order, if the block succeeds. Not inside Dynamo.

    Without a trace, or where torch cannot tell, nothing is called.
    """
    current = tracer() if PROXY_MODE.exists and is_recorded() else None
    if current is None:
        yield
        return
    nodes = current.graph.nodes
    last = next(iter(reversed(nodes)), None)
    yield
    node = next(iter(nodes), None) if last is None else last.next
    while node is not None and node.op != "root":
        mark(node)
        node = node.next


@contextlib.contextmanager
def recording_nodes(record: Callable[[torch.fx.Node], None]) -> Iterator[None]:
    """Calls ``record`` with each graph node when the trace adds it. Not inside Dynamo."""
    current = tracer() if PROXY_MODE.exists and is_recorded() else None
    if current is None:
        yield
        return
    create = current.create_node

    def create_and_record(*args: Any, **kwargs: Any) -> torch.fx.Node:
        node = create(*args, **kwargs)
        record(node)
        return node

    current.create_node = create_and_record
    try:
        yield
    finally:
        del current.create_node


@contextlib.contextmanager
def operations_outside_of_function_modes() -> Iterator[None]:
    """A context in which function modes see the calls of traced code, but not those of the tracer. Not inside Dynamo.

    The tracer runs each operation on fake tensors in Python, where every access to an attribute of a tensor would pass
    through all modes.
    """
    mode = PROXY_MODE.get()() if PROXY_MODE.exists and NO_FUNCTION_MODES.exists and is_recorded() else None
    if mode is None:
        yield
        return
    dispatch, without_function_modes = mode.__torch_dispatch__, NO_FUNCTION_MODES.get()
    device_operator = DEVICE.get() if DEVICE.exists else None

    def dispatch_outside(_: object, operator: object, types: object, args: Any = (), kwargs: object = None) -> Any:
        with without_function_modes():
            # Autograd reads the devices of tensors by an operator, which is not recorded.
            return args[0].device if operator is device_operator else dispatch(operator, types, args, kwargs)

    mode.__torch_dispatch__ = types.MethodType(dispatch_outside, mode)
    try:
        yield
    finally:
        del mode.__torch_dispatch__


def new_fake_mode(shape_env: object = None) -> Any:
    """Returns a context that runs operations on tensors without values, which its ``from_tensor`` makes.

    Args:
        shape_env: The symbols of sizes, from ``new_shape_env``. By default sizes are numbers.
    """
    return FAKE_MODE.get()(allow_non_fake_inputs=True, shape_env=shape_env)


def new_shape_env() -> Any:
    """Returns an environment of symbols in which sizes that are equal in the example stay separate symbols."""
    return SHAPE_ENV.get()(duck_shape=False)


def with_symbolic_sizes(mode: Any, tensor: Tensor, name: str) -> Tensor:
    """Returns a fake tensor whose sizes are symbols, in a mode with a shape environment."""
    dynamic = [DYNAMIC.get().DYNAMIC] * tensor.ndim
    return mode.from_tensor(tensor, source=SOURCE.get()(name), symbolic_context=SYMBOLS.get()(dynamic_sizes=dynamic))


def size_functions() -> dict[str, Any]:
    """Returns the functions that conditions on symbolic sizes call, by name."""
    return INTERPRETER.get()


def decompositions(operators: Sequence[object]) -> dict[Any, Callable[..., Any]]:
    """Returns implementations of operators in Python, in terms of simpler operators."""
    return DECOMPOSITIONS.get()(operators)


@functools.cache
def decomposition(operator: object) -> Callable[..., Any] | None:
    """Returns an implementation of an operator in Python, or None if torch has none."""
    return decompositions([operator]).get(operator) if DECOMPOSITIONS.exists else None


def is_known_true(condition: object) -> bool:
    """Whether a comparison of sizes is true for all values of their symbols. It adds no condition on them."""
    return KNOWN_TRUE.get()(condition)


def compiling_flag() -> object:
    """Returns the flag of the process that ``torch.compiler.is_compiling`` converts to a bool."""
    return getattr(torch.compiler, "_is_compiling_flag", False)


def set_compiling_flag(value: object) -> None:
    """Sets the flag of the process that ``torch.compiler.is_compiling`` converts to a bool."""
    torch.compiler._is_compiling_flag = value
