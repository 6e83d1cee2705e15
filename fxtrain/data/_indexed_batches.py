"""Batches of indexed items in the order of an epoch, such as the windows of a token sequence."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from fxtrain import tree
from fxtrain.core import Batch, Tree, check_choice, check_positive_int, describe
from fxtrain.core._short_tracebacks import with_short_traceback
from fxtrain.data._as_tensors import as_tensors
from fxtrain.data._batch_checks import ALL_DIMS
from fxtrain.data._epoch_order import Order, mix
from fxtrain.data._source import Source
from fxtrain.data._types import Indexable

DropLast = bool | Literal["pad"]


class IndexedBatches(Source):
    """Batches of indexed items. Use ``batches`` or ``windows``.

    Args:
        take: Maps items (int64 [n]), a position, and the rank if there are several, to a batch.
        size: Number of items per epoch.
        what: Description of the data, for errors.
    """

    epoch_length: int
    batch_size: int

    def __init__(
        self,
        take: Callable[..., Batch],
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
        check_choice("shuffle", shuffle, (True, False))
        if not isinstance(seed, int) or isinstance(seed, bool):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(
                f"expected seed to be an int, got {describe(seed)}. A run can only be repeated and resumed with a seed."
            )
        check_choice("drop_last", drop_last, (True, False, "pad"))
        if size == 0 or (drop_last is True and batch_size > size):
            raise ValueError(
                f"expected data for at least one batch of batch_size={batch_size}, got {what}. Lower batch_size, or "
                'keep the short batch with drop_last=False or "pad".'
            )
        self.size, self.batch_size, self.drop_last = size, batch_size, drop_last
        self.num_examples = size
        self.epoch_length = size // batch_size if drop_last is True else -(-size // batch_size)
        self._take = take
        self._order = Order(size, seed=seed, shuffle=shuffle)

    def fetch(self, position: int) -> Batch:
        items = self._items(position)
        batch = self._take(items, position)
        return _padded(as_tensors(batch), len(items), self.batch_size) if self.drop_last == "pad" else batch

    def fetch_rows(self, position: int, rank: int, ranks: int) -> Batch:
        """Returns the items ``rank``, ``rank + ranks``, ... of the batch at this position, and reads no others."""
        return self._take(self._items(position)[rank::ranks], position, rank)

    def num_items(self, position: int) -> int:
        """Returns the number of items of the batch at this position, without padding."""
        return min(self.batch_size, self.size - position % self.epoch_length * self.batch_size)

    def _items(self, position: int) -> np.ndarray:
        epoch, index = divmod(position, self.epoch_length)
        start = index * self.batch_size
        return self._order.items(epoch, start, start + self.num_items(position))


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
    return {**full, "mask": torch.arange(batch_size, device=tree.device_of(batch)) < rows}


def take_rows(leaf: Tensor | Indexable[np.ndarray, np.ndarray], index: np.ndarray) -> Tensor:
    """Returns the rows at these indices (int64 [n]) of a tensor, an array, or an array on disk."""
    if not isinstance(leaf, Tensor | np.ndarray):
        # h5py requires ascending indices without repeats.
        rows, places = np.unique(index, return_inverse=True)
        return as_tensors(np.asarray(getattr(leaf, "oindex", leaf)[rows])[places])
    if isinstance(leaf, np.ndarray):
        return as_tensors(np.asarray(leaf[index]))  # reads only these rows of a memory-mapped file
    at = torch.from_numpy(index).to(leaf.device)
    # index_select is faster, but lacks the unsigned dtypes in which tokens are often stored.
    return leaf[at] if leaf.dtype in (torch.uint16, torch.uint32, torch.uint64) else leaf.index_select(0, at)


@with_short_traceback
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
    if not isinstance(tokens, Tensor) and not hasattr(tokens, "shape"):
        raise TypeError(
            f"expected tokens to be a tensor or an array, got {describe(tokens)}. Convert it with torch.tensor(tokens)."
        )
    head = as_tensors(tokens[:0]) if len(tokens.shape) == 1 else None
    if head is None or head.dtype == torch.bool or head.is_floating_point() or head.is_complex():
        raise ValueError(
            f"expected tokens to be integers of shape [n], got {describe(tokens)}. Concatenate "
            "all documents to one vector of token ids."
        )
    total = len(tokens)
    # Shuffling uses one window less, which leaves room for any offset.
    size = max((total - length) // length if shuffle else (total - 1) // length, 0)
    steps = np.arange(length)

    def take(items: np.ndarray, position: int, *_: int) -> dict[str, Tensor]:
        offset = mix(seed, position // data.epoch_length, 1) % length if shuffle else 0
        at = ((items * length + offset)[:, None] + steps).ravel()
        x, y = (take_rows(tokens, index).to(torch.int64).reshape(-1, length) for index in (at, at + 1))
        return {"x": x, "y": y}

    what = f"{size} windows of length={length} from {total} tokens"
    data = IndexedBatches(take, size, batch_size, seed=seed, shuffle=shuffle, drop_last=drop_last, what=what)
    data.num_tokens, data.is_in_memory = total, True
    return data
