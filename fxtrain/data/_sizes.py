"""The sizes of a data source, as far as it or the loader in it declares them."""

from __future__ import annotations

from collections.abc import Sized
from typing import NamedTuple

from torch.utils.data import IterableDataset

_INNER = ("source", "batches", "loader", "iterable")  # attributes of sources that read others
_MAX_DEPTH = 20


class DataSizes(NamedTuple):
    """The sizes of a data source. Unknown ones are None.

    Args:
        batch_size: Examples per batch; None if it varies.
        num_examples: Examples per epoch, those of batches that are dropped included.
        num_tokens: Tokens in these, or positions of the longest column.
    """

    batch_size: int | None = None
    num_examples: int | None = None
    num_tokens: int | None = None


def data_sizes(source: object) -> DataSizes:
    """Returns the sizes that a source, the sources that it wraps, or their loader declare. Reads no batches.

    Args:
        source: A source. It declares sizes as attributes ``batch_size``, ``num_examples`` and ``num_tokens``. Of a
            loader with a ``dataset``, such as a ``DataLoader``, the length of the dataset is used.

    Example:
        >>> import torch, fxtrain as fx
        >>> data_sizes(fx.data.prefetch(fx.data.windows(torch.arange(100), length=8, batch_size=4)))
        DataSizes(batch_size=4, num_examples=11, num_tokens=100)
    """
    found: dict[str, int] = {}
    part: object = source
    for _ in range(_MAX_DEPTH):
        if part is None:
            break
        for name, value in (*((name, getattr(part, name, None)) for name in DataSizes._fields), *_of_loader(part)):
            if type(value) is int:
                found.setdefault(name, value)
        part = next((inner for name in _INNER if (inner := getattr(part, name, None)) is not None), None)
    return DataSizes(**found)


def _of_loader(loader: object) -> list[tuple[str, object]]:
    dataset: object = getattr(loader, "dataset", None)
    sampler: object = getattr(loader, "batch_sampler", None)
    sizes: list[tuple[str, object]] = [("batch_size", getattr(sampler, "batch_size", None))]
    has_samples = sampler is not None or getattr(loader, "batch_size", None) is not None
    if has_samples and isinstance(dataset, Sized) and not isinstance(dataset, IterableDataset):
        sizes.append(("num_examples", len(dataset)))
    return sizes
