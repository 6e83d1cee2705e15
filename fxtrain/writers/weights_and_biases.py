"""Weights & Biases: a run on its page, or in files that ``wandb sync`` sends there later."""

from __future__ import annotations

import html
import io
import json
import os
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fxtrain.values import (
    Audio,
    ConfusionMatrix,
    Histogram,
    HParams,
    Image,
    PointCloud,
    Table,
    Text,
    Video,
)
from fxtrain.writers.disk import replace_file
from fxtrain.writers.encoding import gif, wav
from fxtrain.writers.interface import Backend, unwritable

_FILE = "wandb-run.json"
_MOST_BUCKETS = 512  # of wandb's


def wandb(
    folder: str | os.PathLike[str],
    *,
    project: str = "fxtrain",
    name: str | None = None,
    mode: str | None = None,
    **options: Any,
) -> WandbWriter:
    """A writer to Weights & Biases. The same folder is the same run there: a resumed session goes on in it.

    The run's step is the value ``step``, which every chart has as its axis. What was written cannot be taken back from
    a run there: where a session goes back to a step before the last one written, the points in between are there
    twice, and it says so. Numbers and texts may have any name; ``/`` makes sections.

    Args:
        folder: For wandb's files, and for the run's identity, ``wandb-run.json``.
        project: The project there.
        name: The run's name there.
        mode: ``"online"``, ``"offline"`` (files only) or ``"disabled"``; by default what ``WANDB_MODE`` says.
        options: More for ``wandb.init``: ``entity``, ``group``, ``tags``.

    Raises:
        ImportError: If wandb is not there.
        OSError: If the folder cannot be written to.

    Example:
        >>> import tempfile
        >>> writer = wandb(tempfile.mkdtemp(), mode="disabled")
        >>> writer.write_scalars(1, {"train/loss": 0.5})
        >>> writer.close()
    """
    try:
        import wandb  # noqa: F401
    except ImportError as error:
        raise ImportError("wandb is not there: pip install 'fxtrain[wandb]'.") from error
    path = Path(folder)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise unwritable("wandb", path, error) from error
    return WandbWriter(path, {"project": project, "name": name, "mode": mode, **options})


class WandbWriter(Backend):
    """Writes to Weights & Biases; made by ``wandb``. The run is begun, or gone on with, at the first value."""

    kinds = frozenset((float, Text, Image, Video, Audio, Histogram, Table, ConfusionMatrix, PointCloud, HParams))

    def __init__(self, folder: Path, options: dict[str, Any]) -> None:
        self._folder, self._options = folder, options
        self._run: Any = None
        self._last = self._known().get("step", 0)  # the last one written

    def put(self, step: int, values: Mapping[str, Any], event: Any) -> None:
        run = self._opened()
        config = {key: v for value in values.values() if isinstance(value, HParams) for key, v in value.flat().items()}
        if config:
            run.config.update(config, allow_val_change=True)
        shown = {name: self._shown(value) for name, value in values.items() if not isinstance(value, HParams)}
        if shown:
            run.log({"step": step, **shown})
            self._last = max(self._last, step)

    def purge(self, step: int) -> None:
        """Says that points are there twice, if something lies beyond the step."""
        if self._last > step:
            warnings.warn(
                f"Weights & Biases takes nothing back: what it has of steps {step + 1} to {self._last} stays, and will "
                "be there twice.",
                RuntimeWarning,
                stacklevel=3,
            )
            self._last = step

    def flush(self) -> None:
        """Remembers how far the run is. Its values wandb itself writes to the disk, in a process of its own."""
        if self._run is not None:
            self._remember()

    def close(self) -> None:
        if self._run is not None:
            self._remember()
            self._run.finish(quiet=True)
            self._run = None

    def _opened(self) -> Any:
        if self._run is None:
            import wandb

            known = self._known()
            self._run = wandb.init(
                dir=str(self._folder), id=known.get("id"), resume="allow" if known else None, **self._options
            )
            self._run.define_metric("step", hidden=True)
            self._run.define_metric("*", step_metric="step")
            self._remember()
        return self._run

    def _known(self) -> dict[str, Any]:
        path = self._folder / _FILE
        return json.loads(path.read_text()) if path.exists() else {}

    def _remember(self) -> None:
        content = json.dumps({"id": self._run.id, "step": self._last})
        replace_file(self._folder / _FILE, content.encode())

    def _shown(self, value: Any) -> Any:
        import wandb

        match value:
            case Text(markdown):
                return wandb.Html(f"<pre style='white-space: pre-wrap'>{html.escape(markdown)}</pre>", inject=False)
            case Image():
                return [_image(frame) for frame in value.frames]
            case Video():
                # A GIF made here: wandb's own encoder wants two more packages.
                return [wandb.Video(io.BytesIO(gif(frames, value.fps)), format="gif") for frames in value.frames]
            case Audio():
                return [_audio(waves, value.rate) for waves in value.waves]
            case Histogram():
                return wandb.Histogram(np_histogram=value.buckets(min(30, _MOST_BUCKETS)))
            case Table():
                return _table(value)
            case ConfusionMatrix():
                return _table(value.table())
            case PointCloud():
                points = value.points.float().cpu()
                if value.colors is not None:
                    points = points.new_tensor([[*p, *c] for p, c in zip(points, value.colors.cpu(), strict=True)])
                return wandb.Object3D(points.numpy())
            case _:
                return value


def _image(frame: Any) -> Any:
    import PIL.Image
    import wandb

    return wandb.Image(PIL.Image.fromarray(frame[..., 0] if frame.shape[-1] == 1 else frame))


def _audio(waves: Any, rate: int) -> Any:
    import wandb

    # A file of ours: wandb's own encoder wants another package. It copies the file as it is given.
    with tempfile.NamedTemporaryFile(suffix=".wav") as file:
        file.write(wav(waves, rate))
        file.flush()
        return wandb.Audio(file.name)


def _table(table: Table) -> Any:
    import wandb

    columns = [
        cells if isinstance(cells, list) else [_image(frame) for frame in cells] for cells in table.cells().values()
    ]
    return wandb.Table(columns=list(table.columns), data=[list(row) for row in zip(*columns, strict=True)])
