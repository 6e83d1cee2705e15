"""Finds the files written by ``writers.media``, and reads tables and confusion matrices from them."""

from __future__ import annotations

import urllib.parse
from pathlib import PurePosixPath

from fxtrain.report import _validation as validation
from fxtrain.report._folder import Folder
from fxtrain.report._logged import Logged
from fxtrain.writers._media import REWINDS, MediaFile, latest_files, media_file, rewinds_of
from fxtrain.writers._rewinds import Rewinds

Files = dict[str, dict[int, list[PurePosixPath]]]
"""Files by name and step, ordered by step and number."""


def read_media(folder: Folder, path: str, metrics: Logged) -> tuple[Files, Files]:
    """Finds media and text files, and adds tables and confusion matrices to ``metrics``.

    Args:
        folder: The run folder.
        path: The subfolder of the media, relative to ``folder``.
        metrics: Receives the tables and confusion matrices.

    Returns:
        The files of images, videos and sounds, without images that belong to tables, and the files of texts.
    """
    names: dict[str, list[tuple[MediaFile, PurePosixPath]]] = {}
    rewinds = Rewinds()
    for parent, file in folder.walk(path):
        if (parent, file) == (path, REWINDS):
            rewinds = rewinds_of(folder.read(f"{path}/{REWINDS}") or b"")
        elif (stated := media_file(file)) is not None:
            try:
                validation.step(stated.step)
            except ValueError as error:
                folder.problems.add(f"{parent}/{file}", str(error))
                continue
            names.setdefault(_name(PurePosixPath(parent), path), []).append((stated, PurePosixPath(parent, file)))
    media: Files = {}
    texts: Files = {}
    tables: Files = {}
    kinds = {".png": media, ".gif": media, ".wav": media, ".md": texts, ".json": tables}
    for name in sorted(names):
        for step, files in latest_files(names[name], rewinds).items():
            for file in files:
                if file.suffix in kinds:
                    kinds[file.suffix].setdefault(name, {}).setdefault(step, []).append(file)
    images = _take_tables(folder, tables, metrics)
    for name, steps in list(media.items()):
        kept = {step: [file for file in files if file not in images] for step, files in steps.items()}
        media[name] = {step: files for step, files in kept.items() if files}
        if not media[name]:
            del media[name]
    return media, texts


def _name(parent: PurePosixPath, path: str) -> str:
    # Folder names encode characters that file systems reject as %XX.
    return urllib.parse.unquote(parent.relative_to(path).as_posix())


def _take_tables(folder: Folder, tables: Files, metrics: Logged) -> set[PurePosixPath]:
    """Adds tables and confusion matrices to ``metrics`` and returns the images used in tables."""
    images: set[PurePosixPath] = set()
    for name, steps in tables.items():
        for step, file in ((step, file) for step, files in steps.items() for file in files):
            content = folder.read(str(file))
            if content is None:
                continue
            try:
                found = validation.mapping(validation.parsed(content))
                if "columns" in found:
                    images |= metrics.take_table(validation.name(name), step, found, file.parent)
                else:
                    metrics.take_confusion(validation.name(name), step, found)
            except ValueError as error:
                folder.problems.add(str(file), str(error))
    return images
