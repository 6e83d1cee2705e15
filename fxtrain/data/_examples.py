"""Examples of different lengths (texts, signals, rows of columns), with the length of each."""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Mapping, Sequence, Sized
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.data import IterableDataset

from fxtrain.core import check_choice, describe
from fxtrain.data._collate import samples
from fxtrain.data._seeding import seeded
from fxtrain.data._types import Example, Examples, Values

Lengths = Sequence[int] | np.ndarray | Tensor | str
"""Int [n], or the name of the column that contains them."""

_ROWS_PER_READ = 4096  # rows of a datasets.Dataset to measure per read
_UNNAMED_COLUMN = "x"  # the column name of unnamed examples, as in ``windows``


class MeasuredExamples:
    """Indexed examples with their lengths.

    Args:
        source: A list of arrays or lists, a dict of columns, or a map-style dataset.
        columns: The columns to read, or names for the parts of tuples.
        variable: The columns whose length varies. By default all examples are measured, to find the columns whose
            length differs between examples. If there are none, all columns with a length are used.
        lengths: Known lengths, with which no example is measured.

    Raises:
        TypeError: If the source has another type, or no column has a length.
        ValueError: If there are no examples, or ``lengths`` does not match them.
    """

    def __init__(
        self,
        source: Examples,
        *,
        columns: Sequence[str] | None = None,
        variable: Sequence[str] | None = None,
        lengths: Lengths | None = None,
    ) -> None:
        _refuse_unless_ragged(source)
        self._source: Any = source
        self._columns = None if columns is None else tuple(columns)
        self.count = _count(source)
        if self.count == 0:
            raise ValueError("expected data with at least one example, got none.")
        with seeded(0):  # a dataset may use the global generators
            self.first = self.read(np.zeros(1, np.int64))[0]
        for name in variable or ():
            check_choice("variable", name, tuple(self.first))
        self.by_column = self._measured(variable) if lengths is None else self._given(lengths, variable)
        """The length of each example, int64 [n], by variable column."""

    def read(self, items: np.ndarray) -> list[dict[str, Values]]:
        """Returns the examples at these indices, as dicts by column."""
        if isinstance(self._source, Mapping):
            names = self._columns or self._source
            return [{name: self._source[name][item] for name in names} for item in items.tolist()]
        return [columns_of(sample, self._columns) for sample in samples(self._source, items.tolist())]

    def _given(self, lengths: Lengths, variable: Sequence[str] | None) -> dict[str, np.ndarray]:
        found = np.asarray(self._source[lengths] if isinstance(lengths, str) else lengths)
        if found.shape != (self.count,) or found.dtype.kind not in "iu":
            raise ValueError(
                f"expected lengths to be integers of shape [{self.count}], one per example, got {found.dtype} of shape "
                f"{list(found.shape)}."
            )
        seen = {name: length_of(value) for name, value in self.first.items()}
        names = variable or [name for name, length in seen.items() if length == found[0]]
        if not names:
            raise ValueError(
                f"expected lengths[0]={found[0]} to be the length of a column of example 0, got columns of lengths "
                f"{seen}. Name the columns whose length varies: variable=(...)."
            )
        return dict.fromkeys(names, found.astype(np.int64))

    def _measured(self, variable: Sequence[str] | None) -> dict[str, np.ndarray]:
        found = _stored_lengths(self._source, list(self.first)) if _is_stored(self._source) else self._scanned()
        for name in variable or ():
            if name not in found:
                raise TypeError(f"expected arrays or lists in column {name!r}, got {describe(self.first[name])}.")
        if not found:
            raise TypeError(
                f"expected a column of arrays or lists, got {describe(self.first)}. Tokenize texts first, and pass "
                "columns of equal size to fxtrain.data.batches."
            )
        varying = {name: each for name, each in found.items() if each.min() != each.max()}
        return {name: found[name] for name in variable} if variable else varying or found

    def _scanned(self) -> dict[str, np.ndarray]:
        columns = self._source if isinstance(self._source, Mapping) else {}
        # Rows of a column that is a single array have equal size.
        measured: dict[str, list[int]] = {name: [] for name in self.first if not _is_array(columns.get(name))}
        with seeded(0):
            for item in range(self.count):
                (example,) = self.read(np.array([item]))
                for name in list(measured):
                    length = length_of(example.get(name))
                    if length is None:
                        del measured[name]
                    else:
                        measured[name].append(length)
        return {name: np.array(each, np.int64) for name, each in measured.items()}


def columns_of(sample: Example, columns: Sequence[str] | None = None) -> dict[str, Values]:
    """Returns an example as a dict by column.

    Args:
        sample: A mapping, a tuple with parts named by ``columns``, or one array or list, which becomes the column
            ``"x"``.
        columns: The columns to keep, or names for the parts of a tuple.

    Raises:
        TypeError: If ``sample`` is a tuple and ``columns`` is None.
        ValueError: If a tuple has more or fewer parts than ``columns``.

    Example:
        >>> columns_of(([1, 2], 0), ("text", "label"))
        {'text': [1, 2], 'label': 0}
    """
    if isinstance(sample, Mapping):
        return dict(sample) if columns is None else {name: sample[name] for name in columns}
    if not isinstance(sample, tuple):
        return {columns[0] if columns else _UNNAMED_COLUMN: sample}
    if columns is None:
        raise TypeError(
            f"expected examples that are dicts or arrays, got {describe(sample)}. Name its parts: columns=(...)."
        )
    if len(columns) != len(sample):
        raise ValueError(f"expected examples of {len(columns)} parts, the length of columns, got {len(sample)}.")
    return dict(zip(columns, sample, strict=True))


def length_of(value: object) -> int | None:
    """Returns the first dimension of an array, or the length of a list; None for scalars and strings."""
    if isinstance(value, Tensor | np.ndarray):
        return value.shape[0] if value.ndim else None
    return len(value) if isinstance(value, Sequence) and not isinstance(value, str | bytes) else None


def _refuse_unless_ragged(source: object) -> None:
    if isinstance(source, IterableDataset) or not (hasattr(source, "__len__") and hasattr(source, "__getitem__")):
        raise TypeError(
            f"expected a list of arrays, a dict of columns or a map-style dataset, got {describe(source)}. Read it "
            "into a list first, because the lengths of all examples determine the batch shapes."
        )
    if _is_array(source) or isinstance(source, tuple | str):
        raise TypeError(
            f"expected a list of arrays, a dict of columns or a map-style dataset, got {describe(source)}. Pass rows "
            "of equal size to fxtrain.data.batches."
        )


def _is_array(column: object) -> bool:
    return isinstance(column, Tensor) or (isinstance(column, np.ndarray) and column.dtype != object)


def _count(source: Sized) -> int:
    if not isinstance(source, Mapping):
        return len(source)
    counts = {name: len(column) for name, column in source.items()}
    if len(set(counts.values())) > 1:
        raise ValueError(f"expected columns of equal length, with an entry per example, got {counts}.")
    return next(iter(counts.values()), 0)


def _is_stored(source: object) -> bool:
    """Whether this is a ``datasets.Dataset`` without a custom transform, so that columns have their stored lengths."""
    return callable(getattr(source, "with_format", None)) and getattr(source, "format", {}).get("type") != "custom"


def _stored_lengths(source: Any, names: Iterable[str]) -> dict[str, np.ndarray]:
    """Returns lengths by list column, read from Arrow without creating Python objects for the items."""
    measure = importlib.import_module("pyarrow.compute")  # installed with datasets, not required by fxtrain
    tables = source.with_format("arrow")
    parts: dict[str, list[np.ndarray]] = {}
    for start in range(0, len(source), _ROWS_PER_READ):
        table = tables[start : start + _ROWS_PER_READ]
        for name in names:
            if "list" in str(table[name].type).split("<")[0]:
                found = measure.fill_null(measure.list_value_length(table[name]), 0)
                parts.setdefault(name, []).append(found.to_numpy())
    return {name: np.concatenate(each).astype(np.int64) for name, each in parts.items()}
