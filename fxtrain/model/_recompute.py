"""Recompute: the statistics of batch norms, for parameters that have none of their own."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

from fxtrain import rng, tree
from fxtrain.core import TrainState
from fxtrain.model._architecture import model_of


def recompute_statistics(
    state: TrainState, batches: Iterable[Any], call: Callable[[Any, Any], Any] = lambda model, batch: model(batch)
) -> TrainState:
    """The state with the statistics of its batch norms computed anew, as plain means over some batches.

    For averaged parameters: the statistics that training left are those of the live ones.

        state = fx.recompute_statistics(fx.callbacks.averaged(state, "swa"), batches, lambda model, b: model(b["x"]))

    Args:
        state: Any state with a model. It stays as it is.
        batches: Some of the training data, on the state's device.
        call: Runs the model on a batch, which is all that is needed of it.

    Raises:
        ValueError: If there is no batch.

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

    def counting(modules: Any, batch: Any, first: bool) -> Any:
        for norm in _norms(modules):
            norm.momentum = None  # a mean of all batches; the attribute is put back after the call
            if first:
                norm.reset_running_stats()
        return call(modules, batch)

    index = -1
    for index, batch in enumerate(batches):
        key = rng.key(state.seed, stream=rng.Stream.SAMPLE, step=state.step, microbatch=index)
        buffers = model.call(state.params, buffers, counting, batch, index == 0, train=True, key=key).buffers
    if index < 0:
        raise ValueError("There is no batch to compute statistics of.")
    return state.replace(buffers=buffers)


def _norms(modules: Any) -> list[Any]:
    roots = [leaf for leaf in tree.leaves(modules) if isinstance(leaf, nn.Module)]
    kinds = nn.modules.batchnorm._BatchNorm  # pyright: ignore[reportPrivateUsage]
    return [module for root in roots for module in root.modules() if isinstance(module, kinds) and module.training]
