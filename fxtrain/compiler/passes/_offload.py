"""A graph pass that keeps activations on the host between the forward and the backward pass of a step on a GPU."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph

from fxtrain._torch_internals.dispatch import is_view
from fxtrain._torch_internals.memory import storage_id
from fxtrain.compiler.passes._liveness import Timeline
from fxtrain.compiler.passes._nodes import storages_written
from fxtrain.compiler.passes._operators import from_host, to_host
from fxtrain.compiler.passes._recompute import can_order, is_backward
from fxtrain.core import warn
from fxtrain.core._graph_marks import pass_of

_log = logging.getLogger(__name__)

_LEAST_BYTES = 2**20
"""Smaller activations stay on the device, because each transfer has a cost of its own."""

_LEAST_OPERATIONS = 16
"""Activations that the backward pass reads within so many operations stay, as those of the last layer."""


def offload(graph: Graph, device: torch.device, *, least_bytes: int = _LEAST_BYTES) -> int:
    """Moves activations to the host, and back where the backward pass reads them first. Returns their bytes.

    Copies keep the bits, and run in the order of the graph on the stream of the step, so no compiler can reuse the
    memory of a value that is still copied.

    Args:
        graph: A graph from ``make_fx``. It is modified in place.
        device: The device whose activations are moved.
        least_bytes: The size from which an activation is moved.
    """
    timeline, written = Timeline(graph), storages_written(graph)
    tokens = _tokens(timeline)
    moved = 0
    for index, node in enumerate(timeline.nodes):
        value = node.meta.get("val")
        if not (timeline.is_forward(index) and timeline.is_stored[index] and isinstance(value, Tensor)):
            continue
        if value.device != device or value.nbytes < least_bytes or storage_id(value) in written or not _is_dense(value):
            continue
        views, readers = _readers(node)
        later = sorted((reader for reader in readers if is_backward(reader)), key=timeline.order.__getitem__)
        # A value that is read outside of the passes, as by a metric, stays in memory until then.
        if not later or any(pass_of(reader) is None for reader in readers):
            continue
        last = max(timeline.order[reader] for reader in (node, *views, *readers) if not is_backward(reader))
        first = timeline.order[later[0]]
        if first - last >= _LEAST_OPERATIONS and tokens[first] is not None:
            _move(graph, node, later, tokens[first])
            moved += value.nbytes
    return moved


def report(step: object, device: torch.device | None, moved: int) -> None:
    """Logs how much was moved, and warns if there is no device whose memory could be saved."""
    if device is None:
        warn(
            f"expected {step!r} to run on one GPU with memory='offload', got a state or batch elsewhere. Activations "
            "stay where they are. Use memory='recompute', or move state and batches to one GPU.",
            UserWarning,
        )
    else:
        _log.info("%r keeps activations of %d bytes on the host.", step, moved)


def _is_dense(value: Tensor) -> bool:
    """Whether a copy on another device has the same strides."""
    return torch.empty_like(value).stride() == value.stride()


def _readers(node: Any) -> tuple[list[Any], list[Any]]:
    """Returns the views of a value in its forward pass, and what reads the value or one of them."""
    views, readers, todo = list[Any](), dict[Any, None](), [node]
    while todo:
        for user in todo.pop().users:
            if user.op == "call_function" and is_view(user.target) and not is_backward(user) and pass_of(user):
                views.append(user)
                todo.append(user)
            else:
                readers[user] = None
    return views, list(readers)


def _tokens(timeline: Timeline) -> list[Any]:
    """Returns for each operation the latest value of a backward pass before it, for ``from_host`` to wait for."""
    found, latest = list[Any](), None
    for node in timeline.nodes:
        found.append(latest)
        if is_backward(node) and can_order(node):
            latest = node
    return found


def _move(graph: Graph, node: Any, readers: list[Any], token: Any) -> None:
    """Replaces a value in its readers, given in order, by a copy that comes back from the host."""
    with graph.inserting_after(node):
        host: Any = graph.call_function(to_host(), (node,))
    host.meta.update(node.meta, val=torch.empty_like(node.meta["val"], device="cpu"))
    with graph.inserting_before(readers[0]):
        back: Any = graph.call_function(from_host(), (host, token))
    back.meta.update(token.meta, val=torch.empty_like(node.meta["val"]))
    copies = {node: back}

    def copied(view: Any, reader: Any) -> Any:
        if view not in copies:
            base = copied(view.args[0], reader)
            with graph.inserting_before(reader):
                copies[view] = graph.node_copy(view, lambda other: base if other is view.args[0] else other)
        return copies[view]

    inside = {node, *_readers(node)[0]}
    for reader in readers:
        for other in reader.all_input_nodes:
            if other in inside:
                reader.replace_input_with(other, copied(other, reader))
