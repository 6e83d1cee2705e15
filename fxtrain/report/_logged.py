"""Reads logged values from JSON Lines, CSV and media files, within a memory budget."""

from __future__ import annotations

import contextlib
import csv
import urllib.parse
from collections.abc import Callable, Iterator, Mapping
from pathlib import PurePosixPath

from fxtrain.core import truncate
from fxtrain.report import _validation as validation
from fxtrain.report._downsampling import BoundedSeries, Items, Points
from fxtrain.report._folder import Folder, Problems
from fxtrain.report._run import Cell, Confusion, Heights, Mark, Table
from fxtrain.writers._append_only import REWOUND, Rewinds
from fxtrain.writers._media import REWINDS, MediaFile, latest_files, media_file, rewinds_of

_MAX_TEXT = 2**16  # characters shown of a text
_MAX_ROWS = 50  # shown of a table
_MAX_NAMES = 2000  # per kind of value
_MAX_POINTS = 2**22  # in all curves; a point takes 50 to 70 bytes
_MAX_HEIGHTS = 2**22  # counts and edges in all histograms
_MAX_CHARACTERS = 2**24  # in all texts, and in all marks
_MAX_CAPTIONS = 20_000
_MAX_TABLES = 200
_MAX_COLUMNS = 50
_MAX_CELL = 500  # characters
_MAX_MATRICES = 20
_MAX_CLASSES = 2000
_OVERHEAD = 100  # memory cost of a text in addition to its characters
_CLOCKS = ("epoch", "time")  # JSON fields and CSV columns that are not metrics
_MEDIA = (".png", ".gif", ".mp4", ".wav", ".html")

Files = dict[str, dict[int, list[PurePosixPath]]]
"""Files by name and step, ordered by step and number."""


class Logged:
    """Logged values by name, in bounded memory.

    Args:
        folder: The run folder.
    """

    def __init__(self, folder: Folder) -> None:
        self._folder = folder
        self.curves: BoundedSeries[Points] = BoundedSeries(Points, budget=_MAX_POINTS, names=_MAX_NAMES)
        self.clocks: BoundedSeries[Points] = BoundedSeries(Points, budget=_MAX_POINTS // 4, names=len(_CLOCKS))
        self.texts: BoundedSeries[Items[str]] = BoundedSeries(Items, budget=_MAX_CHARACTERS, names=_MAX_NAMES)
        self.histograms: BoundedSeries[Items[Heights]] = BoundedSeries(Items, budget=_MAX_HEIGHTS, names=_MAX_NAMES)
        self.improved: BoundedSeries[Items[Mark]] = BoundedSeries(Items, budget=_MAX_CHARACTERS, names=_MAX_NAMES)
        self.tables: dict[str, Table] = {}
        self.confusion: dict[str, Confusion] = {}
        self.hparams: dict[str, object] = {}
        self.captions: dict[PurePosixPath, str] = {}
        self._time = self._earlier_time = 0.0  # of the session, and of all sessions before it
        self._kinds: dict[str, Callable[[str, int, object], object]] = {
            "metrics": self._take_number,
            "texts": self._take_text,
            "histograms": self._take_histogram,
            "tables": lambda name, step, value: self._take_table(name, step, {"columns": value}),
            "confusion": self._take_confusion,
        }

    def read_lines(self, path: str) -> None:
        """Reads values from the JSON Lines file ``path``."""
        rewinds = Rewinds()
        for count, content in self._folder.lines(path, quiet=True):
            if REWOUND.encode() in content:
                with contextlib.suppress(ValueError, KeyError):
                    line = validation.mapping(validation.parsed(content))
                    rewinds.add(count, validation.step(line[REWOUND]))
        for count, content in self._folder.lines(path):
            with self._folder.problems.recording(path, f"line {count}: "):
                line = validation.mapping(validation.parsed(content))
                self.hparams |= validation.mapping(line.get("hparams", {}))
                kinds = {kind: validation.mapping(line[kind]) for kind in self._kinds if kind in line}
                step = validation.step(line.get("step")) if kinds else validation.step(line.get(REWOUND, 0))
                if rewinds.keeps(count, step):
                    clocks = {name: line[name] for name in _CLOCKS if kinds and line.get(name) is not None}
                    self._take(path, f"line {count},", self._take_clock, step, clocks)
                    for kind, values in kinds.items():
                        self._take(path, f"line {count}, {kind}", self._kinds[kind], step, values)

    def read_rows(self, path: str) -> None:
        """Reads metrics from the CSV file ``path``."""
        rewinds = Rewinds()
        for count, step, cells in self._rows(path, quiet=True):
            if not cells:
                rewinds.add(count, step)
        for count, step, cells in self._rows(path):
            if rewinds.keeps(count, step):
                clocks = {name: cells.pop(name) for name in _CLOCKS if name in cells}
                self._take(path, f"line {count}, column", self._take_clock, step, clocks)
                self._take(path, f"line {count}, column", self._take_number, step, cells)

    def read_media(self, path: str) -> tuple[Files, Files]:
        """Finds the files written by ``writers.media``, and reads tables and confusion matrices from them.

        Args:
            path: The subfolder of the media, relative to the run folder.

        Returns:
            The files of images, videos and sounds, without images that belong to tables, and the files of texts.
        """
        names: dict[str, list[tuple[MediaFile, PurePosixPath]]] = {}
        rewinds = Rewinds()
        for parent, file in self._folder.walk(path):
            if (parent, file) == (path, REWINDS):
                rewinds = rewinds_of(self._folder.read(f"{path}/{REWINDS}") or b"")
            elif (stated := media_file(file)) is not None:
                with self._folder.problems.recording(f"{parent}/{file}"):
                    validation.step(stated.step)
                    # Folder names encode characters that file systems reject as %XX.
                    name = urllib.parse.unquote(PurePosixPath(parent).relative_to(path).as_posix())
                    names.setdefault(name, []).append((stated, PurePosixPath(parent, file)))
        found = [
            (name, step, file)
            for name in sorted(names)
            for step, files in latest_files(names[name], rewinds).items()
            for file in files
        ]
        in_tables: set[PurePosixPath] = set()
        for name, step, file in found:
            if file.suffix == ".json":
                in_tables |= self._read_table(name, step, file)
        media: Files = {}
        texts: Files = {}
        for name, step, file in found:
            if file.suffix == ".md":
                texts.setdefault(name, {}).setdefault(step, []).append(file)
            elif file.suffix in _MEDIA and file not in in_tables:
                media.setdefault(name, {}).setdefault(step, []).append(file)
        return media, texts

    def _read_table(self, name: str, step: int, file: PurePosixPath) -> set[PurePosixPath]:
        """Adds the captions, the table or the confusion matrix in a file, and returns the images of a table."""
        content = self._folder.read(str(file))
        if content is not None:
            with self._folder.problems.recording(str(file)):
                found = validation.mapping(validation.parsed(content))
                if "captions" in found:
                    captions = validation.mapping(found["captions"])
                    if len(self.captions) + len(captions) <= _MAX_CAPTIONS:
                        for beside, caption in captions.items():
                            self.captions[file.parent / beside] = truncate(validation.text(caption), _MAX_CELL)
                    return set()
                if "columns" in found:
                    return self._take_table(validation.name(name), step, found, file.parent)
                self._take_confusion(validation.name(name), step, found)
        return set()

    def _rows(self, path: str, *, quiet: bool = False) -> Iterator[tuple[int, int, dict[str, str]]]:
        """Yields the line number, the step and the other cells of each row, without empty cells."""
        problems = Problems() if quiet else self._folder.problems
        lines = self._folder.lines(path, quiet=quiet)
        rows = csv.reader(content.decode("utf-8", "replace") for _, content in lines)
        header: list[str] = []
        while True:
            try:
                row = next(rows, None)
                if row is None:
                    return
                if not header:
                    if "step" not in row:
                        got = validation.named(validation.words(row))
                        raise ValueError(f"expected columns with one named step, got {got}")
                    header = row
                    continue
                cells = dict(zip(header, row, strict=True))
                step = validation.step(int(cells.pop("step")))
            except (ValueError, csv.Error) as error:
                problems.add(path, f"line {rows.line_num}: {error}")
                if not header:
                    return
                continue
            yield rows.line_num, step, {name: cell for name, cell in cells.items() if cell}

    def _take(
        self, path: str, where: str, take: Callable[[str, int, object], object], step: int, values: Mapping[str, object]
    ) -> None:
        for name, value in values.items():
            try:
                take(validation.name(name), step, value)
            except ValueError as error:  # the other values of the line are still read
                self._folder.problems.add(path, f"{where} {validation.named(name)}: {error}")

    def _take_number(self, name: str, step: int, value: object) -> None:
        found = validation.number(value)
        self.curves.put(name, step, found)
        if name.endswith("/improved_by"):
            what = f"{name.removesuffix('/improved_by')} improved by {found:.4g}"
            self.improved.put(name, step, Mark(step, "improved", what), _OVERHEAD + len(what))

    def _take_clock(self, name: str, step: int, value: object) -> None:
        found = validation.number(value)
        if name == "time":
            if found < self._time:  # each session counts from zero
                self._earlier_time += self._time
            self._time = found
            found += self._earlier_time
        self.clocks.put(name, step, found)

    def _take_text(self, name: str, step: int, value: object) -> None:
        found = shortened_text(validation.text(value))
        self.texts.put(name, step, found, _OVERHEAD + len(found))

    def _take_histogram(self, name: str, step: int, value: object) -> None:
        found = validation.mapping(value)
        counts = validation.counts(found.get("counts"))
        edges = validation.edges(found.get("edges"), len(counts))
        self.histograms.put(name, step, Heights(counts, edges), len(counts) + len(edges))

    def _take_table(
        self, name: str, step: int, value: Mapping[str, object], beside: PurePosixPath | None = None
    ) -> set[PurePosixPath]:
        """Adds a table, unless there is a later one of the same name.

        Args:
            name: The name of the table.
            step: The step of the table.
            value: ``{"columns": {name: cells}}``.
            beside: The folder of images that cells refer to.

        Returns:
            The images in the table.

        Raises:
            ValueError: If ``value`` is not a valid table.
        """
        columns = {each: validation.listed(cells) for each, cells in validation.mapping(value["columns"]).items()}
        if not columns or len({len(cells) for cells in columns.values()}) > 1:
            raise ValueError(f"expected columns of equal length, got {sorted({len(c) for c in columns.values()})}")
        images = {
            beside / cell
            for cells in columns.values()
            for cell in cells
            if beside is not None and validation.is_file_of_table(cell)
        }
        if name not in self.tables and len(self.tables) >= _MAX_TABLES:
            raise ValueError(f"expected at most {_MAX_TABLES} tables, got more")
        if name not in self.tables or step >= self.tables[name].step:
            if len(columns) > _MAX_COLUMNS:
                raise ValueError(f"expected at most {_MAX_COLUMNS} columns, got {len(columns):,}")
            shown = {
                truncate(each, _MAX_CELL): [_cell(cell, beside) for cell in cells[:_MAX_ROWS]]
                for each, cells in columns.items()
            }
            self.tables[name] = Table(step, shown, len(next(iter(columns.values()))))
        return images

    def _take_confusion(self, name: str, step: int, value: object) -> None:
        """Adds a confusion matrix, unless there is a later one of the same name.

        Args:
            name: The name of the matrix.
            step: The step of the matrix.
            value: ``{"labels": [n], "counts": [n, n]}``.

        Raises:
            ValueError: If ``value`` is not a valid confusion matrix.
        """
        found = validation.mapping(value)
        labels = [truncate(validation.words(label), 100) for label in validation.listed(found.get("labels"))]
        if not 1 <= len(labels) <= _MAX_CLASSES:
            raise ValueError(f"expected from 1 to {_MAX_CLASSES:,} labels, got {len(labels):,}")
        counts = validation.square(found.get("counts"), len(labels))
        if name not in self.confusion and len(self.confusion) >= _MAX_MATRICES:
            raise ValueError(f"expected at most {_MAX_MATRICES} confusion matrices, got more")
        if name not in self.confusion or step >= self.confusion[name].step:
            self.confusion[name] = Confusion(step, labels, counts)


def shortened_text(text: str) -> str:
    """Returns ``text``, truncated with a note if it is very long."""
    return text if len(text) <= _MAX_TEXT else f"{text[:_MAX_TEXT]}\n\n({len(text) - _MAX_TEXT:,} more characters)"


def _cell(value: object, beside: PurePosixPath | None) -> Cell:
    if beside is not None and validation.is_file_of_table(value):
        return beside / value
    return value if isinstance(value, float) else truncate(validation.words(value), _MAX_CELL)
