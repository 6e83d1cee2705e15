"""Selects which parameters of a state are trainable."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from fxtrain import tree
from fxtrain.core import TrainState, Tree, check_train_state, matching
from fxtrain.model._init import init_optimizer
from fxtrain.model._model import model_of
from fxtrain.model._types import Transforms
from fxtrain.optim import PerParameter
from fxtrain.tree import as_code, as_name, children, leaf_paths, rebuilt


def with_trainable(state: TrainState, tx: Transforms, parameters: str | Sequence[str]) -> TrainState:
    """Returns a state in which only the matching parameters are trainable.

    Frozen parameters get no gradients and no optimizer state, so steps are faster and use less memory. Changing the
    selection recompiles the step. Optimizer state is kept for parameters that stay trainable, and initialized for newly
    unfrozen ones.

    Optimizers count the updates of each parameter, so a newly unfrozen one gets the updates of a fresh optimizer, as in
    ``torch.optim``. Schedules are not reset. A custom transformation with one update count for all parameters raises,
    because its bias correction would make the first updates of newly unfrozen parameters several times too large.
    ``fxtrain.optim.start_counts`` adds a count for each parameter. To reset the optimizer state of all parameters, pass
    ``state.replace(opt_state=())``.

    Args:
        state: Any state with a model.
        tx: The transformation given to ``init``.
        parameters: Shell-style patterns of parameter names, such as ``"head.*"``. ``"*"`` selects all.

    Raises:
        ValueError: If a pattern matches no floating or complex parameter, or if a newly unfrozen parameter would share
            an update count with parameters that were trained before.

    Example:
        >>> import torch, fxtrain as fx
        >>> tx = fx.optim.sgd(0.1)
        >>> state = fx.init(torch.nn.Linear(1, 1), tx)
        >>> step = fx.train_step(lambda model, batch: model(batch).sum(), tx)
        >>> after, _ = step(fx.with_trainable(state, tx, "bias"), torch.ones(1, 1))
        >>> bool((after.params["weight"] == state.params["weight"]).all()), bool(
        ...     (after.params["bias"] == state.params["bias"]).all()
        ... )
        (True, False)
    """
    check_train_state(state, "with_trainable(state, tx, parameters)")
    leaves, structure = tree.flatten(state.params)
    names = [as_name(path) for path in leaf_paths(state.params)]
    able = [name for name, leaf in zip(names, leaves, strict=True) if _is_differentiable(leaf)]
    chosen = {able[i] for i in matching(able, parameters, "parameter that can be trained")}
    narrowed = model_of(state).training_only(tree.unflatten(structure, [name in chosen for name in names]))
    fresh = init_optimizer(tx, narrowed.split(state.params))
    opt_state = _with_old_values(state.opt_state, fresh)
    refuse_shared_counts(
        opt_state,
        {id(leaf) for leaf in tree.leaves(fresh)},
        "with_trainable",
        "restart the optimizer state: with_trainable(state.replace(opt_state=()), ...)",
    )
    return state.replace(model=narrowed, opt_state=opt_state)


def _with_old_values(old: Tree, fresh: Tree) -> Tree:
    """Returns the fresh optimizer state, with values of the old one wherever they fit."""
    if isinstance(fresh, PerParameter):
        return fresh.updated(old) if isinstance(old, PerParameter) and _is_like(old.values, fresh.values, 1) else fresh
    inner = children(fresh)
    if inner is None:
        return old if isinstance(old, Tensor) and _is_like(old, fresh) else fresh
    kept = dict(children(old) or ())
    return rebuilt(fresh, [_with_old_values(kept.get(key), child) for key, child in inner])


def _is_like(old: Tensor, new: Tensor, first_dim: int = 0) -> bool:
    return old.shape[first_dim:] == new.shape[first_dim:] and old.dtype == new.dtype


def refuse_shared_counts(node: Tree, fresh: set[int], caller: str, remedy: str, path: str = "") -> None:
    """Raises if newly initialized optimizer state shares an update count with parameters that were trained before.

    Args:
        node: The new optimizer state, or a node of it.
        fresh: Ids of the leaves that were just initialized.
        caller: The function named at the start of the error.
        remedy: An alternative for the user, as the end of a sentence.
        path: Path of the node in the optimizer state.

    Raises:
        ValueError: Names the parameter and the node.
    """
    for key, child in children(node) or []:
        refuse_shared_counts(child, fresh, caller, remedy, f"{path}{as_code((key,))}")
    fields: dict[Any, Any] = node._asdict() if hasattr(node, "_asdict") else node if isinstance(node, dict) else {}
    names: tuple[Any, ...] = getattr(type(node), "SHARED_COUNTS", tuple(fields))
    named = [fields.get(name) for name in names]
    counts = [count for count in named if isinstance(count, Tensor) and not _is_differentiable(count)]
    if not any(bool(count.any()) for count in counts):
        return
    for name, subtree in fields.items():
        if name in _INNER_STATE_FIELDS or isinstance(subtree, Tensor):
            continue
        for place, leaf in zip(leaf_paths(subtree), tree.leaves(subtree), strict=True):
            if id(leaf) in fresh:
                raise ValueError(
                    f"{caller}: expected parameters trained since the optimizer's first update, got "
                    f"{as_name(place)!r} after {max(int(count.max()) for count in counts)} updates, which "
                    f"opt_state{path}, a {type(node).__name__}, counts for all parameters together. "
                    "Use fxtrain.optim.unfreeze, which counts for each phase, count with fxtrain.optim.start_counts, "
                    f"or {remedy}."
                )


# Fields for the states of inner transformations, which have their own counts.
_INNER_STATE_FIELDS = ("inner_state", "inner_states")


def _is_differentiable(leaf: Tensor) -> bool:
    return leaf.is_floating_point() or leaf.is_complex()
