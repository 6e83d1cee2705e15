"""Finds the files written by ``writers.media``, and reads tables and confusion matrices from them."""

from __future__ import annotations

import re
import urllib.parse
from pathlib import PurePosixPath

from fxtrain.report import _shapes as shapes
from fxtrain.report._folder import Folder
from fxtrain.report._metrics import Metrics

_MEDIA_NAME = re.compile(r"(\d{8,})(?:-(\d+))?\.(png|gif|wav|md|json)", re.ASCII)

Files = dict[str, dict[int, list[PurePosixPath]]]
"""Files by name and step, ordered by step and number."""


def read_media(folder: Folder, path: str, metrics: Metrics) -> tuple[Files, Files]:
    """Finds media and text files, and adds tables and confusion matrices to ``metrics``.

    Args:
        folder: The run folder.
        path: The subfolder of the media, relative to ``folder``.
        metrics: Receives the tables and confusion matrices.

    Returns:
        The files of images, videos and sounds, without images that belong to tables, and the files of texts.
    """
    media: Files = {}
    texts: Files = {}
    tables: Files = {}
    kinds = {"md": texts, "json": tables}
    found = sorted(
        (parent, *place, name)
        for parent, name in folder.walk(path)
        if (place := _step_number_suffix(folder, parent, name))
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


def _step_number_suffix(folder: Folder, parent: str, name: str) -> tuple[int, int, str] | None:
    """Returns the step, number and suffix of a file, or None if ``writers.media`` did not write it."""
    match = _MEDIA_NAME.fullmatch(name)
    if match is None:
        return None
    try:
        # Parsed for sorting, because numbers and steps of more than eight digits are not padded.
        return shapes.step(int(match[1])), int(match[2] or 0), match[3]
    except ValueError as error:
        folder.problems.add(f"{parent}/{name}", str(error))
        return None


def _name(parent: PurePosixPath, path: str) -> str:
    # Folder names encode characters that file systems reject as %XX.
    return urllib.parse.unquote(parent.relative_to(path).as_posix())


def _take_tables(folder: Folder, tables: Files, metrics: Metrics) -> set[PurePosixPath]:
    """Adds tables and confusion matrices to ``metrics`` and returns the images used in tables."""
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
