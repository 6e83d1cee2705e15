"""The examples of a batch: how many there are, which of them a rank has, and the weight of a batch in averages."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fxtrain import rng, tree
from fxtrain._torch_internals.collectives import rank
from fxtrain.core import Batch, wide_dtype
from fxtrain.data._foreign_containers import count_examples
from fxtrain.distributed._mesh import Mesh
from fxtrain.rng._philox import Rows


def num_examples(batch: Batch) -> int:
    """Returns the number of examples of a batch.

    That of its graphs, the length of its lists, or the first dimension of its first tensor that has one other than 1. A
    first dimension of 1 broadcasts.

    Example:
        >>> num_examples({"positions": torch.zeros(1, 7), "x": torch.zeros(4, 7)})
        4
    """
    # Dynamo cannot trace the search for graphs.
    count = None if torch.compiler.is_dynamo_compiling() else count_examples(batch)
    if count is not None:
        return count
    return next((leaf.shape[0] for leaf in tree.leaves(batch) if has_examples(leaf)), 1)


def has_examples(leaf: object) -> bool:
    """Whether a leaf of a batch is a tensor with a first dimension other than 1."""
    return isinstance(leaf, Tensor) and leaf.ndim > 0 and leaf.shape[0] != 1


def on_rank(key: rng.Key, mesh: Mesh, batch: Batch) -> rng.Key:
    """Returns a key whose samples are those of this rank's examples.

    Args:
        key: The key of all ranks.
        mesh: The ranks.
        batch: The batch of this rank.
    """
    return key.replace(rows=Rows(rank(key.seed, mesh.ranks_per_model), mesh.size, num_examples(batch)))


def scalar(value: float, device: torch.device) -> Tensor:
    """Returns a number in the dtype of weights: float64 [], or float32 where there is no float64."""
    return torch.full((), value, dtype=wide_dtype(device), device=device)


def wide(values: Any, device: torch.device) -> Tensor:
    """Returns the values of a tensor in one row, in the dtype of weights."""
    return values.detach().to(device, wide_dtype(device)).reshape(-1)
