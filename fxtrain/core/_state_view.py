"""HTML of a training state: a tree that folds, with totals of each part and the values of scalars."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from fxtrain.core._formats import dtype_name, first_names, format_bytes, pluralize
from fxtrain.core._html import Html, Number, element, fold, join, left_out, table, view
from fxtrain.core._leaf_values import leaf_bytes, leaf_shape, leaf_values
from fxtrain.core._pytrees import NAMESPACE, ops

if TYPE_CHECKING:
    from fxtrain.core._state import TrainState

_MAX_LEAVES = 150  # shown of each part of the state
_PLAIN = ("dict", "list", "tuple")  # types of nodes that say nothing about their content


@dataclasses.dataclass
class _Node:
    """A part of the state: its leaves, and the parts in it by name."""

    kind: str = ""  # the name of its type
    leaves: list[Any] = dataclasses.field(default_factory=list[Any])  # of the whole part
    parts: dict[str, _Node] = dataclasses.field(default_factory=dict[str, "_Node"])
    value: str = ""  # of a single leaf

    @property
    def is_leaf(self) -> bool:
        return not self.parts


def state_view(state: TrainState) -> str:
    """Returns the HTML of a state."""
    leaves: list[Any]
    accessors, leaves, _ = ops.tree_flatten_with_accessor(state, namespace=NAMESPACE)
    root = _Node()
    for accessor, leaf, value in zip(accessors, leaves, leaf_values(leaves), strict=True):
        node = root
        root.leaves.append(leaf)
        for entry in accessor:
            if entry.type.__name__ not in _PLAIN:
                node.kind = entry.type.__name__
            for name in _names(entry):
                node = node.parts.setdefault(name, _Node())
                node.leaves.append(leaf)
        node.value = value
    counters = {name: node.value or _shape(node.leaves[0]) for name, node in root.parts.items() if node.is_leaf}
    due = root.parts.pop("due", _Node())
    pending = [name for name, node in due.parts.items() if node.value not in ("False", "0")]
    devices = sorted({str(leaf.device) for leaf in leaves if isinstance(leaf, Tensor)})
    note = f"{pluralize(len(leaves), 'leaf', 'leaves')}, {_size(leaves)} on {', '.join(devices) or 'no device'}"
    named = join((f"{name} {value}" for name, value in counters.items()), ", ")
    facts = element("p", named, f"; due: {first_names(pending, 8)}")
    return view("TrainState", facts, *(_part(*item) for item in root.parts.items() if not item[1].is_leaf), note=note)


def _names(entry: Any) -> list[str]:
    """Returns the names of a step on the path to a leaf. Names of parameters are split at their dots."""
    if isinstance(entry.entry, str):
        return entry.entry.split(".")
    return [entry.codify("").removeprefix(".")]


def _part(name: str, node: _Node) -> Html:
    left = [_MAX_LEAVES]
    content = _content(node, left)
    hidden = len(node.leaves) - (_MAX_LEAVES - left[0])
    title = _title(name, node, "parameters" if name == "params" else "elements")
    return fold(title, content, left_out(hidden, "tensor"))


def _content(node: _Node, left: list[int]) -> Html:
    """Returns the parts of a node: those that fold, and a table of its leaves.

    Args:
        node: The node.
        left: How many leaves may still be shown, counted down here.
    """
    folds: list[Html] = []
    rows: list[tuple[object, ...]] = []
    for name, part in node.parts.items():
        if left[0] <= 0:
            break
        name, part = _without_single_parts(name, part)
        if part.is_leaf:
            left[0] -= 1
            leaf = part.leaves[0]
            dtype = dtype_name(leaf.dtype) if isinstance(leaf, Tensor) else ""
            rows.append((name, _shape(leaf), dtype, Number(_size([leaf])), part.value))
        else:
            folds.append(fold(_title(name, part), _content(part, left)))
    return join([table((), rows) if rows else "", *folds])


def _without_single_parts(name: str, node: _Node) -> tuple[str, _Node]:
    while len(node.parts) == 1:
        ((inner, part),) = node.parts.items()
        if node.kind and not part.is_leaf:
            break
        name, node = f"{name}{inner}" if inner.startswith("[") else f"{name}.{inner}", part
    return name, node


def _title(name: str, node: _Node, unit: str = "") -> Html:
    tensors = [leaf for leaf in node.leaves if isinstance(leaf, Tensor)]
    kinds = Counter(dtype_name(leaf.dtype) for leaf in tensors)
    elements = f"{sum(leaf.numel() for leaf in tensors):,} {unit} in " if unit else ""
    about = f"{elements}{pluralize(len(node.leaves), 'tensor')}, {_size(tensors)}, {first_names(list(kinds))}"
    return join([element("b", name), f" {node.kind} " if node.kind else " ", element("small", about)])


def _shape(leaf: Any) -> str:
    return leaf_shape(leaf) if isinstance(leaf, Tensor) else type(leaf).__name__


def _size(leaves: Sequence[Any]) -> str:
    return format_bytes(sum(leaf_bytes(leaf) for leaf in leaves if isinstance(leaf, Tensor)))
