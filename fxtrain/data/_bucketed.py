"""Batches of examples of similar length, in a few shapes that are known in advance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from fxtrain.core import args_from, check_choice, check_positive_int
from fxtrain.core._short_tracebacks import with_short_traceback
from fxtrain.data._epoch_order import Order, mix
from fxtrain.data._examples import Lengths, MeasuredExamples
from fxtrain.data._indexed_batches import DropLast
from fxtrain.data._pad import PadLayout, Side, pad
from fxtrain.data._padded import BatchPlan, RaggedBatches, padded
from fxtrain.data._types import Examples

# The search for bounds compares all pairs of candidate lengths, for each bucket.
_MAX_CANDIDATES = 512


@with_short_traceback
@args_from(padded, pad)
def bucketed(
    source: Examples,
    batch_size: int | None = None,
    *,
    tokens: int | None = None,
    sizes: int | Sequence[int] = 8,
    multiple: int = 8,
    batch_multiple: int = 1,
    truncate: Side | None = None,
    seed: int = 0,
    shuffle: bool = True,
    drop_last: DropLast = True,
    side: Side = "right",
    value: float | Mapping[str, float] = 0,
    mask: str | Mapping[str, str] = "mask",
    columns: Sequence[str] | None = None,
    variable: Sequence[str] | None = None,
    lengths: Lengths | None = None,
) -> BucketedBatches:
    """Returns batches of examples of similar length, each padded to one of a few lengths.

    The batch shapes, the number of batches per epoch and the amount of padding are known before the first batch. Each
    shape compiles one graph, without a warning. A batch is a function of (seed, position).

    Examples that do not fill a batch of their bucket move to the next longer bucket. An epoch therefore has at most one
    partial batch, in the longest bucket, and dropping it loses less than one batch of examples. With shuffling, each
    epoch groups examples differently, and mixes batches of all lengths.

    Args:
        batch_size: Examples per batch, for all lengths. Give either this or ``tokens``.
        tokens: Positions per batch, including padding, so that batches of shorter examples have more rows.
        sizes: The lengths that batches may have, ascending; or their maximum number, in which case the lengths with the
            least padding are chosen.
        multiple: Chosen lengths are multiples of this.
        batch_multiple: With ``tokens``, the number of rows is a multiple of this, as ``accumulate`` of ``train_step``
            requires.
        truncate: The side on which examples longer than the last of ``sizes`` are cut. By default they raise an error.
        shuffle: Whether to shuffle. Otherwise batches are ordered by length.
        mask: Name of the mask, or names by column. Columns whose lengths differ within an example need separate masks.
            The longest column selects the bucket, and each other column is padded to the smallest length that fits its
            examples there.

    Returns:
        Batches with the columns, [rows, length, ...], and the mask, bool [rows, length]. ``sizes`` lists the rows and
        length of each batch shape. ``padding(epoch)`` counts the padding.

    Raises:
        TypeError: If the type of the source or of a column is not supported.
        ValueError: If an example is empty or too long, there is no full batch, or arguments conflict.

    Example:
        >>> texts = [[1] * length for length in (3, 9, 4, 2, 8, 3, 12, 1)]
        >>> data = bucketed(texts, tokens=16, sizes=(4, 16), drop_last=False)
        >>> data.sizes, data.epoch_length
        (((4, 4), (1, 16)), 5)
        >>> data = bucketed(texts, 2, sizes=3, multiple=2)
        >>> data.sizes, round(data.padding().fraction, 2)
        (((2, 2), (2, 4), (2, 12)), 0.3)
    """
    examples = MeasuredExamples(source, columns=columns, variable=variable, lengths=lengths)
    bounds = None if isinstance(sizes, int) else _checked(sizes)
    limit = None if bounds is None else bounds[-1]
    layout = PadLayout(examples.by_column, max_length=limit, truncate=truncate, side=side, value=value, mask=mask)
    if (batch_size is None) == (tokens is None):
        raise ValueError("expected either batch_size or tokens, got " + ("neither." if tokens is None else "both."))
    check_positive_int("batch_multiple", batch_multiple)
    cut = layout.cut(examples.by_column)
    longest = np.maximum.reduce(list(cut.values()))
    if bounds is None:
        assert isinstance(sizes, int)
        bounds = least_padding(longest, sizes, multiple)
    rows = [_rows(bound, batch_size, tokens, batch_multiple) for bound in bounds]
    return BucketedBatches(examples, layout, cut, bounds, rows, seed=seed, shuffle=shuffle, drop_last=drop_last)


class BucketedBatches(RaggedBatches):
    """Batches of examples of similar length. Use ``bucketed``.

    Args:
        bounds: The length of each bucket, ascending.
        rows: The batch rows of each bucket.
    """

    def __init__(
        self,
        examples: MeasuredExamples,
        layout: PadLayout,
        lengths: Mapping[str, np.ndarray],
        bounds: Sequence[int],
        rows: Sequence[int],
        *,
        seed: int,
        shuffle: bool,
        drop_last: DropLast,
    ) -> None:
        check_choice("drop_last", drop_last, (True, False, "pad"))
        bucket = np.searchsorted(bounds, np.maximum.reduce(list(lengths.values())))
        self._rows = rows
        self._members = [np.flatnonzero(bucket == number) for number in range(len(bounds))]
        self._orders = [
            Order(len(found), seed=mix(seed, number, 2), shuffle=shuffle) for number, found in enumerate(self._members)
        ]
        self._carried = [0]  # examples carried over from the previous bucket
        full: list[int] = []
        for found, size in zip(self._members, rows, strict=True):
            batches, rest = divmod(self._carried[-1] + len(found), size)
            full.append(batches)
            self._carried.append(rest)
        # A bucket holds its own examples and shorter ones. The longest of these sets the length of a column.
        self._sizes: list[dict[str, int]] = []
        for number in range(len(bounds)):
            members = np.concatenate(self._members[: number + 1])
            most = {name: int(each[members].max(initial=1)) for name, each in lengths.items()}
            top = max(most.values())
            fitting = {name: int(np.searchsorted(bounds, each)) for name, each in most.items()}
            self._sizes.append({name: bounds[number if each == top else fitting[name]] for name, each in most.items()})
        rest = self._carried[-1]
        shapes = [(size, bound) for size, bound, batches in zip(rows, bounds, full, strict=True) if batches]
        if rest and drop_last is not True:
            last = (rest if drop_last is False else rows[-1], bounds[-1])
            shapes += [last] if last not in shapes else []
        if not shapes:
            raise ValueError(
                f"expected at least {rows[-1]} examples, for a batch of length {bounds[-1]}, got {examples.count}. "
                'Lower batch_size or tokens, or keep a short batch with drop_last=False or "pad".'
            )
        self.drop_last = drop_last
        self._ends = np.cumsum(full)
        epoch_length = int(self._ends[-1]) + (rest > 0 and drop_last is not True)
        self._order = Order(epoch_length, seed=mix(seed, 1), shuffle=shuffle)
        self._cache: tuple[int, list[np.ndarray]] | None = None  # the carried-over examples of one epoch
        super().__init__(
            self._choose_items, examples, layout, lengths, sizes=shapes, epoch_length=epoch_length, seed=seed
        )
        self.batch_size = rows[0] if len({*rows}) == 1 else None

    def _choose_items(self, epoch: int, index: int) -> BatchPlan:
        number = int(self._order.items(epoch, index, index + 1)[0])
        bucket = min(int(np.searchsorted(self._ends, number, side="right")), len(self._rows) - 1)
        rows = self._rows[bucket]
        start = (number - (int(self._ends[bucket - 1]) if bucket else 0)) * rows
        stop = min(start + rows, self._carried[bucket] + len(self._members[bucket]))
        items = self._items(epoch, bucket, start, stop, self._carried_over(epoch)[bucket])
        return BatchPlan(items, len(items) if self.drop_last is False else rows, self._sizes[bucket])

    def _carried_over(self, epoch: int) -> list[np.ndarray]:
        """Returns, for each bucket, the examples carried over from shorter buckets."""
        if self._cache is None or self._cache[0] != epoch:
            found = [np.empty(0, np.int64)]
            for bucket, members in enumerate(self._members[:-1]):
                stop = self._carried[bucket] + len(members)
                found.append(self._items(epoch, bucket, stop - self._carried[bucket + 1], stop, found[-1]))
            self._cache = (epoch, found)
        return self._cache[1]

    def _items(self, epoch: int, bucket: int, start: int, stop: int, first: np.ndarray) -> np.ndarray:
        """Returns a slice of a bucket's examples: first those carried over from shorter buckets, then its own."""
        begin, end = max(start - len(first), 0), max(stop - len(first), 0)
        if begin == end:
            return first[start:stop]
        return np.concatenate([first[start:stop], self._members[bucket][self._orders[bucket].items(epoch, begin, end)]])


def least_padding(lengths: np.ndarray, count: int, multiple: int) -> list[int]:
    """Returns at most ``count`` ascending bounds that minimize padding when each length is padded to the next bound.

    Args:
        lengths: Lengths of the examples, int [n].
        count: Maximum number of bounds.
        multiple: All bounds are multiples of this.

    Example:
        >>> least_padding(np.array([1, 2, 2, 9, 10, 10]), 2, 1)
        [2, 10]
    """
    check_positive_int("sizes", count)
    check_positive_int("multiple", multiple)
    step = multiple * -(-int(lengths.max()) // (multiple * _MAX_CANDIDATES))
    candidates, inverse = np.unique(-(-lengths // step) * step, return_inverse=True)
    members = np.concatenate([[0], np.cumsum(np.bincount(inverse))])
    # cost[j]: padded positions of all examples up to candidate j, if j is the last of the bounds chosen so far.
    cost = members[1:] * candidates
    choices: list[np.ndarray] = []
    for _ in range(min(count, len(candidates)) - 1):
        # With consecutive bounds i and j, the examples between them are padded to j.
        both = cost[:, None] + (members[None, 1:] - members[1:, None]) * candidates[None, :]
        both = np.where(np.tri(len(candidates), k=-1, dtype=bool).T, both, np.iinfo(np.int64).max)
        best = both.argmin(0)
        found = both[best, np.arange(len(candidates))]
        choices.append(np.where(found < cost, best, -1))
        cost = np.minimum(found, cost)
    bounds, at = [int(candidates[-1])], len(candidates) - 1
    for choice in reversed(choices):
        if choice[at] >= 0:
            at = int(choice[at])
            bounds.append(int(candidates[at]))
    return bounds[::-1]


def _checked(sizes: Sequence[int]) -> list[int]:
    found = list(sizes)
    if not found or found != sorted(set(found)):
        raise ValueError(f"expected sizes to be ascending lengths without repeats, got {found}.")
    for size in found:
        check_positive_int("sizes", size)
    return found


def _rows(length: int, batch_size: int | None, tokens: int | None, batch_multiple: int) -> int:
    if batch_size is not None:
        check_positive_int("batch_size", batch_size)
        return batch_size
    assert tokens is not None
    check_positive_int("tokens", tokens)
    rows = tokens // length // batch_multiple * batch_multiple
    if not rows:
        raise ValueError(
            f"expected tokens to be at least {batch_multiple * length}, for batch_multiple={batch_multiple} examples "
            f"of length {length}, got {tokens}. Raise tokens, or cut long examples with sizes=(...) and truncate=."
        )
    return rows
