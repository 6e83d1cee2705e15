"""Losses with the number of items that they average, so that means over batches of unequal size are exact."""

from __future__ import annotations

import math
from typing import NamedTuple

from torch import Tensor

from fxtrain.core import Tree


class Weighted(NamedTuple):
    """A loss with its weight. Made by ``weighted``.

    Args:
        loss: float [], or a model's output with such a ``loss``.
        weight: The weight of the batch: [].

    Example:
        >>> import fxtrain as fx
        >>> fx.weighted(0.5, weight=3)
        Weighted(loss=0.5, weight=3)
    """

    loss: Tree
    weight: Tensor | float


def weighted(loss: Tree, weight: Tensor | float) -> Weighted:
    """Returns a loss with the weight of its batch, for a loss function to return in place of the loss.

        sum_i w_i L_i / sum_i w_i

    Texts have different numbers of tokens, so the mean of the microbatches' means is not the mean over all tokens.
    Gradients, loss and 0-d metrics are averaged over microbatches by weight, and so are evaluations over batches and
    ``fxtrain.callbacks.epoch_mean`` over steps.

    A batch of weight 0, such as one of padding only, does not count, even if its loss is nan. If all microbatches of a
    step have weight 0, its loss, its 0-d metrics and its gradients are 0.

    Args:
        loss: The mean over the items of the batch: float [], or a model's output with such a ``loss``.
        weight: The number of items, or the sum of their weights: a nonnegative real number or 0-d tensor.

    Raises:
        ValueError: If ``weight`` is a negative or non-finite number. Tensors are not checked.

    Example:
        >>> import torch, fxtrain as fx
        >>> def loss_fn(model, batch):
        ...     kept = batch["x"] != 0
        ...     return fx.weighted((model["w"] * batch["x"]).sum() / kept.sum(), kept.sum())
        >>> tx = fx.optim.sgd(1.0)
        >>> step = fx.train_step(loss_fn, tx, accumulate=2)
        >>> batch = {"x": torch.tensor([[1.0, 1.0], [4.0, 0.0]])}
        >>> state, output = step(fx.init({"w": torch.tensor(1.0)}, tx), batch)
        >>> output.metrics["loss"], output.weight
        (tensor(2.), tensor(3., dtype=torch.float64))
    """
    if isinstance(weight, int | float) and not 0 <= weight < math.inf:
        raise ValueError(f"expected a finite weight of 0 or more, got {weight!r}. Count the items of the batch.")
    return Weighted(loss, weight)
