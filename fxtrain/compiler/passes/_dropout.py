"""A graph pass that generates dropout masks of one shape together.

A dropout mask takes some 130 integer operations, which differ between masks only in the number of the site. Inductor
generates a loop for each mask, and compiling these loops dominates the first step of a model with many dropouts. This
pass generates all masks of one shape in one batched computation, from which each site takes its slice. The bits are the
same. Masks are bytes that a step keeps for its backward pass in any case, so memory use does not grow.
"""

from __future__ import annotations

import collections
import heapq
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.fx import Graph, Node

from fxtrain._torch_internals.collectives import is_rank
from fxtrain._torch_internals.dispatch import is_in_place
from fxtrain._torch_internals.tracing import make_fx
from fxtrain.compiler.passes._nodes import is_pointwise, storages_written

_SHAPING = {"_to_copy", "_unsafe_view", "arange", "clone", "full", "slice", "stack", "unsqueeze", "view"}


class _Draw(NamedTuple):
    """The operations that generate the mask of one site."""

    nodes: Sequence[Any]  # in order; the first one combines the counter with the site number
    outputs: Sequence[Any]  # the nodes among them with outside readers
    reader: Any  # the first outside reader


def merge_dropout_masks(graph: Graph) -> Graph:
    """Generates dropout masks of one shape together.

    Args:
        graph: A graph from ``make_fx``. It is modified in place and returned. A graph with other in-place writes than
            the final update of the state is left unchanged.
    """
    if storages_written(graph):
        return graph
    integer_nodes = _merge_counter_nodes(graph)
    order = {node: index for index, node in enumerate(graph.nodes)}
    alike = collections.defaultdict[str, dict[int, _Draw]](dict)
    for node in filter(_takes_site, integer_nodes):
        draw = _draw_from(node, integer_nodes, order)
        if draw is not None:
            alike[_signature_without_site(draw)][node.args[1]] = draw
    for draws in alike.values():
        for sites in _progressions(draws):
            if len(sites) > 1:
                _draw_together(graph, [draws[site] for site in sites], sites, order)
    return graph


def _merge_counter_nodes(graph: Graph) -> dict[Any, None]:
    """Returns all nodes computed only from integer constants and RNG counters, with duplicates merged.

    Each mask repeats the computations on its counter and key, which become duplicates here.
    """
    integer_nodes, known, of_sites = dict[Any, None](), dict[Any, Any](), set[Any]()
    for node in list(graph.nodes):
        value = node.meta.get("val")
        if not isinstance(value, Tensor) or value.is_floating_point():
            continue
        if node.op == "placeholder" or is_rank(node.target):
            if not value.ndim:
                integer_nodes[node] = None
            continue
        is_plain = is_pointwise(node.target, _SHAPING) and not is_in_place(node.target)
        if not is_plain or any(other not in integer_nodes for other in node.all_input_nodes):
            continue
        first = known.setdefault((node.target, repr(node.args), repr(node.kwargs)), node)
        is_of_site = _takes_site(node) or not of_sites.isdisjoint(node.all_input_nodes)
        # Outputs of the graph must not share memory, and masks must not share operations that depend on the site.
        if first is node or is_of_site or graph.output_node() in node.users:
            integer_nodes[node] = None
            of_sites.update([node] if is_of_site else [])
        else:
            node.replace_all_uses_with(first)
            graph.erase_node(node)
    return integer_nodes


def _takes_site(node: Node) -> bool:
    return node.target == torch.ops.aten.bitwise_xor.Scalar


def _draw_from(taking: Any, integer_nodes: Mapping[Any, None], order: Mapping[Any, int]) -> _Draw | None:
    """Returns the operations that depend on ``taking``, up to the first one that meets data.

    None if they do not generate a mask.
    """
    nodes, seen, todo = dict[Any, None](), {taking}, [(order[taking], taking)]
    while todo:
        _, node = heapq.heappop(todo)
        if node not in integer_nodes:
            outputs = [node for node in nodes if any(user not in nodes for user in node.users)]
            is_mask = all(node.meta["val"].itemsize == 1 for node in outputs)
            return _Draw(list(nodes), outputs, node) if is_mask and sum(map(_takes_site, nodes)) == 1 else None
        nodes[node] = None
        for user in node.users:
            if user not in seen:
                seen.add(user)
                heapq.heappush(todo, (order[user], user))
    return None


def _signature_without_site(draw: _Draw) -> str:
    names = {node: f"#{index}" for index, node in enumerate(draw.nodes)}

    def as_text(node: Node) -> str:
        arguments = node.args[:1] if _takes_site(node) else node.args
        return repr((node.target, torch.fx.map_arg((arguments, node.kwargs), lambda other: names.get(other, other))))

    return repr((list(map(as_text, draw.nodes)), [names[node] for node in draw.outputs]))


def _progressions(sites: Iterable[int]) -> list[range]:
    """Splits the sites into arithmetic progressions: of those that begin at the smallest site, the longest first.

    A progression is computed by ``arange`` and needs no stored constant.
    """
    left, found = set(sites), list[range]()
    while left:
        first = min(left)
        strides = [site - first for site in left if site != first] or [1]
        counts = {stride: next(n for n in range(len(left) + 1) if first + n * stride not in left) for stride in strides}
        stride = max(sorted(strides), key=counts.__getitem__)
        found.append(range(first, first + counts[stride] * stride, stride))
        left -= set(found[-1])
    return found


def _draw_together(graph: Graph, draws: Sequence[_Draw], sites: range, order: Mapping[Any, int]) -> None:
    model, reader = draws[0], min((draw.reader for draw in draws), key=order.__getitem__)
    scalars = list(dict.fromkeys(n for node in model.nodes for n in node.all_input_nodes if n not in model.nodes))
    examples = [node.meta["val"] for node in scalars]

    def one(site: Tensor, *values: Tensor) -> list[Tensor]:
        made = dict(zip(scalars, values, strict=True))
        for node in model.nodes:
            args, kwargs = torch.fx.map_arg((node.args, node.kwargs), made.__getitem__)
            made[node] = torch.bitwise_xor(args[0], site) if _takes_site(node) else node.target(*args, **kwargs)
        return [made[node] for node in model.outputs]

    def all_of_them(*values: Tensor) -> list[Tensor]:
        site_numbers = torch.arange(sites.start, sites.stop, sites.step, device=examples[0].device)
        return torch.vmap(one, (0, *[None] * len(values)))(site_numbers, *values)

    with examples[0].fake_mode:
        body: Any = make_fx(all_of_them)(*examples).graph
    body.eliminate_dead_code()
    with graph.inserting_before(reader):
        masks: Any = graph.graph_copy(body, dict(zip(body.find_nodes(op="placeholder"), scalars, strict=True)))
        for index, draw in enumerate(draws):
            for output, together in zip(draw.outputs, masks, strict=True):
                mask = graph.call_function(torch.ops.aten.select.int, (together, 0, index))
                mask.meta["val"] = together.meta["val"][index]
                output.replace_all_uses_with(mask)
            for node in reversed(draw.nodes):
                graph.erase_node(node)
