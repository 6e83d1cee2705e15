"""Each image, video, sound, text and table as a file in a common format."""

from __future__ import annotations

import contextlib
import json
import os
import re
import urllib.parse
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np

from fxtrain.core import LoopEvent, check_path, describe
from fxtrain.disk import append_lines, make_folder, replace_file, sync_file, sync_folder
from fxtrain.values import Audio, ConfusionMatrix, Figure, Image, PointCloud, Table, Text, Value, Video, jsonable
from fxtrain.values._encoders import png, video, wav
from fxtrain.values._figure import PlotlyFigure
from fxtrain.values._table import Cell, Media
from fxtrain.writers._append_only import REWOUND, Rewinds
from fxtrain.writers._interface import Backend, explain_failure

_FILE = re.compile(r"(\d{8,})(?:\.r(\d+))?(?:-(\d+))?\.(md|png|gif|mp4|wav|json|ply|html)", re.ASCII)
REWINDS = "rewinds.jsonl"
"""The file in the folder of the media with one line for each rewind."""
_UNSAFE = re.compile(r"^[. ]+|[. ]+$|[^\w .()=-]")  # would leave the folder, be hidden, or be rejected by a file system

_Path = TypeVar("_Path")


def media(folder: str | os.PathLike[str]) -> MediaWriter:
    """A writer of files named ``<folder>/<name>/<step>.<kind>``. A ``/`` in a name makes folders.

    Characters that file systems reject are percent-encoded, such as ``%3F`` for ``?``.

    Images are PNG, sounds WAV and texts Markdown. Videos are MP4 if PyAV is installed (``pip install
    'fxtrain[video]'``), and GIF otherwise or with an alpha channel. Tables and confusion matrices are JSON, point
    clouds PLY, and plotly figures HTML. Several images, videos or sounds of one name are numbered, as in
    ``00000100-3.png``. So are those in a table, which contains their file names. Captions are in a JSON file beside the
    images or videos, by file name. Non-finite floats are strings in JSON, such as ``"NaN"``.

    Files are neither moved nor deleted. After a rewind, or a resume from an earlier step, ``purge`` adds a line to
    ``<folder>/rewinds.jsonl``, and files are named after the number of lines, as in ``00000100.r1.png``. Files of later
    steps with a lower number are abandoned. ``read_media`` leaves them out.

    ``flush`` syncs the files and their names to the disk.

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
    check_path("folder", folder)
    return MediaWriter(Path(folder))


class MediaWriter(Backend):
    """Writes files. Created by ``media``."""

    kinds = frozenset((Text, Image, Video, Audio, Table, ConfusionMatrix, PointCloud, PlotlyFigure))

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._rewinds: int | None = None  # the number of rewinds, or None before the first value
        self._unsynced: list[Path] = []

    def put(self, step: int, values: Mapping[str, Value], event: LoopEvent | None) -> None:
        if self._rewinds is None:
            self._rewinds = _rewinds_in(self._folder).count(b"\n")
        stem = f"{step:08d}.r{self._rewinds}" if self._rewinds else f"{step:08d}"
        for name, value in values.items():
            place = self._folder / _safe(name)
            with explain_failure("media", place):
                if not place.is_dir():
                    make_folder(place)
                for file, content in _files(stem, value).items():
                    self._put(place / file, content)

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
        """Marks the files of later steps as abandoned, with a line in ``rewinds.jsonl``, unless there are none."""
        if not any(later > step for steps in read_media(self._folder).values() for later in steps):
            return
        append_lines(self._folder / REWINDS, json.dumps({REWOUND: step}).encode() + b"\n")
        self._rewinds = None

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


class MediaFile(NamedTuple):
    """What the name of a file states, in the order in which files of one name are read."""

    step: int
    rewinds: int  # before the file was written
    number: int  # among the files of a step
    kind: str  # the suffix, without its dot


def media_file(name: str) -> MediaFile | None:
    """Returns what the name of a file states, or None if ``media`` did not write it.

    Example:
        >>> media_file("00000100.r1-3.png"), media_file("notes.md")
        (MediaFile(step=100, rewinds=1, number=3, kind='png'), None)
    """
    found = _FILE.fullmatch(name)
    return None if found is None else MediaFile(int(found[1]), int(found[2] or 0), int(found[3] or 0), found[4])


def latest_files(files: Iterable[tuple[MediaFile, _Path]], rewinds: Rewinds) -> dict[int, list[_Path]]:
    """Returns the files of one name by step, without those that are abandoned or written again.

    Args:
        files: What each name states, and its path.
        rewinds: The rewinds of the folder, from ``rewinds_of``.
    """
    found: dict[int, tuple[int, list[_Path]]] = {}
    for (step, count, *_), path in sorted(files):
        if rewinds.keeps(count - 1, step):
            before, paths = found.get(step, (count, []))
            found[step] = count, [*paths, path] if before == count else [path]
    return {step: paths for step, (_, paths) in found.items()}


def rewinds_of(content: bytes) -> Rewinds:
    """Returns the rewinds in the content of ``rewinds.jsonl``. Skips damaged lines."""
    rewinds = Rewinds()
    for position, line in enumerate(content.split(b"\n")[:-1]):
        try:
            rewinds.add(position, int(json.loads(line)[REWOUND]))
        except (ValueError, KeyError, TypeError):
            continue
    return rewinds


def read_media(folder: str | os.PathLike[str]) -> dict[str, dict[int, list[Path]]]:
    """Returns the files of a run that ``media`` wrote, by name and step.

    Files that a rewind or a resume abandoned are left out. Of files written several times, the last are returned.

    Args:
        folder: The folder. It may be missing.

    Example:
        >>> import pathlib, tempfile
        >>> folder = pathlib.Path(tempfile.mkdtemp())
        >>> writer = media(folder)
        >>> for step in (1, 2, 3):
        ...     writer.write_texts(step, {"sample": f"text {step}"})
        >>> writer.purge(1)  # the run returns to step 1
        >>> writer.write_texts(2, {"sample": "another text"})
        >>> {step: path.name for step, (path,) in read_media(folder)["sample"].items()}
        {1: '00000001.md', 2: '00000002.r1.md'}
    """
    root = Path(folder)
    names: dict[str, list[tuple[MediaFile, Path]]] = {}
    for path in root.rglob("*"):
        if (stated := media_file(path.name)) is not None and path.parent != root:
            name = urllib.parse.unquote(path.parent.relative_to(root).as_posix())
            names.setdefault(name, []).append((stated, path))
    rewinds = rewinds_of(_rewinds_in(root))
    found = {name: latest_files(files, rewinds) for name, files in sorted(names.items())}
    return {name: files for name, files in found.items() if files}


def _rewinds_in(folder: Path) -> bytes:
    path = folder / REWINDS
    return path.read_bytes() if path.exists() else b""


def _files(stem: str, value: Value) -> dict[str, bytes]:
    match value:
        case Text(markdown):
            return {f"{stem}.md": markdown.encode()}
        case Image():
            return _captioned(stem, value, _numbered(stem, "png", [png(frame) for frame in value.frames]))
        case Video():
            endings, videos = zip(*(video(frames, value.fps) for frames in value.frames), strict=True)
            return _captioned(stem, value, _numbered(stem, endings[0], videos))
        case Audio():
            return _numbered(stem, "wav", [wav(waves, value.rate) for waves in value.waves])
        case Table():
            return _table(stem, value)
        case Figure():
            return {f"{stem}.html": value.html().encode()}
        case ConfusionMatrix():
            content = {"labels": value.labels, "counts": value.counts.tolist()}
            return {f"{stem}.json": json.dumps(content).encode()}
        case PointCloud():
            return {f"{stem}.ply": _ply(value)}
        case _:
            raise TypeError(f"expected a value that media stores as a file, got {describe(value)}.")


def _numbered(stem: str, ending: str, contents: Sequence[bytes]) -> dict[str, bytes]:
    if len(contents) == 1:
        return {f"{stem}.{ending}": contents[0]}
    return {f"{stem}-{index}.{ending}": content for index, content in enumerate(contents)}


def _captioned(stem: str, value: Image | Video, files: dict[str, bytes]) -> dict[str, bytes]:
    """Adds a file with the captions by file name, if there are any."""
    if not any(value.captions):
        return files
    captions = dict(zip(files, value.captions, strict=True))
    return {f"{stem}.json": json.dumps({"captions": captions}).encode(), **files}


def _table(stem: str, table: Table) -> dict[str, bytes]:
    files: dict[str, bytes] = {}

    def stored(cell: Cell | Media) -> Cell | Media:
        """Returns the name of a new file for an image, video or sound."""
        if not isinstance(cell, Media):
            return cell
        encoded = {name: data for name, data in _files(f"{stem}-{len(files)}", cell).items() if ".json" not in name}
        files.update(encoded)
        return next(iter(encoded))

    columns = {name: jsonable([stored(cell) for cell in cells]) for name, cells in table.cells().items()}
    return {f"{stem}.json": json.dumps({"columns": columns}, allow_nan=False).encode(), **files}


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
