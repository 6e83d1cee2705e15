"""Runs of Weights & Biases, online or in files that ``wandb sync`` uploads later."""

from __future__ import annotations

import contextlib
import functools
import io
import os
import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fxtrain.core import RunInfo, check_path, escape_html
from fxtrain.values import (
    Artifact,
    Audio,
    ConfusionMatrix,
    Figure,
    Histogram,
    HParams,
    Image,
    PointCloud,
    Table,
    Text,
    Value,
    Video,
)
from fxtrain.values._encoders import video, wav
from fxtrain.values._figure import PlotlyFigure, WandbChart
from fxtrain.writers._backlog import PendingCall
from fxtrain.writers._interface import numbered, with_captions
from fxtrain.writers._outbox import CLOSE_SECONDS
from fxtrain.writers._remote import RemoteWriter

_MAX_BUCKETS = 512  # wandb raises beyond this
_MAX_MEDIA = 108  # wandb drops the rest of a name beyond this
_REJECTED = re.compile(r"[^\w.-]")  # in the name of an artifact
_LIMITS = {"init_timeout": 10.0, "finish_timeout": CLOSE_SECONDS}


def wandb(
    folder: str | os.PathLike[str],
    *,
    project: str | None = None,
    name: str | None = None,
    mode: str | None = None,
    **options: Any,
) -> WandbWriter:
    """A writer to Weights & Biases. A resumed session with the same folder continues the same run.

    A thread passes the values to wandb. Training waits for the service only in a flush, for at most 5 seconds. Up to
    10,000 points and 64 MiB are queued until the run has begun. Beyond that, the oldest points are dropped. Closing
    waits for at most 20 seconds, or 5 if the service does not answer. Points that wandb has accepted by then are in its
    files, for ``wandb sync``. Each outage and the number of lost points cause a warning. If the server stays silent,
    wandb's own process may delay the program's exit by about 20 more seconds.

    The step of the run is the value ``step``, which is the axis of all charts. Points cannot be deleted from a run: if
    a session returns to a step before the last one written, the points in between are duplicated, with a warning.
    Values may have any name except ``step``, and a ``/`` in a name makes sections.

    Offline, each session has its own files, and one ``wandb sync`` uploads all of them in order. Until then, tables are
    stored in ``WANDB_DATA_DIR``, so sync on the same machine.

    ``values.Artifact`` becomes a version of the artifact ``<name>-<id of the run>``.

    Args:
        folder: The folder of wandb's files, and of the run's identity, ``wandb-run.json``.
        project: The project of the run. Defaults to that of ``fit(run=...)``, or else to ``"fxtrain"``.
        name: The name of the run in the project. Defaults to that of ``fit(run=...)``, and so do the options ``group``,
            ``tags`` and ``notes``, its description.
        mode: ``"online"``, ``"offline"`` (files only) or ``"disabled"``. Defaults to ``WANDB_MODE``.
        options: Further options of ``wandb.init``, such as ``entity``, ``group`` and ``tags``. The run is separate from
            a run that the program has begun, unless ``reinit`` is given.

    Raises:
        ImportError: wandb is not installed.
        OSError: The folder cannot be written to.

    Example:
        >>> import tempfile
        >>> writer = wandb(tempfile.mkdtemp(), mode="disabled")
        >>> writer.write_scalars(1, {"train/loss": 0.5})
        >>> writer.close()
    """
    check_path("folder", folder)
    try:
        import wandb  # noqa: F401
    except ImportError as error:
        raise ImportError("writers.wandb needs wandb. Install it with pip install 'fxtrain[wandb]'.") from error
    return WandbWriter(Path(folder), {"project": project, "name": name, "mode": mode, **options})


class WandbWriter(RemoteWriter):
    """Writes to Weights & Biases. Created by ``wandb``. The run is created or continued at the first value."""

    service, file = "Weights & Biases", "wandb-run.json"
    kinds = frozenset(
        (float, Text, Image, Video, Audio, Histogram, Table, ConfusionMatrix, PointCloud, HParams, RunInfo, Artifact)
    ) | {PlotlyFigure, WandbChart}

    def __init__(self, folder: Path, options: dict[str, object]) -> None:
        super().__init__(folder)
        self._options = options

    def check(self, values: Mapping[str, Value]) -> None:
        if "step" in values:
            raise ValueError("expected names other than 'step', the axis of wandb's charts. Rename the value.")

    def _session(self) -> WandbSession:
        return WandbSession(self, self._folder, self._options)


class WandbSession:
    """The calls of one session, made by one thread."""

    def __init__(self, writer: WandbWriter, folder: Path, options: dict[str, object]) -> None:
        self._writer, self._folder, self._options = writer, folder, options
        self._run: Any = None

    def begin(self) -> None:
        import wandb

        # A new run, because init by default returns a run that the program may have begun.
        info = self._writer.run
        known = {"project": info.project or "fxtrain", "group": info.group, "name": info.name}
        known |= {"notes": info.description, "tags": info.tags or None}
        given = {name: value for name, value in self._options.items() if value is not None}
        options = {"reinit": "create_new", **known, **given}
        options.setdefault("settings", _settings())
        identity = self._writer.identity
        resume = None if identity is None else "allow"
        self._run = wandb.init(dir=str(self._folder), id=identity, resume=resume, **options)
        self._run.define_metric("step", hidden=True)
        self._run.define_metric("*", step_metric="step")
        self._writer.identified(self, self._run.id)

    def send(self, calls: list[PendingCall]) -> None:
        for call in calls:
            self._log(call.step, call.values or {})
        self._writer.reached(self, calls)

    def _log(self, step: int, values: Mapping[str, Value]) -> None:
        config = {key: v for value in values.values() if isinstance(value, HParams) for key, v in value.flat().items()}
        if config:
            self._run.config.update(config, allow_val_change=True)
        # wandb copies files when it logs them, so they must exist until then.
        with contextlib.ExitStack() as files:
            shown: dict[str, Any] = {}
            for name, value in values.items():
                if isinstance(value, Artifact):
                    self._writer.upload(name, value, functools.partial(self._upload, step, name, value))
                    continue
                shown |= _as_wandb(name, value, files)
            if shown:
                self._run.log({"step": step, **shown})

    def _upload(self, step: int, name: str, artifact: Artifact, path: Path) -> None:
        import wandb

        # Names are shared by all runs of a project.
        made = wandb.Artifact(f"{_REJECTED.sub('-', name)}-{self._run.id}", artifact.kind, metadata={"step": step})
        if path.is_dir():
            made.add_dir(str(path))
        else:
            made.add_file(str(path))
        self._run.log_artifact(made, aliases=list(dict.fromkeys(("latest", *artifact.aliases))))

    def end(self) -> None:
        run, self._run = self._run, None
        if run is not None:
            run.finish()

    def is_refusal(self, error: Exception) -> bool:
        # wandb handles uploads in its own process, so an error here comes from the values.
        return not isinstance(error, OSError)


def _settings() -> Any:
    """Returns limits for wandb, which would block for minutes to begin and forever to end, even at exit."""
    import wandb

    known = getattr(wandb.Settings, "model_fields", {})
    limits: dict[str, Any] = {name: seconds for name, seconds in _LIMITS.items() if name in known}
    return wandb.Settings(**limits)


def _as_wandb(name: str, value: Value, files: contextlib.ExitStack) -> dict[str, Any]:
    """Converts a value to wandb's types, under one name or several."""
    import wandb

    match value:
        case Text(markdown):
            page = f"<pre style='white-space: pre-wrap'>{escape_html(markdown)}</pre>"
            return {name: wandb.Html(page, inject=False)}
        case Image():
            return _panels(name, _images(value))
        case Video():
            return _panels(name, _videos(value))
        case Audio():
            # One per name, because wandb needs another package for a list of sounds.
            sounds = [_audio(waves, value.rate, files) for waves in value.waves]
            return {numbered(name, index, len(sounds)): sound for index, sound in enumerate(sounds)}
        case Histogram():
            return {name: wandb.Histogram(np_histogram=_merge_buckets(*value.buckets()))}
        case Table():
            return {name: _table(value, files)}
        case Figure():
            return {name: wandb.Plotly(value.plotly()) if value.kind is PlotlyFigure else value.source}
        case ConfusionMatrix():
            return {name: _table(value.table(), files)}
        case PointCloud():
            points = value.points.double().cpu()
            if value.colors is not None:
                points = torch.cat([points, value.colors.double().cpu()], 1)
            return {name: wandb.Object3D(points.numpy())}
        case HParams() | RunInfo():
            return {}  # part of the run's configuration, not a chart
        case _:
            return {name: value}


def _panels(name: str, media: Sequence[object]) -> dict[str, Any]:
    """Splits media of one name into lists that wandb accepts."""
    begins = range(0, len(media), _MAX_MEDIA)
    return {numbered(name, index, len(begins)): media[begin : begin + _MAX_MEDIA] for index, begin in enumerate(begins)}


def _images(value: Image) -> list[Any]:
    import PIL.Image
    import wandb

    return [
        wandb.Image(PIL.Image.fromarray(frame[..., 0] if frame.shape[-1] == 1 else frame), caption=caption)
        for frame, caption in with_captions(value)
    ]


def _videos(value: Video) -> list[Any]:
    import wandb

    # Encoded here, because wandb's encoder needs two more packages.
    found: list[Any] = []
    for frames, caption in with_captions(value):
        ending, content = video(frames, value.fps)
        found.append(wandb.Video(io.BytesIO(content), format=ending, caption=caption))
    return found


def _audio(waves: np.ndarray, rate: int, files: contextlib.ExitStack) -> Any:
    import wandb

    # Encoded here, because wandb's encoder needs another package.
    file = files.enter_context(tempfile.NamedTemporaryFile(suffix=".wav"))  # noqa: SIM115 -- the stack closes it
    file.write(wav(waves, rate))
    file.flush()
    return wandb.Audio(file.name)


def _table(table: Table, files: contextlib.ExitStack) -> Any:
    import wandb
    from wandb.sdk.data_types._dtypes import AnyType

    def shown(cell: object) -> object:
        match cell:
            case Image():
                return _images(cell)[0]
            case Video():
                return _videos(cell)[0]
            case Audio():
                return _audio(cell.waves[0], cell.rate, files)
            case _:
                return cell

    columns = [map(shown, cells) for cells in table.cells().values()]
    rows: list[Any] = [list(row) for row in zip(*columns, strict=True)]
    # Images, videos and sounds are shown only in columns of their type. Other columns may be mixed.
    shown_as = {Image: wandb.Image, Video: wandb.Video, Audio: wandb.Audio}
    kinds = [{shown_as.get(type(cell)) for cell in cells if cell is not None} for cells in table.cells().values()]
    types: list[Any] = [next(iter(kind)) if len(kind) == 1 and None not in kind else AnyType for kind in kinds]
    return wandb.Table(columns=list(table.columns), data=rows, dtype=types)


def _merge_buckets(counts: np.ndarray, edges: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Merges neighboring buckets down to the number that wandb accepts."""
    group = -(-len(counts) // _MAX_BUCKETS)
    first = np.arange(0, len(counts), group)
    return np.add.reduceat(counts, first), np.append(edges[first], edges[-1])
