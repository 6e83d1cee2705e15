"""Runs in MLflow's tracking store."""

from __future__ import annotations

import functools
import os
import re
import tempfile
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fxtrain.core import RunInfo, check_path
from fxtrain.values import Artifact, HParams
from fxtrain.writers._backlog import PendingCall
from fxtrain.writers._media import MediaWriter
from fxtrain.writers._remote import RemoteWriter

if TYPE_CHECKING:
    from mlflow import MlflowClient

_MAX_METRICS, _MAX_PARAMETERS = 1000, 100  # the store's limits per request
_MAX_NAME, _MAX_PARAMETER = 250, 6000  # its limits on the length of a name and of a parameter
_REJECTED = re.compile(r"[^\w. :-]")


def mlflow(
    folder: str | os.PathLike[str],
    *,
    uri: str | None = None,
    experiment: str | None = None,
    name: str | None = None,
) -> MlflowWriter:
    """A writer to MLflow. A resumed session with the same folder continues the same run.

    A thread sends the values. Training waits for the server only in a flush, for at most 5 seconds, and not again while
    the server does not answer. Up to 10,000 points and 64 MiB are queued until it answers. Beyond that, the oldest
    points are dropped. Closing waits for at most 20 seconds, or 5 if the server does not answer. Each outage and the
    number of lost points cause a warning. A request that hangs is aborted after 10 seconds and retried, unless
    ``MLFLOW_HTTP_REQUEST_TIMEOUT`` and ``MLFLOW_HTTP_REQUEST_MAX_RETRIES`` set other limits.

    Scalars become metrics, hyperparameters become parameters, and media become artifacts, with the files of
    ``writers.media``. MLflow cannot delete points: if a session returns to a step before the last one written, the
    points in between are duplicated, with a warning. It cannot change parameters either. Characters that it rejects in
    names become ``_``.

    ``values.Artifact`` is uploaded as ``<name>/step-<step>``, and the tag ``<name>.<alias>`` of the run is the place
    of the version with this alias, such as ``latest``.

    Args:
        folder: The folder of the run's identity, ``mlflow-run.json``.
        uri: The tracking store: a server's address, ``sqlite:///runs.db`` if all of MLflow is installed, or
            ``file:///folder`` if ``MLFLOW_ALLOW_FILE_STORE`` is ``true``. Defaults to ``MLFLOW_TRACKING_URI``, or else
            to MLflow's default.
        experiment: The experiment, created if it is missing. Defaults to the project of ``fit(run=...)``, or else to
            ``"fxtrain"``.
        name: The name of the run in MLflow. Defaults to that of ``fit(run=...)``. Its group, tags and description
            become tags of the run.

    Raises:
        ImportError: MLflow is not installed.
        OSError: The folder cannot be written to.
        mlflow.exceptions.MlflowException: MLflow rejects ``uri``.

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
    check_path("folder", folder)
    try:
        from mlflow import MlflowClient
    except ImportError as error:
        raise ImportError("writers.mlflow needs MLflow. Install it with pip install 'fxtrain[mlflow]'.") from error
    return MlflowWriter(Path(folder), MlflowClient(uri), experiment, name)


class MlflowWriter(RemoteWriter):
    """Writes to MLflow. Created by ``mlflow``. The run is created or continued at the first value."""

    service, file = "MLflow", "mlflow-run.json"
    kinds = frozenset((float, HParams, RunInfo, Artifact)) | MediaWriter.kinds

    def __init__(self, folder: Path, client: MlflowClient, experiment: str | None, name: str | None) -> None:
        super().__init__(folder)
        self._client, self._experiment, self._name = client, experiment, name

    def _session(self) -> MlflowSession:
        return MlflowSession(self, self._client, self._experiment, self._name)


class MlflowSession:
    """The requests of one session, made by one thread."""

    def __init__(self, writer: MlflowWriter, client: MlflowClient, experiment: str | None, name: str | None) -> None:
        self._writer, self._client, self._experiment, self._name = writer, client, experiment, name
        self._run = ""

    def begin(self) -> None:
        limit_requests()
        self._run = self._begun(self._writer.identity)
        self._writer.identified(self, self._run)

    def send(self, calls: list[PendingCall]) -> None:
        from mlflow.entities import Metric, Param

        metrics: list[Any] = []
        config: dict[str, Any] = {}
        media: list[tuple[int, dict[str, Any]]] = []
        artifacts: list[tuple[int, str, Artifact]] = []
        for call in calls:
            shown: dict[str, Any] = {}
            for name, value in (call.values or {}).items():
                if isinstance(value, bool | int | float):
                    metrics.append(Metric(_accepted_name(name), float(value), call.milliseconds, call.step))
                elif isinstance(value, HParams):
                    config |= value.flat()
                elif isinstance(value, RunInfo):
                    self._tag(value)
                elif isinstance(value, Artifact):
                    artifacts.append((call.step, name, value))
                else:
                    shown[name] = value
            media += [(call.step, shown)] if shown else []
        for begin in range(0, len(metrics), _MAX_METRICS):
            self._client.log_batch(self._run, metrics=metrics[begin : begin + _MAX_METRICS])
        parameters = [Param(name, value) for name, value in self._new_parameters(config).items()] if config else []
        for begin in range(0, len(parameters), _MAX_PARAMETERS):
            self._client.log_batch(self._run, params=parameters[begin : begin + _MAX_PARAMETERS])
        if media:
            with tempfile.TemporaryDirectory() as files:
                for step, named in media:
                    MediaWriter(Path(files)).put(step, named, None)
                self._client.log_artifacts(self._run, files, "media")
        for step, name, artifact in artifacts:
            self._writer.upload(name, artifact, functools.partial(self._upload, step, _accepted_name(name), artifact))
        self._writer.reached(self, calls)

    def end(self) -> None:
        self._client.set_terminated(self._run)

    def is_refusal(self, error: Exception) -> bool:
        from mlflow.exceptions import MlflowException

        if isinstance(error, MlflowException):
            return error.get_http_status_code() in (400, 404, 409, 413, 422)
        return not isinstance(error, OSError)

    def _upload(self, step: int, name: str, artifact: Artifact, path: Path) -> None:
        place = f"{name}/step-{step:09d}"
        log = self._client.log_artifacts if path.is_dir() else self._client.log_artifact
        log(self._run, str(path), place)
        for alias in ("latest", *artifact.aliases):
            self._client.set_tag(self._run, _accepted_name(f"{name}.{alias}"), place)

    def _new_parameters(self, config: Mapping[str, object]) -> dict[str, str]:
        """Returns the parameters that the run does not have yet. Warns about changed ones, which MLflow rejects."""
        known = self._client.get_run(self._run).data.params
        given = {_accepted_name(name): str(value)[:_MAX_PARAMETER] for name, value in config.items()}
        changed = [name for name, value in given.items() if known.get(name, value) != value]
        if changed:
            self._writer.tell(
                f"MLflow cannot change parameters of a run, so it keeps the first values of {', '.join(changed)}. "
                "Start a new run in another folder to record the new values."
            )
        return {name: value for name, value in given.items() if name not in known}

    def _begun(self, identity: str | None) -> str:
        if identity is not None:
            self._client.update_run(identity, status="RUNNING")
            return identity
        info = self._writer.run
        experiment = self._experiment or info.project or "fxtrain"
        found = self._client.get_experiment_by_name(experiment)
        place = found.experiment_id if found else self._client.create_experiment(experiment)
        return self._client.create_run(place, run_name=self._name or info.name).info.run_id

    def _tag(self, info: RunInfo) -> None:
        texts = info.texts()
        for name, key in (("group", "group"), ("tags", "tags"), ("description", "mlflow.note.content")):
            if name in texts:
                self._client.set_tag(self._run, key, texts[name])


_limited = threading.local()
_LIMITS = {"MLFLOW_HTTP_REQUEST_TIMEOUT": 10, "MLFLOW_HTTP_REQUEST_MAX_RETRIES": 0}


def limit_requests() -> None:
    """Limits the duration of this thread's requests, which by default block for minutes.

    MLflow reads its limits only from the environment, which belongs to the program. Requests of other threads and the
    environment itself are not changed. Limits that are set in the environment apply here too.
    """
    from mlflow import environment_variables

    _limited.here = True
    for name in _LIMITS:
        variable: Any = getattr(environment_variables, name, None)
        if variable is not None and not hasattr(variable.get, "unlimited"):
            variable.get = _limited_get(variable.get, name)


def _limited_get(get: Callable[[], Any], name: str) -> Callable[[], Any]:
    def limited() -> Any:
        return _LIMITS[name] if getattr(_limited, "here", False) and name not in os.environ else get()

    limited.unlimited = get  # pyright: ignore[reportFunctionMemberAccess]
    return limited


def _accepted_name(name: str) -> str:
    """Returns a name that the store accepts: a path of letters, digits and ``_-. :``."""
    parts = [_REJECTED.sub("_", part) for part in name[:_MAX_NAME].split("/")]
    return "/".join("_" if part in ("", ".", "..") else part for part in parts)
