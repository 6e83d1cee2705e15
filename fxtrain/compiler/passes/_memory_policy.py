"""A graph pass that chooses which activations a step keeps and which it recomputes."""

from __future__ import annotations

import bisect
import logging
import operator
from collections.abc import Iterable, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.fx import Graph

from fxtrain._torch_internals.dispatch import Operator, operator_name
from fxtrain.compiler.passes._liveness import Timeline, crossing, crossing_values
from fxtrain.compiler.passes._recompute import droppable, recompute
from fxtrain.core import warn

_log = logging.getLogger(__name__)

Memory = Literal["save", "recompute", "offload"] | float
"""Which activations a step keeps, and where: ``compile`` describes the values."""

_SEGMENTS = (2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)

_MARGIN = 0.95
"""Leaves the rest of a limit for what the graph does not show, such as the workspace of an operator."""

_FLOPS_PER_SECOND, _BYTES_PER_SECOND = 5e10, 1e10
"""Rough speeds of a core. Only their ratio matters, to compare matmuls with loops."""


class Outcome(NamedTuple):
    """What a policy achieved.

    Args:
        before: Bytes of the activations and their gradients at the peak if all are kept, as estimated from the graph.
        after: The same with the policy.
    """

    before: int
    after: int


class _Plan(NamedTuple):
    nbytes: int
    seconds: float
    dropped: set[int]
    kept: set[int]


def limit_memory(graph: Graph, memory: Memory) -> Outcome | None:
    """Recomputes activations in the backward passes of a graph. Returns None if it has none.

    The forward pass is cut where the fewest bytes are live, into segments that need about the same memory. The values
    at the cuts are kept. All others are recomputed segment by segment, except those of the last one, whose backward
    pass comes first. ``"recompute"`` takes the number of segments with the lowest peak. A fraction takes the plan that
    recomputes least, by time, among those within the limit: of the other values, those that take longest to compute
    for their size are kept too.

    Args:
        graph: A graph from ``make_fx``. It is modified in place.
        memory: ``"recompute"``, or the peak as a fraction of that without recomputation.
    """
    timeline = Timeline(graph)
    given = {timeline.order[node] for node in droppable(graph, filter(_is_forward_of(timeline), timeline.nodes))}
    passes = _forward_passes(timeline, given)
    if not passes:
        return None
    before = timeline.peak().nbytes
    limit = before if isinstance(memory, str) or memory == 1 else int(memory * before * _MARGIN)
    plans = [_plan(timeline, given, passes, segments) for segments in _SEGMENTS]
    plans = [plan for plan in plans if plan is not None]
    if not plans:
        return Outcome(before, before)
    best = min(plans, key=lambda plan: (plan.nbytes, plan.seconds))
    if memory != "recompute":
        refined = [_refined(timeline, plan, limit) for plan in plans if plan.nbytes <= limit]
        best = min(refined, key=lambda plan: (plan.seconds, plan.nbytes), default=best)
    if best.nbytes >= before:
        return Outcome(before, before)
    recompute(graph, [timeline.nodes[index] for index in sorted(best.dropped)])
    return Outcome(before, best.nbytes)


def report(step: object, memory: Memory, outcome: Outcome | None) -> None:
    """Logs what a policy achieves, and warns if it misses its limit."""
    if outcome is None:
        return
    share = outcome.after / max(outcome.before, 1)
    _log.info("%r keeps activations of %d bytes at most, %.2f of %d bytes.", step, outcome.after, share, outcome.before)
    if not isinstance(memory, str) and share > memory:
        warn(
            f"expected the activations of {step!r} to fit in {memory:g} of the memory of memory='save', got "
            f"{share:.2f}, the least that recomputation needs. Reduce the batch, or split it with accumulate.",
            UserWarning,
        )


def _is_forward_of(timeline: Timeline) -> Any:
    return lambda node: timeline.is_forward(timeline.order[node])


def _forward_passes(timeline: Timeline, given: Iterable[int]) -> list[list[int]]:
    """Returns the operations of each forward pass that has a backward pass, in order."""
    found: dict[object, list[int]] = {}
    for index, each in enumerate(timeline.passes):
        if each is not None and not each.is_backward:
            found.setdefault(each.derivative, []).append(index)
    differentiated = {each.derivative for each in timeline.passes if each is not None and each.is_backward}
    known = set(given)
    return [nodes for key, nodes in found.items() if key in differentiated and not known.isdisjoint(nodes)]


def _plan(timeline: Timeline, given: set[int], passes: Sequence[list[int]], segments: int) -> _Plan | None:
    """Returns the plan that cuts each forward pass into a number of segments."""
    dropped, kept = set[int](), set[int]()
    for forward in passes:
        cuts = _cuts(timeline, given, forward, segments)
        if not cuts:
            return None
        for cut in cuts:
            kept |= crossing_values(timeline, forward, cut)
        dropped |= {index for index in forward if index in given and index <= cuts[-1]}
    return _measured(timeline, dropped - kept, kept)


def _measured(timeline: Timeline, dropped: set[int], kept: set[int]) -> _Plan:
    # Views and further results of kept operators are kept with them.
    nodes = droppable(timeline.nodes[0].graph, [timeline.nodes[index] for index in sorted(dropped)])
    dropped = {timeline.order[node] for node in nodes}
    copies = [index for index, is_copy in timeline.operations(dropped) if is_copy]
    peak = timeline.peak(dropped, kept)
    return _Plan(peak.nbytes, sum(_seconds(timeline.nodes[index]) for index in copies), dropped, kept)


def _cuts(timeline: Timeline, given: set[int], forward: Sequence[int], segments: int) -> list[int]:
    """Returns the operations after which to cut a forward pass, in order."""
    live = crossing(timeline, forward)
    sizes, total = list[int](), 0
    for index in forward:
        total += timeline.nbytes[index] if timeline.is_stored[index] and index in given else 0
        sizes.append(total)
    cuts = set[int]()
    for number in range(1, segments):
        low, middle, high = (
            bisect.bisect_left(sizes, total * (number + shift) / segments) for shift in (-0.5, 0.0, 0.5)
        )
        places = range(low, max(min(high, len(forward) - 1), low + 1))
        cuts.add(forward[min(places, key=lambda place: (live[place], abs(place - middle)))])
    return sorted(cuts)


def _refined(timeline: Timeline, plan: _Plan, limit: int) -> _Plan:
    """Returns a plan that keeps more, as far as the limit allows."""
    copies = {index for index, is_copy in timeline.operations(plan.dropped) if is_copy}
    nodes = timeline.nodes
    costs = {index: _seconds(_source(nodes[index])) for index in copies if timeline.is_stored[index]}
    ranked = sorted(costs, key=lambda index: (-costs[index] / max(timeline.nbytes[index], 1), index))

    def keeping(count: int) -> _Plan:
        more = set(ranked[:count])
        return _measured(timeline, plan.dropped - more, plan.kept | more)

    best, low, high = plan, 0, len(ranked)
    while low < high:
        middle = (low + high + 1) // 2
        found = keeping(middle)
        if found.nbytes <= limit:
            best, low = found, middle
        else:
            high = middle - 1
    return best


def _source(node: Any) -> Any:
    """Returns the operator of which a node is a result."""
    return node.args[0] if node.target is operator.getitem else node


def _seconds(node: Any) -> float:
    """Returns roughly how long an operation takes on one core."""
    value = node.meta.get("val")
    if not isinstance(value, Tensor):
        parts = [part for part in value or () if isinstance(part, Tensor)] if isinstance(value, tuple | list) else []
        value = parts[0] if parts else None
    if value is None or not isinstance(node.target, Operator):
        return 0.0
    return _flops(node, value) / _FLOPS_PER_SECOND + value.nbytes / _BYTES_PER_SECOND


def _flops(node: Any, value: Tensor) -> float:
    name = operator_name(node.target)
    shapes = [other.meta["val"].shape for other in node.all_input_nodes if isinstance(other.meta.get("val"), Tensor)]
    if name in ("mm", "bmm", "addmm", "baddbmm"):
        return 2.0 * value.numel() * node.args[-2].meta["val"].shape[-1]
    if name == "convolution":
        weight: torch.Size = node.args[1].meta["val"].shape
        return 2.0 * value.numel() * weight[1:].numel()
    if name.startswith("_scaled_dot_product"):
        return 4.0 * value.numel() * shapes[1][-2]
    return 0.0
