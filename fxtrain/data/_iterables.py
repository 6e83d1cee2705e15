"""Batches of iterables, which are read from their start."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch.utils.data import IterableDataset

from fxtrain.core import Batch, describe
from fxtrain.core._short_tracebacks import with_short_traceback
from fxtrain.data._batch_checks import ALL_DIMS
from fxtrain.data._seeding import seeded
from fxtrain.data._source import Exhausted, Source

_log = logging.getLogger(__name__)

_END: Any = object()


class IterableBatches(Source):
    """Batches from one iterator per epoch. Use ``from_iterable``, ``from_loader`` or ``from_stateful_loader``.

    Args:
        begin: Maps an epoch to an iterator over its batches.
        name: The source's name in messages.
        seed: The global generators are seeded from this, the epoch and the index while the source makes a batch.
        once: Whether there is only one iterator.
        dynamic_dims: Number of leading dimensions that may change size in any batch.
    """

    iterable: object = None
    """What the iterators come from, which may declare its sizes."""

    def __init__(
        self,
        begin: Callable[[int], Iterator[Batch]],
        *,
        name: str,
        seed: int,
        once: bool = False,
        dynamic_dims: int = 0,
    ) -> None:
        super().__init__(dynamic_dims=dynamic_dims)
        self.epoch_length = None
        self.seed = seed
        self._begin, self._name, self._once = begin, name, once
        self.interruptible, self.random_access = not once, False
        self._iterator: Iterator[Any] | None = None
        self._begun = False  # whether an iterator was ever started
        self._epoch = 0  # the epoch of the iterator
        self._index = 0  # number of batches read from the iterator
        self._ended = False  # whether the iterator is exhausted
        self._announced: int | None = None  # the epoch passed to begin_epoch, if any
        self._ahead: list[Any] = []  # at most one batch, read to find out whether the epoch continues
        self._reads_ahead = True

    def fetch(self, position: int) -> Batch:
        self._seek(position)
        batch = self._read()
        if batch is _END:
            raise Exhausted(position)
        if self.epoch_length_may_change and self._reads_ahead and self._index == self.epoch_length:
            self._look_ahead()
        return batch

    def close(self) -> None:
        if not self._once:
            self._iterator = None
            self._ahead.clear()

    def begin_epoch(self, epoch: int, length: int) -> None:
        self._announced, self.epoch_length = epoch, length or None

    @property
    def epoch_length_may_change(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self._announced is not None

    def _look_ahead(self) -> None:
        """Finds out whether the epoch exceeds its expected length, before the last expected batch is returned."""
        assert self._iterator is not None
        with seeded(self.seed, self._epoch, self._index, 4):
            batch = next(self._iterator, _END)
        self._ended = batch is _END
        if not self._ended:
            self._ahead = [batch]
            self._announced, self.epoch_length = self._epoch, None

    @property
    def _position(self) -> int:
        return self._epoch * (self.epoch_length or 0) + self._index

    def expect_epoch_length(self, length: int) -> None:
        if self.epoch_length is None and not self._begun:
            self.epoch_length = length

    def _seek(self, position: int) -> None:
        """Advances so that the next read returns the batch at ``position``."""
        epoch, index = (
            (self._announced or 0, position) if self.epoch_length is None else divmod(position, self.epoch_length)
        )
        is_complete = self._index == self.epoch_length and not self._ended
        if self._iterator is not None and is_complete and epoch == self._epoch + 1:
            self._read()  # exhaust the iterator, because a source may clean up at its end
        if self._iterator is None or epoch != self._epoch or index < self._index:
            self._open(epoch, position)
        missing = index - self._index
        if missing:
            _log.warning(
                "Reading %d batches again to reach position %d, because %s can only be read from its start.",
                *(missing, position, self._name),
            )
        for _ in range(missing):
            length = self.epoch_length
            if self._read() is _END:
                if length is not None:
                    raise self._other_length("fewer", length)
                return self._seek(position)  # the epoch length is known now
        return None

    def _open(self, epoch: int, position: int) -> None:
        if self._once and (self._begun or epoch > 0):
            if self.epoch_length is not None and position >= self.epoch_length:
                raise Exhausted(position)
            raise ValueError(
                f"expected an iterable that can be read again, to reach position {position}, got {self._name}, which "
                "can be read only once. Pass a list, an object with __iter__, or a generator function without calling "
                "it."
            )
        with seeded(self.seed, epoch, 2):
            self._iterator = self._begin(epoch)
        self._begun, self._epoch, self._index, self._ended = True, epoch, 0, False
        self._ahead.clear()

    def _read(self) -> Batch:
        assert self._iterator is not None
        try:
            with seeded(self.seed, self._epoch, self._index, 4):
                batch = self._ahead.pop() if self._ahead else next(self._iterator, _END)
        except BaseException:
            self._iterator = None  # after an exception, a generator only raises StopIteration
            raise
        if batch is not _END:
            self._index += 1
        self._ended = batch is _END
        if self._ended and self._index == 0:
            raise ValueError(
                f"expected at least one batch in epoch {self._epoch} of {self._name}, got none. The data is empty or "
                "exhausted."
            )
        if self._ended and (
            self.epoch_length is None or (self.epoch_length_may_change and self._index < self.epoch_length)
        ):
            self.epoch_length = self._index
        length = self.epoch_length
        if length is not None and (self._index > length or (self._ended and self._index < length)):
            raise self._other_length("fewer" if self._ended else "more", length)
        return batch

    def _other_length(self, more_or_fewer: str, length: int) -> ValueError:
        return ValueError(
            f"expected {length} batches in epoch {self._epoch} of {self._name}, as many as before, got "
            f"{more_or_fewer}. Make each read of an epoch return the same batches."
        )


@with_short_traceback
def from_iterable(
    source: Iterable[Batch] | Callable[[], Iterable[Batch]], *, seed: int = 0, dynamic: bool = False
) -> Source:
    """Returns the batches of an iterable that can only be read from its start.

    To reach a position, the batches before it are read again, which logs a warning. The epoch length is known once the
    first epoch ends. From then on, a position is reached from the start of its epoch. Random samples of the source are
    repeatable if they come from the global generators of torch, Python and numpy, or from generators that the source
    reseeds for each iterator.

    In ``fit``, epochs may differ in length. The length of an epoch is known when it ends.

    Args:
        source: An iterable of batches, or a function that returns an iterator. An iterator, such as a generator object,
            lasts for one epoch and cannot be read again.
        seed: Any int.
        dynamic: Whether sizes may change from batch to batch.

    Example:
        >>> import torch
        >>> def rows():
        ...     yield from torch.arange(6.0).reshape(3, 2)
        >>> data = from_iterable(rows)
        >>> data[0], data[1]
        (tensor([0., 1.]), tensor([2., 3.]))
    """
    if not (isinstance(source, Iterable) or callable(source)):
        raise TypeError(f"expected an iterable of batches, or a function that returns one, got {describe(source)}.")

    def begin(epoch: int) -> Iterator[Batch]:
        if callable(set_epoch := getattr(source, "set_epoch", None)):
            set_epoch(epoch)
        return iter(source if isinstance(source, Iterable) else source())

    name = f"the {type(source).__name__}" if isinstance(source, Iterable) else getattr(source, "__name__", repr(source))
    data = IterableBatches(
        begin, name=name, seed=seed, once=isinstance(source, Iterator), dynamic_dims=ALL_DIMS if dynamic else 0
    )
    data.iterable = source
    return data


def dynamic_dimensions(loader: object, dynamic: bool) -> int:
    """Returns how many leading dimensions may change: one if each worker ends with a short batch, so that rows vary."""
    iterable = isinstance(getattr(loader, "dataset", None), IterableDataset)
    short = iterable and getattr(loader, "num_workers", 0) > 1 and not getattr(loader, "drop_last", False)
    return ALL_DIMS if dynamic else int(short)
