"""Batches of arrays, map-style datasets and streams."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TypeGuard

import numpy as np
from torch import Tensor
from torch.utils.data import IterableDataset

from fxtrain import tree
from fxtrain.core import Batch, Tree, check_positive_int, describe
from fxtrain.core._short_tracebacks import with_short_traceback
from fxtrain.data._as_tensors import as_tensors
from fxtrain.data._collate import collate, samples
from fxtrain.data._hugging_face import as_torch, has_state, is_stream
from fxtrain.data._indexed_batches import DropLast, IndexedBatches, take_rows
from fxtrain.data._iterables import from_iterable
from fxtrain.data._seeding import seeded
from fxtrain.data._source import Source
from fxtrain.data._stateful_loaders import from_stateful_loader
from fxtrain.data._types import MapDataset, Sample, StatefulLoader
from fxtrain.equivalents import with_known_arguments


@with_short_traceback
@with_known_arguments
def batches(
    source: Tree | MapDataset[Sample] | Iterable[Sample],
    batch_size: int,
    *,
    seed: int = 0,
    shuffle: bool | None = None,
    drop_last: DropLast = True,
    collate: Callable[[list[Sample]], Batch] = collate,
    dynamic: bool = False,
) -> Source:
    """Returns batches of arrays or of a dataset, in an order determined by the seed and the epoch.

    Args:
        source: One of three kinds. (1) A tensor, an array, or a pytree (not a list) of these, of equal length in the
            first dimension. Arrays may be memory-mapped, or read lazily like those of h5py and zarr. (2) A map-style
            dataset: any object with ``len`` and ``[]``, such as a list of samples. Its random samples from the global
            generators of torch, Python and numpy are a function of (seed, position). A ``datasets.Dataset`` without a
            format is read as tensors. (3) A stream: an ``IterableDataset`` of torch or ``datasets``, or a WebDataset,
            whose samples are batched in order. A run resumes from the stream's ``state_dict`` if it has one. Otherwise
            the epoch is read again from its start.
        batch_size: Items per batch.
        seed: Any int.
        shuffle: Whether each epoch has a different random order. Defaults to True, except for streams, which shuffle
            themselves.
        drop_last: How to handle the items left over at the end of an epoch. True drops them, and False makes a shorter
            batch. ``"pad"`` pads that batch with zeros, and adds ``"mask"``, bool [batch_size], to each batch, which
            must be a dict.
        collate: Combines a list of samples into a batch. By default numbers and tensors are stacked, and text and other
            values become lists.
        dynamic: Whether ``collate`` may return batches of different sizes.

    Raises:
        ValueError: If there is no full batch, or lengths differ.
        TypeError: If a leaf is not an array, or the source is a table of pandas, polars or pyarrow.

    Example:
        >>> import numpy as np, torch
        >>> data = batches({"x": torch.arange(10), "y": np.arange(10) ** 2}, 4, seed=0)
        >>> data[0]
        {'x': tensor([1, 8, 9, 3]), 'y': tensor([ 1, 64, 81,  9])}
        >>> data.epoch_length
        2
    """
    source = as_torch(source)
    _refuse_table(source)
    if isinstance(source, IterableDataset) or is_stream(source):
        if shuffle:
            raise ValueError(
                "expected shuffle=False for a stream, got shuffle=True. Shuffle the stream itself, for example with "
                "dataset.shuffle(...) of datasets or webdataset."
            )
        if has_state(source):
            stream = StatefulStreamBatches(source, batch_size, collate, drop_last)
            return from_stateful_loader(stream, seed=seed, dynamic=dynamic)
        return from_iterable(StreamBatches(source, batch_size, collate, drop_last), seed=seed, dynamic=dynamic)
    if _is_dataset(source):

        def take(items: np.ndarray, position: int, *rank: int) -> Batch:
            with seeded(seed, position, *rank):
                return collate(samples(source, items.tolist()))

        size, what = len(source), f"a dataset with {len(source)} samples"
    else:
        size = _common_length(source)
        what = f"arrays with {size} rows"
        if drop_last == "pad" and (not isinstance(source, Mapping) or "mask" in source):
            raise ValueError(
                f'expected a dict of arrays without the key "mask", which drop_last="pad" adds, got {describe(source)}.'
            )

        def take(items: np.ndarray, position: int, *rank: int) -> Batch:
            return tree.map(lambda leaf: take_rows(leaf, items), source)

    data = IndexedBatches(
        take,
        size,
        batch_size,
        seed=seed,
        shuffle=True if shuffle is None else shuffle,
        drop_last=drop_last,
        what=what,
        dynamic=dynamic,
    )
    data.is_in_memory = not _is_dataset(source)
    return data


class StreamBatches:
    """A stream's samples in groups of ``batch_size``."""

    def __init__(
        self, dataset: Iterable[Sample], batch_size: int, collate: Callable[[list[Sample]], Batch], drop_last: DropLast
    ) -> None:
        check_positive_int("batch_size", batch_size)
        if not isinstance(drop_last, bool):
            raise ValueError(f"expected drop_last to be True or False for a stream, got {describe(drop_last)}.")
        self.dataset, self.batch_size, self.drop_last, self._collate = dataset, batch_size, drop_last, collate

    def set_epoch(self, epoch: int) -> None:
        if callable(set_epoch := getattr(self.dataset, "set_epoch", None)):
            set_epoch(epoch)

    def __iter__(self) -> Iterator[Batch]:
        group: list[Tree] = []
        for sample in self.dataset:
            group.append(sample)
            if len(group) == self.batch_size:
                yield self._collate(group)
                group = []
        if group and not self.drop_last:
            yield self._collate(group)


class StatefulStreamBatches(StreamBatches):
    """``StreamBatches`` for a stream that can save and restore its position."""

    dataset: StatefulLoader

    def state_dict(self) -> dict[str, Tree]:
        return {"dataset": copy.deepcopy(self.dataset.state_dict())}

    def load_state_dict(self, state: Mapping[str, Tree]) -> None:
        self.dataset.load_state_dict(copy.deepcopy(state["dataset"]))


def _is_dataset(source: object) -> TypeGuard[MapDataset[Tree]]:
    sized = hasattr(source, "__len__") and hasattr(source, "__getitem__")
    return sized and not isinstance(source, Tensor | np.ndarray | Mapping | tuple)


def _common_length(source: Tree) -> int:
    paths, leaves = tree.paths(source, "arrays"), tree.leaves(source)
    if not leaves:
        raise ValueError(f"expected at least one array, got {describe(source)}.")
    for path, leaf in zip(paths, leaves, strict=True):
        if not isinstance(leaf, Tensor | np.ndarray) and not _is_read_lazily(leaf):
            raise TypeError(
                f"expected {path} to be a tensor, a numpy array or an array on disk, got {describe(leaf)}. Convert it "
                "with numpy.asarray(...)."
            )
        if len(leaf.shape) == 0:
            raise ValueError(f"expected {path} to have a first dimension that indexes items, got shape [].")
        if len(leaf) != len(leaves[0]):
            raise ValueError(
                f"expected arrays of equal length, got {len(leaves[0])} rows in {paths[0]} and {len(leaf)} in {path}."
            )
    as_tensors(tree.map(lambda leaf: leaf[:1], source))  # raises for dtypes that torch lacks
    return len(leaves[0])


def _refuse_table(source: object) -> None:
    """Raises for tables of pandas, polars and pyarrow, whose ``[]`` does not index rows."""
    kind = type(source)
    if kind.__module__.partition(".")[0] in ("pandas", "polars", "pyarrow"):
        raise TypeError(
            f"expected arrays or a dataset, got a {kind.__module__.partition('.')[0]} {kind.__name__}. Pass its "
            "columns as arrays: {name: table[name].to_numpy() for name in names}."
        )


def _is_read_lazily(leaf: object) -> bool:
    """Whether this is an array on disk that reads only the indexed items, like those of h5py and zarr."""
    is_array = all(hasattr(leaf, name) for name in ("shape", "dtype", "__getitem__"))
    return is_array and isinstance(getattr(leaf, "dtype", None), np.dtype) and not hasattr(leaf, "iloc")
