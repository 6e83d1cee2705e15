"""Datasets and streams of Hugging Face."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, TypeGuard, TypeVar

from fxtrain.core import Tree
from fxtrain.data._types import StatefulLoader

Data = TypeVar("Data")


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
