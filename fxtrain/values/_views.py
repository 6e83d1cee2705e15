"""HTML of logged values in notebooks, within a budget of bytes: values are cut or scaled down, and the view says so."""

from __future__ import annotations

import base64
import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from fxtrain.core import pluralize, printable_lines, truncate
from fxtrain.core._html import Html, as_html, element, join, left_out, table, view
from fxtrain.values._encoders import png, video, wav
from fxtrain.values._markdown import as_html as markdown_as_html

if TYPE_CHECKING:
    from fxtrain.values._figure import Figure
    from fxtrain.values._histogram import Histogram
    from fxtrain.values._media import Audio
    from fxtrain.values._pixels import Image, Pixels, Video
    from fxtrain.values._table import ConfusionMatrix, Table
    from fxtrain.values._text import Text

_Pixels = TypeVar("_Pixels", bound="Pixels")

_MAX_BYTES = 2**22  # of the files in a view
_MAX_IMAGES, _MAX_VIDEOS, _MAX_SOUNDS = 64, 4, 8
_MAX_SIDE, _MAX_VIDEO_SIDE = 1024, 512  # pixels
_MIN_SIDE, _MIN_VIDEO_SIDE = 112, 240  # pixels; smaller ones are enlarged by a whole factor
_MAX_FRAMES = 240  # of a video
_MAX_SECONDS = 20  # of a sound
_MAX_TEXT = 2**16  # characters
_MAX_ROWS, _MAX_COLUMNS = 50, 50
_MAX_CELL_PIXELS, _MAX_CELL_SIDE = 192, 64  # pixels of an image in a table, and its height on the screen
_MAX_CLASSES = 24  # confusion matrices with more classes are drawn without counts
_MAX_PAIRS = 10  # most confused pairs of classes
_MAX_BARS = 100
_WIDTH, _HEIGHT, _MARGIN = 360, 120, 16  # of the drawing of a histogram
_MAX_WIDTH_RATIO = 100  # of the widest bucket to the narrowest that are drawn in proportion


def image_view(value: Image) -> str:
    """Returns the HTML of one or more images."""
    shown = _reduced(value, _MAX_SIDE, None if value.grid else _MAX_IMAGES)
    files = ((png(frame), _picture(frame)) for frame in shown.frames)  # encoded only while the budget lasts
    drawn = _within_budget(files, shown.captions)
    count = 1 if value.grid else value.count
    return view(repr(value), *drawn, left_out(count - len(drawn), "image"))


def video_view(value: Video) -> str:
    """Returns the HTML of one or more videos, which play in a loop."""
    shown = _reduced(value, _MAX_VIDEO_SIDE, _MAX_VIDEOS)
    files: list[tuple[bytes, str]] = []
    for each in shown.frames:
        kind, content = video(each, value.fps)
        style = f'style="{_enlarged(each, _MIN_VIDEO_SIDE)}"'
        tag = f'<video controls autoplay loop muted playsinline {style} src="data:video/mp4;base64,{{}}"></video>'
        files.append((content, tag if kind == "mp4" else f'<img alt="video" {style} src="data:image/gif;base64,{{}}">'))
    drawn = _within_budget(files, shown.captions)
    cut = element("p", element("small", f"the first {_MAX_FRAMES} frames")) if value.size("T") > _MAX_FRAMES else ""
    return view(repr(value), *drawn, cut, left_out(value.count - len(drawn), "video"), note=f"{value.fps:g} fps")


def audio_view(value: Audio) -> str:
    """Returns the HTML of one or more sounds."""
    several = value.samples.ndim == 3
    samples = value.samples[:_MAX_SOUNDS] if several else value.samples[None]
    shown = dataclasses.replace(value, samples=samples[:, : _MAX_SECONDS * value.rate][slice(None) if several else 0])
    files = [(wav(each, value.rate), '<audio controls src="data:audio/wav;base64,{}"></audio>') for each in shown.waves]
    drawn = _within_budget(files, ())
    count = len(value.samples) if several else 1
    is_cut = samples.shape[1] > _MAX_SECONDS * value.rate
    cut = element("p", element("small", f"the first {_MAX_SECONDS} seconds")) if is_cut else ""
    return view(repr(value), *drawn, cut, left_out(count - len(drawn), "sound"), note=f"{value.rate:,} Hz")


def figure_view(value: Figure) -> str:
    """Returns the HTML of a figure of Matplotlib. Others need scripts, so only their kind is shown."""
    if not value.pixels.size:
        return view(repr(value), element("p", element("small", "Show it with .plotly() or in its own library.")))
    return view(repr(value), _embedded(png(value.pixels), '<img alt="figure" src="data:image/png;base64,{}">'))


def text_view(value: Text) -> str:
    """Returns the HTML of a text in Markdown."""
    text = value.markdown
    shown = "\n".join(printable_lines(truncate(text, _MAX_TEXT)))
    return view("Text", Html(markdown_as_html(shown)), left_out(len(text) - _MAX_TEXT, "character"))


def table_view(value: Table) -> str:
    """Returns the HTML of the first rows of a table, with its images."""
    names = list(value.columns)[:_MAX_COLUMNS]
    head = type(value)({name: _rows(value.columns[name]) for name in names})
    left = [_MAX_BYTES]
    rows = zip(*([_cell(cell, left) for cell in column] for column in head.cells().values()), strict=True)
    hidden = left_out(len(value) - _MAX_ROWS, "row"), left_out(len(value.columns) - _MAX_COLUMNS, "column")
    return view("Table", table(names, rows), *hidden, note=pluralize(len(value), "row"))


def confusion_view(value: ConfusionMatrix) -> str:
    """Returns the HTML of a confusion matrix."""
    counts = value.counts.cpu().double().numpy()
    accuracy = np.trace(counts) / max(counts.sum(), 1e-12)
    note = f"{accuracy:.1%} of {counts.sum():,.0f} correct"
    return view(repr(value), confusion_html(value.labels, counts), note=note)


def confusion_html(labels: Sequence[str], counts: np.ndarray) -> Html:
    """Returns the HTML of a confusion matrix: a table if it has few classes, and otherwise an image.

    Args:
        labels: The names of the classes.
        counts: float64 [C, C], the counts by true class (row) and predicted class (column).
    """
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1e-12)
    if len(labels) > _MAX_CLASSES:
        return join([_as_image(shares), _most_confused(labels, counts)])
    rows = [
        join([element("th", label), *(_square(*cell) for cell in zip(*row, strict=True))])
        for label, *row in zip(labels, counts.tolist(), shares.tolist(), strict=True)
    ]
    predicted = Html(f'<th colspan="{len(labels)}">predicted</th>')
    head = element("tr", element("th", "true"), predicted), element("tr", element("th"), *map(_head, labels))
    return element("table", *head, *(element("tr", row) for row in rows), kind="confusion")


def histogram_view(value: Histogram) -> str:
    """Returns the HTML of a histogram, with bars whose areas are the counts."""
    counts, edges = value.buckets()
    drawn = _bars(*_merged(counts, edges)) if counts.sum() > 0 else ""
    return view(repr(value), drawn, note=f"{counts.sum():,.6g} values" if drawn else "no values")


def _reduced(value: _Pixels, side: int, count: int | None = None) -> _Pixels:
    """Returns images or videos with less to copy to the host and to embed.

    Args:
        value: The images or videos.
        side: How many pixels a side has at most, of the whole picture with a grid. Rows and columns are left out.
        count: How many images or videos are kept; all by default.
    """
    columns = getattr(value, "columns", 1)
    rows = -(-value.count // columns) if getattr(value, "grid", False) else 1
    every = slice(None, None, math.ceil(max(value.size("H") * rows, value.size("W") * columns) / side))
    kept = {"N": slice(count), "T": slice(_MAX_FRAMES), "H": every, "W": every, "C": slice(None)}
    caption = value.caption if isinstance(value.caption, str) else value.caption[:count]
    return dataclasses.replace(value, pixels=value.pixels[tuple(kept[axis] for axis in value.order)], caption=caption)


def _enlarged(frame: np.ndarray, least: int = _MIN_SIDE) -> str:
    """Returns the style that shows an image [..., H, W, C] with at least ``least`` pixels on its longer side."""
    times = math.ceil(least / max(frame.shape[-3:-1]))
    return f"width:{frame.shape[-2] * times}px;{'image-rendering:pixelated' if times > 1 else ''}"


def _picture(frame: np.ndarray, style: str = "") -> str:
    return f'<img alt="image" style="{style or _enlarged(frame)}" src="data:image/png;base64,{{}}">'


def _within_budget(files: Iterable[tuple[bytes, str]], captions: Sequence[str]) -> list[Html]:
    """Returns figures with the first files, as many as fit into the budget.

    Args:
        files: The content of each file, and its HTML element with braces in the place of the content.
        captions: The captions, or none.
    """
    figures: list[Html] = []
    left = _MAX_BYTES
    for index, (content, tag) in enumerate(files):
        left -= len(content)
        if left < 0:
            break
        caption = element("figcaption", captions[index]) if captions and captions[index] else ""
        figures.append(element("figure", _embedded(content, tag), caption))
    return figures


def _embedded(content: bytes, tag: str) -> Html:
    return Html(tag.format(base64.b64encode(content).decode()))


def _rows(column: Any) -> Any:
    return _reduced(column, _MAX_CELL_PIXELS, _MAX_ROWS) if hasattr(column, "is_single") else column[:_MAX_ROWS]


def _cell(cell: Any, left: list[int]) -> object:
    """Returns a cell of a table: images as they are, and other media as their description."""
    if not hasattr(cell, "frames") or hasattr(cell, "fps"):
        return cell if isinstance(cell, str | int | float | None) else repr(cell)
    frame = _reduced(cell, _MAX_CELL_PIXELS).frames[0]
    content = png(frame)
    left[0] -= len(content)
    if left[0] < 0:
        return repr(cell)
    return _embedded(content, _picture(frame, f"height:{_MAX_CELL_SIDE}px;image-rendering:pixelated"))


def _head(label: str) -> Html:
    return element("th", as_html(label, 40))


def _square(count: float, share: float) -> Html:
    return Html(f'<td style="--share:{share:.3f}">{f"{count:,.6g}" if count else ""}</td>')


def _as_image(shares: np.ndarray) -> Html:
    """Returns an image with one pixel for each pair of classes, more opaque for a larger share of the true class."""
    pixels = np.empty((*shares.shape, 4), np.uint8)
    pixels[...] = (31, 111, 235, 0)
    pixels[..., 3] = np.round(255 * shares / max(shares.max(), 1e-12))
    return element("p", _embedded(png(pixels), _picture(pixels, "width:24em;image-rendering:pixelated")))


def _most_confused(labels: Sequence[str], counts: np.ndarray) -> Html:
    wrong = counts * (1 - np.eye(len(counts)))
    most = [divmod(int(place), len(counts)) for place in np.argsort(-wrong, axis=None, kind="stable")[:_MAX_PAIRS]]
    rows = [(labels[row], labels[column], int(wrong[row, column])) for row, column in most if wrong[row, column]]
    return table(("true", "predicted", "count"), rows) if rows else Html()


def _finite(edges: np.ndarray) -> np.ndarray:
    """Returns the edges with infinite ones in the place of a bucket of the usual width."""
    known = edges[np.isfinite(edges)]
    if not len(known):
        return np.linspace(0.0, 1.0, len(edges))
    width = float(np.median(np.diff(known))) if len(known) > 1 else 1.0
    return np.where(np.isneginf(edges), known[0] - width, np.where(np.isposinf(edges), known[-1] + width, edges))


def _merged(counts: np.ndarray, edges: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    every = math.ceil(len(counts) / _MAX_BARS)
    if every == 1:
        return counts, edges
    starts = np.arange(0, len(counts), every)
    return np.add.reduceat(counts, starts), np.append(edges[starts], edges[-1])


def _bars(counts: np.ndarray, edges: np.ndarray) -> Html:
    """Returns bars whose areas are the counts. Buckets of very different widths are drawn equally wide."""
    drawn = _finite(edges)
    widths = np.diff(drawn)
    if is_uneven := widths.max() > _MAX_WIDTH_RATIO * widths.min():
        drawn = np.arange(len(edges))
    densities = counts / np.diff(drawn)
    heights = densities / densities.max() * _HEIGHT
    places = (drawn - drawn[0]) / (drawn[-1] - drawn[0]) * _WIDTH
    bars = "".join(
        f'<rect x="{left:.2f}" y="{_HEIGHT - height:.2f}" width="{max(right - left - 0.5, 0.5):.2f}" '
        f'height="{height:.2f}"><title>{count:,.6g} from {low:.4g} to {high:.4g}</title></rect>'
        for left, right, height, count, low, high in zip(
            places, places[1:], heights, counts, edges, edges[1:], strict=False
        )
    )
    axis = f'<path d="M0 {_HEIGHT}H{_WIDTH}" stroke="currentColor" opacity=".4"/>'
    if is_uneven:
        quarters = [len(edges) // 4, len(edges) // 2, 3 * len(edges) // 4]
        inner = [(float(places[index]), float(edges[index])) for index in quarters]
    else:
        inner = [(_WIDTH / 2, float(drawn[0] + drawn[-1]) / 2)]
    marked = [(0, "start", edges[0]), *((place, "middle", edge) for place, edge in inner), (_WIDTH, "end", edges[-1])]
    labels = "".join(
        f'<text x="{place:.6g}" y="{_HEIGHT + 12}" text-anchor="{anchor}">{edge:.4g}</text>'
        for place, anchor, edge in marked
    )
    highest = f'<text x="{_WIDTH}" y="9" text-anchor="end">at most {counts.max():,.6g} in a bar</text>'
    size = f'viewBox="0 0 {_WIDTH} {_HEIGHT + _MARGIN}" width="{_WIDTH}" height="{_HEIGHT + _MARGIN}"'
    return Html(f'<svg role="img" {size}>{bars}{axis}{labels}{highest}</svg>')
