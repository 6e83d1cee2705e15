"""Types of sources, and of the data that they read: datasets, loaders, examples and columns."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Protocol, TypeVar, runtime_checkable

import numpy as np
from torch import Tensor
from typing_extensions import TypeAliasType

from fxtrain.core import Batch, Tree

Key = TypeVar("Key")
Sample = TypeVar("Sample")
_Key = TypeVar("_Key", contravariant=True)
_Sample = TypeVar("_Sample", covariant=True)

Values = TypeAliasType("Values", Tensor | np.ndarray | Sequence[float] | float)
"""One column of an example: an array or a list [length, ...], or a number."""

Example = TypeAliasType("Example", Mapping[str, Values] | tuple[Values, ...] | Values)
"""Columns by name, columns in a tuple, or one column."""


class Indexable(Protocol[_Key, _Sample]):
    """A dataset that returns a sample for each key."""

    def __getitem__(self, key: _Key, /) -> _Sample: ...


class MapDataset(Indexable[int, _Sample], Protocol[_Sample]):
    """A dataset with a length, which returns a sample for each index."""

    def __len__(self) -> int: ...


Examples = TypeAliasType("Examples", MapDataset[Example] | Mapping[str, Sequence[Values] | Tensor | np.ndarray])
"""A list or a map-style dataset of examples, or columns by name with an entry per example."""


class StatefulLoader(Protocol):
    """An iterable that can save and restore its position, such as torchdata's ``StatefulDataLoader``."""

    def __iter__(self) -> Iterator[Tree]: ...

    def state_dict(self) -> dict[str, Tree]: ...

    def load_state_dict(self, state: Mapping[str, Tree], /) -> None: ...


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

    For summaries, a source may define ``batch_size``, ``num_examples`` and ``num_tokens`` (of an epoch).

    Example:
        >>> import torch
        >>> class Countdown:
        ...     epoch_length = 3
        ...
        ...     def __getitem__(self, position):
        ...         return torch.tensor([3 - position % 3])
        >>> isinstance(Countdown(), Batches)
        True
    """

    @property
    def epoch_length(self) -> int | None:
        """Batches per epoch; None if not yet known, or if there is no end."""
        ...

    def __getitem__(self, position: int, /) -> Batch: ...


SourceLike = TypeAliasType("SourceLike", Batches | Iterable[Batch] | Callable[[], Iterable[Batch]])
"""Data that ``fit``, ``steps`` and ``evaluate`` accept.

A ``Source`` or another object with the methods of ``Batches``, a ``DataLoader``, a list of batches, any other iterable
of batches, or a function that returns one.
"""
