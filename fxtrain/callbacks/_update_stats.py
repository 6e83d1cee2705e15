"""Statistics: one number for each leaf or layer of what a step moved, computed once however many callbacks ask."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fxtrain import tree
from fxtrain.core import TrainState, Updated
from fxtrain.optim._nodes import as_name, leaf_paths

KINDS = ("grads", "weights", "updates")
"""What can be looked at: all are trees like the trainable parameters."""

NORMS = ("l2", "l1", "linf", "mean")
"""Root of the sum of squares, sum, largest, and mean of absolute values."""


@dataclasses.dataclass(frozen=True)
class Moved:
    """What a step moved, and how.

    Args:
        weights: Pytree of the trainable parameters, after the step.
        grads: Pytree like ``weights``.
        updates: Pytree like ``weights``.
        skipped: bool []. Whether the parameters were left where they were.
        kept: What was computed of them; None where nothing may be kept, as in a branch of the graph.
    """

    weights: Any
    grads: Any
    updates: Any
    skipped: Tensor
    kept: dict[Any, Tensor] | None = None

    @classmethod
    def at(cls, state: TrainState, event: Updated) -> Moved:
        """What there is to see at an event. All who look at one event share what is computed of it."""
        # Dynamo cannot keep anything on an event; Inductor finds by itself what is computed twice.
        kept = None if torch.compiler.is_dynamo_compiling() else event.__dict__.setdefault("_kept", {})
        return cls(trainable(state), event.grads, event.updates, event.skipped, kept)

    def sums(self, kind: str, power: str) -> Tensor:
        """Of each leaf, float32 [leaves]: the sum of its ``"squares"`` or absolute values (``"abs"``), or the largest
        of these (``"max"``)."""
        if self.kept is not None and (kind, power) in self.kept:
            return self.kept[kind, power]
        leaves = tree.leaves(getattr(self, kind))
        found = torch.stack([_reduced(leaf, power) for leaf in leaves]) if leaves else torch.zeros(0)
        if self.kept is not None:
            self.kept[kind, power] = found
        return found

    def norms(self, kind: str, norm: str, groups: Sequence[Sequence[int]]) -> Tensor:
        """Of each group of leaves: float32 [groups]."""
        if norm == "linf":
            return _grouped(self.sums(kind, "max"), groups, torch.maximum)
        if norm == "l2":
            return _grouped(self.sums(kind, "squares"), groups, torch.add).sqrt()
        total = _grouped(self.sums(kind, "abs"), groups, torch.add)
        return total if norm == "l1" else total / self.counts(kind, groups)

    def counts(self, kind: str, groups: Sequence[Sequence[int]]) -> Tensor:
        """The number of elements of each group: float32 [groups]."""
        leaves = tree.leaves(getattr(self, kind))
        sizes = [float(sum(leaves[index].numel() for index in group)) for group in groups]
        # Filled, and not a tensor of a list, which a branch of a graph cannot hold.
        return torch.stack([torch.full((), size, device=leaves[0].device) for size in sizes])


def trainable(state: TrainState) -> Any:
    """The trainable parameters of a state: like the gradients."""
    return state.params if state.model is None else state.model.split(state.params)


def leaf_names(state: TrainState) -> list[str]:
    """The names of the trainable parameters, in the order of the leaves: keys and indices, joined by dots."""
    return [as_name(path) for path in leaf_paths(trainable(state))]


def layers(state: TrainState) -> dict[str, list[int]]:
    """The trainable parameters of each layer, as the places of the leaves, in the order that the module defines.

    A layer is a module that has parameters of its own: ``blocks.0.attn`` has ``blocks.0.attn.weight`` and ``.bias``. A
    parameter that is in no module is a layer.
    """
    names = leaf_names(state)
    places = {name: index for index, name in enumerate(names)}
    found: dict[str, list[int]] = {}
    for name in _as_defined(trainable(state)):
        if name in places:
            found.setdefault(name.rpartition(".")[0] or name, []).append(places[name])
    return found


def _as_defined(node: Any, path: tuple[Any, ...] = ()) -> list[str]:
    """The names of leaves in the order of insertion, which a flattened tree sorts."""
    if isinstance(node, dict):
        return [name for key, child in node.items() for name in _as_defined(child, (*path, key))]
    return [as_name((*path, *rest)) for rest in leaf_paths(node)]


def _reduced(leaf: Tensor, power: str) -> Tensor:
    size = leaf.abs() if power != "squares" or leaf.is_complex() else leaf
    size = size.to(torch.promote_types(size.dtype, torch.float32))
    reduce: dict[str, Callable[[Tensor], Tensor]] = {
        "squares": lambda x: x.square().sum(),
        "abs": torch.sum,
        "max": lambda x: x.max() if x.numel() else x.sum(),
    }
    return reduce[power](size).to(torch.float32)


def _grouped(values: Tensor, groups: Sequence[Sequence[int]], join: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """[groups]: the values at each group's places, joined."""
    each = values.unbind()
    return torch.stack([functools.reduce(join, [each[index] for index in group]) for group in groups])
