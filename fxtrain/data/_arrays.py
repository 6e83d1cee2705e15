"""Batches of random-access data: arrays, map-style datasets, token sequences, lists."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Literal, TypeGuard

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import IterableDataset

from fxtrain import tree
from fxtrain.core import Batch, Tree, check_choice, check_positive_int, describe
from fxtrain.data._as_tensors import as_tensors
from fxtrain.data._batch_checks import ALL_DIMS
from fxtrain.data._collate import Grouped, StatefulGrouped, as_torch, collate, has_state, is_stream, samples
from fxtrain.data._epoch_order import Order, mix
from fxtrain.data._seeding import seeded
from fxtrain.data._source import Source
from fxtrain.data._streams import from_iterable, from_stateful_loader
from fxtrain.data._types import LazyArray, MapDataset, Sample

DropLast = bool | Literal["pad"]


class Indexed(Source):
    """Batches of indexed items. Use ``batches`` or ``windows``.

    Args:
        take: Maps items (int64 [n]) and a position to a batch.
        size: Number of items per epoch.
        what: Description of the data, for errors.
    """

    epoch_length: int

    def __init__(
        self,
        take: Callable[[np.ndarray, int], Batch],
        size: int,
        batch_size: int,
        *,
        seed: int,
        shuffle: bool,
        drop_last: DropLast,
        what: str,
        dynamic: bool = False,
    ) -> None:
        super().__init__(dynamic_dims=ALL_DIMS if dynamic else 0)
        check_positive_int("batch_size", batch_size)
        check_choice("drop_last", drop_last, (True, False, "pad"))
        if size == 0 or (drop_last is True and batch_size > size):
            raise ValueError(
                f"expected data for at least one batch of batch_size={batch_size}, got {what}. Lower batch_size, or "
                'keep the short batch with drop_last=False or "pad".'
            )
        self.size = size
        self.batch_size = batch_size
        self.drop_last = drop_last
        self.epoch_length = size // batch_size if drop_last is True else -(-size // batch_size)
        self._take = take
        self._order = Order(size, seed=seed, shuffle=shuffle)

    def fetch(self, position: int) -> Batch:
        epoch, index = divmod(position, self.epoch_length)
        start = index * self.batch_size
        stop = min(start + self.batch_size, self.size)
        batch = self._take(self._order.items(epoch, start, stop), position)
        return _padded(as_tensors(batch), stop - start, self.batch_size) if self.drop_last == "pad" else batch


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
        >>> data = batches({"x": torch.arange(10), "y": np.arange(10) ** 2}, 4, seed=0)
        >>> data[0]
        {'x': tensor([1, 8, 9, 3]), 'y': tensor([ 1, 64, 81,  9])}
        >>> data.epoch_length
        2
    """
    source = as_torch(source)
    _refuse_table(source)
    if isinstance(source, IterableDataset) or is_stream(source):
        return _grouped(
            *(source, batch_size),
            seed=seed,
            shuffle=shuffle,
            drop_last=drop_last,
            collate=collate,
            dynamic=dynamic,
        )
    if _is_dataset(source):

        def take(items: np.ndarray, position: int) -> Batch:
            with seeded(seed, position):
                return collate(samples(source, items.tolist()))

        size, what = len(source), f"a dataset with {len(source)} samples"
    else:
        size, what = _common_length(source), f"arrays with {_common_length(source)} rows"
        if drop_last == "pad" and (not isinstance(source, Mapping) or "mask" in source):
            raise ValueError(
                f'expected a dict of arrays without the key "mask", which drop_last="pad" adds, got {describe(source)}.'
            )

        def take(items: np.ndarray, position: int) -> Batch:
            return tree.map(lambda leaf: _rows(leaf, items), source)

    return Indexed(
        take,
        size,
        batch_size,
        seed=seed,
        shuffle=shuffle is not False,
        drop_last=drop_last,
        what=what,
        dynamic=dynamic,
    )


def windows(
    tokens: Tensor | np.ndarray,
    length: int,
    batch_size: int,
    *,
    seed: int = 0,
    shuffle: bool = True,
    drop_last: DropLast = True,
) -> Source:
    """Returns batches of windows of a token sequence, for next-token prediction.

    An epoch cuts the sequence into windows that do not overlap. With shuffling, the first window of an epoch starts at
    an offset below ``length``, which is a function of (seed, epoch).

    Args:
        tokens: The sequence, [n], of any integer dtype. It may be memory-mapped.
        length: Tokens per window.
        batch_size: Windows per batch.
        seed: Any int.
        shuffle: Whether to shuffle the windows. Otherwise they come in order, starting at the first token.
        drop_last: As for ``batches``.

    Returns:
        Batches ``{"x": int64 [batch_size, length], "y": int64 [batch_size, length]}``, where ``y`` is ``x`` shifted by
        one token.

    Raises:
        ValueError: If there are too few tokens for a batch.

    Example:
        >>> windows(torch.arange(100), 3, 2, shuffle=False)[1]
        {'x': tensor([[ 6,  7,  8], [ 9, 10, 11]]), 'y': tensor([[ 7,  8,  9], [10, 11, 12]])}
    """
    check_positive_int("length", length)
    head = as_tensors(tokens[:0]) if len(tokens.shape) == 1 else None
    if head is None or head.dtype == torch.bool or head.is_floating_point() or head.is_complex():
        raise ValueError(f"expected tokens to be integers of shape [n], got {tokens.dtype} {list(tokens.shape)}.")
    total = len(tokens)
    # Shuffling uses one window less, which leaves room for any offset.
    size = max((total - length) // length if shuffle else (total - 1) // length, 0)
    steps = np.arange(length)

    def take(items: np.ndarray, position: int) -> dict[str, Tensor]:
        offset = mix(seed, position // data.epoch_length, 1) % length if shuffle else 0
        at = ((items * length + offset)[:, None] + steps).ravel()
        x, y = (_rows(tokens, index).to(torch.int64).reshape(-1, length) for index in (at, at + 1))
        return {"x": x, "y": y}

    data = Indexed(
        take,
        size,
        batch_size,
        seed=seed,
        shuffle=shuffle,
        drop_last=drop_last,
        what=f"{size} windows of length={length} from {total} tokens",
    )
    return data


class Listed(Source):
    """Batches from a list. Use ``sequence``."""

    epoch_length: int

    def __init__(self, items: Sequence[Batch], *, dynamic: bool = False) -> None:
        super().__init__(dynamic_dims=ALL_DIMS if dynamic else 0)
        if not items:
            raise ValueError("expected at least one batch, got an empty list.")
        self.items = items
        self.epoch_length = len(items)
        # Check all batches now, so that a mismatch raises before the run and not during it.
        self._batches = [super(Listed, self).__getitem__(position) for position in range(len(items))]

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
        >>> data = sequence([torch.zeros(2), torch.ones(2)])
        >>> data.epoch_length, data[3]
        (2, tensor([1., 1.]))
    """
    return Listed(list(items), dynamic=dynamic)


def _grouped(
    stream: Iterable[Sample],
    batch_size: int,
    *,
    seed: int,
    shuffle: bool | None,
    drop_last: DropLast,
    collate: Callable[[list[Sample]], Batch],
    dynamic: bool,
) -> Source:
    """Returns batches of an iterable dataset's samples."""
    check_positive_int("batch_size", batch_size)
    if shuffle:
        raise ValueError(
            "expected shuffle=False for a stream, got shuffle=True. Shuffle the stream itself, for example with "
            "dataset.shuffle(...) of datasets or webdataset."
        )
    if not isinstance(drop_last, bool):
        raise ValueError(f"expected drop_last to be True or False for a stream, got {describe(drop_last)}.")
    if has_state(stream):
        loader = StatefulGrouped(stream, batch_size, collate, drop_last)
        return from_stateful_loader(loader, seed=seed, dynamic=dynamic)
    return from_iterable(Grouped(stream, batch_size, collate, drop_last), seed=seed, dynamic=dynamic)


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


def _is_read_lazily(leaf: object) -> TypeGuard[LazyArray]:
    """Whether this is an array on disk that reads only the indexed items, like those of h5py and zarr."""
    is_array = all(hasattr(leaf, name) for name in ("shape", "dtype", "__getitem__"))
    return is_array and isinstance(getattr(leaf, "dtype", None), np.dtype) and not hasattr(leaf, "iloc")


def _rows(leaf: Tensor | np.ndarray | LazyArray, index: np.ndarray) -> Tensor:
    if not isinstance(leaf, Tensor | np.ndarray):
        # h5py requires ascending indices without repeats.
        rows, places = np.unique(index, return_inverse=True)
        return as_tensors(np.asarray(getattr(leaf, "oindex", leaf)[rows])[places])
    if isinstance(leaf, np.ndarray):
        return as_tensors(np.asarray(leaf[index]))  # reads only these rows of a memory-mapped file
    at = torch.from_numpy(index).to(leaf.device)
    # index_select is faster, but lacks the unsigned dtypes in which tokens are often stored.
    return leaf[at] if leaf.dtype in (torch.uint16, torch.uint32, torch.uint64) else leaf.index_select(0, at)


def _padded(batch: Batch, rows: int, batch_size: int) -> dict[str, Tree]:
    if not isinstance(batch, dict) or "mask" in batch:
        raise ValueError(
            'expected each batch to be a dict without the key "mask", which drop_last="pad" adds, got '
            f"{describe(batch)}."
        )

    def pad(path: str, leaf: object) -> object:
        if not isinstance(leaf, Tensor):
            return leaf
        if leaf.ndim == 0 or len(leaf) != rows:
            raise ValueError(
                f'expected {path} to have {rows} rows, which drop_last="pad" can pad, got shape {list(leaf.shape)}.'
            )
        return torch.cat([leaf, leaf.new_zeros(batch_size - rows, *leaf.shape[1:])]) if rows < batch_size else leaf

    full = tree.map_with_path(pad, batch, root="batch")
    device = tree.device_of(batch)
    return {**full, "mask": torch.arange(batch_size, device=device) < rows}
