"""The protocol of batch sources, and the base class of those in fxtrain."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, Literal, overload

import torch
from optree import PyTreeSpec
from torch import Tensor

from fxtrain import tree
from fxtrain.core import Batch, describe
from fxtrain.core._html import html_view
from fxtrain.data._as_tensors import as_tensors, map_tensors
from fxtrain.data._batch_checks import ALL_DIMS, REMEDY, check_batch
from fxtrain.data._placeholders import for_step


class Exhausted(IndexError):  # noqa: N818
    """Raised when there is no batch at a position.

    A source with unknown epoch length raises it at the end of the first epoch, and then sets ``epoch_length``. Reading
    the same position again starts the next epoch, or raises again if there is none.

    Args:
        position: The position that was read.

    Example:
        >>> from fxtrain.data import from_iterable
        >>> data = from_iterable(iter([torch.zeros(1)]))
        >>> data[0]
        tensor([0.])
        >>> data[1]
        Traceback (most recent call last):
        ...
        fxtrain.data._source.Exhausted: expected a batch at position 1, got the end of the data.
    """

    def __init__(self, position: int) -> None:
        super().__init__(f"expected a batch at position {position}, got the end of the data.")
        self.position = position


class Source:
    """Base class of sources that check their batches. A subclass defines ``fetch`` and ``epoch_length``.

    Numpy arrays and numbers in a batch become tensors, and text and other values are kept. Structure, dtypes and shapes
    must match those of earlier batches, so that a step compiles once. Sizes may differ in the last batch of an epoch,
    in graphs, and in lists of tensors of different sizes.

    Args:
        dynamic_dims: Number of leading dimensions that may change size in any batch: 0 for none, 64 for all.
        num_shapes: Number of batch shapes, or None if unknown. If there are several, a compiled step compiles a
            graph for each, without a warning.

    Example:
        >>> class Squares(Source):
        ...     epoch_length = 3
        ...
        ...     def fetch(self, position):
        ...         return {"x": torch.tensor([position % 3]) ** 2}
        >>> Squares()[2]
        {'x': tensor([4])}
    """

    epoch_length: int | None
    batch_size: int | None = None
    """Examples per batch; None if it is unknown or varies. This and the next two are for summaries only."""
    num_examples: int | None = None
    """Examples per epoch; None if it is unknown."""
    num_tokens: int | None = None
    """Tokens of these examples; None if it is unknown."""
    interruptible: bool = True
    """Whether an exception during a read leaves the position unchanged."""
    random_access: bool = True
    """Whether any batch can be read without those before it."""
    epoch_length_may_change: bool = False
    """Whether the current epoch may be shorter or longer than ``epoch_length``."""
    is_in_memory: bool = False
    """Whether batches are rows of arrays, so that a view of the source may read one."""

    def __init__(self, *, dynamic_dims: int = 0, num_shapes: int | None = 1) -> None:
        self.dynamic_dims, self.num_shapes = dynamic_dims, num_shapes
        # The reference batch: its position, the epoch length at that time, and the batch without its values.
        self._like: tuple[int, int | None, Any] | None = None
        self._usual: list[Any] = []  # accepted structures, shapes and dtypes
        # A short batch, which is an error unless the epoch ends there: its position, and the epoch length at that time.
        self._short: tuple[int, int | None] | None = None

    def fetch(self, position: int) -> Batch:
        """Returns the batch at this position, before conversion and checks."""
        raise NotImplementedError(f"expected {type(self).__name__} to define fetch(position), got no such method.")

    def close(self) -> None:
        """Releases threads and processes. Reading another batch starts them again."""

    @property
    def has_snapshots(self) -> bool:
        """Whether ``snapshot`` and ``restore`` are defined, because the position is not enough to continue quickly."""
        return getattr(self.snapshot, "__func__", None) is not Source.snapshot

    def snapshot(self, position: int) -> Tensor | None:
        """Returns the iterator state for ``restore`` at ``position``, uint8 [n]; None if the position is enough."""
        return None

    def restore(self, position: int, snapshot: Tensor) -> None:
        """Continues at ``position``, from a snapshot that was taken there."""
        raise NotImplementedError(f"expected a source with snapshots, got {type(self).__name__}, which defines none.")

    @property
    def has_variable_epochs(self) -> bool:
        """Whether ``begin_epoch`` is defined, because epochs may differ in length."""
        return getattr(self.begin_epoch, "__func__", None) is not Source.begin_epoch

    def begin_epoch(self, epoch: int, length: int) -> None:
        """Announces the epoch that is read next, and its expected length, 0 if unknown."""

    def expect_epoch_length(self, length: int) -> None:
        """Sets the number of batches per epoch, as found in an earlier session."""

    def __getitem__(self, position: int) -> Batch:
        position = operator.index(position)
        if position < 0:
            raise ValueError(
                f"expected a position of at least 0, got {position}. Positions continue across epochs and have no end "
                "to count from."
            )
        batch = self.fetch(position)
        if self._short is None and _kind(batch) in self._usual:
            return batch
        batch = as_tensors(batch)
        if not any(isinstance(leaf, Tensor) for leaf in tree.leaves(batch)):
            raise TypeError(
                f"expected a batch with at least one tensor, got {describe(batch)}. Convert its contents with data.map."
            )
        self._compare(batch, position)
        return batch

    @overload
    def map(self, function: Callable[[Batch], Batch], *, with_position: Literal[False] = False) -> Source: ...

    @overload
    def map(self, function: Callable[[Batch, int], Batch], *, with_position: Literal[True]) -> Source: ...

    def map(self, function: Callable[..., Batch], *, with_position: bool = False) -> Source:
        """Returns these batches with a pure function applied to each.

        Args:
            function: Maps a batch, before conversion to tensors, to a batch.
            with_position: Whether to pass the position as a second argument, from which the function can derive random
                samples.

        Example:
            >>> from fxtrain.data import sequence
            >>> data = sequence([torch.zeros(2), torch.ones(2)]).map(lambda batch: {"x": batch + 1})
            >>> data[1]
            {'x': tensor([2., 2.])}
        """
        return MappedBatches(self, function, with_position=with_position)

    def __repr__(self) -> str:
        from fxtrain.data._view import source_text  # loaded only when a source is shown

        return source_text(self)

    @html_view
    def _repr_html_(self) -> str:
        from fxtrain.data._view import source_view

        return source_view(self)

    def _compare(self, batch: Batch, position: int) -> None:
        length, short, self._short = self.epoch_length, self._short, None
        # A different epoch length means a different epoch, whose positions are counted differently.
        if short == (position - 1, length) and not _ends_epoch(position - 1, length):
            raise ValueError(
                f"expected the batch at position {position - 1} to have as many rows as those before, because it is "
                f"not the last of its epoch, got a different number. {REMEDY}"
            )
        if self._like is None:
            self._set_like(batch, position)
            return
        like_position, like_length, like = self._like
        has_several = self.num_shapes is not None and self.num_shapes > 1
        loose = (
            length is None
            or self.epoch_length_may_change
            or _ends_epoch(position, length)
            or _ends_epoch(like_position, length)
        )
        try:
            same = check_batch(
                batch, like, dynamic_dims=ALL_DIMS if has_several else max(self.dynamic_dims, int(loose))
            )
        except ValueError as error:
            raise ValueError(f"At position {position}: {error}") from None
        if has_several:
            if len(self._usual) == self.num_shapes:
                raise ValueError(
                    f"At position {position}: expected the {self.num_shapes} batch shapes that the source declares, "
                    f"got one more: {tree.map(describe, for_step(batch))}. Make data.map change shapes in the same "
                    "way at each position."
                )
            self._usual.append(_kind(batch))
        elif same or self.dynamic_dims:
            return
        elif _ends_epoch(like_position, length):
            # The reference batch was the short last batch of an epoch, and this one has full size.
            self._set_like(batch, position)
        elif self.epoch_length_may_change and like_length != length and rows_of(batch) > rows_of(like):
            self._set_like(batch, position)  # the reference was short, in an epoch that ended early
        elif length is None or self.epoch_length_may_change:
            self._short = (position, length)

    def _set_like(self, batch: Batch, position: int) -> None:
        like = map_tensors(lambda leaf: torch.empty(leaf.shape, dtype=leaf.dtype, device="meta"), for_step(batch))
        self._like = position, self.epoch_length, like
        self._usual = [_kind(batch)]


class MappedBatches(Source):
    """Batches with a function applied to each. Only the function's results are checked."""

    def __init__(self, source: Source, function: Callable[..., Batch], *, with_position: bool = False) -> None:
        super().__init__(dynamic_dims=source.dynamic_dims, num_shapes=source.num_shapes)
        self.source, self.function, self.with_position = source, function, with_position
        self.interruptible, self.random_access = source.interruptible, source.random_access
        for name in ("snapshot", "restore", "begin_epoch", "expect_epoch_length", "close"):
            setattr(self, name, getattr(source, name))

    @property
    def epoch_length(self) -> int | None:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.source.epoch_length

    @property
    def epoch_length_may_change(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.source.epoch_length_may_change

    @property
    def has_snapshots(self) -> bool:
        return self.source.has_snapshots

    @property
    def has_variable_epochs(self) -> bool:
        return self.source.has_variable_epochs

    def fetch(self, position: int) -> Batch:
        batch = self.source.fetch(position)
        return self.function(batch, position) if self.with_position else self.function(batch)


def rows_of(batch: Batch) -> int:
    """Returns the size of the first dimension, or 0 if no tensor has one."""
    return next((len(leaf) for leaf in tree.leaves(batch) if isinstance(leaf, Tensor) and leaf.ndim), 0)


def _ends_epoch(position: int, length: int | None) -> bool:
    return length is not None and (position + 1) % length == 0


def _kind(batch: Batch) -> tuple[PyTreeSpec, list[tuple[torch.Size, torch.dtype] | None]]:
    leaves, structure = tree.flatten(batch)
    return structure, [
        (leaf.shape, leaf.dtype) if isinstance(leaf, Tensor) and not leaf.is_nested else None for leaf in leaves
    ]
