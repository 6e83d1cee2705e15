"""The protocol of batch sources, and the base class of those in fxtrain."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from fxtrain import tree
from fxtrain.core import describe
from fxtrain.data._aside import for_step
from fxtrain.data._leaves import as_tensors, map_tensors
from fxtrain.data._likeness import ANY, REMEDY, check


@runtime_checkable
class Batches(Protocol):
    """A stream of batches by position: ``data[i]`` returns the same batch each time.

    Positions continue across epochs: ``i // data.epoch_length`` is the epoch. A source may define ``close()``, which
    releases threads and processes. If the position alone is not enough to continue quickly, it may also define
    ``snapshot(position)``, which returns a uint8 tensor, and ``restore(position, snapshot)``.

    If epochs differ in length, a source defines ``begin_epoch(epoch, length)``. The loop calls it before it reads the
    first batch of an epoch, with the expected length (0 if unknown). From then on, ``epoch_length`` is the length of
    that epoch, and positions are counted as if all epochs had it. If the epoch ends early, the source raises
    ``Exhausted`` and corrects ``epoch_length``. If the epoch exceeds the expected length, ``epoch_length`` is None
    until it ends, and positions count from its start.
    """

    @property
    def epoch_length(self) -> int | None:
        """Batches per epoch; None if not yet known, or if there is no end."""
        ...

    def __getitem__(self, position: int, /) -> Any: ...


class Exhausted(IndexError):  # noqa: N818
    """Raised when there is no batch at a position.

    A source with unknown epoch length raises it at the end of the first epoch, and then sets ``epoch_length``. Reading
    the same position again starts the next epoch, or raises again if there is none.
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
        free: Number of leading dimensions that may change size in any batch: usually 0, or ``ANY``.
        kinds: Number of batch shapes, or None if unknown. If there are several, a compiled step compiles a graph for
            each, without a warning.

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
    can_be_left = True  # whether an exception during a read leaves the position unchanged
    can_jump = True  # whether any batch can be read without those before it
    may_end_anywhere = False  # whether an epoch's length may differ from the expected one

    def __init__(self, *, free: int = 0, kinds: int | None = 1) -> None:
        self.free, self.kinds = free, kinds
        # The reference batch: its position, the epoch length at that time, and the batch without its values.
        self._like: tuple[int, int | None, Any] | None = None
        self._usual: list[Any] = []  # accepted structures, shapes and dtypes
        # A short batch, which is an error unless the epoch ends there: its position, and the epoch length at that time.
        self._short: tuple[int, int | None] | None = None

    def fetch(self, position: int) -> Any:
        """Returns the batch at this position, before conversion and checks."""
        raise NotImplementedError(f"expected {type(self).__name__} to define fetch(position), got no such method.")

    def close(self) -> None:
        """Releases threads and processes. Reading another batch starts them again."""

    def __getitem__(self, position: int) -> Any:
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

    def map(self, function: Callable[..., Any], *, with_position: bool = False) -> Source:
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
        return Mapped(self, function, with_position=with_position)

    def _compare(self, batch: Any, position: int) -> None:
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
        if self.kinds is not None and self.kinds > 1:
            self._compare_kind(batch, like, position)
            return
        loose = (
            length is None
            or self.may_end_anywhere
            or _ends_epoch(position, length)
            or _ends_epoch(like_position, length)
        )
        try:
            same = check(batch, like, free=max(self.free, int(loose)))
        except ValueError as error:
            raise ValueError(f"At position {position}: {error}") from None
        if same or self.free:
            return
        if _ends_epoch(like_position, length):
            # The reference batch was the short last batch of an epoch, and this one has full size.
            self._set_like(batch, position)
        elif self.may_end_anywhere and like_length != length and _rows(batch) > _rows(like):
            self._set_like(batch, position)  # the reference was short, in an epoch that ended early
        elif length is None or self.may_end_anywhere:
            self._short = (position, length)

    def _set_like(self, batch: Any, position: int) -> None:
        self._like = position, self.epoch_length, _without_values(batch)
        self._usual = [_kind(batch)]

    def _compare_kind(self, batch: Any, like: Any, position: int) -> None:
        try:
            check(batch, like, free=ANY)
        except ValueError as error:
            raise ValueError(f"At position {position}: {error}") from None
        if len(self._usual) == self.kinds:
            raise ValueError(
                f"At position {position}: expected the {self.kinds} batch shapes that the source declares, got one "
                f"more: {tree.map(describe, for_step(batch))}. Make data.map change shapes in the same way at each "
                "position."
            )
        self._usual.append(_kind(batch))


class Mapped(Source):
    """Batches with a function applied to each. Only the function's results are checked."""

    def __init__(self, source: Source, function: Callable[..., Any], *, with_position: bool = False) -> None:
        super().__init__(free=source.free, kinds=source.kinds)
        self.source = source
        self.function = function
        self.with_position = with_position
        self.can_be_left, self.can_jump = source.can_be_left, source.can_jump

    @property
    def epoch_length(self) -> int | None:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.source.epoch_length

    @property
    def may_end_anywhere(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.source.may_end_anywhere

    def fetch(self, position: int) -> Any:
        batch = self.source.fetch(position)
        return self.function(batch, position) if self.with_position else self.function(batch)

    def close(self) -> None:
        self.source.close()

    def __getattr__(self, name: str) -> Any:
        if name in ("snapshot", "restore", "expect_epoch_length", "begin_epoch"):  # defined only if the source has them
            return getattr(self.source, name)
        raise AttributeError(f"{type(self).__name__} has no attribute {name!r}.")


def _rows(batch: Any) -> int:
    return next((len(leaf) for leaf in tree.leaves(batch) if isinstance(leaf, Tensor) and leaf.ndim), 0)


def _ends_epoch(position: int, length: int | None) -> bool:
    return length is not None and (position + 1) % length == 0


def _kind(batch: Any) -> tuple[Any, list[Any]]:
    leaves, structure = tree.flatten(batch)
    return structure, [
        (leaf.shape, leaf.dtype) if isinstance(leaf, Tensor) and not leaf.is_nested else None for leaf in leaves
    ]


def _without_values(batch: Any) -> Any:
    return map_tensors(lambda leaf: torch.empty(leaf.shape, dtype=leaf.dtype, device="meta"), for_step(batch))
