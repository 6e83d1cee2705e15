"""Adapt: what users have, as batches by position."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

from fxtrain.data._arrays import sequence
from fxtrain.data._containers import is_graph
from fxtrain.data._loaders import from_loader
from fxtrain.data._samples import as_torch, has_state
from fxtrain.data._source import Batches, Source
from fxtrain.data._streams import from_iterable, from_stateful_loader


class Foreign(Source):
    """Batches of somebody else's making, checked."""

    def __init__(self, source: Any) -> None:
        super().__init__()
        self.source = source
        if hasattr(source, "snapshot") and hasattr(source, "restore"):
            self.snapshot, self.restore = source.snapshot, source.restore
            self.can_be_left = False
        if hasattr(source, "expect_epoch_length"):
            self.expect_epoch_length = source.expect_epoch_length
        if hasattr(source, "begin_epoch"):
            self.begin_epoch = source.begin_epoch

    @property
    def epoch_length(self) -> int | None:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.source.epoch_length

    def fetch(self, position: int) -> Any:
        return self.source[position]

    def close(self) -> None:
        if hasattr(self.source, "close"):
            self.source.close()


def adapt(source: Any, *, seed: int = 0) -> Source:
    """Batches by position from what there is.

    Batches stay themselves, and a list is a ``sequence``. A graph of torch_geometric is a single batch. A loader with a
    ``state_dict`` goes to ``from_stateful_loader``, another ``DataLoader`` to ``from_loader``, and the rest to
    ``from_iterable``.

    Args:
        source: What gives batches.
        seed: Any whole number, for orders that a loader draws.

    Raises:
        TypeError: If it gives samples and no batches, or is no data.

    Example:
        >>> import torch
        >>> data = adapt([torch.zeros(2), torch.ones(2)])
        >>> adapt(data) is data
        True
    """
    if isinstance(source, Source):
        return source
    source = as_torch(source)
    if isinstance(source, Batches):
        return Foreign(source)
    if is_graph(source):
        return sequence([source])
    if isinstance(source, list | tuple):
        return sequence(source)
    if isinstance(source, Iterable) and has_state(source):
        return from_stateful_loader(source, seed=seed)
    if isinstance(source, DataLoader):
        return from_loader(source, seed=seed)
    _refuse_other_kind(source)
    samples = isinstance(source, Dataset) or (hasattr(source, "__len__") and hasattr(source, "__getitem__"))
    if isinstance(source, Tensor | np.ndarray | Mapping) or (samples and not isinstance(source, IterableDataset)):
        raise TypeError(
            f"expected batches, got a {type(source).__name__}, which holds samples. Make batches of them with "
            "fxtrain.data.batches(source, batch_size), or with a DataLoader."
        )
    return from_iterable(source, seed=seed)


def _refuse_other_kind(source: Any) -> None:
    """Refuses what neither holds samples nor gives batches."""
    kind, remedy = type(source).__name__, ""
    if isinstance(source, type):
        kind, remedy = f"the class {source.__name__}", "Make an instance."
    elif isinstance(source, nn.Module):
        remedy = "Give the arguments in this order: fit(state, step, data)."
    elif isinstance(source, str | bytes | os.PathLike):
        remedy = "Read what it names, for example with datasets.load_dataset."
    elif isinstance(source, Mapping) and any(isinstance(value, DataLoader | Source) for value in source.values()):
        remedy = f"Choose one, as data[{next(iter(source))!r}]."
    if remedy:
        raise TypeError(f"expected batches, got {kind if isinstance(source, type) else f'a {kind}'}. {remedy}")
