"""Reading and collation of dataset samples, and adapters for Hugging Face datasets and streams."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeGuard, TypeVar

import numpy as np
from torch import Tensor
from torch.utils.data import default_collate

from fxtrain import tree
from fxtrain.core import Batch, Tree
from fxtrain.data._as_tensors import KINDS_OF_NUMBERS, as_tensors
from fxtrain.data._foreign_containers import register_containers
from fxtrain.data._graphs import is_graph
from fxtrain.data._types import Indexable, Key, Sample, StatefulLoader

Data = TypeVar("Data")


def samples(dataset: Indexable[Key, Sample], keys: Sequence[Key]) -> list[Sample]:
    """Returns samples of a map-style dataset, in a single call if the dataset supports it."""
    fetch = getattr(dataset, "__getitems__", None)
    return [dataset[key] for key in keys] if fetch is None else fetch(keys)


def collate(samples: list[Sample]) -> Batch:
    """Combines samples into a batch: numbers and tensors are stacked, and everything else becomes a list.

    Works like torch's ``default_collate``, but also accepts dataclasses and other containers, None, dates and paths.
    torch_geometric graphs become one batch of graphs.

    Raises:
        ValueError: If tensors differ in shape, or samples in structure.

    Example:
        >>> import torch
        >>> collate([{"x": torch.tensor(1), "caption": "a"}, {"x": torch.tensor(2), "caption": None}])
        {'x': tensor([1, 2]), 'caption': ['a', None]}
    """
    if is_graph(samples[0]):
        return importlib.import_module("torch_geometric.data").Batch.from_data_list(samples)
    try:
        return _stacked(samples)
    except TypeError:
        register_containers(samples)

    def join(*leaves: object) -> Batch:
        if not all(map(_is_numeric, leaves)):
            return list(leaves)
        return _stacked([as_tensors(leaf) if isinstance(leaf, np.ndarray) else leaf for leaf in leaves])

    try:
        return tree.map(join, *samples, none_is_leaf=True)
    except _ShapesError:
        raise
    except ValueError as error:
        raise ValueError(
            f"expected samples of equal structure, got different ones ({error}). Pass a collate function."
        ) from error


def _is_numeric(leaf: object) -> bool:
    if isinstance(leaf, np.ndarray | np.generic):
        return leaf.dtype.kind in KINDS_OF_NUMBERS
    return isinstance(leaf, Tensor | bool | int | float)


class _ShapesError(ValueError):
    """Raised for samples of different shapes."""


def _stacked(samples: list[Sample]) -> Batch:
    try:
        return default_collate(samples)
    except RuntimeError as error:
        if "equal size" not in str(error):
            raise
        raise _ShapesError(
            f"expected samples of equal shape, to stack them, got different ones ({error}). Pad them with "
            "fxtrain.data.padded, or pass a collate function."
        ) from error
    except ValueError as error:  # arrays that torch rejects: negative strides or foreign byte order
        raise TypeError(str(error)) from error


def as_torch(dataset: Data) -> Data:
    """Returns a Hugging Face dataset whose samples contain tensors, unless its format is usable as it is.

    Other objects are returned unchanged.

    Raises:
        TypeError: If ``dataset`` is a dictionary of splits.
    """
    kind = _hugging_face_kind(dataset)
    found: Any = dataset
    if kind in ("DatasetDict", "IterableDatasetDict"):
        splits = ", ".join(map(repr, found))
        raise TypeError(
            f"expected one split of a dataset, got a {kind} with the splits {splits}. Select one: "
            f"dataset[{next(iter(found), 'train')!r}]."
        )
    if kind == "Dataset" and found.format["type"] in _REPLACED_FORMATS:
        names = found.format["columns"]
        with_times = [name for name in names if any(part in repr(found.features[name]) for part in _TIME_TYPES)]
        if not with_times:
            return found.with_format("torch", columns=names)
        others = [name for name in names if name not in with_times]
        return found.select_columns(names).with_format("torch", columns=others, output_all_columns=True)
    if kind == "IterableDataset" and _stream_format(dataset) in _REPLACED_FORMATS:
        return found.with_format("torch")
    return dataset


_REPLACED_FORMATS = (None, "arrow", "polars", "jax", "tensorflow")
"""Formats of ``datasets`` that are replaced by the torch format."""

_TIME_TYPES = ("timestamp[", "date32", "date64", "time32[", "time64[", "duration[")
"""Substrings of the types that the torch format cannot convert."""


def _stream_format(dataset: object) -> str | None:
    formatting = getattr(dataset, "_formatting", None)
    return getattr(formatting, "format_type", "custom") if formatting is not None else None


def has_state(dataset: object) -> TypeGuard[StatefulLoader]:
    """Whether a stream can save its position together with all state that it needs to continue.

    A Hugging Face stream with a shuffle buffer cannot, because its ``state_dict`` omits the buffered examples.
    """
    part = getattr(dataset, "_ex_iterable", None)
    while part is not None:
        if type(part).__name__ == "BufferShuffledExamplesIterable" and getattr(part, "buffer_size", 2) > 1:
            return False
        part = getattr(part, "ex_iterable", None)
    return all(callable(getattr(dataset, name, None)) for name in ("state_dict", "load_state_dict"))


def is_stream(dataset: object) -> TypeGuard[Iterable[Tree]]:
    """Whether this is a Hugging Face dataset that can only be iterated over."""
    return _hugging_face_kind(dataset) == "IterableDataset"


def _hugging_face_kind(dataset: object) -> str | None:
    names = ("Dataset", "IterableDataset", "DatasetDict", "IterableDatasetDict")
    kinds = (base for base in type(dataset).__mro__ if base.__module__.partition(".")[0] == "datasets")
    return next((base.__name__ for base in kinds if base.__name__ in names), None)


class Grouped:
    """A stream's samples in groups of ``batch_size``. Use ``fxtrain.data.batches``."""

    def __init__(
        self, dataset: Iterable[Sample], batch_size: int, collate: Callable[[list[Sample]], Batch], drop_last: bool
    ) -> None:
        self.dataset = dataset
        self.batch_size = batch_size
        self.drop_last = drop_last
        self._collate = collate

    def set_epoch(self, epoch: int) -> None:
        if callable(set_epoch := getattr(self.dataset, "set_epoch", None)):
            set_epoch(epoch)

    def __iter__(self) -> Iterator[Batch]:
        group: list[Any] = []
        for sample in self.dataset:
            group.append(sample)
            if len(group) == self.batch_size:
                yield self._collate(group)
                group = []
        if group and not self.drop_last:
            yield self._collate(group)


class StatefulGrouped(Grouped):
    """``Grouped`` for a stream that can save and restore its position."""

    dataset: StatefulLoader

    def state_dict(self) -> dict[str, Tree]:
        return {"dataset": copy.deepcopy(self.dataset.state_dict())}

    def load_state_dict(self, state: Mapping[str, Tree]) -> None:
        self.dataset.load_state_dict(copy.deepcopy(state["dataset"]))
