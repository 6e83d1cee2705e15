"""Each image, video, sound, text and table as a file in a common format."""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fxtrain.disk import make_folder, replace_file, sync_file, sync_folder
from fxtrain.values import Audio, ConfusionMatrix, Image, PointCloud, Table, Text, Video, plain
from fxtrain.writers._encoding import gif, png, wav
from fxtrain.writers._interface import Backend, unwritable

_STEP = re.compile(r"(\d{8,})(-\d+)?\.(md|png|gif|wav|json|ply)$")
_UNSAFE = re.compile(r"^[. ]+|[. ]+$|[^\w .()=-]")  # would leave the folder, be hidden, or be rejected by a file system


def media(folder: str | os.PathLike[str]) -> MediaWriter:
    """A writer of files named ``<folder>/<name>/<step>.<kind>``. A ``/`` in a name makes folders.

    Characters that file systems reject are percent-encoded, such as ``%3F`` for ``?``.

    Images are PNG, videos GIF, sounds WAV and texts Markdown. Tables and confusion matrices are JSON, and point clouds
    PLY. Several images, videos or sounds of one name are numbered, as in ``00000100-3.png``. So are images in a table,
    which contains their file names. Non-finite floats are strings in JSON, such as ``"NaN"``.

    ``flush`` syncs the files and their names to the disk. ``purge`` moves the files after a step to
    ``<folder>.dropped``.

    Args:
        folder: The folder, created when there is something to write.

    Example:
        >>> import pathlib, tempfile, torch
        >>> folder = pathlib.Path(tempfile.mkdtemp())
        >>> writer = media(folder)
        >>> writer.write_images(100, {"samples": torch.zeros(2, 8, 8, 1)})
        >>> sorted(str(path.relative_to(folder)) for path in folder.rglob("*.png"))
        ['samples/00000100-0.png', 'samples/00000100-1.png']
    """
    return MediaWriter(Path(folder))


class MediaWriter(Backend):
    """Writes files. Created by ``media``."""

    kinds = frozenset((Text, Image, Video, Audio, Table, ConfusionMatrix, PointCloud))

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._unsynced: list[Path] = []

    def put(self, step: int, values: Mapping[str, Any], event: Any) -> None:
        for name, value in values.items():
            place = self._folder / _safe(name)
            try:
                if not place.is_dir():
                    make_folder(place)
                for file, content in _files(f"{step:08d}", value).items():
                    self._put(place / file, content)
            except OSError as error:
                raise unwritable("media", place, error) from error

    def _put(self, path: Path, content: bytes) -> None:
        if path.exists():
            replace_file(path, content)  # atomically, because the old file may be synced already
            return
        try:
            path.write_bytes(content)
        except OSError:
            with contextlib.suppress(OSError):
                path.unlink()  # a partial file is useless
            raise
        self._unsynced.append(path)

    def purge(self, step: int) -> None:
        """Moves the files after a step to ``<folder>.dropped``."""
        dropped = self._folder.with_name(f"{self._folder.name}.dropped")
        moved: dict[Path, Path] = {}
        for path in [path for path in self._folder.rglob("*") if path.is_file()]:
            found = _STEP.match(path.name)
            if found is not None and int(found[1]) > step:
                target = dropped / path.relative_to(self._folder)
                if not target.parent.is_dir():
                    make_folder(target.parent)
                os.replace(path, target)
                moved[path.parent] = target.parent
        self._unsynced = [path for path in self._unsynced if path.exists()]
        # In this order, a power cut loses no file.
        for source, target in moved.items():
            sync_folder(target)
            sync_folder(source)

    def flush(self) -> None:
        """Syncs the files and their names to the disk."""
        while self._unsynced:
            path = self._unsynced[-1]
            if path.exists():
                sync_file(path)
            self._unsynced.pop()
            if path.parent not in (other.parent for other in self._unsynced):
                sync_folder(path.parent)

    def close(self) -> None:
        self.flush()


def _files(stem: str, value: Any) -> dict[str, bytes]:
    match value:
        case Text(markdown):
            return {f"{stem}.md": markdown.encode()}
        case Image():
            return _numbered(stem, "png", [png(frame) for frame in value.frames])
        case Video():
            return _numbered(stem, "gif", [gif(frames, value.fps) for frames in value.frames])
        case Audio():
            return _numbered(stem, "wav", [wav(waves, value.rate) for waves in value.waves])
        case Table():
            return _table(stem, value)
        case ConfusionMatrix():
            content = {"labels": value.labels, "counts": value.counts.tolist()}
            return {f"{stem}.json": json.dumps(content).encode()}
        case _:
            return {f"{stem}.ply": _ply(value)}


def _numbered(stem: str, ending: str, contents: list[bytes]) -> dict[str, bytes]:
    if len(contents) == 1:
        return {f"{stem}.{ending}": contents[0]}
    return {f"{stem}-{index}.{ending}": content for index, content in enumerate(contents)}


def _table(stem: str, table: Table) -> dict[str, bytes]:
    images: dict[str, bytes] = {}
    columns: dict[str, list[Any]] = {}
    for name, cells in table.cells().items():
        if isinstance(cells, list):
            columns[name] = plain(cells)
            continue
        files = [f"{stem}-{len(images) + index}.png" for index in range(len(cells))]
        images |= dict(zip(files, map(png, cells), strict=True))
        columns[name] = files
    return {f"{stem}.json": json.dumps({"columns": columns}, allow_nan=False).encode(), **images}


def _ply(cloud: PointCloud) -> bytes:
    points = cloud.points.float().cpu().numpy()
    header = ["ply", "format ascii 1.0", f"element vertex {len(points)}"]
    header += [f"property float {axis}" for axis in "xyz"]
    rows = points.astype(str)
    if cloud.colors is not None:
        header += [f"property uchar {color}" for color in ("red", "green", "blue")]
        rows = np.concatenate([rows, cloud.colors.cpu().numpy().astype(str)], 1)
    return "\n".join([*header, "end_header", *map(" ".join, rows), ""]).encode()


def _safe(name: str) -> Path:
    """Returns a distinct path below the folder for each name."""
    return Path(*(_UNSAFE.sub(_escaped, part) or "%" for part in name.split("/")))


def _escaped(found: re.Match[str]) -> str:
    return "".join(f"%{byte:02X}" for byte in found[0].encode())
