"""fxtrain's own operators in graphs for Inductor. They are registered on first use."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from fxtrain._torch_internals.collectives import wait
from fxtrain._torch_internals.dispatch import ctc_loss, linear_by_onednn
from fxtrain._torch_internals.inductor import (
    contiguous_buffer,
    is_lowering_loaded,
    loop_operators,
    ordered_loop,
    pointwise,
    register_lowering,
    strided_buffer,
)


@functools.cache
def once() -> Any:
    """``once(x)``: the identity, materialized in memory.

    Inductor would otherwise recompute ``x`` in each of its readers.
    """
    operator = _registered("once(Tensor x) -> Tensor", torch.clone, torch.empty_like, "CPU", "CUDA")

    def lowered(x: Any) -> Any:
        x.realize()
        return x

    _set_lowering(operator, lowered)
    return operator


@functools.cache
def laid_out() -> Any:
    """``laid_out(x, strides)``: the values of ``x`` in memory with these strides.

    Inductor chooses the layout of other values.
    """

    def computed(x: Tensor, strides: list[int]) -> Tensor:
        return x.new_empty_strided(x.shape, strides).copy_(x)

    def shaped(x: Tensor, strides: list[int]) -> Tensor:
        return x.new_empty_strided(x.shape, strides)

    operator = _registered("laid_out(Tensor x, int[] strides) -> Tensor", computed, shaped, "CPU", "CUDA")
    _set_lowering(operator, strided_buffer)
    return operator


@functools.cache
def unrecognized() -> Any:
    """``unrecognized(x)``: the identity, through which Inductor recognizes no pattern. It takes no time."""
    operator = _registered("unrecognized(Tensor x) -> Tensor", torch.clone, torch.empty_like, "CPU", "CUDA")
    _set_lowering(operator, lambda x: x)
    return operator


def materialize(node: Any, readers: Iterable[Any] | None = None) -> None:
    """Gives readers of a node the value in memory.

    Args:
        node: A node of a graph.
        readers: Nodes that read it. Defaults to all.
    """
    read_through(once(), node, readers=readers)


def read_through(identity: Any, node: Any, *arguments: object, readers: Iterable[Any] | None = None) -> None:
    """Gives readers of a node its value through an operator that returns its first argument.

    Args:
        identity: The operator.
        node: A node of a graph.
        arguments: Further arguments of the operator.
        readers: Nodes that read it. Defaults to all.
    """
    graph, given = node.graph, list(node.users if readers is None else readers)
    with graph.inserting_after(node):
        kept = graph.call_function(identity, (node, *arguments))
    kept.meta.update(node.meta)
    for reader in given:
        reader.replace_input_with(node, kept)


@functools.cache
def after() -> Any:
    """``after(x, token)``: the identity of ``x``, which is computed only once ``token`` has been.

    A compiler cannot merge what reads it with what reads ``x``.
    """
    schema = "after(Tensor x, Tensor token) -> Tensor"
    operator = _registered(schema, lambda x, token: x.clone(), lambda x, token: torch.empty_like(x), "CPU", "CUDA")
    _set_lowering(operator, ordered_loop)
    return operator


@functools.cache
def sendable() -> Any:
    """``sendable(x)``: the values of ``x`` in contiguous memory, which is the same for all that read the result.

    Inductor may copy a view for one reader, and that copy is no result of the graph.
    """

    def computed(x: Tensor) -> Tensor:
        return x.clone(memory_format=torch.contiguous_format)

    def shaped(x: Tensor) -> Tensor:
        return torch.empty_like(x, memory_format=torch.contiguous_format)

    operator = _registered("sendable(Tensor x) -> Tensor", computed, shaped, "CPU", "CUDA")
    _set_lowering(operator, contiguous_buffer)
    return operator


@functools.cache
def arrived() -> Any:
    """``arrived(received, sent)``: waits for the transfer into ``received``, until which ``sent`` stays in memory.

    A compiler replaces it with the wait alone. It keeps the arguments of a graph until the graph has been computed.
    """
    _library().define("arrived(Tensor received, Tensor sent) -> Tensor")
    _library().impl("arrived", lambda received, sent: wait(received), "CompositeImplicitAutograd")
    return torch.ops.fxtrain.arrived.default


@functools.cache
def to_host() -> Any:
    """``to_host(x)``: a copy in pinned memory of the host, made in the order of the current stream."""

    def computed(x: Tensor) -> Tensor:
        host = torch.empty_like(x, device="cpu", pin_memory=x.device.type != "cpu")
        return host.copy_(x, non_blocking=True)

    schema = "to_host(Tensor x) -> Tensor"
    return _registered(schema, computed, lambda x: torch.empty_like(x, device="cpu"), "CPU", "CUDA")


@functools.cache
def from_host() -> Any:
    """``from_host(x, token)``: a copy of ``x`` on the device of ``token``, which has to be computed before."""

    def computed(x: Tensor, token: Tensor) -> Tensor:
        return torch.empty_like(x, device=token.device).copy_(x, non_blocking=True)

    def shaped(x: Tensor, token: Tensor) -> Tensor:
        return torch.empty_like(x, device=token.device)

    return _registered("from_host(Tensor x, Tensor token) -> Tensor", computed, shaped, "CPU", "CUDA")


@functools.cache
def expm1() -> Any:
    """``expm1(x)`` from float64 additions and multiplications, which give the same bits in every loop.

    Inductor calls the C library for scalars and computes ``exp(x) - 1`` for vectors. Which of them a tensor gets
    depends on the other operations of its loop, and the second loses half of the digits near 0.
    """
    operator = _registered("expm1(Tensor x) -> Tensor", torch.expm1, torch.empty_like)

    def arithmetic(dtype: torch.dtype, x: Any) -> Any:
        ops = loop_operators()

        def number(value: float) -> Any:
            return ops.constant(value, torch.float64)

        x = ops.maximum(ops.to_dtype(x, torch.float64), number(_MIN_EXPONENT))
        x = ops.mul(x, number(0.5**_DOUBLINGS))
        series = number(1 / math.factorial(_TERMS))
        for power in reversed(range(1, _TERMS)):
            series = ops.add(ops.mul(series, x), number(1 / math.factorial(power)))
        value = ops.mul(series, x)
        for _ in range(_DOUBLINGS):  # expm1(2 x) = expm1(x) (expm1(x) + 2)
            value = ops.mul(value, ops.add(value, number(2.0)))
        return ops.to_dtype(value, dtype)

    def lowered(x: Any) -> Any:
        return pointwise(functools.partial(arithmetic, x.get_dtype()))(x)

    _set_lowering(operator, lowered)
    return operator


_MIN_EXPONENT = -750.0  # exp of less is 0 in float64
_DOUBLINGS, _TERMS = 16, 7  # exact to 1e-14


@functools.cache
def linear() -> Any:
    """``linear(x, weight, bias)``: x weight^T + bias, by oneDNN.

    Shapes: x [n, k], weight [m, k], bias [m] or None, result [n, m].
    """
    schema = "linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor"
    return _registered(schema, linear_by_onednn, lambda x, weight, bias: x.new_empty((len(x), len(weight))))


@functools.cache
def ctc() -> Any:
    """``ctc(scores, targets, inputs, lengths, blank, zero_infinity)``: CTC losses with their gradients.

    Takes scores [time, batch, classes], targets as in ``torch.nn.functional.ctc_loss``, and integer lengths of inputs
    and targets [batch]. Returns losses [batch] and their gradients with respect to the scores [time, batch, classes].
    """

    def computed(
        scores: Tensor, targets: Tensor, inputs: Tensor, lengths: Tensor, blank: int, zero_infinity: bool
    ) -> tuple[Tensor, Tensor]:
        losses, slopes = ctc_loss(scores, targets, inputs.tolist(), lengths.tolist(), blank, zero_infinity)
        if zero_infinity:
            losses = losses.masked_fill(losses == torch.inf, 0.0)
        return losses.clone(), slopes.contiguous()

    def shapes(scores: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
        return scores.new_empty(scores.shape[1]), scores.new_empty(scores.shape)

    arguments = "Tensor scores, Tensor targets, Tensor inputs, Tensor lengths, int blank, bool zero_infinity"
    return _registered(f"ctc({arguments}) -> (Tensor, Tensor)", computed, shapes, "CPU", "CUDA")


_unregistered: list[tuple[Any, Callable[..., Any]]] = []


def register_lowerings() -> None:
    """Tells Inductor how to compile the operators of fxtrain that are in use. Imports it."""
    while _unregistered:
        register_lowering(*_unregistered.pop())


def _set_lowering(operator: Any, lowering: Callable[..., Any]) -> None:
    _unregistered.append((operator, lowering))
    # Later otherwise, because loading a compiled graph does not need Inductor.
    if is_lowering_loaded():
        register_lowerings()


def _registered(schema: str, computed: Any, fake: Callable[..., Any], *devices: str) -> Any:
    """Registers an operator for these devices, by default only the CPU, and for fake tensors. Returns it."""
    name = schema.partition("(")[0]
    _library().define(schema)
    for device in devices or ("CPU",):
        _library().impl(name, computed, device)
    torch.library.register_fake(f"fxtrain::{name}", fake)
    return getattr(torch.ops.fxtrain, name).default


# Cached, because operators are removed when their library is.
@functools.cache
def _library() -> torch.library.Library:
    return torch.library.Library("fxtrain", "DEF")
