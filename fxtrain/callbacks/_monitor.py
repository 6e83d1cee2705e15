"""Callbacks that measure gradients, weights and updates inside the compiled step, and publish from the loop.

Cheap statistics are measured at every step, so a checkpoint holds those of its own step. Costly ones are in a
conditional branch of the graph. Publishing happens in the loop: unless its trigger holds, nothing is logged or read.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from fxtrain import tree
from fxtrain._torch_internals.dispatch import is_recorded
from fxtrain.callbacks._per_model import per_model
from fxtrain.core import Control, Logged, SaveBegin, StepEnd, TrainState, Tree, Updated
from fxtrain.core._shard import full_tensor, is_dtensor
from fxtrain.fold import Handler, When, as_trigger, on, slotted
from fxtrain.tree import as_name, leaf_paths

_Values = TypeVar("_Values")
_Seen = TypeVar("_Seen")

KINDS = ("grads", "weights", "updates")
"""Trees that can be measured, each like the trainable parameters."""

NORMS = ("l2", "l1", "linf", "mean")
"""Root of the sum of squares; sum, maximum and mean of absolute values."""


class MonitorState(NamedTuple):
    """State of a monitor."""

    step: Tensor  # int64 []: the step measured last; -1 before the first
    values: Tree  # its measurements, a pytree of tensors
    published: Tensor | tuple[()] = ()  # int64 []: the step published last at StepEnd; empty without at_saves


def monitor(
    name: str,
    measure: Callable[[TrainState, UpdateStats, _Values | None], _Values],
    show: Callable[[TrainState, _Values], Mapping[str, object]],
    *,
    every: When = 1,
    publish: When | None = None,
    at_saves: bool = False,
) -> Handler:
    """Returns a callback that measures a step from inside and publishes from the loop.

    Args:
        name: The slot, and the prefix of the logged names.
        measure: ``measure(state, stats, before)`` returns a pytree of tensors. Only the structure and shapes of
            ``state`` may be used. ``stats`` has the weights, gradients and updates of the step. ``before`` is the
            previous measurement, or None when the slot is initialized.
        show: ``show(state, values)`` returns the values to log, by name without the prefix. An empty name logs one
            under the name of the slot. ``fx.Logged`` publishes one only if its flag holds.
        every: When to measure: a number of steps, or a trigger, evaluated inside the step. Unless it is 1, the
            measurement is in a conditional branch of the graph.
        publish: When to publish, evaluated at ``StepEnd``; ``every`` by default. Only values measured at that same step
            are published.
        at_saves: Whether to publish at each save of a measured step too. With ``every=1``, each checkpoint
            then has published values of its own step.

    Raises:
        TypeError: If ``every`` or ``publish`` is neither an int nor a trigger.
        ValueError: If one of them is below 1.

    Example:
        >>> import torch, fxtrain as fx
        >>> def measure(state, stats, before):
        ...     return stats.sums("updates", "max").max()
        >>> largest = monitor("largest", measure, lambda state, value: {"update": value})
        >>> tx = fx.optim.sgd(0.5)
        >>> step = fx.train_step(lambda model, batch: model["w"] * batch, tx, callbacks=largest)
        >>> state = fx.attach(fx.init({"w": torch.tensor(4.0)}, tx), largest)
        >>> state, _ = step(state, torch.tensor(2.0))
        >>> fx.compose(largest)(state, fx.StepEnd(step=1, metrics={}))[1].log["largest/update"].value
        tensor(1.)
    """
    measures = as_trigger(every)
    due = measures if publish is None else as_trigger(publish, "publish")

    def init(state: TrainState) -> MonitorState:
        weights = trainable(state)
        stats = UpdateStats(weights, weights, weights, torch.zeros_like(state.due.stop))
        blank = tree.map(torch.zeros_like, measure(state, stats, None))
        never = torch.full_like(state.step, -1)
        return MonitorState(never, blank, never.clone() if at_saves else ())

    def update(state: TrainState, event: Updated | StepEnd | SaveBegin) -> tuple[TrainState, Control]:
        slot: MonitorState = state.slots[name]
        if isinstance(event, Updated):
            stats = UpdateStats.at(state, event)
            if every == 1:
                values = measure(state, stats, slot.values)
                return state.with_slot(name, slot._replace(step=event.step.clone(), values=values)), Control()
            flag = measures(event)
            now = flag if isinstance(flag, Tensor) else torch.full((), flag, device=event.step.device)
            seen = (stats.weights, stats.grads, stats.updates, stats.skipped)
            values = _where(now, lambda seen, old: measure(state, UpdateStats(*seen), old), seen, slot.values)
            measured = slot._replace(step=torch.where(now, event.step, slot.step), values=values)
            return state.with_slot(name, measured), Control()
        if isinstance(event, StepEnd) and not due(event):
            return state, Control()
        is_new = slot.step == event.step
        if isinstance(slot.published, Tensor):
            is_new &= slot.published != event.step
            if isinstance(event, StepEnd):
                state = state.with_slot(name, slot._replace(published=slot.step.clone()))
        shown = show(state, slot.values)
        log: dict[str, Logged] = {}
        for key, value in shown.items():
            flagged = value if isinstance(value, Logged) else Logged(value)
            log[f"{name}/{key}" if key else name] = dataclasses.replace(flagged, when=is_new & flagged.when)
        return state, Control(log=log)

    seen = Updated | StepEnd | SaveBegin if at_saves else Updated | StepEnd
    return per_model(slotted(name, init, on(seen, update)))


def _where(flag: Tensor, function: Callable[[_Seen, _Values], _Values], seen: _Seen, otherwise: _Values) -> _Values:
    """Returns ``function(seen, otherwise)`` if the flag holds, else ``otherwise``.

    The function is called only if the flag holds, except under ``vmap``, where both branches are computed.
    """
    if not (torch.compiler.is_dynamo_compiling() or is_recorded()):
        try:
            return function(seen, otherwise) if bool(flag) else otherwise
        except RuntimeError:  # vmap: the flag has one value per member
            return tree.where(flag, function(seen, otherwise), otherwise)
    leaves, structure = tree.flatten((seen, otherwise))
    if any(map(is_dtensor, leaves)):  # which a conditional branch of the graph cannot hold
        return tree.where(flag, function(seen, otherwise), otherwise)

    def yes(*leaves: Tensor) -> tuple[Tensor, ...]:
        return tuple(tree.leaves(function(*tree.unflatten(structure, leaves))))

    def no(*leaves: Tensor) -> tuple[Tensor, ...]:
        return tuple(leaf.clone() for leaf in tree.leaves(tree.unflatten(structure, leaves)[1]))

    # The operator itself under make_fx, because `torch.cond` would start Dynamo.
    cond: Any = torch.cond if torch.compiler.is_dynamo_compiling() else torch.ops.higher_order.cond
    return tree.unflatten(tree.structure(otherwise), cond(flag, yes, no, tuple(leaves)))


@dataclasses.dataclass(frozen=True, eq=False)
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
        kept = {} if self.kept is None else self.kept
        if (kind, power) not in kept:
            leaves = tree.leaves(getattr(self, kind))
            kept[kind, power] = torch.stack([_reduced(leaf, power) for leaf in leaves]) if leaves else torch.zeros(0)
        return kept[kind, power]

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
    if power == "squares":
        size = size.square()
    return full_tensor(size.max() if power == "max" and size.numel() else size.sum()).to(torch.float32)


def _grouped(values: Tensor, groups: Sequence[Sequence[int]], join: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Returns the values of each group, reduced by ``join``: [groups]."""
    each = values.unbind()
    return torch.stack([functools.reduce(join, [each[index] for index in group]) for group in groups])
