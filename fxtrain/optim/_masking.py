"""Transformations for some of the parameters, selected by masks, labels or names, and for some of the steps."""

# pyright: reportIncompatibleMethodOverride=false
# As in optax, states have a field named `count`, which shadows the method of tuples.

from __future__ import annotations

import fnmatch
import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from fxtrain import tree
from fxtrain.core import Tree, describe, name_of, takes
from fxtrain.optim._learning_rates import by_group, inner_state_of, inside
from fxtrain.optim._state import start_count
from fxtrain.optim._transform import GradientTransformation, described, refuse_unless_transformation, set_to_zero
from fxtrain.tree import MaskedNode, as_code, as_name, leaf_paths

Mask = Tree | Callable[[str, Tensor], bool]
"""A pytree of bools, or a function ``(path, leaf) -> bool``.

The path consists of the keys and indices that lead to the leaf, joined by dots. For the parameters of a module it is
the parameter's name. The result must depend only on the path, the shape and the dtype, because it is part of the graph.
"""

Labels = Tree | Callable[[str, Tensor], str]
"""A pytree of labels, or a function ``(path, leaf) -> label``, with paths as in ``Mask``."""

Phase = int | tuple[int, int] | None
"""The first step of training, or ``(first, end)`` with ``end`` exclusive, or None to never train."""


class MaskedState(NamedTuple):
    """The state of ``masked``."""

    inner_state: Tree  # state of the wrapped transformation, for the selected parameters


class PartitionState(NamedTuple):
    """The state of ``partition``."""

    inner_states: dict[str, Tree]  # from labels to the states of their transformations


@described
def masked(tx: GradientTransformation, mask: Mask) -> GradientTransformation:
    """Applies ``tx`` only to leaves where the mask is true. Other updates pass through unchanged.

    Leaves that are not selected have no optimizer state. To freeze them as well, use ``partition`` with
    ``set_to_zero``.

    Args:
        tx: Any transformation.
        mask: A pytree of bools like the parameters, or a function ``(path, leaf) -> bool``.

    Raises:
        TypeError: If the mask is a function that does not take a path and a leaf.
        ValueError: At ``init`` or ``update``, if the mask lacks a leaf or has a value that is not a bool.

    Example:
        >>> import torch
        >>> from fxtrain import optim
        >>> tx = masked(optim.scale(10.0), lambda path, leaf: path.startswith("head."))
        >>> grads = {"body.weight": torch.tensor(1.0), "head.weight": torch.tensor(1.0)}
        >>> tx.update(grads, tx.init(grads))[0]
        {'body.weight': tensor(1.), 'head.weight': tensor(10.)}
    """

    refuse_unless_transformation("tx", tx)
    _refuse_other_arguments("mask", mask)

    def init(params: Tree) -> MaskedState:
        return MaskedState(tx.init(_where(_selected(mask, params), params)))

    def update(updates: Tree, opt_state: MaskedState, params: Tree | None = None) -> tuple[Tree, MaskedState]:
        chosen = _selected(mask, updates if params is None else params)
        inner_params = None if params is None else _where(chosen, params)
        inner, inner_state = tx.update(_where(chosen, updates), opt_state.inner_state, inner_params)
        return _merged(updates, [(chosen, inner)]), MaskedState(inner_state)

    return GradientTransformation(init, update, inside(tx.learning_rates, inner_state_of))


@described
def partition(transforms: Mapping[str, GradientTransformation], labels: Labels) -> GradientTransformation:
    """Applies to each leaf the transformation selected by its label.

    Args:
        transforms: From labels to transformations.
        labels: A pytree of labels like the parameters, or a function ``(path, leaf) -> label``.

    Raises:
        ValueError: At ``init`` or ``update``, if a leaf has no label, or one that is not in ``transforms``. The
            message names the leaf.

    Example:
        >>> import torch
        >>> from fxtrain import optim
        >>> tx = partition(
        ...     {"train": optim.sgd(0.1), "freeze": optim.set_to_zero()},
        ...     lambda path, leaf: "train" if path.startswith("head.") else "freeze",
        ... )
        >>> grads = {"body.weight": torch.tensor(1.0), "head.weight": torch.tensor(1.0)}
        >>> tx.update(grads, tx.init(grads))[0]
        {'body.weight': tensor(0.), 'head.weight': tensor(-0.1000)}
    """
    for label, tx in transforms.items():
        refuse_unless_transformation(f"transforms[{label!r}]", tx)
    _refuse_other_arguments("labels", labels)

    def groups(values: Tree) -> dict[str, list[bool]]:
        found = _of_leaves("labels", labels, values)
        for path, label in zip(leaf_paths(values), found, strict=True):
            if label not in transforms:
                raise ValueError(
                    f"expected the label of params{as_code(path)} to be one of "
                    f"{', '.join(map(repr, transforms))}, got {describe(label)}. Add a transformation for it, or "
                    "set_to_zero() to freeze it."
                )
        return {label: [other == label for other in found] for label in transforms}

    def init(params: Tree) -> PartitionState:
        chosen = groups(params)
        return PartitionState({label: tx.init(_where(chosen[label], params)) for label, tx in transforms.items()})

    def update(updates: Tree, opt_state: PartitionState, params: Tree | None = None) -> tuple[Tree, PartitionState]:
        chosen = groups(updates if params is None else params)
        parts: list[tuple[list[bool], Tree]] = []
        states: dict[str, Tree] = {}
        for label, tx in transforms.items():
            mine = chosen[label]
            inner_params = None if params is None else _where(mine, params)
            part, states[label] = tx.update(_where(mine, updates), opt_state.inner_states[label], inner_params)
            parts.append((mine, part))
        return _merged(updates, parts), PartitionState(states)

    learning_rates = {
        label: inside(tx.learning_rates, lambda state, label=label: state.inner_states[label])
        for label, tx in transforms.items()
    }
    return GradientTransformation(init, update, by_group(learning_rates))


def _selected(mask: Mask, values: Tree) -> list[bool]:
    found = _of_leaves("mask", mask, values)
    for path, chosen in zip(leaf_paths(values), found, strict=True):
        if not isinstance(chosen, bool):
            raise ValueError(
                f"expected mask to be True or False at params{as_code(path)}, got {describe(chosen)}. Return a bool."
            )
    return found


def _of_leaves(name: str, of: Mask | Labels, values: Tree) -> list[Any]:
    """Returns the mask value or label of each leaf of ``values``."""
    paths = leaf_paths(values)
    if callable(of):
        return [of(as_name(path), leaf) for path, leaf in zip(paths, tree.leaves(values), strict=True)]
    by_path = dict(zip(leaf_paths(of), tree.leaves(of), strict=True))
    for path in paths:
        if path not in by_path:
            raise ValueError(
                f"expected {name} to have a leaf for params{as_code(path)}, got a tree without it. Pass a tree like "
                "the parameters, or a function (path, leaf)."
            )
    # The tree may have more leaves, because inside another mask only some of the parameters are visible.
    return [by_path[path] for path in paths]


def _refuse_other_arguments(name: str, of: Mask | Labels) -> None:
    """Raises if a function of a mask or of labels does not take a path and a leaf."""
    if torch.compiler.is_dynamo_compiling() or not callable(of):  # Dynamo cannot trace signatures
        return
    if not takes(of, 2):
        raise TypeError(
            f"expected {name} to be a function (path, leaf), got {name_of(of)}{inspect.signature(of)}. It is called "
            "for each parameter, as in lambda path, leaf: leaf.ndim > 1, and not with the tree, as in optax."
        )


def _where(chosen: list[bool], values: Tree) -> Tree:
    leaves, structure = tree.flatten(values)
    return tree.unflatten(
        structure, [leaf if keep else MaskedNode() for keep, leaf in zip(chosen, leaves, strict=True)]
    )


def _merged(values: Tree, parts: list[tuple[list[bool], Tree]]) -> Tree:
    """Returns ``values`` with the selected leaves replaced by those of the parts."""
    leaves, structure = tree.flatten(values)
    for chosen, part in parts:
        replaced = iter(tree.leaves(part))
        leaves = [next(replaced) if mine else leaf for mine, leaf in zip(chosen, leaves, strict=True)]
    return tree.unflatten(structure, leaves)


class ActiveWhenState(NamedTuple):
    """The state of ``active_when``."""

    count: Tensor  # int64 []: steps so far
    inner_state: Tree  # state of the wrapped transformation


@described
def active_when(tx: GradientTransformation, holds: Callable[[Tensor], Tensor]) -> GradientTransformation:
    """Applies ``tx`` only while ``holds(count)`` is true.

    Otherwise the updates are zero, and the state of ``tx`` does not change.

    Args:
        tx: Any transformation.
        holds: A function from the number of earlier steps (int64 []) to a bool tensor of shape [].

    Example:
        >>> import torch
        >>> from fxtrain import optim
        >>> tx = active_when(optim.sgd(1.0), lambda count: count >= 1)
        >>> state = tx.init(torch.tensor(0.0))
        >>> first, state = tx.update(torch.tensor(1.0), state)
        >>> second, state = tx.update(torch.tensor(1.0), state)
        >>> float(first), float(second)
        (0.0, -1.0)
    """

    refuse_unless_transformation("tx", tx)

    def init(params: Tree) -> ActiveWhenState:
        return ActiveWhenState(start_count(params), tx.init(params))

    def update(updates: Tree, opt_state: ActiveWhenState, params: Tree | None = None) -> tuple[Tree, ActiveWhenState]:
        active = holds(opt_state.count)
        moved, inner_state = tx.update(updates, opt_state.inner_state, params)
        return tree.where(active, moved, tree.zeros_like(moved)), ActiveWhenState(
            opt_state.count + 1, tree.where(active, inner_state, opt_state.inner_state)
        )

    return GradientTransformation(init, update, inside(tx.learning_rates, inner_state_of, follows_step=False))


@described
def unfreeze(tx: GradientTransformation, phases: Mapping[str, Phase]) -> GradientTransformation:
    """Trains each parameter with ``tx`` only during its phase.

    Outside of it the parameter gets updates of zero, and its optimizer state does not change. Update counts inside
    ``tx``, and with them schedules and bias corrections, start when the phase starts.

    All phases share one graph, so gradients of frozen parameters are computed and discarded.
    ``fxtrain.with_trainable`` leaves them out of the graph, but retraces for each phase. Parameters that never train
    have no optimizer state in either case.

    Args:
        tx: Any transformation. Whole-tree operations, such as clipping by global norm, see only the parameters of one
            pattern here. Put them first: ``chain(clip_by_global_norm(1.0), unfreeze(adamw(3e-4), ...))``.
        phases: From shell-style patterns of parameter names to phases. The first matching pattern applies.

    Raises:
        ValueError: If a phase is invalid. At ``init``, if a parameter matches no pattern.

    Example:
        >>> import torch
        >>> from fxtrain import optim
        >>> tx = unfreeze(optim.sgd(1.0), {"head.*": 0, "*": 1})
        >>> grads = {"body.w": torch.tensor(1.0), "head.w": torch.tensor(1.0)}
        >>> state = tx.init(grads)
        >>> first, state = tx.update(grads, state)
        >>> second, state = tx.update(grads, state)
        >>> first, second
        ({'body.w': tensor(0.), 'head.w': tensor(-1.)}, {'body.w': tensor(-1.), 'head.w': tensor(-1.)})
    """
    refuse_unless_transformation("tx", tx)
    if not isinstance(phases, Mapping):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(
            f"expected phases to be a mapping from patterns to phases, got {describe(phases)}. Pass a dict, as in "
            'unfreeze(tx, {"head.*": 0, "*": 1000}).'
        )
    transforms = {pattern: _during(tx, pattern, phase) for pattern, phase in phases.items()}

    def matched(path: str) -> str:
        for pattern in transforms:
            if fnmatch.fnmatchcase(path, pattern):
                return pattern
        raise ValueError(
            f"expected phases to have a pattern for {path!r}, got {', '.join(map(repr, transforms))}. Add a pattern, "
            "such as '*', with its phase."
        )

    label = cast(Any, torch.compiler).assume_constant_result(matched)  # Dynamo cannot trace fnmatch
    return partition(transforms, lambda path, leaf: label(path))


def _during(tx: GradientTransformation, pattern: str, phase: Phase) -> GradientTransformation:
    match phase:
        case None:
            return set_to_zero()
        case bool():
            pass
        case 0:
            return tx
        case int(start) if start > 0:
            return active_when(tx, lambda count: count >= start)
        case (int(start), int(end)) if 0 <= start < end:
            return active_when(tx, lambda count: (count >= start) & (count < end))
        case _:
            pass
    raise ValueError(
        f"expected phases[{pattern!r}] to be a first step, (first, end) with first < end, or None for never, got "
        f"{describe(phase)}."
    )
