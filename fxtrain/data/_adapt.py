"""Conversion of loaders, lists, iterables and other user data to sources of batches."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

from fxtrain.core import describe
from fxtrain.data._arrays import sequence
from fxtrain.data._containers import is_graph
from fxtrain.data._loaders import from_loader
from fxtrain.data._samples import as_torch, has_state
from fxtrain.data._source import Batches, Source
from fxtrain.data._streams import from_iterable, from_stateful_loader


class Foreign(Source):
    """A third-party ``Batches`` object, wrapped so that its batches are checked."""

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
    """Returns a source of batches for ``source``.

    A ``Source`` is returned unchanged, and other implementations of ``Batches`` are wrapped to check their batches. A
    list or tuple becomes a ``sequence``, and a torch_geometric graph a single batch. A loader with a ``state_dict`` is
    passed to ``from_stateful_loader``, any other ``DataLoader`` to ``from_loader``, and any other iterable or function
    to ``from_iterable``.

    Args:
        source: Batches in any of these forms.
        seed: Any int. Seeds the loader's shuffling and the dataset's random samples.

    Raises:
        TypeError: If ``source`` yields samples instead of batches, or is not data.

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
            f"expected batches, got {describe(source)}, which contains samples. Batch them with "
            "fxtrain.data.batches(source, batch_size), or with a DataLoader."
        )
    return from_iterable(source, seed=seed)


def _refuse_other_kind(source: Any) -> None:
    """Raises for objects that neither hold samples nor yield batches."""
    remedy = ""
    if isinstance(source, type):
        remedy = "Create an instance."
    elif isinstance(source, nn.Module):
        remedy = "Pass the arguments in this order: fit(state, step, data)."
    elif isinstance(source, str | bytes | os.PathLike):
        remedy = "Load the data first, for example with datasets.load_dataset."
    elif isinstance(source, Mapping) and any(isinstance(value, DataLoader | Source) for value in source.values()):
        remedy = f"Select one: data[{next(iter(source))!r}]."
    if remedy:
        raise TypeError(f"expected batches, got {describe(source)}. {remedy}")
