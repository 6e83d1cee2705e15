"""Renders images, videos, sounds, texts, tables and confusion matrices, up to a size limit."""

from __future__ import annotations

import base64
import html
import urllib.parse
from pathlib import PurePosixPath

import numpy as np

from fxtrain.report._downsampling import evenly
from fxtrain.report._folder import Folder
from fxtrain.report._html import card, cell_text, grid, left_out, section, steps, table, titled
from fxtrain.report._run import Confusion, Run
from fxtrain.values._encoders import png
from fxtrain.values._markdown import as_html

_MAX_STEPS = 8  # per name, evenly spaced
_MAX_BYTES = 24 * 2**20  # of media per page
_MAX_CHARACTERS = 2**20  # of texts per page, which bounds the time to render them
_MAX_PIXELS = 50_000_000  # per image, because a small file may decode to more than a browser's memory
_MAX_NAMES = 500
_MAX_IMAGE = 2**18  # bytes of an image in a table; larger images are not embedded
_MAX_CLASSES = 32  # confusion matrices with more classes are drawn as images
_MAX_PAIRS = 20  # most confused pairs of classes
_PLACEHOLDERS = {".png": "(image)", ".wav": "(audio)"}
_TYPES = {".png": "image/png", ".gif": "image/gif", ".mp4": "video/mp4", ".wav": "audio/wav"}
_PNG, _PNG_END = b"\x89PNG\r\n\x1a\n", b"\0\0\0\0IEND\xaeB`\x82"
_GIF, _GIF_END = (b"GIF87a", b"GIF89a"), b"\x3b"


class Embedded:
    """Embeds files of the run folder in the page, within a budget of bytes.

    Args:
        folder: The run folder, or None for a run without files.
    """

    def __init__(self, folder: Folder | None) -> None:
        self._folder = folder
        self._left = _MAX_BYTES

    def fits(self, paths: list[PurePosixPath]) -> bool:
        """Returns whether all of ``paths`` fit into the remaining budget."""
        return self._folder is not None and sum(self._folder.size(str(path)) or 0 for path in paths) <= self._left

    def html(self, path: PurePosixPath, largest: int = _MAX_BYTES) -> str | None:
        """Returns an HTML element with the content of a file, or None if it is too large or cannot be read.

        Args:
            path: The path of the file.
            largest: The largest size to embed, in bytes.
        """
        size = self._folder.size(str(path)) if self._folder is not None else None
        if path.suffix == ".html" and size is not None:  # has a script, which the policy of the report forbids
            return f'<a href="{html.escape(urllib.parse.quote(str(path)))}">interactive figure</a>'
        if self._folder is None or size is None or size > min(largest, self._left):
            return None
        content = self._folder.read(str(path), size)
        if content is None:
            return None
        if problem := _problem(path.suffix, content):
            self._folder.problems.add(str(path), problem)
            return None
        self._left -= size
        source = f"data:{_TYPES[path.suffix]};base64,{base64.b64encode(content).decode()}"
        if path.suffix == ".wav":
            return f'<audio controls src="{source}"></audio>'
        if path.suffix == ".mp4":
            return f'<video controls loop muted src="{source}"></video>'
        return f'<img alt="{html.escape(path.parent.name)}" src="{source}">'


def _problem(suffix: str, content: bytes) -> str:
    """Returns a problem with the content of a file, or an empty string. A browser would show no reason."""
    size = (0, 0)
    if suffix == ".png":
        whole = content.startswith(_PNG) and content.endswith(_PNG_END)
        size = int.from_bytes(content[16:20], "big"), int.from_bytes(content[20:24], "big")
    elif suffix == ".gif":
        whole = content.startswith(_GIF) and content.endswith(_GIF_END)
        size = int.from_bytes(content[6:8], "little"), int.from_bytes(content[8:10], "little")
    elif suffix == ".mp4":
        whole = content[4:8] == b"ftyp" and _has_whole_boxes(content)
    else:
        riff = content[:4] == b"RIFF" and content[8:12] == b"WAVE"
        whole = riff and int.from_bytes(content[4:8], "little") + 8 <= len(content)
    if not whole:
        return f"expected a complete {suffix[1:].upper()} file, got a truncated or different one"
    if size[0] * size[1] > _MAX_PIXELS:
        return f"expected at most {_MAX_PIXELS:,} pixels, got {size[0]:,} x {size[1]:,}"
    return ""


def _has_whole_boxes(content: bytes) -> bool:
    """Returns whether an MP4 file ends where its last box does."""
    place = 0
    while place + 8 <= len(content):
        size = int.from_bytes(content[place : place + 4], "big")
        if size < 8:
            return False
        place += size
    return place == len(content)


def media(run: Run, embedded: Embedded) -> str:
    """Returns the section of images, videos and sounds."""
    chosen = {name: evenly(sorted(run.media[name]), _MAX_STEPS) for name in sorted(run.media)[:_MAX_NAMES]}
    shown: dict[str, dict[int, str]] = {name: {} for name in chosen}
    # Embed the latest step of every name before any earlier one, so that no name uses up the budget.
    for rank in range(1, _MAX_STEPS + 1):
        for name, found in chosen.items():
            paths = run.media[name][found[-rank]] if rank <= len(found) else []
            if paths and embedded.fits(paths):
                content = "".join(
                    filter(None, (_captioned(embedded.html(path), run.captions.get(path)) for path in paths))
                )
                if content:
                    shown[name][found[-rank]] = content
    return section(
        "Samples",
        grid(
            card(html.escape(name), steps("media", found) + left_out("step", len(run.media[name]) - len(found)))
            for name, found in shown.items()
        ),
    )


def _captioned(element: str | None, caption: str | None) -> str | None:
    if element is None or not caption:
        return element
    return f'<div class="captioned">{element}<small>{html.escape(caption)}</small></div>'


def texts(run: Run) -> str:
    """Returns the section of texts."""
    left = _MAX_CHARACTERS
    names = sorted(run.texts)[:_MAX_NAMES]
    shown: dict[str, dict[int, str]] = {name: {} for name in names}
    for rank in range(1, max((len(run.texts[name].items) for name in names), default=0) + 1):
        for name in names:
            items = run.texts[name].items
            if rank <= len(items) and len(items[-rank][1]) <= left:
                step, text = items[-rank]
                left -= len(text)
                shown[name][step] = as_html(text)
    return section(
        "Texts",
        "".join(
            card(html.escape(name), steps("text", found) + left_out("step", run.texts[name].count - len(found)))
            for name, found in shown.items()
        ),
    )


def tables(run: Run, embedded: Embedded) -> str:
    """Returns the section of tables."""

    def cell(value: object) -> str:
        if isinstance(value, PurePosixPath):
            return embedded.html(value, _MAX_IMAGE) or _PLACEHOLDERS.get(value.suffix, "(video)")
        return cell_text(value)

    parts: list[str] = []
    for name, (step, columns, count) in sorted(run.tables.items()):
        rows = list(zip(*columns.values(), strict=True))
        shown = table(columns, rows, cell=cell)
        parts.append(f"<h3>{titled(name, step)}</h3>{shown}{left_out('row', count - len(rows))}")
    return section("Tables", "".join(parts))


def confusion(run: Run) -> str:
    """Returns the section of confusion matrices."""
    note = "<p>Rows are true classes, columns are predicted classes.</p>"
    return section(
        "Confusion",
        grid(
            card(
                titled(name, found.step), note + (_as_table if len(found.labels) <= _MAX_CLASSES else _as_image)(found)
            )
            for name, found in sorted(run.confusion.items())
        ),
    )


def _as_table(found: Confusion) -> str:
    rows = ""
    for label, row in zip(found.labels, found.counts.tolist(), strict=True):
        total = max(sum(row), 1e-12)
        cells = "".join(
            f'<td{" class=dark" * (count > total / 2)} style="--share:{count / total:.3f}">{count:g}</td>'
            if count
            else "<td></td>"
            for count in row
        )
        rows += f"<tr><th>{html.escape(label)}</th>{cells}</tr>"
    heads = "".join(f"<th>{html.escape(label)}</th>" for label in found.labels)
    return f'<div class="wide"><table class="confusion"><tr><th></th>{heads}</tr>{rows}</table></div>'


def _as_image(found: Confusion) -> str:
    """Returns an image with one pixel for each pair of classes, and a table of the most confused pairs."""
    labels, counts = found.labels, found.counts
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1e-12)
    image = base64.b64encode(png(np.round(255 * (1 - shares[..., None])).astype(np.uint8))).decode()
    wrong = counts * (1 - np.eye(len(counts)))
    most = [divmod(int(place), len(counts)) for place in np.argsort(-wrong, axis=None, kind="stable")[:_MAX_PAIRS]]
    rows = [(labels[row], labels[column], f"{wrong[row, column]:g}") for row, column in most if wrong[row, column]]
    drawn = f'<img class="matrix" alt="confusion matrix" src="data:image/png;base64,{image}">'
    return drawn + (table(("true class", "predicted class", "count"), rows) if rows else "")
