"""The protocol of writers, after clu's ``MetricWriter``, and the base class of the writers in this package.

``Selection`` decides which values a writer keeps.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Generator, Iterable, Mapping
from pathlib import Path
from typing import ClassVar, Protocol, runtime_checkable

import numpy as np
import torch

from fxtrain.core import LoopEvent, RunInfo, describe, warn
from fxtrain.equivalents import refuse_foreign_callback
from fxtrain.values import (
    KINDS,
    Artifact,
    Audio,
    Histogram,
    HParams,
    Image,
    Kind,
    PointCloud,
    Scalar,
    Table,
    Text,
    Value,
    Video,
    kind_of,
    plain_number,
    simplified,
)
from fxtrain.values._nodes import note_of_clipping

Array = torch.Tensor | np.ndarray


@runtime_checkable
class Writer(Protocol):
    """Stores values by step and name. Names and arguments are those of clu, so clu's writers satisfy it too.

    Two optional methods are used if a writer has them. ``purge(step)`` marks everything after a step as abandoned when
    a run resumes or rewinds. Without it, points are duplicated. ``write(step, values, event)`` takes everything that an
    event published in one call, instead of one call per kind.

    Example:
        >>> from fxtrain.writers import console
        >>> isinstance(console(), Writer)
        True
    """

    def write_scalars(self, step: int, scalars: Mapping[str, Scalar | Array | np.generic]) -> None:
        """Writes scalars by name: Python numbers, 0-d arrays or 0-d tensors."""

    def write_images(self, step: int, images: Mapping[str, Array]) -> None:
        """Writes images by name, each uint8 or floating-point [N, H, W, C]."""

    def write_videos(self, step: int, videos: Mapping[str, Array]) -> None:
        """Writes videos by name, each uint8 or floating-point [N, T, H, W, C]."""

    def write_audios(self, step: int, audios: Mapping[str, Array], *, sample_rate: int) -> None:
        """Writes sounds by name, each floating-point [N, T, C]. ``sample_rate`` is in Hz."""

    def write_texts(self, step: int, texts: Mapping[str, str]) -> None:
        """Writes Markdown texts by name."""

    def write_histograms(
        self, step: int, arrays: Mapping[str, Array | Histogram], num_buckets: Mapping[str, int] | None = None
    ) -> None:
        """Writes the distributions of arrays.

        Args:
            step: The step of the values.
            arrays: Real arrays or tensors by name. The writers here also accept ``fxtrain.values.Histogram``.
            num_buckets: The number of buckets by name. Defaults to 30.
        """

    def write_hparams(self, hparams: Mapping[str, object]) -> None:
        """Writes the configuration of the run: strings, numbers and bools by name."""

    def flush(self) -> None:
        """Syncs written values to the disk."""

    def close(self) -> None:
        """Flushes and closes the files. The writers here reopen them for further values."""


def check_writer(owner: str, writer: object) -> None:
    """Raises TypeError unless ``writer`` has a method of writers, such as for a logger of another library.

    Args:
        owner: The function that it was passed to, for the error.
        writer: The value that was passed.
    """
    refuse_foreign_callback(owner, "writers of fxtrain.writers", writer)
    is_writer = any(callable(getattr(writer, name, None)) for name in ("write", "write_scalars"))
    if is_writer and not isinstance(writer, type):
        return
    if isinstance(writer, list | tuple):
        remedy = f"Unpack it: {owner}(*writers)."
    elif isinstance(writer, str | os.PathLike):
        remedy = f"Make a writer of the path, such as fxtrain.writers.tensorboard({os.fspath(writer)!r})."
    elif callable(getattr(writer, "add_scalar", None)):
        remedy = "Use fxtrain.writers.tensorboard(folder), which takes the folder."
    elif callable(writer):
        remedy = "Call it, as in fxtrain.writers.csv(path)."
    else:
        remedy = "Make one with a function of fxtrain.writers."
    raise TypeError(f"expected writers for {owner}(), got {describe(writer)}. {remedy}")


class Selection:
    """Selects the values that a writer can keep, and converts others to a simpler kind.

    Warns once per kind that the writer cannot keep, once per name that is clipped, and for each value out of range.

    Args:
        writer: The name of the writer, for warnings.
        kinds: The kinds that it keeps.
    """

    def __init__(self, writer: str, kinds: frozenset[Kind]) -> None:
        self.kinds = kinds
        self._writer = writer
        self._warned: set[Kind | str] = set()

    def silence(self, kinds: Iterable[Kind]) -> None:
        """Suppresses the warnings about kinds, because another writer of the run keeps them."""
        self._warned.update(kinds)

    def select(self, step: int, values: Mapping[str, Value]) -> dict[str, Value]:
        """Returns the values to write, by name.

        Args:
            step: The step of the values.
            values: Values by name.
        """
        kept: dict[str, Value] = {}
        for name, value in values.items():
            kind = kind_of(value)
            if kind is float and float in self.kinds:  # most values; they need no conversion
                kept[name] = value
                continue
            try:
                simpler = simplified(value, self.kinds)
            except ValueError as error:  # a figure that cannot be drawn
                self._warn_once(kind, f"{name!r} of step {step} and similar values are not written: {error}")
                continue
            if simpler is None and kind in (RunInfo, Artifact):
                continue  # observers pass these to all writers
            if simpler is None:
                other = "jsonl" if kind is float else "media"
                self._warn_once(
                    kind,
                    f"{self._writer} does not store {KINDS.get(kind, 'scalars')} and skips {name!r} and similar "
                    f"values. Add a writer that does, such as fxtrain.writers.tensorboard or fxtrain.writers.{other}.",
                )
                continue
            try:
                for clipped in _convert(simpler):
                    self._warn_once(
                        f"clipped {name}",
                        f"{name!r} of step {step}: {clipped} Set limits= or scale the values. Later values of this "
                        "name are clipped without a warning.",
                    )
            except ValueError as error:
                warn(f"{name!r} of step {step} is not written: {error}", RuntimeWarning)
                continue
            kept[name] = simpler
        return kept

    def _warn_once(self, about: Kind | str, message: str) -> None:
        if about not in self._warned:
            self._warned.add(about)
            warn(message, RuntimeWarning)


def _convert(value: Value) -> list[str]:
    """Converts a value on the host, where all writers find it, and returns descriptions of what was clipped.

    Raises:
        ValueError: The value is out of range.
    """
    notes: list[str] = []
    for part in _parts(value):
        match part:
            case Image() | Video():
                _ = part.frames
            case Audio():
                _ = part.waves
            case Histogram():
                part.buckets()
            case _:
                continue
        if (clipped := note_of_clipping(part)) is not None:
            notes.append(clipped)
    return notes


def _parts(value: Value) -> Iterable[object]:
    """Returns the columns of a table, or the cells of those that are lists. Other values have one part."""
    if not isinstance(value, Table):
        return [value]
    return [part for column in value.columns.values() for part in (column if isinstance(column, list) else [column])]


class Backend:
    """Implements clu's methods with one method, ``put``. A subclass defines ``kinds`` and ``put``.

    Values of other kinds are converted to a simpler kind, such as tables to texts, or left out with one warning.

    Example:
        >>> class Printer(Backend):
        ...     kinds = frozenset((float, Text))
        ...     def put(self, step, values, event):
        ...         print(step, values)
        >>> Printer().write_scalars(1, {"loss": 0.5})
        1 {'loss': 0.5}
    """

    kinds: ClassVar[frozenset[Kind]]  # ``float`` stands for scalars

    @functools.cached_property
    def selection(self) -> Selection:
        """Selects the values that the writer can keep."""
        return Selection(type(self).__name__, self.kinds)

    @property
    def keeps(self) -> frozenset[Kind]:
        """The kinds that the writer, or the writers that it passes values to, keep."""
        return self.kinds

    def put(self, step: int, values: Mapping[str, Value], event: LoopEvent | None) -> None:
        """Writes values of the writer's own kinds.

        Args:
            step: The step of the values.
            values: At least one value by name. Scalars are ``bool``, ``int`` or ``float``.
            event: The event that published them, or None.
        """
        raise NotImplementedError

    def write(self, step: int, values: Mapping[str, Value], event: LoopEvent | None = None) -> None:
        """Writes values of any kind.

        Args:
            step: The step of the values.
            values: Scalars and values of ``fxtrain.values`` by name.
            event: The event that published them, or None.
        """
        kept = self.selection.select(step, values)
        if kept:
            self.put(int(step), {name: plain_number(value) for name, value in kept.items()}, event)

    def contain_failures(self) -> None:
        """Makes a writer that raises errors at a later call queue and retry what it misses instead."""

    def take_failure(self) -> Exception | None:
        """Returns the first error contained since the last call, for runs that require the writer."""
        return None

    def flush(self) -> None:
        """Syncs written values to the disk."""

    def close(self) -> None:
        """Flushes and closes the files."""

    def write_summaries(
        self, step: int, values: Mapping[str, Array], metadata: Mapping[str, object] | None = None
    ) -> None:
        """Writes arrays of third-party plugins as histograms, because their meaning is not known here."""
        self.write_histograms(step, values)

    def write_scalars(self, step: int, scalars: Mapping[str, Scalar | Array | np.generic]) -> None:
        self.write(step, scalars)

    def write_images(self, step: int, images: Mapping[str, Array]) -> None:
        self.write(step, {name: Image(pixels) for name, pixels in images.items()})

    def write_videos(self, step: int, videos: Mapping[str, Array]) -> None:
        self.write(step, {name: Video(pixels) for name, pixels in videos.items()})

    def write_audios(self, step: int, audios: Mapping[str, Array], *, sample_rate: int) -> None:
        self.write(step, {name: Audio(samples, sample_rate) for name, samples in audios.items()})

    def write_texts(self, step: int, texts: Mapping[str, str]) -> None:
        self.write(step, {name: Text(markdown) for name, markdown in texts.items()})

    def write_histograms(
        self, step: int, arrays: Mapping[str, Array | Histogram], num_buckets: Mapping[str, int] | None = None
    ) -> None:
        found: dict[str, Histogram] = {}
        for name, array in arrays.items():
            given = array if isinstance(array, Histogram) else Histogram(torch.as_tensor(array))
            counts, edges = given.buckets((num_buckets or {}).get(name, 30))
            found[name] = Histogram(counts=torch.from_numpy(counts), edges=torch.from_numpy(edges))
        self.write(step, found)

    def write_pointcloud(
        self,
        step: int,
        point_clouds: Mapping[str, Array],
        *,
        point_colors: Mapping[str, Array] | None = None,
        configs: Mapping[str, object] | None = None,
    ) -> None:
        found: dict[str, PointCloud] = {}
        for name, points in point_clouds.items():
            colors = (point_colors or {}).get(name)
            for index, cloud in enumerate(points):
                color = None if colors is None else colors[index]
                found[numbered(name, index, len(points))] = PointCloud(cloud, color)
        self.write(step, found)

    def write_hparams(self, hparams: Mapping[str, object]) -> None:
        self.write(0, {"hparams": HParams(hparams)})


def with_captions(value: Image | Video) -> list[tuple[np.ndarray, str | None]]:
    """Returns each image or video of a value on the host, with its caption or None."""
    captions: Iterable[str | None] = value.captions or [None] * len(value.frames)
    return list(zip(value.frames, captions, strict=True))


@contextlib.contextmanager
def explain_failure(writer: str, path: Path) -> Generator[None]:
    """Makes an ``OSError`` state what cannot be written and why, and what to do."""
    try:
        yield
    except BlockingIOError:  # another writer has the file open, which the error explains
        raise
    except OSError as error:
        raise OSError(
            f"{writer} cannot write to {path} ({error.strerror or error}). Use a writable path, on a disk with free "
            "space."
        ) from error


def numbered(name: str, index: int, count: int) -> str:
    """Returns the name of one of ``count`` values, or the name itself if there is only one.

    Example:
        >>> numbered("samples", 2, 16), numbered("samples", 0, 1)
        ('samples/2', 'samples')
    """
    return name if count == 1 else f"{name}/{index}"
