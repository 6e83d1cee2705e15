"""Confusion matrices, and their rendering as tables and images."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from fxtrain.core import describe
from fxtrain.values._media import Image
from fxtrain.values._nodes import as_tensor, on_host, register_value
from fxtrain.values._table import Table

_CELL = 24  # pixels
_LIGHT, _DARK = np.array([247, 251, 255.0]), np.array([8, 48, 107.0])


@dataclasses.dataclass(frozen=True, eq=False)
class ConfusionMatrix:
    """The number of predictions of each class (column) for each true class (row).

    Args:
        counts: Real tensor or array [C, C], nonnegative.
        labels: The names of the C classes. Defaults to their indices.

    Raises:
        TypeError: ``counts`` is not a real tensor or array, or a label is not a string.
        ValueError: ``counts`` is not square, or the number of labels is not C.

    Example:
        >>> import torch
        >>> matrix = ConfusionMatrix(torch.tensor([[8, 2], [1, 9]]), labels=("cat", "dog"))
        >>> print(matrix.table().markdown())
        | truth | cat | dog |
        | --- | --- | --- |
        | cat | 8 | 2 |
        | dog | 1 | 9 |
    """

    counts: Any  # a tensor after __post_init__
    labels: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        counts = as_tensor("ConfusionMatrix", self.counts)
        object.__setattr__(self, "counts", counts)
        if counts.ndim != 2 or counts.shape[0] != counts.shape[1] or not len(counts):
            raise ValueError(f"expected counts of shape [C, C], got {list(counts.shape)}.")
        labels: Sequence[str] = self.labels or [str(index) for index in range(len(counts))]
        if isinstance(labels, str) or not all(isinstance(label, str) for label in labels):
            raise TypeError(f"expected labels to be a sequence of strings, one per class, got {describe(labels)}.")
        if len(labels) != len(counts):
            raise ValueError(f"expected {len(counts)} labels, one per class, got {len(labels)}.")
        object.__setattr__(self, "labels", tuple(labels))

    def table(self) -> Table:
        """Returns the counts as a table, with the true class as the first column."""
        columns = on_host(self.counts).T.tolist()
        return Table({"truth": list(self.labels), **dict(zip(self.labels, columns, strict=True))})

    def image(self) -> Image:
        """Returns an image with one square per pair of classes, darker for a larger share of its row."""
        counts = on_host(self.counts).astype(np.float64)
        shares = counts / np.maximum(counts.sum(1, keepdims=True), 1e-12)
        squares = _LIGHT + shares[..., None] * (_DARK - _LIGHT)
        pixels = np.round(squares).astype(np.uint8).repeat(_CELL, 0).repeat(_CELL, 1)
        pixels[_CELL - 1 :: _CELL] = pixels[:, _CELL - 1 :: _CELL] = 200  # grid lines
        return Image(pixels)

    def __repr__(self) -> str:
        return f"ConfusionMatrix of {len(self.labels)} classes"


register_value(ConfusionMatrix, "counts")
