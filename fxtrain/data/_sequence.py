"""Batches from a list."""

from __future__ import annotations

import operator
from collections.abc import Sequence

from fxtrain.core import Batch
from fxtrain.data._batch_checks import ALL_DIMS
from fxtrain.data._source import Source


class ListBatches(Source):
    """Batches from a list. Use ``sequence``."""

    epoch_length: int

    def __init__(self, items: Sequence[Batch], *, dynamic: bool = False) -> None:
        super().__init__(dynamic_dims=ALL_DIMS if dynamic else 0)
        if not items:
            raise ValueError("expected at least one batch, got an empty list.")
        self.items = items
        self.epoch_length = len(items)
        # Check all batches now, so that a mismatch raises before the run and not during it.
        self._batches = [super(ListBatches, self).__getitem__(position) for position in range(len(items))]

    def fetch(self, position: int) -> Batch:
        return self.items[position % self.epoch_length]

    def __getitem__(self, position: int) -> Batch:
        position = operator.index(position)
        return self._batches[position % self.epoch_length] if position >= 0 else super().__getitem__(position)


def sequence(items: Sequence[Batch], *, dynamic: bool = False) -> Source:
    """Returns the given batches, in the same order in each epoch.

    Args:
        items: Batches of equal structure, dtypes and shapes. The last may have fewer rows.
        dynamic: Whether sizes may change from batch to batch.

    Raises:
        ValueError: If there are no batches, or they differ.

    Example:
        >>> import torch
        >>> data = sequence([torch.zeros(2), torch.ones(2)])
        >>> data.epoch_length, data[3]
        (2, tensor([1., 1.]))
    """
    return ListBatches(list(items), dynamic=dynamic)
