"""Draws confusion matrices with labels and counts."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fxtrain.core import format_scaled, truncate

_LIGHT, _DARK = np.array([247, 251, 255.0]), np.array([8, 48, 107.0])
_INK, _GRID = (60, 60, 60), (200, 200, 200)
_FONT, _FONT_SIZE = "DejaVuSans.ttf", 13
_MAX_NAMED_CLASSES = 50  # beyond, cells are too small for text
_MAX_LABEL = 24  # characters
_MIN_SIDE, _MAX_SIDE = 160, 1000  # pixels of a matrix with few classes, and of one without text
_MIN_CELL, _PADDING = 28, 6  # pixels


def draw_confusion_matrix(counts: np.ndarray, labels: Sequence[str]) -> np.ndarray:
    """Returns a picture of a confusion matrix, with a row for each true class and a column for each predicted class.

    A cell is darker for a larger share of its row. Up to 50 classes have their labels and nonzero counts.

    Args:
        counts: Float array [C, C], nonnegative.
        labels: The names of the C classes.

    Returns:
        uint8 [H, W, 3].

    Example:
        >>> draw_confusion_matrix(np.eye(100), [str(index) for index in range(100)]).shape
        (1000, 1000, 3)
    """
    shares = np.nan_to_num(counts / np.maximum(counts.sum(1, keepdims=True), 1e-12))
    squares = np.round(_LIGHT + shares[..., None] * (_DARK - _LIGHT)).astype(np.uint8)
    if len(labels) > _MAX_NAMED_CLASSES:
        cell = max(1, _MAX_SIDE // len(labels))
        return squares.repeat(cell, 0).repeat(cell, 1)
    return _with_text(squares, counts, shares, [truncate(" ".join(label.split()), _MAX_LABEL) for label in labels])


def _with_text(squares: np.ndarray, counts: np.ndarray, shares: np.ndarray, labels: Sequence[str]) -> np.ndarray:
    from PIL import Image, ImageDraw, ImageFont

    try:
        # The font of Pillow has no characters beyond ASCII.
        is_ascii = "".join(labels).isascii()
        font = ImageFont.load_default(_FONT_SIZE) if is_ascii else ImageFont.truetype(_FONT, _FONT_SIZE)
    except OSError:
        font = ImageFont.load_default(_FONT_SIZE)
    numbers = [[_short(count) if count else "" for count in row] for row in counts.tolist()]
    widest = round(max(font.getlength(label) for label in labels))
    longest = round(max(font.getlength(number) for row in numbers for number in row))
    cell = max(_MIN_CELL, _MIN_SIDE // len(labels), longest + _PADDING)
    side = cell * len(labels)
    is_vertical = widest > cell - _PADDING  # labels of columns that would overlap
    title = _FONT_SIZE + 2 * _PADDING  # height of the line of an axis title
    left, below = title + widest + _PADDING, (widest if is_vertical else _FONT_SIZE) + _PADDING + title
    picture = Image.new("RGB", (left + side + _PADDING, _PADDING + side + below), "white")
    picture.paste(Image.fromarray(squares).resize((side, side), Image.Resampling.NEAREST), (left, _PADDING))
    pen = ImageDraw.Draw(picture)
    for line in range(len(labels) + 1):
        at = min(line * cell, side - 1)
        pen.line((left, _PADDING + at, left + side - 1, _PADDING + at), _GRID)
        pen.line((left + at, _PADDING, left + at, _PADDING + side - 1), _GRID)

    def write(x: int, y: int, text: str, ink: tuple[int, int, int] = _INK, anchor: str = "mm") -> None:
        pen.text((x, y), text, ink, font, anchor=anchor)

    def write_upwards(x: int, top: int, text: str) -> None:
        strip = Image.new("RGB", (round(font.getlength(text)) + 1, _FONT_SIZE + 4), "white")
        ImageDraw.Draw(strip).text((0, strip.height / 2), text, _INK, font, anchor="lm")
        picture.paste(strip.rotate(90, expand=True), (x - strip.height // 2, top))

    for row, label in enumerate(labels):
        place = row * cell + cell // 2
        write(left - _PADDING, _PADDING + place, label, anchor="rm")
        if is_vertical:
            write_upwards(left + place, 2 * _PADDING + side, label)
        else:
            write(left + place, 2 * _PADDING + side + _FONT_SIZE // 2, label)
        for column, number in enumerate(numbers[row]):
            ink = (255, 255, 255) if shares[row, column] > 0.5 else _INK
            write(left + column * cell + cell // 2, _PADDING + place, number, ink)
    write(left + side // 2, picture.height - title // 2, "predicted class")
    write_upwards(title // 2, _PADDING + (side - round(font.getlength("true class"))) // 2, "true class")
    return np.asarray(picture)


def _short(count: float) -> str:
    return f"{count:.4g}" if count < 1e4 else format_scaled(count)
