"""The calls of a program: what each computes and reads, in an order in which each comes after what it reads."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Container, Sequence
from typing import Any, NamedTuple

from torch import Tensor
from torch.fx import Node

from fxtrain._torch_internals.collectives import is_collective
from fxtrain._torch_internals.dispatch import is_last_write
from fxtrain._torch_internals.memory import storage_id
from fxtrain.compiler.passes._liveness import is_stored
from fxtrain.compiler.passes._nodes import is_pointwise, numel
from fxtrain.compiler.passes._operands import Element, element_of, is_taken_again, operands
from fxtrain.compiler.passes._operators import arrived

_SMALL = 4096  # elements; such values are computed as early as possible, so that updates need not wait for them
_MAX_INLINED = 4  # operations in a row

Repeat = Sequence[Sequence[Node]]
"""The instances of a repeated part: their operations, in the same order in each."""


class Slice(NamedTuple):
    """A range of a vector, of which a unit reads the elements."""

    vector: Node
    start: int
    stop: int


Value = Node | Slice


class Unit(NamedTuple):
    """What one call computes.

    Args:
        nodes: Its operations.
        reads: What it reads of inputs and of other units.
        template: A number that is equal for units that share a graph. Their operations and what they read are in the
            same order.
    """

    nodes: Sequence[Node]
    reads: Sequence[Value]
    template: int


def node_of(value: Value) -> Node:
    """Returns a node, or the vector of a slice."""
    return value.vector if isinstance(value, Slice) else value


def units_of(nodes: Sequence[Node], layers: Sequence[Repeat], updates: Sequence[Repeat]) -> list[Unit]:
    """Returns the units of a program.

    Args:
        nodes: The nodes of a graph that writes its inputs only by copies, after all other operations.
        layers: Repeated parts, of which each instance is a range of the graph.
        updates: Repeated updates as from ``repeated_updates``.
    """
    parts = _in_ranges(nodes, layers, updates)
    number = len(parts)
    for template, repeat in enumerate(updates, len(parts) + len(layers)):
        parts += [Unit(instance, (), template) for instance in repeat]
    units = _with_reads(parts, _inlined(_with_reads(parts, ())))
    return _with_early_updates(units[:number], units[number:])


def _in_ranges(nodes: Sequence[Node], layers: Sequence[Repeat], updates: Sequence[Repeat]) -> list[Unit]:
    """Returns units of the layers and of what is between them."""
    position = {node: index for index, node in enumerate(nodes)}
    found = sorted((position[instance[0]], key, instance) for key, repeat in enumerate(layers) for instance in repeat)
    starts = [start for start, _, _ in found]
    repeated = {node for repeat in (*layers, *updates) for instance in repeat for node in instance}
    between: list[list[Node]] = [[] for _ in range(len(found) + 1)]
    # The first range that an operation can be in.
    earliest = {node: bisect.bisect(starts, position[node]) for node in repeated}
    for index, node in enumerate(nodes):
        if node.op != "call_function" or node in repeated:
            continue
        ready = max((earliest[other] for other in node.all_input_nodes if other in earliest), default=0)
        if _is_left_to_readers(node):
            earliest[node] = ready
            continue
        earliest[node] = place = ready if _is_light(node) else bisect.bisect(starts, index)
        between[place].append(node)
    units: list[Unit] = []
    for some, layer in itertools.zip_longest(between, found):
        if some:
            units.append(Unit(some, (), len(layers) + len(units)))
        if layer is not None:
            units.append(Unit(layer[2], (), layer[1]))
    return units


def _is_left_to_readers(node: Node) -> bool:
    """Whether a node is a view or a constant of which only its readers have a use, so that it extends no lifetime."""
    return is_taken_again(node) and element_of(node) is None and all(user.op != "output" for user in node.users)


def _is_light(node: Node) -> bool:
    """Whether an operation may be done early, because all its values are small."""
    if is_collective(node.target) or node.target == arrived() or is_last_write(node):
        return False
    return all(numel(value) <= _SMALL for value in (node, *node.all_input_nodes))


def _with_reads(units: Sequence[Unit], inlined: Container[Node | Element]) -> list[Unit]:
    """Returns units with what they read."""
    found = list(units)
    for group in by_template(units).values():
        traces = [
            [operand for node in units[index].nodes for operand in operands(node, local, inlined)]
            for index in group
            for local in [set(units[index].nodes)]
        ]
        # One input for what is the same value in each of the units.
        columns = list(dict.fromkeys(zip(*traces, strict=True)))
        reads = [column for column in columns if not isinstance(column[0], Element)]
        tensors: dict[tuple[Node, ...], list[tuple[Element, ...]]] = {}
        for column in columns:
            if isinstance(column[0], Element):
                tensors.setdefault(tuple(element.tensor for element in column), []).append(column)
        for elements in tensors.values():
            reads += _slices(elements)
        for place, index in enumerate(group):
            found[index] = units[index]._replace(reads=[column[place] for column in reads])
    return found


def _slices(columns: list[tuple[Element, ...]]) -> list[tuple[Value, ...]]:
    """Returns one slice of each unit's vector, or the single values where they are no numbers next to each other."""
    columns.sort(key=lambda column: column[0].index)
    rows = list(zip(*columns, strict=True))
    is_range = all(element.index == row[0].index + offset for row in rows for offset, element in enumerate(row))
    if is_range and all(row[0].tensor.meta["val"].ndim == 1 and not is_taken_again(row[0].tensor) for row in rows):
        return [tuple(Slice(row[0].tensor, row[0].index, row[0].index + len(row)) for row in rows)]
    return [tuple(element.value for element in column) for column in columns]


def _inlined(units: Sequence[Unit]) -> Container[Node | Element]:
    """Returns elementwise operations whose readers read all of their operands as well.

    A compiler does not store them in a single graph, and has no reason to store them between units.
    """
    readers: dict[Node, set[int]] = {}
    for index, unit in enumerate(units):
        for value in unit.reads:
            readers.setdefault(node_of(value), set()).add(index)
    writers = {index for index, unit in enumerate(units) if any(map(is_last_write, unit.nodes))}
    written = {
        storage_id(_overwritten(node)) for index in writers for node in units[index].nodes if is_last_write(node)
    }

    def is_read_as_well(source: Node | Element, by: set[int]) -> bool:
        if not isinstance(source, Node):
            return False
        if source.op == "placeholder":
            # A unit that writes may come after one that has overwritten the input.
            return by.isdisjoint(writers) or storage_id(source.meta["val"]) not in written
        return by <= readers.get(source, set())

    depths: dict[Node | Element, int] = {}
    places: dict[Node, tuple[int, int]] = {}
    for template, group in by_template(units).items():
        for place, same in enumerate(zip(*(units[index].nodes for index in group), strict=True)):
            read = [node for node in same if node in readers]
            places |= dict.fromkeys(read, (template, place))
            if not read or any(is_stored(node) or not is_pointwise(node.target, ()) for node in read):
                continue
            sources = {node: list(operands(node, ())) for node in read}
            if all(is_read_as_well(source, readers[node]) for node in read for source in sources[node]):
                depth = 1 + max(depths.get(source, 0) for node in read for source in (*sources[node], node))
                if depth <= _MAX_INLINED:
                    depths |= dict.fromkeys(read, depth)
    # Units that share a graph compute the same.
    for group in by_template(units).values():
        for values in zip(*(units[index].reads for index in group), strict=True):
            if len({places.get(node_of(value)) for value in values}) > 1:
                for value in values:
                    depths.pop(node_of(value), None)
    return depths


def by_template(units: Sequence[Unit]) -> dict[int, list[int]]:
    """Returns the indices of the units of each graph."""
    groups: dict[int, list[int]] = {}
    for index, unit in enumerate(units):
        groups.setdefault(unit.template, []).append(index)
    return groups


def _with_early_updates(units: Sequence[Unit], updates: Sequence[Unit]) -> list[Unit]:
    """Returns all units in order. An update follows as soon as it can, so that its gradients can be freed."""
    home = {node: index for index, unit in enumerate(units) for node in unit.nodes}
    readers: dict[int, int] = {}
    for index, unit in enumerate(units):
        for value in unit.reads:
            if node_of(value).op == "placeholder":
                readers[storage_id(node_of(value).meta["val"])] = index
    following: list[list[Unit]] = [[] for _ in units]
    for update in updates:
        after = [home.get(node_of(value), 0) for value in update.reads]
        after += [readers.get(storage_id(_overwritten(node)), 0) for node in update.nodes if is_last_write(node)]
        following[max(after)].append(update)
    return [each for unit, some in zip(units, following, strict=True) for each in (unit, *some)]


def _overwritten(write: Any) -> Tensor:
    return write.args[0].meta["val"]
