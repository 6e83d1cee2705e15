"""Conversion of loaders, lists, iterables and other user data to sources of batches."""

from __future__ import annotations

import operator
import os
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

from fxtrain.core import Batch, describe
from fxtrain.core._short_tracebacks import with_short_traceback
from fxtrain.data._batch_checks import ALL_DIMS
from fxtrain.data._data_loaders import from_loader
from fxtrain.data._foreign_containers import count_examples
from fxtrain.data._graphs import is_graph
from fxtrain.data._hugging_face import as_torch, has_state
from fxtrain.data._iterables import from_iterable
from fxtrain.data._source import Source, rows_of
from fxtrain.data._stateful_loaders import from_stateful_loader
from fxtrain.data._types import Batches, SourceLike


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
        counts = [count_examples(batch) or rows_of(batch) for batch in self._batches]
        self.batch_size, self.num_examples = max(counts) or None, sum(counts) or None

    def fetch(self, position: int) -> Batch:
        return self.items[position % self.epoch_length]

    def __getitem__(self, position: int) -> Batch:
        position = operator.index(position)
        return self._batches[position % self.epoch_length] if position >= 0 else super().__getitem__(position)


@with_short_traceback
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


class CheckedBatches(Source):
    """Adds checks of the batches to an implementation of ``Batches``. Forwards the optional methods that it defines."""

    def __init__(self, batches: Batches) -> None:
        super().__init__()
        self.batches = batches
        for name in ("expect_epoch_length", "begin_epoch", "close"):
            if hasattr(batches, name):
                setattr(self, name, getattr(batches, name))
        if hasattr(batches, "snapshot") and hasattr(batches, "restore"):
            self.snapshot, self.restore = getattr(batches, "snapshot"), getattr(batches, "restore")  # noqa: B009
            self.interruptible = False

    @property
    def epoch_length(self) -> int | None:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.batches.epoch_length

    def fetch(self, position: int) -> Batch:
        return self.batches[position]


@with_short_traceback
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
        if isinstance(data, tuple):
            _refuse_columns(data)
        return sequence(data)
    if isinstance(data, Iterable) and has_state(data):
        return from_stateful_loader(data, seed=seed)
    if isinstance(data, DataLoader):
        return from_loader(data, seed=seed)
    _refuse_all_but_batches(data)
    return from_iterable(data, seed=seed)


def _refuse_columns(source: tuple[object, ...]) -> None:
    """Raises for a tuple of the columns of one data set, such as inputs and targets."""
    arrays = [value for value in source if isinstance(value, Tensor | np.ndarray) and value.ndim]
    kinds, rows = {(value.shape[1:], value.dtype) for value in arrays}, {len(value) for value in arrays}
    if len(arrays) == len(source) and len(rows) == 1 and len(kinds) > 1:
        raise TypeError(
            f"expected batches, got a tuple of {len(arrays)} arrays of {rows.pop()} rows each, which differ like the "
            "columns of one data set. Batch them with fxtrain.data.batches(columns, batch_size), or with a DataLoader."
        )


def _refuse_all_but_batches(source: object) -> None:
    """Raises for objects that hold samples, and for those that hold no data."""
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
    samples = isinstance(source, Dataset) or (hasattr(source, "__len__") and hasattr(source, "__getitem__"))
    if isinstance(source, Tensor | np.ndarray | Mapping) or (samples and not isinstance(source, IterableDataset)):
        raise TypeError(
            f"expected batches, got {describe(source)}, which contains samples. Batch them with "
            "fxtrain.data.batches(source, batch_size), or with a DataLoader."
        )
