"""Batches: what a stream of batches is, and what all of fxtrain's sources have in common."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from fxtrain import tree
from fxtrain.data._aside import for_step
from fxtrain.data._leaves import as_tensors, map_tensors
from fxtrain.data._likeness import ANY, REMEDY, check, described


@runtime_checkable
class Batches(Protocol):
    """A stream of batches by position: ``data[i]`` is the same batch whenever it is asked for.

    The position runs on through the epochs: ``i // data.epoch_length`` is the epoch. A source may have ``close()``,
    which releases threads and processes, and, if the position alone is not enough to continue quickly,
    ``snapshot(position)`` and ``restore(position, snapshot)``, of which a snapshot is a uint8 tensor.

    Where epochs differ in length, a source has ``begin_epoch(epoch, length)``, which the loop calls before it reads the
    first batch of an epoch, with the length that it expects (0 if unknown). From then on ``epoch_length`` is the length
    of that epoch, and positions count as if all epochs had it. If the epoch ends early, the source raises ``Exhausted``
    and has the right length; if it goes on, ``epoch_length`` is None until it ends, and positions count from its start.
    """

    @property
    def epoch_length(self) -> int | None:
        """Batches in an epoch; None where that is unknown yet, or there is no end."""
        ...

    def __getitem__(self, position: int, /) -> Any: ...


class Exhausted(IndexError):  # noqa: N818
    """There is no batch at this position.

    A source that did not know the length of an epoch raises it where the first epoch ends, and knows then. Asked
    again for the same position it begins the next epoch, or raises again if it has no more.
    """

    def __init__(self, position: int) -> None:
        super().__init__(f"The data ends before position {position}.")
        self.position = position


class Source:
    """Batches that check themselves: a subclass writes ``fetch`` and ``epoch_length``.

    A batch's numpy arrays and numbers become tensors, and text and other values stay beside them. Its structure, dtypes
    and shapes are those of the batches before it, so that a step is compiled once. Sizes differ in the last batch of an
    epoch, in graphs, and in lists of tensors of different sizes.

    Args:
        free: How many first dimensions may change their size at any batch: none as a rule, or ``ANY``.
        kinds: How many shapes batches have, if they differ and that is known. A compiled step makes a graph of each
            without a warning. None where it is unknown.
    """

    epoch_length: int | None
    can_be_left = True  # whether an exception raised while a batch is awaited leaves the position where it was
    can_jump = True  # whether any batch is read without those before it
    may_end_anywhere = False  # whether an epoch may have another length than expected

    def __init__(self, *, free: int = 0, kinds: int | None = 1) -> None:
        self.free, self.kinds = free, kinds
        # A position, the epoch length there, and the batch without its values.
        self._like: tuple[int, int | None, Any] | None = None
        self._usual: list[Any] = []  # structures, shapes and dtypes that need no comparison
        # The position of a short batch, and the epoch length then, until it is known whether the epoch ends there.
        self._short: tuple[int, int | None] | None = None

    def fetch(self, position: int) -> Any:
        """The batch at this position, as it comes."""
        raise NotImplementedError(f"{type(self).__name__} has no fetch: write one.")

    def close(self) -> None:
        """Releases threads and processes. The next batch that is asked for starts them again."""

    def __getitem__(self, position: int) -> Any:
        position = operator.index(position)
        if position < 0:
            raise ValueError(f"Position {position}: positions start at 0 and run on through the epochs.")
        batch = self.fetch(position)
        if self._short is None and _kind(batch) in self._usual:
            return batch
        batch = as_tensors(batch)
        if not any(isinstance(leaf, Tensor) for leaf in tree.leaves(batch)):
            raise TypeError(
                f"expected a batch with a tensor in it, got {batch!r:.80}. Make tensors of its contents with data.map."
            )
        self._compare(batch, position)
        return batch

    def map(self, function: Callable[..., Any], *, with_position: bool = False) -> Source:
        """These batches, each changed by a pure function.

        Args:
            function: From a batch, as it comes, to a batch.
            with_position: Whether the function takes the position as a second argument, to derive random numbers
                from it.

        Example:
            >>> from fxtrain.data import sequence
            >>> data = sequence([torch.zeros(2), torch.ones(2)]).map(lambda batch: {"x": batch + 1})
            >>> data[1]
            {'x': tensor([2., 2.])}
        """
        return Mapped(self, function, with_position=with_position)

    def _compare(self, batch: Any, position: int) -> None:
        length, short, self._short = self.epoch_length, self._short, None
        # With another epoch length it is another epoch, and its positions count otherwise.
        if short == (position - 1, length) and not _ends_epoch(position - 1, length):
            raise ValueError(
                f"The batch at position {position - 1} had another number of rows than those before, and was not the "
                f"last of its epoch: {REMEDY}"
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
            # That one was short, and this is the usual size.
            self._set_like(batch, position)
        elif self.may_end_anywhere and like_length != length and _rows(batch) > _rows(like):
            self._set_like(batch, position)  # likewise, in an epoch that has ended early
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
                f"At position {position}: expected batches of {self.kinds} shapes, as the data source declares, got "
                f"one more: {tree.map(described, for_step(batch))}. Let data.map change shapes in the same way at each "
                "position."
            )
        self._usual.append(_kind(batch))


class Mapped(Source):
    """Batches, each changed by a function. Only what comes out is checked."""

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
        if name in ("snapshot", "restore", "expect_epoch_length", "begin_epoch"):  # there only if the source has them
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
