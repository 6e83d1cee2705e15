"""Batches of examples of different lengths, in random order, each padded to its longest example."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from fxtrain.core import args_from, check_choice, check_positive_int
from fxtrain.data._epoch_order import Order
from fxtrain.data._examples import Lengths, MeasuredExamples
from fxtrain.data._indexed import DropLast
from fxtrain.data._pad import PadLayout, Side, pad
from fxtrain.data._ragged_batches import BatchPlan, RaggedBatches
from fxtrain.data._types import Examples


class PaddedBatches(RaggedBatches):
    """Batches padded to their longest example. Use ``padded``."""

    def __init__(
        self,
        examples: MeasuredExamples,
        layout: PadLayout,
        batch_size: int,
        *,
        multiple: int,
        seed: int,
        shuffle: bool,
        drop_last: DropLast,
    ) -> None:
        check_positive_int("batch_size", batch_size)
        check_positive_int("multiple", multiple)
        check_choice("drop_last", drop_last, (True, False, "pad"))
        count = examples.count
        full, rest = divmod(count, batch_size)
        if drop_last is True and not full:
            raise ValueError(
                f"expected at least batch_size={batch_size} examples, got {count}. Lower batch_size, or keep a short "
                'batch with drop_last=False or "pad".'
            )
        lengths = layout.cut(examples.by_column)
        self.batch_size, self.multiple, self.drop_last = batch_size, multiple, drop_last
        self._order = Order(count, seed=seed, shuffle=shuffle)
        # The longest of b examples is at least as long as the b-th shortest of all.
        ascending = np.sort(np.maximum.reduce(list(lengths.values())))
        examples_by_rows = {batch_size: batch_size} if full else {}
        if rest and drop_last is not True:
            rows = batch_size if drop_last == "pad" else rest
            examples_by_rows[rows] = rest
        sizes = [
            (rows, int(length))
            for rows, real in sorted(examples_by_rows.items(), reverse=True)
            for length in np.unique(-(-ascending[real - 1 :] // multiple) * multiple)
        ]
        epoch_length = full + (rest > 0 and drop_last is not True)
        super().__init__(examples, layout, lengths, sizes=sizes, epoch_length=epoch_length, seed=seed)

    def choose(self, epoch: int, index: int) -> BatchPlan:
        start = index * self.batch_size
        items = self._order.items(epoch, start, min(start + self.batch_size, self.examples.count))
        sizes = self.layout.sizes({name: each[items] for name, each in self.lengths.items()}, self.multiple)
        # One length for all columns, because each combination of lengths would compile another graph.
        sizes = dict.fromkeys(sizes, max(sizes.values()))
        return BatchPlan(items, len(items) if self.drop_last is False else self.batch_size, sizes)


@args_from(pad)
def padded(
    source: Examples,
    batch_size: int,
    *,
    multiple: int = 64,
    max_length: int | None = None,
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
) -> PaddedBatches:
    """Returns batches of examples of different lengths, each padded to its longest example, rounded up to a multiple.

    Examples are shuffled as in ``batches``, so each batch is a fair sample of the data. ``bucketed`` groups examples of
    similar length, which needs less padding.

    Args:
        source: A list of arrays or lists [length, ...] (the column ``"x"``), of dicts or of tuples of these; a dict of
            columns, each a list of arrays, or one array with a row per example; or a map-style dataset, such as a
            ``datasets.Dataset`` with list columns.
        batch_size: Examples per batch.
        multiple: Batch lengths are rounded up to a multiple of this. A larger multiple gives fewer shapes, each of
            which compiles one graph. Up to 16 shapes are declared to ``fit``, which then compiles them without a
            warning.
        seed: Any int. Each epoch has a different order.
        shuffle: Whether the order is random.
        drop_last: How to handle the examples left over at the end of an epoch. True drops them, False makes a shorter
            batch, and ``"pad"`` adds rows of padding to it, where the mask is False.
        mask: Name of the mask, or names by column.
        variable: The columns to pad. By default those whose length differs between examples.
        lengths: The length of each example, int [n], or the name of a column that contains it. If omitted, a dataset
            other than a ``datasets.Dataset`` is read through once to measure its examples.

    Returns:
        Batches with the columns, [batch_size, length, ...], and the mask, bool [batch_size, length]. ``sizes`` lists
        the rows and length of each possible batch shape. ``padding(epoch)`` counts the padding.

    Raises:
        TypeError: If the type of the source or of a column is not supported.
        ValueError: If an example is empty or too long, there is no full batch, or examples do not match.

    Example:
        >>> data = padded([[1, 2, 3], [4], [5, 6], [7]], 2, multiple=2, shuffle=False)
        >>> data[0], data[1]["x"], data.sizes
        ({'x': tensor([[1, 2, 3, 0],
                [4, 0, 0, 0]]), 'mask': tensor([[ True,  True,  True, False],
                [ True, False, False, False]])}, tensor([[5, 6],
                [7, 0]]), ((2, 2), (2, 4)))
        >>> data.padding()
        Padding(padded=5, positions=12)
    """
    examples = MeasuredExamples(source, columns=columns, variable=variable, lengths=lengths)
    layout = PadLayout(examples.by_column, max_length=max_length, truncate=truncate, side=side, value=value, mask=mask)
    return PaddedBatches(
        examples, layout, batch_size, multiple=multiple, seed=seed, shuffle=shuffle, drop_last=drop_last
    )
