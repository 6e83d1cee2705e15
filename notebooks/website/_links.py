"""Finds dead links in a folder of HTML pages."""

from __future__ import annotations

import pathlib
from collections.abc import Iterator
from html.parser import HTMLParser
from urllib.parse import unquote, urlsplit


class _Page(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.anchors: set[str] = {"", "top"}
        self.links: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name == "id" or (name == "name" and tag == "a"):
                self.anchors.add(value or "")
            elif name in ("href", "src"):
                self.links.append(value or "")
            elif name == "srcset":
                self.links += [part.split()[0] for part in (value or "").split(",")]


def dead_links(folder: pathlib.Path) -> Iterator[str]:
    """Yields a line for each link to a file or an anchor that does not exist.

    Links to other sites are not followed.

    Args:
        folder: A folder of pages. All files to which they link must be in it.
    """
    folder = folder.resolve()
    pages = {path: _Page(path.read_text(encoding="utf-8")) for path in sorted(folder.rglob("*.html"))}
    for path, page in pages.items():
        for link in page.links:
            url = urlsplit(link)
            if url.scheme or url.netloc:
                continue
            target = (path.parent / unquote(url.path)).resolve() if url.path else path
            where = f"{path.relative_to(folder)}: expected a link to"
            if not target.is_relative_to(folder) or not target.is_file():
                yield f"{where} a file of the site, got {link!r}."
            elif target in pages and unquote(url.fragment) not in pages[target].anchors:
                yield f"{where} an anchor of {target.relative_to(folder)}, got {link!r}."
