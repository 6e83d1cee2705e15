"""Media: the files that ``writers.media`` left, by name and step."""

from __future__ import annotations

import re
import urllib.parse
from pathlib import PurePosixPath

from fxtrain.report import _shapes as shapes
from fxtrain.report._folder import Folder
from fxtrain.report._metrics import Metrics

_MEDIUM = re.compile(r"(\d{8,})(?:-(\d+))?\.(png|gif|wav|md|json)", re.ASCII)
_MAX_TABLES = 1000  # files; only the latest of each name is shown

Files = dict[str, dict[int, list[PurePosixPath]]]
"""Files by name and step, in the order of steps and numbers."""


def read_media(folder: Folder, path: str, metrics: Metrics) -> tuple[Files, Files]:
    """Finds images, videos and sounds, and texts; takes tables and matrices into ``metrics``.

    Returns:
        Media and texts. Images of tables are left out.
    """
    media: Files = {}
    texts: Files = {}
    tables: Files = {}
    kinds = {"md": texts, "json": tables}
    found = sorted(
        (parent, *place, name) for parent, name in folder.walk(path) if (place := _placed(folder, parent, name))
    )
    for parent, step, _, kind, file in found:
        name = _name(PurePosixPath(parent), path)
        kinds.get(kind, media).setdefault(name, {}).setdefault(step, []).append(PurePosixPath(parent, file))
    images = _take_tables(folder, tables, metrics)
    for name, steps in list(media.items()):
        kept = {step: [file for file in files if file not in images] for step, files in steps.items()}
        media[name] = {step: files for step, files in kept.items() if files}
        if not media[name]:
            del media[name]
    return media, texts


def _placed(folder: Folder, parent: str, name: str) -> tuple[int, int, str] | None:
    """The step, number and kind of a file; None for one that the writer did not make."""
    match = _MEDIUM.fullmatch(name)
    if match is None:
        return None
    try:
        # Steps beyond eight digits and numbers are not padded: names would sort them otherwise.
        return shapes.step(int(match[1])), int(match[2] or 0), match[3]
    except ValueError as error:
        folder.problems.add(f"{parent}/{name}", str(error))
        return None


def _name(parent: PurePosixPath, path: str) -> str:
    # A folder has the letters that file systems do not take as %XX.
    return urllib.parse.unquote(parent.relative_to(path).as_posix())


def _take_tables(folder: Folder, tables: Files, metrics: Metrics) -> set[PurePosixPath]:
    """Takes tables and matrices; returns the images that are in tables."""
    images: set[PurePosixPath] = set()
    for name, steps in tables.items():
        for step, file in ((step, file) for step, files in steps.items() for file in files):
            content = folder.read(str(file))
            if content is None:
                continue
            try:
                found = shapes.mapping(shapes.parsed(content))
                if "columns" in found:
                    images |= metrics.take_table(shapes.name(name), step, found, file.parent)
                else:
                    metrics.take_confusion(shapes.name(name), step, found)
            except ValueError as error:
                folder.problems.add(str(file), str(error))
    return images
