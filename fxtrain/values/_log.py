"""Passes published values to the methods of writers."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fxtrain.values._confusion import ConfusionMatrix
from fxtrain.values._figure import Figure
from fxtrain.values._histogram import Histogram
from fxtrain.values._media import Audio, Image, Video, note_of_clipping
from fxtrain.values._points import PointCloud
from fxtrain.values._table import Table
from fxtrain.values._text import HParams, Text

KINDS: Mapping[type[Any], str] = {
    Text: "texts",
    Image: "images",
    Video: "videos",
    Audio: "sounds",
    Histogram: "histograms",
    Table: "tables",
    Figure: "figures",
    ConfusionMatrix: "confusion matrices",
    PointCloud: "point clouds",
    HParams: "hyper-parameters",
}
"""The kinds of values besides scalars, and their names in messages."""

_SIMPLER: Mapping[type[Any], tuple[tuple[type[Any], Callable[[Any], Any]], ...]] = {
    Figure: ((Image, lambda figure: figure.image()),),
    ConfusionMatrix: (
        (Image, lambda matrix: matrix.image()),
        (Table, lambda matrix: matrix.table()),
        (Text, lambda matrix: Text(matrix.table().markdown())),
    ),
    Table: ((Text, lambda table: Text(table.markdown())),),
}


def kind_of(value: Any) -> type[Any]:
    """Returns the class of a value, with ``float`` for all scalars."""
    return type(value) if type(value) in KINDS else float


def kept_by(writer: Any, kinds: frozenset[type[Any]], step: int, values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the values that a writer can keep, unchanged or converted to a simpler kind.

    Warns once per kind that the writer cannot keep, once per name that is clipped, and for each value out of range.

    Args:
        writer: The writer.
        kinds: The kinds that it keeps. ``float`` stands for scalars.
        step: The step of the values.
        values: Values by name.
    """
    kept: dict[str, Any] = {}
    for name, value in values.items():
        kind = kind_of(value)
        if kind not in kinds:
            make = next((make for simpler, make in _SIMPLER.get(kind, ()) if simpler in kinds), None)
            if make is None:
                _warn_once(
                    writer,
                    kind,
                    f"{type(writer).__name__} does not store {KINDS.get(kind, 'scalars')} and skips {name!r} and "
                    "similar values. Add a writer that does, such as fxtrain.writers.tensorboard or "
                    "fxtrain.writers.media.",
                )
                continue
            value = make(value)
        try:
            for part in value.columns.values() if isinstance(value, Table) else (value,):
                if type(part) in _ON_HOST:
                    _ON_HOST[type(part)](part)
                    if (clipped := note_of_clipping(part)) is not None:
                        _warn_once(writer, f"clipped {name}", f"{name!r} of step {step}: {clipped} {_CLIPPING}")
        except ValueError as error:
            warnings.warn(f"{name!r} of step {step} is not written: {error}", RuntimeWarning, stacklevel=3)
            continue
        kept[name] = value
    return kept


# Host conversion is cached on the value for all writers, and raises if the value is out of range.
_ON_HOST: Mapping[type[Any], Callable[[Any], Any]] = {
    Image: lambda image: image.frames,
    Video: lambda video: video.frames,
    Audio: lambda audio: audio.waves,
    Histogram: lambda histogram: histogram.buckets(),
}


def hand_over(writer: Any, step: int, values: Mapping[str, Any], event: Any = None) -> None:
    """Passes values to a writer, in one call of ``write`` if it has that, otherwise to clu's method for each kind.

    Args:
        writer: A ``fxtrain.writers.Writer``, or a clu writer.
        step: The step of the values.
        values: Values under the names of ``published``.
        event: The event that published them, or None.
    """
    if not values:
        return
    if hasattr(writer, "write"):
        writer.write(step, values, event)
        return
    kinds = kinds_of(writer)
    by_kind: dict[type[Any], dict[str, Any]] = {}
    for name, value in kept_by(writer, kinds, step, values).items():
        by_kind.setdefault(kind_of(value), {})[name] = value
    for kind, named in by_kind.items():
        write = getattr(writer, _VERBS[kind])
        if kind is Audio:
            for name, audio in named.items():  # sample rates may differ
                write(step, {name: audio.waves / 32767}, sample_rate=audio.rate)
        elif kind is PointCloud:
            for name, cloud in named.items():
                colors = None if cloud.colors is None else {name: cloud.colors.cpu().numpy()[None]}
                write(step, {name: cloud.points.float().cpu().numpy()[None]}, point_colors=colors)
        elif kind is HParams:
            for hparams in named.values():
                write(hparams.flat())
        else:
            write(step, {name: _FOR_VERBS.get(kind, lambda value: value)(value) for name, value in named.items()})


_FOR_VERBS: Mapping[type[Any], Callable[[Any], Any]] = {
    Text: lambda text: text.markdown,
    Image: lambda image: image.frames,
    Video: lambda video: video.frames,
    # A histogram of counts has no values, so values with the same distribution are written.
    Histogram: lambda histogram: histogram.spread(),
}

_VERBS: Mapping[type[Any], str] = {
    float: "write_scalars",
    Text: "write_texts",
    Image: "write_images",
    Video: "write_videos",
    Audio: "write_audios",
    Histogram: "write_histograms",
    PointCloud: "write_pointcloud",
    HParams: "write_hparams",
}


_CLIPPING = "Set limits= or scale the values. Later values of this name are clipped without a warning."


def _warn_once(writer: Any, about: Any, message: str) -> None:
    warned: set[Any] = getattr(writer, "__dict__", {}).setdefault("_left_out", set())
    if about not in warned:
        warned.add(about)
        warnings.warn(message, RuntimeWarning, stacklevel=4)


def hold_back(writer: Any, write: Callable[[], None]) -> None:
    """Registers a bound method that writes points held back for a writer.

    Args:
        writer: The writer.
        write: The method, which ``settle`` calls. It is weakly referenced.
    """
    getattr(writer, "__dict__", {}).setdefault("_held_back", []).append(weakref.WeakMethod(write))


def settle(writer: Any) -> None:
    """Writes the points held back for a writer, before any later ones, so that steps keep their order."""
    for each in getattr(writer, "_held_back", ()):
        write = each()
        if write is not None:
            write()


def share(writers: Sequence[Any]) -> None:
    """Suppresses the warnings of each writer about kinds that another writer of the run keeps."""
    kinds = [kinds_of(writer) for writer in writers]
    for index, writer in enumerate(writers):
        elsewhere = frozenset[type[Any]]().union(*kinds[:index], *kinds[index + 1 :])
        getattr(writer, "__dict__", {}).setdefault("_left_out", set()).update(elsewhere)


def kinds_of(writer: Any) -> frozenset[type[Any]]:
    """Returns the kinds that a writer keeps: its ``kinds``, or those for which it has clu's method."""
    return getattr(writer, "kinds", None) or frozenset(kind for kind, verb in _VERBS.items() if hasattr(writer, verb))


def take_back(writer: Any, step: int) -> None:
    """Makes a writer drop everything after a step. Warns if it cannot, because points will be duplicated.

    Args:
        writer: A ``fxtrain.writers.Writer``, or a clu writer.
        step: The last step to keep.
    """
    if hasattr(writer, "purge"):
        writer.purge(step)
    elif step > 0:
        warnings.warn(
            f"{type(writer).__name__} has no purge(step), so points after step {step} stay and will be duplicated.",
            RuntimeWarning,
            stacklevel=3,
        )


def try_all(*actions: Callable[[], Any]) -> None:
    """Runs every action, then raises the first error, so that one failure does not prevent other cleanup."""
    errors: list[Exception] = []
    for act in actions:
        try:
            act()
        except Exception as error:
            errors.append(error)
    if errors:
        raise errors[0]
