"""The number of parameters of a state, and its size."""

from __future__ import annotations

from torch import Tensor

from fxtrain import tree
from fxtrain.core import TrainState


def model_sizes(state: TrainState) -> dict[str, int]:
    """Returns the sizes of a state by the names under which they are published.

    Args:
        state: Any state. Without a model, all parameters count as trainable.

    Returns:
        ``model/num_parameters`` and ``model/trainable_parameters``, numbers of elements with shared parameters counted
        once, and ``model/state_bytes``, the size of the state with its optimizer, callbacks and buffers.

    Example:
        >>> import torch, fxtrain as fx
        >>> model_sizes(fx.init(torch.nn.Linear(3, 2), fx.optim.adam(1e-3)))
        {'model/num_parameters': 8, 'model/trainable_parameters': 8, 'model/state_bytes': 150}
    """
    tensors: list[Tensor] = tree.leaves(state.params)
    trainable = [True] * len(tensors) if state.model is None else tree.leaves(state.model.trainable)
    counts = [tensor.numel() for tensor in tensors]
    return {
        "model/num_parameters": sum(counts),
        "model/trainable_parameters": sum(count for count, moves in zip(counts, trainable, strict=True) if moves),
        "model/state_bytes": tree.nbytes(state),
    }
