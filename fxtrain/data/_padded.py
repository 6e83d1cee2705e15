"""Batches of examples of different lengths, each padded to its longest example, and the padding that they count."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from torch import Tensor

from fxtrain.core import args_from, check_choice, check_positive_int
from fxtrain.core._short_tracebacks import with_short_traceback
from fxtrain.data._batch_checks import ALL_DIMS
from fxtrain.data._epoch_order import Order
from fxtrain.data._examples import Lengths, MeasuredExamples
from fxtrain.data._indexed_batches import DropLast
from fxtrain.data._pad import PadLayout, Side, pad
from fxtrain.data._seeding import seeded
from fxtrain.data._source import Source
from fxtrain.data._types import Examples

# With more shapes, compiling a graph for each no longer pays off.
_MAX_COMPILED_SHAPES = 16


class Padding(NamedTuple):
    """The amount of padding in an epoch's batches.

    Args:
        padded: Number of padding positions.
        positions: Number of all positions.
    """

    padded: int
    positions: int

    @property
    def fraction(self) -> float:
        """The fraction of padding, between 0 and 1."""
        return self.padded / self.positions


class BatchPlan(NamedTuple):
    """The composition of a batch.

    Args:
        items: Indices of examples, int64 [n].
        rows: Number of rows, at least n.
        sizes: The padded length of each column.
    """

    items: np.ndarray
    rows: int
    sizes: Mapping[str, int]


class RaggedBatches(Source):
    """Batches of examples of different lengths. Use ``padded`` or ``bucketed``.

    Args:
        choose: Maps an epoch and an index in it to the composition of a batch.
        examples: The examples and their lengths.
        layout: The layout of examples in a batch.
        lengths: The length of each example after truncation, by column.
        sizes: Rows and length of each batch shape.
        epoch_length: Batches per epoch.
        seed: Seed of the dataset's random samples.
    """

    epoch_length: int

    def __init__(
        self,
        choose: Callable[[int, int], BatchPlan],
        examples: MeasuredExamples,
        layout: PadLayout,
        lengths: Mapping[str, np.ndarray],
        *,
        sizes: Sequence[tuple[int, int]],
        epoch_length: int,
        seed: int,
    ) -> None:
        few = len(sizes) <= _MAX_COMPILED_SHAPES
        super().__init__(dynamic_dims=0 if few else ALL_DIMS, num_shapes=len(sizes) if few else None)
        self._choose = choose
        self._examples, self._layout, self._lengths = examples, layout, lengths
        self.sizes = tuple(sizes)
        """Rows and length of each batch shape."""
        self.epoch_length, self._seed = epoch_length, seed
        self.num_examples, self.num_tokens = examples.count, max(int(each.sum()) for each in lengths.values())
        # Make a batch of one example, so that unsuitable data raises now and not during a run.
        layout.batch([examples.first], {name: int(each[0]) for name, each in lengths.items()}, 1)

    def fetch(self, position: int) -> dict[str, Tensor]:
        items, rows, sizes = self._choose(*divmod(position, self.epoch_length))
        with seeded(self._seed, position):
            return self._layout.batch(self._examples.read(items), sizes, rows)

    def padding(self, epoch: int = 0) -> Padding:
        """Returns the amount of padding in an epoch, without reading examples."""
        real = positions = 0
        for index in range(self.epoch_length):
            items, rows, sizes = self._choose(epoch, index)
            real += sum(int(self._lengths[name][items].sum()) for name in sizes)
            positions += rows * sum(sizes.values())
        return Padding(positions - real, positions)


@with_short_traceback
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
) -> RaggedBatches:
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
    check_positive_int("batch_size", batch_size)
    check_positive_int("multiple", multiple)
    check_choice("drop_last", drop_last, (True, False, "pad"))
    full, rest = divmod(examples.count, batch_size)
    if drop_last is True and not full:
        raise ValueError(
            f"expected at least batch_size={batch_size} examples, got {examples.count}. Lower batch_size, or keep a "
            'short batch with drop_last=False or "pad".'
        )
    cut = layout.cut(examples.by_column)
    longest = np.maximum.reduce(list(cut.values()))
    order = Order(examples.count, seed=seed, shuffle=shuffle)

    def choose(epoch: int, index: int) -> BatchPlan:
        start = index * batch_size
        items = order.items(epoch, start, min(start + batch_size, examples.count))
        # One length for all columns, because each combination of lengths would compile another graph.
        size = -(-int(longest[items].max()) // multiple) * multiple
        return BatchPlan(items, len(items) if drop_last is False else batch_size, dict.fromkeys(cut, size))

    # The longest of b examples is at least as long as the b-th shortest of all.
    ascending = np.sort(longest)
    examples_by_rows = {batch_size: batch_size} if full else {}
    if rest and drop_last is not True:
        examples_by_rows[batch_size if drop_last == "pad" else rest] = rest
    shapes = [
        (rows, int(length))
        for rows, real in sorted(examples_by_rows.items(), reverse=True)
        for length in np.unique(-(-ascending[real - 1 :] // multiple) * multiple)
    ]
    epoch_length = full + (rest > 0 and drop_last is not True)
    data = RaggedBatches(choose, examples, layout, cut, sizes=shapes, epoch_length=epoch_length, seed=seed)
    data.batch_size = batch_size
    return data
