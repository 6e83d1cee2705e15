"""Tables with named columns of equal length, and confusion matrices."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from fxtrain.core import describe, escape_html
from fxtrain.values._nodes import on_host, register_value, set_tensor
from fxtrain.values._pixels import Image

Cell = str | bool | int | float | None
Column = Sequence[Cell] | Tensor | np.ndarray | Image
_CELL = 24  # pixels
_LIGHT, _DARK = np.array([247, 251, 255.0]), np.array([8, 48, 107.0])


@dataclasses.dataclass(frozen=True, eq=False)
class Table:
    """A table of named columns of equal length.

    Args:
        columns: Columns by name. Each is a sequence of strings, numbers, bools and Nones, a tensor or array [N], or an
            ``Image`` of N images.

    Raises:
        TypeError: A column or cell has another type.
        ValueError: There are no columns, or their lengths differ.

    Example:
        >>> import torch
        >>> table = Table({"word": ["cat", "dog"], "score": torch.tensor([0.5, 0.25])})
        >>> print(table.markdown())
        | word | score |
        | --- | --- |
        | cat | 0.5 |
        | dog | 0.25 |
    """

    columns: Mapping[str, Column]

    def __post_init__(self) -> None:
        if not isinstance(self.columns, Mapping) or not self.columns:
            raise ValueError(f"expected a nonempty mapping from names to columns, got {describe(self.columns)}.")
        columns = {str(name): _column(name, column) for name, column in self.columns.items()}
        lengths = {
            name: len(column.pixels if isinstance(column, Image) else column) for name, column in columns.items()
        }
        if len(set(lengths.values())) > 1:
            raise ValueError(f"expected columns of equal length, got {lengths}.")
        object.__setattr__(self, "columns", columns)

    def __len__(self) -> int:
        first = next(iter(self.columns.values()))
        return len(first.pixels if isinstance(first, Image) else first)

    def cells(self) -> dict[str, list[Cell] | np.ndarray]:
        """Returns the columns on the host: lists, and uint8 [N, H, W, C] for images."""
        return {
            name: column.frames if isinstance(column, Image) else _listed(column)
            for name, column in self.columns.items()
        }

    def markdown(self, rows: int = 50) -> str:
        """Returns a Markdown table of the first rows, with ``(image)`` for each image."""
        cells = {
            name: ["(image)"] * len(column.pixels) if isinstance(column, Image) else _listed(column)
            for name, column in self.columns.items()
        }
        lines = [_row(cells), _row(["---"] * len(cells))]
        lines += [_row(map(_text, row)) for row in zip(*(column[:rows] for column in cells.values()), strict=True)]
        if len(self) > rows:
            lines.append(f"\nand {len(self) - rows} more rows")
        return "\n".join(lines)

    def __repr__(self) -> str:
        return f"Table of {len(self)} rows: {', '.join(self.columns)}"


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
        counts = set_tensor(self, "counts")
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


def _column(name: str, column: object) -> Column:
    if isinstance(column, Image):
        if column.pixels.ndim != 4:
            raise ValueError(f"expected column {name!r} to be several images [N, H, W, C], got {column!r}.")
        return column
    if isinstance(column, Tensor | np.ndarray):
        if column.ndim != 1:
            raise ValueError(f"expected column {name!r} to have shape [N], got {list(column.shape)}.")
        return column.detach() if isinstance(column, Tensor) else column.tolist()
    if isinstance(column, str) or not isinstance(column, Sequence):
        raise TypeError(f"expected column {name!r} to be a list, a tensor [N] or an Image, got {describe(column)}.")
    for cell in column:
        if not (cell is None or isinstance(cell, str | bool | int | float)):
            raise TypeError(f"expected strings, numbers, bools and Nones in column {name!r}, got {describe(cell)}.")
    return list(column)


def _listed(column: Sequence[Cell] | Tensor | np.ndarray) -> list[Cell]:
    return column.tolist() if isinstance(column, Tensor | np.ndarray) else list(column)


def _text(cell: Cell) -> str:
    if isinstance(cell, float):
        return f"{cell:.4g}"
    return "" if cell is None else escape_html(str(cell)).replace("|", "&#124;").replace("\n", "<br>")


def _row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


register_value(ConfusionMatrix, "counts")
