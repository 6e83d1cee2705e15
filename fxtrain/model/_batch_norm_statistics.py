"""Recomputes batch norm statistics, for example for averaged parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from fxtrain import rng, tree
from fxtrain._torch_internals.modules import batch_norms
from fxtrain.core import Batch, TrainState, Tree, describe
from fxtrain.model._model import model_of


def recompute_statistics(
    state: TrainState,
    batches: Iterable[Batch],
    call: Callable[[Tree, Batch], object] = lambda model, batch: model(batch),
) -> TrainState:
    """Returns the state with its batch norm statistics recomputed as plain means over some batches.

    Averaged parameters need this, because the state's statistics belong to the live parameters:

        state = fx.recompute_statistics(fx.callbacks.averaged(state, "swa"), batches, lambda model, b: model(b["x"]))

    Args:
        state: Any state with a model. It is not modified.
        batches: Some of the training data, on the state's device.
        call: Runs the model on a batch. Its output is ignored.

    Raises:
        ValueError: If ``batches`` is empty.

    Example:
        >>> import torch, fxtrain as fx
        >>> state = fx.init(torch.nn.BatchNorm1d(1))
        >>> state = recompute_statistics(state, [torch.tensor([[0.0], [2.0]]), torch.tensor([[4.0], [6.0]])])
        >>> state.buffers["running_mean"]
        tensor([3.])

    References:
        Izmailov et al., "Averaging weights leads to wider optima and better generalization", 2018, section 3.2.
    """
    model, buffers = model_of(state), state.buffers
    if isinstance(batches, Tensor | Mapping):
        raise TypeError(
            f"expected batches to be an iterable of batches, got {describe(batches)}, which is one. Put it in a list."
        )

    def counting(modules: Tree, batch: Batch, first: bool) -> object:
        roots = [leaf for leaf in tree.leaves(modules) if isinstance(leaf, nn.Module)]
        norms: list[Any] = [norm for root in roots for norm in batch_norms(root) if norm.training]
        for norm in norms:
            # None selects a cumulative mean. The attribute is restored after the call.
            norm.momentum = None
            if first:
                norm.reset_running_stats()
        return call(modules, batch)

    index = -1
    for index, batch in enumerate(batches):
        key = rng.key(state.seed, stream=rng.Stream.SAMPLE, step=state.step, microbatch=index)
        buffers = model.call(state.params, buffers, counting, batch, index == 0, train=True, key=key).buffers
    if index < 0:
        raise ValueError("expected at least one batch, got none. Give some of the training data.")
    return state.replace(buffers=buffers)
