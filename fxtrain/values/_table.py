"""Tables with named columns of equal length, and confusion matrices."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from fxtrain.core import describe, escape_html, first_names, printable
from fxtrain.core._html import html_view
from fxtrain.values._confusion_image import draw_confusion_matrix
from fxtrain.values._media import Audio
from fxtrain.values._nodes import on_host, register_value, set_tensor
from fxtrain.values._pixels import Image, Pixels, Video
from fxtrain.values._text import Text

Media = Image | Video | Audio
Cell = str | bool | int | float | None
Column = Sequence[Cell | Text | Media] | Tensor | np.ndarray | Media


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Table:
    """A table of named columns of equal length.

    Args:
        columns: Columns by name. Each is a sequence of cells, a tensor or array [N], or an ``Image``, a ``Video`` or an
            ``Audio`` with an axis of length N. Cells are strings, numbers, bools, Nones, texts, and single images,
            videos and sounds. Writers of texts show a placeholder for media, such as ``(image)``.

    Raises:
        TypeError: A column or cell has another type.
        ValueError: There are no columns, their lengths differ, or a cell contains several images, videos or sounds.

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
            raise ValueError(
                f"expected a nonempty mapping from names to columns, got {describe(self.columns)}. "
                'Pass a dict, as in Table({"loss": [0.5, 0.4]}).'
            )
        columns = {str(name): _column(name, column) for name, column in self.columns.items()}
        lengths = {name: _length(column) for name, column in columns.items()}
        if len(set(lengths.values())) > 1:
            raise ValueError(f"expected columns of equal length, got {lengths}. Fill the shorter ones.")
        object.__setattr__(self, "columns", columns)

    @classmethod
    def from_rows(cls, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> Table:
        """Returns the table of these rows.

        Args:
            columns: The names of the columns.
            rows: Rows with one cell for each column. 0-d tensors and arrays become numbers.

        Raises:
            TypeError: As for ``Table``.
            ValueError: As for ``Table``, or a name is repeated, or a row has another number of cells.

        Example:
            >>> Table.from_rows(["word", "score"], [("cat", 0.5), ("dog", 0.25)])
            Table of 2 rows: word, score
        """
        names = [str(name) for name in columns]
        if isinstance(columns, str) or len(set(names)) != len(names):
            raise ValueError(f"expected columns to be a sequence of distinct names, got {describe(columns)}.")
        found: list[list[object]] = [[] for _ in names]
        for index, row in enumerate(rows):
            if isinstance(row, str) or not isinstance(row, Sequence) or len(row) != len(names):
                raise ValueError(
                    f"expected rows of {len(names)} cells ({', '.join(names)}), got {describe(row)} as row {index}."
                )
            for column, cell in zip(found, row, strict=True):
                if isinstance(cell, np.generic | np.ndarray | Tensor) and cell.ndim == 0:
                    column.append(cell.item())
                else:
                    column.append(cell)
        return cls(dict(zip(names, found, strict=True)))  # pyright: ignore[reportArgumentType] -- checked there

    def __len__(self) -> int:
        return _length(next(iter(self.columns.values())))

    def cells(self) -> dict[str, list[Cell | Media]]:
        """Returns the columns as lists on the host. Each image, video and sound is a value of its own."""
        return {name: [_plain(cell) for cell in _split(column)] for name, column in self.columns.items()}

    def texts(self) -> dict[str, list[Cell]]:
        """Returns the columns as lists on the host, with ``(image)``, ``(video)`` or ``(audio)`` for media."""
        return {
            name: [_placeholder(column)] * _length(column)
            if isinstance(column, Media)
            else [_placeholder(cell) if isinstance(cell, Media) else _plain(cell) for cell in _listed(column)]
            for name, column in self.columns.items()
        }

    def markdown(self, rows: int = 50) -> str:
        """Returns a Markdown table of the first rows, with placeholders for media."""
        cells = self.texts()
        lines = [_row(cells), _row(["---"] * len(cells))]
        lines += [_row(map(_text, row)) for row in zip(*(column[:rows] for column in cells.values()), strict=True)]
        if len(self) > rows:
            lines.append(f"\nand {len(self) - rows} more rows")
        return "\n".join(lines)

    def __repr__(self) -> str:
        return f"Table of {len(self)} rows: {printable(first_names(self.columns, 20))}"

    @html_view
    def _repr_html_(self) -> str:
        from fxtrain.values._views import table_view

        return table_view(self)


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
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
            raise ValueError(
                f"expected counts of shape [C, C], got {list(counts.shape)}. Count targets by predictions."
            )
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
        """Returns a picture with labels and counts. Cells are darker for a larger share of their row."""
        return Image(draw_confusion_matrix(on_host(self.counts).astype(np.float64), self.labels))

    def __repr__(self) -> str:
        return f"ConfusionMatrix of {len(self.labels)} classes"

    @html_view
    def _repr_html_(self) -> str:
        from fxtrain.values._views import confusion_view

        return confusion_view(self)


def _column(name: str, column: object) -> Column:
    if isinstance(column, Media):
        if _axis(column) is None:
            what = "sounds [N, T, C]" if isinstance(column, Audio) else f"{_noun(column)}s with an axis N"
            raise ValueError(f"expected column {name!r} to be several {what}, got {column!r}.")
        return column
    if isinstance(column, Tensor | np.ndarray):
        if column.ndim != 1:
            raise ValueError(f"expected column {name!r} to have shape [N], got {list(column.shape)}.")
        return column.detach() if isinstance(column, Tensor) else column.tolist()
    if isinstance(column, str) or not isinstance(column, Sequence):
        raise TypeError(
            f"expected column {name!r} to be a list, a tensor [N], an Image, a Video or an Audio, got "
            f"{describe(column)}."
        )
    for cell in column:
        if not (cell is None or isinstance(cell, str | bool | int | float | Text | Media)):
            raise TypeError(
                f"expected strings, numbers, bools, Nones, texts, images, videos and sounds in column {name!r}, got "
                f"{describe(cell)}."
            )
        if isinstance(cell, Media) and (_axis(cell) or 1) > 1 and not (isinstance(cell, Image) and cell.grid):
            raise ValueError(
                f"expected one {_noun(cell)} in each cell of column {name!r}, got {cell!r}. Give each its own row."
            )
    return list(column)


def _axis(value: Media) -> int | None:
    """Returns the length of the axis N, or None for a single image, video or sound."""
    if isinstance(value, Pixels):
        return None if value.is_single or (isinstance(value, Image) and value.grid) else value.count
    return len(value.samples) if value.samples.ndim == 3 else None


def _length(column: Column) -> int:
    return (_axis(column) or 1) if isinstance(column, Media) else len(column)


def _noun(value: Media) -> str:
    return type(value).__name__.lower()


def _placeholder(value: Media) -> str:
    return f"({_noun(value)})"


def _split(column: Column) -> Sequence[Cell | Text | Media]:
    """Returns the cells of a column, converted to pixels and samples of the host."""
    match column:
        case Image():
            captions = column.captions or [""] * len(column.frames)
            return [Image(frame, caption=text) for frame, text in zip(column.frames, captions, strict=True)]
        case Video():
            captions = column.captions or [""] * len(column.frames)
            pairs = zip(column.frames, captions, strict=True)
            return [Video(frames, fps=column.fps, caption=text) for frames, text in pairs]
        case Audio():
            return [Audio(wave / np.float32(32767), column.rate) for wave in column.waves]
        case _:
            return _listed(column)


def _listed(column: Sequence[Cell | Text | Media] | Tensor | np.ndarray) -> list[Cell | Text | Media]:
    return column.tolist() if isinstance(column, Tensor | np.ndarray) else list(column)


def _plain(cell: Cell | Text | Media) -> Any:
    return cell.markdown if isinstance(cell, Text) else cell


def _text(cell: Cell) -> str:
    if isinstance(cell, float):
        return f"{cell:.4g}"
    return "" if cell is None else escape_html(str(cell)).replace("|", "&#124;").replace("\n", "<br>")


def _row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


register_value(ConfusionMatrix, "counts")
