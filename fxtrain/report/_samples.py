"""Renders images, videos, sounds, texts, tables and confusion matrices, up to a size limit."""

from __future__ import annotations

import base64
import html
import urllib.parse
from pathlib import PurePosixPath

from fxtrain.core._html import Html
from fxtrain.report._downsampling import evenly
from fxtrain.report._html import card, cell_html, left_out, steps, table, titled
from fxtrain.report._run import Run
from fxtrain.values._markdown import as_html
from fxtrain.values._views import confusion_html

_MAX_STEPS = 8  # per name, evenly spaced
_MAX_BYTES = 24 * 2**20  # of media per page
_MAX_CHARACTERS = 2**20  # of texts per page, which bounds the time to render them
_MAX_PIXELS = 50_000_000  # per image, because a small file may decode to more than a browser's memory
_MAX_NAMES = 500
_MAX_IMAGE = 2**18  # bytes of an image in a table; larger images are not embedded
_PLACEHOLDERS = {".png": "(image)", ".wav": "(audio)"}
_TYPES = {".png": "image/png", ".gif": "image/gif", ".mp4": "video/mp4", ".wav": "audio/wav"}
_PNG, _PNG_END = b"\x89PNG\r\n\x1a\n", b"\0\0\0\0IEND\xaeB`\x82"
_GIF, _GIF_END = (b"GIF87a", b"GIF89a"), b"\x3b"


Cards = list[tuple[str, str]]
"""The names and the HTML of values."""


class Samples:
    """Renders the samples of a run, and embeds their files in the page within a budget.

    Args:
        run: The run.
        label: The name of the run in the titles, or an empty string on the page of a single run.
        share: The number of runs that share the budget of a page.
        link: The path of the run folder relative to the page.
    """

    def __init__(self, run: Run, label: str = "", share: int = 1, link: str = "") -> None:
        self._run, self._label, self._link = run, label, link
        self._folder = run.folder
        self._left, self._characters = _MAX_BYTES // share, _MAX_CHARACTERS // share

    def _fits(self, paths: list[PurePosixPath]) -> bool:
        return self._folder is not None and sum(self._folder.size(str(path)) or 0 for path in paths) <= self._left

    def _html(self, path: PurePosixPath, largest: int = _MAX_BYTES) -> str | None:
        """Returns an HTML element with the content of a file, or None if it is too large or cannot be read.

        Args:
            path: The path of the file.
            largest: The largest size to embed, in bytes.
        """
        size = self._folder.size(str(path)) if self._folder is not None else None
        if path.suffix == ".html" and size is not None:  # has a script, which the policy of the report forbids
            place = urllib.parse.quote(str(PurePosixPath(self._link, path)))
            return f'<a href="{html.escape(place)}">interactive figure</a>'
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

    def media(self) -> Cards:
        """Returns cards of images, videos and sounds."""
        media = self._run.media
        chosen = {name: evenly(sorted(media[name]), _MAX_STEPS) for name in sorted(media)[:_MAX_NAMES]}
        shown: dict[str, dict[int, str]] = {name: {} for name in chosen}
        # Embed the latest step of every name before any earlier one, so that no name uses up the budget.
        for rank in range(1, _MAX_STEPS + 1):
            for name, found in chosen.items():
                paths = media[name][found[-rank]] if rank <= len(found) else []
                if paths and self._fits(paths):
                    content = "".join(
                        filter(None, (_captioned(self._html(path), self._run.captions.get(path)) for path in paths))
                    )
                    if content:
                        shown[name][found[-rank]] = content
        return [
            (name, self._card(name, steps("media", found) + left_out("step", len(media[name]) - len(found))))
            for name, found in shown.items()
        ]

    def texts(self) -> Cards:
        """Returns cards of texts."""
        texts = self._run.texts
        names = sorted(texts)[:_MAX_NAMES]
        shown: dict[str, dict[int, str]] = {name: {} for name in names}
        for rank in range(1, max((len(texts[name].items) for name in names), default=0) + 1):
            for name in names:
                items = texts[name].items
                if rank <= len(items) and len(items[-rank][1]) <= self._characters:
                    step, text = items[-rank]
                    self._characters -= len(text)
                    shown[name][step] = as_html(text)
        return [
            (name, self._card(name, steps("text", found) + left_out("step", texts[name].count - len(found))))
            for name, found in shown.items()
        ]

    def tables(self) -> Cards:
        """Returns tables with their titles."""

        def cell(value: object) -> object:
            if isinstance(value, PurePosixPath):
                return Html(self._html(value, _MAX_IMAGE) or _PLACEHOLDERS.get(value.suffix, "(video)"))
            return cell_html(value)

        cards: Cards = []
        for name, (step, columns, count) in self._run.tables.items():
            rows = list(zip(*columns.values(), strict=True))
            shown = table(columns, rows, cell=cell)
            title = titled(name, step, self._label)
            cards.append((name, f"<h3>{title}</h3>{shown}{left_out('row', count - len(rows))}"))
        return cards

    def confusion(self) -> Cards:
        """Returns cards of confusion matrices."""
        return [
            (name, self._card(name, confusion_html(found.labels, found.counts), found.step))
            for name, found in self._run.confusion.items()
        ]

    def _card(self, name: str, content: str, step: int | None = None) -> str:
        return card(titled(name, step, self._label), content)


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


def _captioned(element: str | None, caption: str | None) -> str | None:
    if element is None or not caption:
        return element
    return f'<div class="captioned">{element}<small>{html.escape(caption)}</small></div>'
