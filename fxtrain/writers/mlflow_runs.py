"""MLflow: a run in its tracking store."""

from __future__ import annotations

import json
import os
import tempfile
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fxtrain.values import HParams, kind_of
from fxtrain.writers.disk import replace_file
from fxtrain.writers.interface import Backend, unwritable
from fxtrain.writers.media import MediaWriter

_FILE = "mlflow-run.json"
_AT_ONCE = 100  # what the store takes of parameters in one request


def mlflow(
    folder: str | os.PathLike[str],
    *,
    uri: str | None = None,
    experiment: str = "fxtrain",
    name: str | None = None,
) -> MlflowWriter:
    """A writer to MLflow. The same folder is the same run there: a resumed session goes on in it.

    Numbers are metrics, hyper-parameters are parameters, and media are artifacts, the files of ``writers.media``. What
    was written cannot be taken back: where a session goes back to a step before the last one written, the points in
    between are there twice, and it says so.

    Args:
        folder: For the run's identity, ``mlflow-run.json``.
        uri: Of the tracking store; by default what ``MLFLOW_TRACKING_URI`` says, or MLflow itself.
        experiment: Made if it is not there.
        name: The run's name there.

    Raises:
        ImportError: If MLflow is not there.
        OSError: If the folder cannot be written to.
    """
    try:
        import mlflow  # noqa: F401
    except ImportError as error:
        raise ImportError("MLflow is not there: pip install 'fxtrain[mlflow]'.") from error
    path = Path(folder)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise unwritable("mlflow", path, error) from error
    return MlflowWriter(path, uri, experiment, name)


class MlflowWriter(Backend):
    """Writes to MLflow; made by ``mlflow``. The run is begun, or gone on with, at the first value."""

    kinds = frozenset((float, HParams)) | MediaWriter.kinds

    def __init__(self, folder: Path, uri: str | None, experiment: str, name: str | None) -> None:
        self._folder, self._uri, self._experiment, self._name = folder, uri, experiment, name
        self._client: Any = None
        self._run = ""
        self._last = self._known().get("step", 0)  # the last one written

    def put(self, step: int, values: Mapping[str, Any], event: Any) -> None:
        from mlflow.entities import Metric, Param

        client, now = self._opened(), int(1000 * time.time())
        numbers = {name: value for name, value in values.items() if kind_of(value) is float}
        media = {name: value for name, value in values.items() if kind_of(value) in MediaWriter.kinds}
        config = {key: v for value in values.values() if isinstance(value, HParams) for key, v in value.flat().items()}
        if numbers:
            metrics = [Metric(_named(name), float(value), now, step) for name, value in numbers.items()]
            client.log_batch(self._run, metrics=metrics)
        parameters = [Param(_named(name), str(value)) for name, value in config.items()]
        for begin in range(0, len(parameters), _AT_ONCE):
            client.log_batch(self._run, params=parameters[begin : begin + _AT_ONCE])
        if media:
            with tempfile.TemporaryDirectory() as files:
                MediaWriter(Path(files)).put(step, media, event)
                client.log_artifacts(self._run, files, "media")
        if numbers or media:
            self._last = max(self._last, step)

    def purge(self, step: int) -> None:
        """Says that points are there twice, if something lies beyond the step."""
        if self._last > step:
            warnings.warn(
                f"MLflow takes nothing back: what it has of steps {step + 1} to {self._last} stays, and will be there "
                "twice.",
                RuntimeWarning,
                stacklevel=3,
            )
            self._last = step

    def flush(self) -> None:
        """Remembers how far the run is: the store has everything already."""
        if self._client is not None:
            self._remember()

    def close(self) -> None:
        if self._client is not None:
            self._remember()
            self._client.set_terminated(self._run)
            self._client = None

    def _opened(self) -> Any:
        if self._client is None:
            from mlflow import MlflowClient

            self._client = MlflowClient(self._uri)
            known = self._known()
            if known:
                self._run = known["id"]
                self._client.update_run(self._run, status="RUNNING")
            else:
                found = self._client.get_experiment_by_name(self._experiment)
                place = found.experiment_id if found else self._client.create_experiment(self._experiment)
                self._run = self._client.create_run(place, run_name=self._name).info.run_id
            self._remember()
        return self._client

    def _known(self) -> dict[str, Any]:
        path = self._folder / _FILE
        return json.loads(path.read_text()) if path.exists() else {}

    def _remember(self) -> None:
        replace_file(self._folder / _FILE, json.dumps({"id": self._run, "step": self._last}).encode())


def _named(name: str) -> str:
    """A name that the store takes: others have letters, digits and ``_-. :/`` only."""
    return "".join(letter if letter.isalnum() or letter in "_-. :/" else "_" for letter in name)
