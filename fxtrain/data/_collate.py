"""Reads samples of a dataset and combines them into batches."""

from __future__ import annotations

import importlib
from collections.abc import Sequence

import numpy as np
from torch import Tensor
from torch.utils.data import default_collate

from fxtrain import tree
from fxtrain.core import Batch
from fxtrain.data._as_tensors import KINDS_OF_NUMBERS, as_tensors
from fxtrain.data._foreign_containers import register_containers
from fxtrain.data._graphs import is_graph
from fxtrain.data._types import Indexable, Key, Sample


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
