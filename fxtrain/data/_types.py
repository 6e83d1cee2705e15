"""Types of the data that sources read: datasets, loaders, examples and columns."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol, TypeVar

import numpy as np
from torch import Tensor
from typing_extensions import TypeAliasType

from fxtrain.core import Tree

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


class MapDataset(Protocol[_Sample]):
    """A dataset with a length, which returns a sample for each index."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> _Sample: ...


Examples = TypeAliasType("Examples", MapDataset[Example] | Mapping[str, Sequence[Values] | Tensor | np.ndarray])
"""A list or a map-style dataset of examples, or columns by name with an entry per example."""


class StatefulLoader(Protocol):
    """An iterable that can save and restore its position, such as torchdata's ``StatefulDataLoader``."""

    def __iter__(self) -> Iterator[Tree]: ...

    def state_dict(self) -> dict[str, Tree]: ...

    def load_state_dict(self, state: Mapping[str, Tree], /) -> None: ...


class LazyArray(Protocol):
    """An array on disk that reads only the indexed rows, like those of h5py and zarr."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> np.dtype[np.generic]: ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: np.ndarray, /) -> np.ndarray: ...
