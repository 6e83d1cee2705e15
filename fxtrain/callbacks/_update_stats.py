"""Reductions over the gradients, weights and updates of a step, shared by all callbacks that use them."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fxtrain import tree
from fxtrain.core import TrainState, Tree, Updated
from fxtrain.tree import as_name, leaf_paths

KINDS = ("grads", "weights", "updates")
"""Trees that can be measured, each like the trainable parameters."""

NORMS = ("l2", "l1", "linf", "mean")
"""Root of the sum of squares; sum, maximum and mean of absolute values."""


@dataclasses.dataclass(frozen=True)
class UpdateStats:
    """Gradients, weights and updates of a step, with cached reductions.

    Args:
        weights: Pytree of the trainable parameters, after the step.
        grads: Pytree like ``weights``.
        updates: Pytree like ``weights``.
        skipped: bool []. Whether the update was skipped.
        kept: Cache of reductions; None where nothing may be cached, as in a conditional branch of the graph.
    """

    weights: Tree
    grads: Tree
    updates: Tree
    skipped: Tensor
    kept: dict[tuple[str, str], Tensor] | None = None

    @classmethod
    def at(cls, state: TrainState, event: Updated) -> UpdateStats:
        """Returns the statistics of an event. All callbacks of one event share a cache."""
        # No cache under Dynamo, which cannot mutate an event. Inductor removes common subexpressions instead.
        kept = None if torch.compiler.is_dynamo_compiling() else event.__dict__.setdefault("_kept", {})
        return cls(trainable(state), event.grads, event.updates, event.skipped, kept)

    def sums(self, kind: str, power: str) -> Tensor:
        """Returns a reduction of each leaf, float32 [leaves].

        Args:
            kind: One of ``KINDS``.
            power: ``"squares"`` for the sum of squares, ``"abs"`` or ``"max"`` for the sum or maximum of absolute
                values.
        """
        if self.kept is not None and (kind, power) in self.kept:
            return self.kept[kind, power]
        leaves = tree.leaves(getattr(self, kind))
        found = torch.stack([_reduced(leaf, power) for leaf in leaves]) if leaves else torch.zeros(0)
        if self.kept is not None:
            self.kept[kind, power] = found
        return found

    def norms(self, kind: str, norm: str, groups: Sequence[Sequence[int]]) -> Tensor:
        """Returns the norm of each group of leaves, float32 [groups].

        Args:
            kind: One of ``KINDS``.
            norm: One of ``NORMS``.
            groups: Leaf indices of each group.
        """
        if norm == "linf":
            return _grouped(self.sums(kind, "max"), groups, torch.maximum)
        if norm == "l2":
            return _grouped(self.sums(kind, "squares"), groups, torch.add).sqrt()
        total = _grouped(self.sums(kind, "abs"), groups, torch.add)
        return total if norm == "l1" else total / self.counts(kind, groups)

    def counts(self, kind: str, groups: Sequence[Sequence[int]]) -> Tensor:
        """Returns the number of elements of each group, float32 [groups]."""
        leaves = tree.leaves(getattr(self, kind))
        sizes = [float(sum(leaves[index].numel() for index in group)) for group in groups]
        # Made by torch.full, because a conditional branch of the graph cannot hold a constant tensor.
        return torch.stack([torch.full((), size, device=leaves[0].device) for size in sizes])


def trainable(state: TrainState) -> Tree:
    """Returns the trainable parameters of a state, structured like the gradients."""
    return state.params if state.model is None else state.model.split(state.params)


def leaf_names(state: TrainState) -> list[str]:
    """Returns the names of the trainable parameters in leaf order: keys and indices, joined by dots."""
    return [as_name(path) for path in leaf_paths(trainable(state))]


def layers(state: TrainState) -> dict[str, list[int]]:
    """Returns the leaf indices of each layer's trainable parameters, in module order.

    A layer is a module with direct parameters: ``blocks.0.attn`` has ``blocks.0.attn.weight`` and ``.bias``. A
    parameter outside any module is a layer by itself.
    """
    names = leaf_names(state)
    places = {name: index for index, name in enumerate(names)}
    found: dict[str, list[int]] = {}
    for name in _as_defined(trainable(state)):
        if name in places:
            found.setdefault(name.rpartition(".")[0] or name, []).append(places[name])
    return found


def _as_defined(node: Tree, path: tuple[object, ...] = ()) -> list[str]:
    """Returns leaf names in insertion order, because flattening sorts keys."""
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
    """Returns the values of each group, reduced by ``join``: [groups]."""
    each = values.unbind()
    return torch.stack([functools.reduce(join, [each[index] for index in group]) for group in groups])
