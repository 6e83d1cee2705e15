"""MLflow: a run in its tracking store."""

from __future__ import annotations

import os
import re
import tempfile
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fxtrain.values import HParams, kind_of
from fxtrain.writers.media import MediaWriter
from fxtrain.writers.remote import RemoteWriter

_METRICS, _PARAMETERS = 1000, 100  # what the store takes in one request,
_NAME, _LETTERS = 250, 6000  # of a name and of a parameter
_REFUSED = re.compile(r"[^\w. :-]")


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
    between are there twice, and it says so; nor does MLflow change a parameter. What it does not take of a name becomes
    ``_``.

    Args:
        folder: For the run's identity, ``mlflow-run.json``.
        uri: Of the tracking store: a server's address, ``sqlite:///runs.db`` if the whole of MLflow is installed, or
            ``file:///folder`` if ``MLFLOW_ALLOW_FILE_STORE`` is ``true``. By default what ``MLFLOW_TRACKING_URI`` says,
            or MLflow itself.
        experiment: Made if it is not there.
        name: The run's name there.

    Raises:
        ImportError: If MLflow is not there.
        OSError: If the folder cannot be written to.
        ValueError: If what the folder has of a run's identity cannot be read.
        mlflow.exceptions.MlflowException: If it does not take the address.

    Example:
        >>> import os, pathlib, tempfile
        >>> os.environ["MLFLOW_ALLOW_FILE_STORE"] = "true"
        >>> folder = pathlib.Path(tempfile.mkdtemp())
        >>> writer = mlflow(folder, uri=(folder / "runs").as_uri())
        >>> writer.write_scalars(1, {"train/loss": 0.5})
        >>> writer.close()
        >>> [path.read_text().split()[1:] for path in folder.rglob("metrics/train/loss")]
        [['0.5', '1']]
        >>> del os.environ["MLFLOW_ALLOW_FILE_STORE"]
    """
    try:
        from mlflow import MlflowClient
    except ImportError as error:
        raise ImportError("MLflow is not there: pip install 'fxtrain[mlflow]'.") from error
    return MlflowWriter(Path(folder), MlflowClient(uri), experiment, name)


class MlflowWriter(RemoteWriter):
    """Writes to MLflow; made by ``mlflow``. The run is begun, or gone on with, at the first value."""

    service, file = "MLflow", "mlflow-run.json"
    kinds = frozenset((float, HParams)) | MediaWriter.kinds

    def __init__(self, folder: Path, client: Any, experiment: str, name: str | None) -> None:
        super().__init__(folder)
        self._client, self._experiment, self._name = client, experiment, name

    def put(self, step: int, values: Mapping[str, Any], event: Any) -> None:
        from mlflow.entities import Metric, Param

        self._open()
        now = int(1000 * time.time())
        numbers = {name: value for name, value in values.items() if kind_of(value) is float}
        media = {name: value for name, value in values.items() if kind_of(value) in MediaWriter.kinds}
        config = {key: v for value in values.values() if isinstance(value, HParams) for key, v in value.flat().items()}
        metrics = [Metric(_named(name), float(value), now, step) for name, value in numbers.items()]
        for begin in range(0, len(metrics), _METRICS):
            self._client.log_batch(self._identity, metrics=metrics[begin : begin + _METRICS])
        parameters = [Param(name, value) for name, value in self._unknown(config).items()] if config else []
        for begin in range(0, len(parameters), _PARAMETERS):
            self._client.log_batch(self._identity, params=parameters[begin : begin + _PARAMETERS])
        if media:
            with tempfile.TemporaryDirectory() as files:
                MediaWriter(Path(files)).put(step, media, event)
                self._client.log_artifacts(self._identity, files, "media")
        if numbers or media:
            self._reached(step)

    def _unknown(self, config: Mapping[str, Any]) -> dict[str, str]:
        """The parameters that the run does not have yet. It refuses to change one, which is said."""
        known = self._client.get_run(self._identity).data.params
        given = {_named(name): str(value)[:_LETTERS] for name, value in config.items()}
        changed = [name for name, value in given.items() if known.get(name, value) != value]
        if changed:
            warnings.warn(
                f"MLflow changes no parameter of a run, so it still has {', '.join(changed)} as first written: begin a "
                "new run, in another folder, to have it right there.",
                RuntimeWarning,
                stacklevel=4,
            )
        return {name: value for name, value in given.items() if name not in known}

    def _begin(self, identity: str | None) -> str:
        if identity is not None:
            self._client.update_run(identity, status="RUNNING")
            return identity
        found = self._client.get_experiment_by_name(self._experiment)
        place = found.experiment_id if found else self._client.create_experiment(self._experiment)
        return self._client.create_run(place, run_name=self._name).info.run_id

    def _end(self) -> None:
        self._client.set_terminated(self._identity)


def _named(name: str) -> str:
    """A name that the store takes: a path of letters, digits and ``_-. :``."""
    parts = [_REFUSED.sub("_", part) for part in name[:_NAME].split("/")]
    return "/".join("_" if part in ("", ".", "..") else part for part in parts)
