"""Batches of fixed-length rows that contain several documents each, with the masks that keep these independent."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from fxtrain.core import args_from, check_choice, check_positive_int
from fxtrain.core._short_tracebacks import with_short_traceback
from fxtrain.data._bin_packing import Bins
from fxtrain.data._epoch_order import Order, mix
from fxtrain.data._examples import Lengths, MeasuredExamples
from fxtrain.data._indexed_batches import DropLast
from fxtrain.data._pad import PadLayout, pad, refuse_unless_alike
from fxtrain.data._padded import Padding, padded
from fxtrain.data._seeding import seeded
from fxtrain.data._source import Source
from fxtrain.data._types import Examples

Truncate = Literal["right", "left", "split"]


@with_short_traceback
@args_from(padded, pad)
def packed(
    source: Examples,
    length: int,
    batch_size: int,
    *,
    truncate: Truncate | None = None,
    seed: int = 0,
    shuffle: bool = True,
    drop_last: DropLast = True,
    value: float | Mapping[str, float] = 0,
    mask: str = "mask",
    columns: Sequence[str] | None = None,
    variable: Sequence[str] | None = None,
    lengths: Lengths | None = None,
) -> PackedBatches:
    """Returns batches of fixed-length rows, each of which contains several whole documents and little padding.

    Best-fit decreasing decides once which lengths share a row, so every epoch has the same number of batches. With
    shuffling, each epoch combines different documents of these lengths, and shuffles the rows. A batch is a function of
    (seed, position).

    To keep documents independent, pass ``positions`` and ``fxtrain.data.attention_mask(batch["segments"])`` to the
    model, and compute the loss with ``fxtrain.data.next_tokens``.

    Args:
        source: A list of arrays or lists [length, ...] (the column ``"x"``), of dicts or of tuples of these; a dict of
            columns, each a list of arrays; or a map-style dataset, such as a ``datasets.Dataset`` with list columns.
        length: Row length.
        batch_size: Rows per batch.
        truncate: How to handle documents longer than a row: cut them on the ``"right"`` or the ``"left"``, or
            ``"split"`` them into documents of at most ``length``. By default they raise an error.
        seed: Any int.
        shuffle: Whether to shuffle. Otherwise the fullest rows come first.
        drop_last: How to handle the rows left over at the end of an epoch. True drops them, False makes a shorter
            batch, and ``"pad"`` adds rows of padding to it.
        mask: Name of the mask.
        variable: The columns to pack. They must be all of ``columns``, because a row cannot contain a value per
            document.

    Returns:
        Batches with the columns, [batch_size, length, ...]; ``"segments"``, int64 [batch_size, length], which numbers
        the documents of a row from 1, with 0 for padding; ``"positions"``, int64 [batch_size, length], which start at 0
        in each document; and ``"mask"``, bool [batch_size, length], False for padding. ``padding(epoch)`` counts the
        padding.

    Raises:
        TypeError: If the type of the source or of a column is not supported.
        ValueError: If a document is empty or too long, there is no full batch, or columns do not match.

    Example:
        >>> data = packed([[1, 2, 3], [4, 5], [6, 7, 8, 9], [10]], 6, 1, shuffle=False)
        >>> data.epoch_length, data[0]["x"], data[0]["segments"], data[0]["positions"]
        (2, tensor([[6, 7, 8, 9, 4, 5]]), tensor([[1, 1, 1, 1, 2, 2]]), tensor([[0, 1, 2, 3, 0, 1]]))
        >>> data.padding()
        Padding(padded=2, positions=12)
    """
    check_positive_int("length", length)
    check_positive_int("batch_size", batch_size)
    check_choice("truncate", truncate, (None, "right", "left", "split"))
    check_choice("drop_last", drop_last, (True, False, "pad"))
    examples = MeasuredExamples(source, columns=columns, variable=variable, lengths=lengths)
    side, limit = (None, None) if truncate == "split" else (truncate, length)
    layout = PadLayout(examples.by_column, max_length=limit, truncate=side, value=value, mask=mask)
    return PackedBatches(examples, layout, length, batch_size, seed=seed, shuffle=shuffle, drop_last=drop_last)


class PackedBatches(Source):
    """Batches of packed rows. Use ``packed``."""

    epoch_length: int
    batch_size: int

    def __init__(
        self,
        examples: MeasuredExamples,
        layout: PadLayout,
        length: int,
        batch_size: int,
        *,
        seed: int,
        shuffle: bool,
        drop_last: DropLast,
    ) -> None:
        self.examples, self.length, self.batch_size, self.seed = examples, length, batch_size, seed
        others = [name for name in examples.first if name not in examples.by_column]
        if others:
            raise ValueError(
                f"expected columns with a value per position, got {others} with a value per document. Exclude them: "
                f"columns={tuple(examples.by_column)!r}."
            )
        self._layout, cut = layout, layout.cut(examples.by_column)
        self._whole = whole = next(iter(cut.values()))
        self.num_examples, self.num_tokens = len(whole), int(whole.sum())
        pieces = -(-whole // length)
        # For each piece of a document: the document's index, and the position where the piece starts.
        self._item = np.repeat(np.arange(len(whole)), pieces)
        self._start = (np.arange(len(self._item)) - np.repeat(np.cumsum(pieces) - pieces, pieces)) * length
        self._lengths = np.minimum(whole[self._item] - self._start, length)
        found, inverse, counts = np.unique(self._lengths, return_inverse=True, return_counts=True)
        self._bins = Bins(dict(zip(found.tolist(), counts.tolist(), strict=True)), length)
        by_length = np.split(np.argsort(inverse, kind="stable"), np.cumsum(counts)[:-1])
        self._pieces = dict(zip(found.tolist(), by_length, strict=True))
        self._orders = {
            each: Order(len(pieces), seed=mix(seed, each, 2), shuffle=shuffle) for each, pieces in self._pieces.items()
        }
        rows = self._bins.count
        full, rest = divmod(rows, batch_size)
        self.drop_last = drop_last
        self.epoch_length = full + (rest > 0 and drop_last is not True)
        if not self.epoch_length:
            raise ValueError(
                f"expected documents for at least batch_size={batch_size} rows of length {length}, got {rows}. Lower "
                'batch_size, or keep a short batch with drop_last=False or "pad".'
            )
        shapes = [(batch_size, length)] if full or drop_last == "pad" else []
        self.sizes = (*shapes, *([(rest, length)] if rest and drop_last is False else []))
        """Rows and length of each batch shape."""
        super().__init__(num_shapes=len(self.sizes))
        self._order = Order(rows, seed=mix(seed, 1), shuffle=shuffle)
        example = layout.batch([examples.first], {name: int(each[0]) for name, each in cut.items()}, 1)
        taken = {"segments", "positions"} & {*example}
        if taken:
            raise ValueError(
                f"expected no column named 'segments' or 'positions', which packing adds, got {sorted(taken)}. Exclude "
                "them: columns=(...)."
            )

    def fetch(self, position: int) -> dict[str, Tensor]:
        epoch, index = divmod(position, self.epoch_length)
        start = index * self.batch_size
        rows = self._order.items(epoch, start, min(start + self.batch_size, self._bins.count))
        contents = self._contents(rows, epoch)
        read = self._read(np.unique(self._item[np.concatenate(contents)]), position)
        height = len(rows) if self.drop_last is False else self.batch_size
        sizes = dict.fromkeys(self._layout.variable, self.length)
        batch = self._layout.batch([self._row(read, pieces) for pieces in contents], sizes, height)
        segments = torch.zeros(height, self.length, dtype=torch.int64)
        positions = torch.zeros(height, self.length, dtype=torch.int64)
        for row, pieces in enumerate(contents):
            lengths = torch.from_numpy(self._lengths[pieces])
            ends, total = lengths.cumsum(0), int(lengths.sum())
            segments[row, :total] = torch.repeat_interleave(torch.arange(1, len(lengths) + 1), lengths)
            positions[row, :total] = torch.arange(total) - torch.repeat_interleave(ends - lengths, lengths)
        return {**batch, "segments": segments, "positions": positions}

    def padding(self, epoch: int = 0) -> Padding:
        """Returns the amount of padding in an epoch, without reading documents."""
        count = self._bins.count if self.drop_last is not True else self.epoch_length * self.batch_size
        real = int(self._lengths.sum())
        for row in self._order.items(epoch, count, self._bins.count).tolist() if count < self._bins.count else ():
            real -= sum(length for length, _ in self._bins.slots(row))
        height = count if self.drop_last is False else self.epoch_length * self.batch_size
        return Padding(height * self.length - real, height * self.length)

    def _contents(self, rows: np.ndarray, epoch: int) -> list[np.ndarray]:
        """Returns the pieces of documents in each row."""
        slots = [self._bins.slots(row) for row in rows.tolist()]
        numbers: dict[int, list[int]] = {}
        for length, number in itertools.chain.from_iterable(slots):
            numbers.setdefault(length, []).append(number)
        found = {
            length: iter(self._pieces[length][self._orders[length].at(epoch, np.array(each))])
            for length, each in numbers.items()
        }
        return [np.array([next(found[length]) for length, _ in row]) for row in slots]

    def _row(self, read: Mapping[int, Mapping[str, Tensor]], pieces: np.ndarray) -> dict[str, Tensor]:
        """Returns the columns of a row."""
        at = [(int(self._item[piece]), int(self._start[piece]), int(self._lengths[piece])) for piece in pieces]
        return {
            name: torch.cat([read[item][name][start : start + length] for item, start, length in at])
            for name in self._layout.variable
        }

    def _read(self, items: np.ndarray, position: int) -> dict[int, dict[str, Tensor]]:
        """Returns documents by index."""
        with seeded(self.seed, position):
            found = [self._layout.columns(example) for example in self.examples.read(items)]
        for name in self._layout.variable:
            refuse_unless_alike([columns[name] for columns in found], name, is_variable=True)
            for item, columns in zip(items.tolist(), found, strict=True):
                if len(columns[name]) != self._whole[item]:
                    raise ValueError(
                        f"expected {self._whole[item]} positions in column {name!r} of document {item}, as measured "
                        f"before, got {len(columns[name])}. Return the same length on each read."
                    )
        return dict(zip(items.tolist(), found, strict=True))


def attention_mask(segments: Tensor, *, causal: bool = True, dtype: torch.dtype | None = None) -> Tensor:
    """Returns the block-diagonal mask with which each token attends only to its own document.

    ``F.scaled_dot_product_attention`` accepts it, as do transformers models, as ``attention_mask``. Positions that
    restart at each document do not separate documents by themselves. Padding attends to padding, because an empty row
    of the mask would make the softmax NaN.

    Args:
        segments: The number of each token's document, 0 for padding, integer [batch, length]. A bool mask of padded
            rows also works.
        causal: Whether tokens attend only to themselves and earlier tokens.
        dtype: The floating dtype of a mask to add to attention scores, which is 0 where tokens attend and the dtype's
            minimum elsewhere. By default the mask is bool, True where tokens attend.

    Returns:
        The mask, [batch, 1, length, length], indexed by query and then key.

    Example:
        >>> attention_mask(torch.tensor([[1, 1, 2, 0]])).int()
        tensor([[[[1, 0, 0, 0],
                  [1, 1, 0, 0],
                  [0, 0, 1, 0],
                  [0, 0, 0, 1]]]], dtype=torch.int32)
    """
    allowed = segments[:, None, :, None] == segments[:, None, None, :]
    if causal:
        at = torch.arange(segments.shape[1], device=segments.device)
        allowed = allowed & (at[:, None] >= at)
    if dtype is None:
        return allowed
    return torch.zeros(allowed.shape, dtype=dtype, device=allowed.device).masked_fill(~allowed, torch.finfo(dtype).min)


def next_tokens(tokens: Tensor, segments: Tensor, *, shift: bool = True, ignore: int = -100) -> Tensor:
    """Returns the targets of a language model: for each token, the next token of its document.

    The last token of a document has no target, and neither has padding, so no document predicts the start of another.

    Args:
        tokens: Integer [batch, length].
        segments: The number of each token's document, 0 for padding, integer [batch, length]. A bool mask of padded
            rows also works.
        shift: Whether a target is placed at the token that predicts it. Otherwise targets stay in place, for models
            that shift ``labels`` themselves, such as those of transformers.
        ignore: The value at positions without a target. ``F.cross_entropy`` ignores -100.

    Returns:
        The targets, int64 [batch, length].

    Example:
        >>> tokens, segments = torch.tensor([[5, 6, 7, 8, 0]]), torch.tensor([[1, 1, 2, 2, 0]])
        >>> next_tokens(tokens, segments)
        tensor([[   6, -100,    8, -100, -100]])
        >>> next_tokens(tokens, segments, shift=False)
        tensor([[-100,    6, -100,    8, -100]])
    """
    follows = (segments[:, 1:] == segments[:, :-1]) & (segments[:, 1:] != 0)
    found = tokens[:, 1:].to(torch.int64).masked_fill(~follows, ignore)
    nothing = found.new_full((tokens.shape[0], 1), ignore)  # len() would specialize symbolic sizes
    return torch.cat([found, nothing] if shift else [nothing, found], 1)
