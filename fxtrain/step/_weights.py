"""Weights: a loss with the number of items that it is the mean of, so that means over unequal batches are exact."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from torch import Tensor


class Weighted(NamedTuple):
    """A loss with its weight; made by ``weighted``."""

    loss: Any  # float [], or an output with a ``loss``
    weight: Tensor | float  # []


def weighted(loss: Any, weight: Tensor | float) -> Weighted:
    """The loss of a batch, with how much the batch counts: what a loss function returns in place of the loss.

        sum_i w_i L_i / sum_i w_i

    Texts have different numbers of tokens, so the mean of the microbatches' means is not the mean over all tokens.
    With its weight beside it, each loss counts as often as it has items: gradients, loss and 0-d metrics are averaged
    over microbatches by weight, and so are evaluations over batches and ``fxtrain.callbacks.epoch_mean`` over steps.

    A batch of weight 0, all padding, counts nowhere, even where its loss is nan. Where all microbatches of a step have
    weight 0, its loss, its 0-d metrics and its gradients are 0.

    Args:
        loss: The mean over the items of the batch: float [], or a model's output with such a ``loss``.
        weight: The number of items, or the sum of their weights: a real number or a 0-d tensor, 0 or more.

    Raises:
        ValueError: If the weight is a number below 0 or not finite.

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
        raise ValueError(f"expected a weight of 0 or more, got {weight!r}. Give the number of items in the batch.")
    return Weighted(loss, weight)
