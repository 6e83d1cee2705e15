"""Conversion of loaders, lists, iterables and other user data to sources of batches."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping

import numpy as np
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

from fxtrain.core import Batch, describe
from fxtrain.data._data_loaders import from_loader
from fxtrain.data._graphs import is_graph
from fxtrain.data._hugging_face import as_torch, has_state
from fxtrain.data._iterables import from_iterable
from fxtrain.data._sequence import sequence
from fxtrain.data._source import Source
from fxtrain.data._stateful_loaders import from_stateful_loader
from fxtrain.data._types import Batches, SourceLike


class CheckedBatches(Source):
    """Adds checks of the batches to an implementation of ``Batches``. Forwards the optional methods that it defines."""

    def __init__(self, batches: Batches) -> None:
        super().__init__()
        self.batches = batches
        for name in ("expect_epoch_length", "begin_epoch", "close"):
            if hasattr(batches, name):
                setattr(self, name, getattr(batches, name))
        if self.has_snapshots:
            self.snapshot, self.restore = getattr(batches, "snapshot"), getattr(batches, "restore")  # noqa: B009
            self.interruptible = False

    @property
    def epoch_length(self) -> int | None:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.batches.epoch_length

    @property
    def has_snapshots(self) -> bool:
        return hasattr(self.batches, "snapshot") and hasattr(self.batches, "restore")

    @property
    def has_variable_epochs(self) -> bool:
        return hasattr(self.batches, "begin_epoch")

    def fetch(self, position: int) -> Batch:
        return self.batches[position]


def as_source(source: SourceLike, *, seed: int = 0) -> Source:
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
        >>> data = as_source([torch.zeros(2), torch.ones(2)])
        >>> as_source(data) is data
        True
    """
    if isinstance(source, Source):
        return source
    data = as_torch(source)
    if isinstance(data, Batches):
        return CheckedBatches(data)
    if is_graph(data):
        return sequence([data])
    if isinstance(data, list | tuple):
        return sequence(data)
    if isinstance(data, Iterable) and has_state(data):
        return from_stateful_loader(data, seed=seed)
    if isinstance(data, DataLoader):
        return from_loader(data, seed=seed)
    _refuse_other_kinds(data)
    _refuse_samples(data)
    return from_iterable(data, seed=seed)


def _refuse_other_kinds(source: object) -> None:
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


def _refuse_samples(source: object) -> None:
    samples = isinstance(source, Dataset) or (hasattr(source, "__len__") and hasattr(source, "__getitem__"))
    if isinstance(source, Tensor | np.ndarray | Mapping) or (samples and not isinstance(source, IterableDataset)):
        raise TypeError(
            f"expected batches, got {describe(source)}, which contains samples. Batch them with "
            "fxtrain.data.batches(source, batch_size), or with a DataLoader."
        )
