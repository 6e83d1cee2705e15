"""Updates for some of the parameters. The others keep their values and their optimizer state, as in ``torch.optim``."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from fxtrain import tree
from fxtrain.core import Tree, describe
from fxtrain.optim._state import PerParameter
from fxtrain.optim._transform import GradientTransformation
from fxtrain.optim._wrappers import EveryKState
from fxtrain.tree import MaskedNode, Path, as_code, children, leaf_paths, rebuilt


def update_used(
    tx: GradientTransformation, grads: Tree, opt_state: Tree, params: Tree, used: Tree
) -> tuple[Tree, Tree]:
    """Runs ``tx.update`` only for the parameters that the step used.

    Unused parameters get an update of zero, and their optimizer state does not change: no weight decay, no momentum
    decay, no count. ``torch.optim`` treats parameters whose ``grad`` is None the same way. State of the whole
    optimizer, such as the step of a schedule, advances.

    The transformation runs on trees without the unused parameters: dictionaries lack their keys, and other nodes have a
    ``MaskedNode`` in their place. So it can be any transformation whose state has the structure of the parameters.
    Inside ``every_k``, a parameter is unused only if no step of the accumulation used it. Otherwise its gradients are
    zero in the steps that did not use it.

    Args:
        tx: Any transformation.
        grads: Pytree of tensors.
        opt_state: The state of ``tx`` for ``params``.
        params: Pytree like ``grads``.
        used: Pytree of bools like ``grads``, or None if all parameters are used.

    Returns:
        The updates, like ``grads``, and the new state.

    Raises:
        ValueError: If ``used`` has another structure or values that are not bools, or if the state of ``tx`` does not
            have the structure of the parameters.

    Example:
        >>> import torch
        >>> from fxtrain import optim
        >>> tx = optim.adamw(0.1, weight_decay=0.1)
        >>> params = {"idle": torch.ones(1), "busy": torch.ones(1)}
        >>> updates, state = update_used(tx, params, tx.init(params), params, {"idle": False, "busy": True})
        >>> updates, state[0].count["idle"], state[0].count["busy"]
        ({'idle': tensor([0.]), 'busy': tensor([-0.1100])}, tensor(0), tensor(1))
    """
    if used is None:
        return tx.update(grads, opt_state, params)
    flags = _flags(used, grads)
    left_out = frozenset(path for path, use in zip(leaf_paths(grads), flags, strict=True) if not use)
    if not left_out:
        return tx.update(grads, opt_state, params)
    if accumulates(opt_state):
        return tx.update(grads, _count_unused(opt_state, left_out), params)
    part = _without(params, left_out)
    inside = _narrowed(opt_state, _layout(tx, part), left_out, "opt_state")
    moved, after = tx.update(_without(grads, left_out), inside, part)
    by_path = dict(zip(leaf_paths(moved), tree.leaves(moved), strict=True))
    leaves, structure = tree.flatten(grads)
    updates = [
        leaf.new_zeros(leaf.shape) if path in left_out else by_path[path]
        for path, leaf in zip(leaf_paths(grads), leaves, strict=True)
    ]
    return tree.unflatten(structure, updates), _merged(opt_state, after)


def accumulates(opt_state: Tree) -> bool:
    """Returns whether the state accumulates gradients, so that a later update may move currently unused parameters."""
    if isinstance(opt_state, EveryKState):
        return True
    return any(accumulates(child) for _, child in children(opt_state) or ())


def _count_unused(node: Tree, left_out: frozenset[Path]) -> Tree:
    """Returns the state with one more unused step counted for these parameters in each accumulation."""
    if isinstance(node, EveryKState):
        more = torch.stack([count + int(path in left_out) for path, count in node.unused.by_path().items()])
        return node._replace(unused=node.unused.replace(more))
    inner = children(node)
    return node if inner is None else rebuilt(node, [_count_unused(child, left_out) for _, child in inner])


def _flags(used: Tree, grads: Tree) -> list[bool]:
    flags: list[Any] = tree.leaves(used)
    paths, expected = leaf_paths(used), leaf_paths(grads)
    if paths != expected:
        lost = next((path for path in (*expected, *paths) if (path in paths) != (path in expected)), ())
        where = "used" if lost in expected else "grads"
        raise ValueError(f"expected used to be a tree like grads, got {as_code(lost) or 'a leaf'} missing in {where}.")
    for path, flag in zip(paths, flags, strict=True):
        if not isinstance(flag, bool):
            raise ValueError(f"expected True or False at used{as_code(path)}, got {describe(flag)}.")
    return flags


def _layout(tx: GradientTransformation, params: Tree) -> Tree:
    """Returns the structure of the state for these parameters, without reading their values if possible."""
    try:
        return tx.init(tree.map(_without_values, params))
    except Exception:
        # ``init`` may read values, which tensors on the meta device do not have.
        return tx.init(params)


def _without_values(leaf: Tensor) -> Tensor:
    return leaf.to("meta")


def _without(values: Tree, left_out: frozenset[Path], path: Path = ()) -> Tree:
    if path in left_out:
        return MaskedNode()
    inner = children(values)
    if inner is None:
        return values
    if isinstance(values, dict):
        entries = cast(dict[Any, Any], values)
        kept = {key: _without(child, left_out, (*path, key)) for key, child in inner if (*path, key) not in left_out}
        return {key: kept[key] for key in entries if key in kept}
    return rebuilt(values, [_without(child, left_out, (*path, key)) for key, child in inner])


def _narrowed(state: Tree, layout: Tree, left_out: frozenset[Path], path: str) -> Tree:
    """Returns the state of the remaining parameters, with the structure that ``init`` gives it."""
    if isinstance(layout, MaskedNode):
        return layout
    if isinstance(layout, PerParameter):
        return state.of(layout.paths)
    inner, own = children(layout), children(state)
    if inner is None:
        if own is not None or (isinstance(state, Tensor) and state.shape != layout.shape):
            raise _unknown_structure(path)
        return state
    kept = dict(own or ())
    names = {key for left in left_out for key in left}
    if any(key not in kept for key, _ in inner) or any(key not in names for key in kept.keys() - dict(inner).keys()):
        raise _unknown_structure(path)
    return rebuilt(layout, [_narrowed(kept[key], child, left_out, f"{path}{as_code((key,))}") for key, child in inner])


def _merged(state: Tree, part: Tree) -> Tree:
    """Returns the state with its updated part merged in."""
    if isinstance(part, MaskedNode):
        return state
    if isinstance(part, PerParameter):
        return state.updated(part)
    inner = children(part)
    if inner is None:
        return part
    new = dict(inner)
    return rebuilt(state, [_merged(child, new[key]) if key in new else child for key, child in children(state) or ()])


def _unknown_structure(path: str) -> ValueError:
    return ValueError(
        f"expected optimizer state that has the structure of the parameters, so that a parameter without a gradient "
        f"can be left out, got {path}, which changes with the number of parameters. Make it a tree like the parameters "
        "or a PerParameter, or give unused parameters a gradient of zero: train_step(..., unused='zero')."
    )
