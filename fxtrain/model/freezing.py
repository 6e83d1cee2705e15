"""Freezing parts of a model: which parameters are differentiated at all."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from fxtrain import tree
from fxtrain.core import TrainState, matching
from fxtrain.model.architecture import model_of
from fxtrain.model.init import init_optimizer
from fxtrain.optim.nodes import as_name, leaf_paths


def with_trainable(state: TrainState, tx: Any, parameters: str | Sequence[str]) -> TrainState:
    """The state with these parameters trained, and no others.

    What is frozen is not differentiated, takes no memory of the optimizer's, and makes a step faster; each choice is
    another graph. What the optimizer remembers of parameters that were trained before and still are stays; of those
    that begin to be, it begins anew. ``fxtrain.optim.unfreeze`` keeps one graph for all phases, and computes all
    gradients.

    Args:
        state: Any state with a model.
        tx: As given to ``init``.
        parameters: Patterns of a shell for the names of parameters: ``"head.*"``; ``"*"`` is all.

    Raises:
        ValueError: If a pattern matches no parameter that can be trained.

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
    leaves, structure = tree.flatten(state.params)
    names = [as_name(path) for path in leaf_paths(state.params)]
    able = [name for name, leaf in zip(names, leaves, strict=True) if _can_be_trained(leaf)]
    chosen = {able[i] for i in matching(able, parameters, "parameter that can be trained")}
    narrowed = model_of(state).training_only(tree.unflatten(structure, [name in chosen for name in names]))
    fresh = init_optimizer(tx, narrowed.split(state.params))
    known = dict(zip(tree.paths(state.opt_state), tree.leaves(state.opt_state), strict=True))
    opt_state = tree.map_with_path(lambda path, leaf: _kept(known.get(path), leaf), fresh)
    return state.replace(model=narrowed, opt_state=opt_state)


def _can_be_trained(leaf: Tensor) -> bool:
    return leaf.is_floating_point() or leaf.is_complex()


def _kept(old: Tensor | None, new: Tensor) -> Tensor:
    return old if old is not None and old.shape == new.shape and old.dtype == new.dtype else new
