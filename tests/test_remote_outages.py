"""Outages of a remote service: training continues, queued points are sent later, and the run ends in bounded time."""

# ruff: noqa: PT012, PT031 -- warnings of a whole session
import concurrent.futures
import http.server
import io
import json
import os
import pathlib
import signal
import subprocess
import sys
import textwrap
import threading
import time

import numpy as np
import PIL.Image
import pytest
import torch

from fxtrain import observers, writers
from fxtrain.core import Control, StepEnd
from fxtrain.values import Image
from fxtrain.writers import _backlog as backlog
from fxtrain.writers import _mlflow_runs as mlflow_runs
from fxtrain.writers import _outbox as outbox

OUTAGES = ["refuses", "fails", "is silent"]


class Server:
    """An MLflow server with the endpoints that the writer calls, and with several kinds of outages."""

    def __init__(self):
        self.how, self.metrics, self.params, self.status, self.refused = "works", [], {}, None, set()
        self.has_failed, self.port = False, None
        self._server = None
        self.start()

    def start(self):
        handler = type("Handler", (Handler,), {"owner": self})
        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", self.port or 0), handler)
        self._server.daemon_threads = True
        self.port = self._server.server_port
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()

    def stop(self):
        self._server.shutdown()
        self._server.server_close()

    def goes(self, how):
        before, self.how = self.how, how
        if how == "refuses":
            self.stop()
        elif before == "refuses":
            self.start()

    @property
    def steps(self):
        return [metric["step"] for metric in self.metrics]


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self):
        server = self.owner
        body = self.rfile.read(int(self.headers.get("content-length") or 0))
        if server.how == "is silent":
            while server.how == "is silent":
                time.sleep(0.01)
            self.close_connection = True
            return
        if server.how == "refuses":  # a connection opened before the outage
            self.close_connection = True
            return
        if server.how == "fails":
            self.answer(500, {})
            server.has_failed = True
            return
        body = json.loads(body or "{}")
        name = self.path.split("?")[0].rsplit("/api/2.0/mlflow/", 1)[-1]
        run = {"info": {"run_id": "r", "status": "RUNNING", "experiment_id": "1", "artifact_uri": "file:///tmp"}}
        match name:
            case "experiments/get-by-name":
                self.answer(200, {"experiment": {"experiment_id": "1", "name": "fxtrain"}})
            case "runs/log-batch":
                steps = {int(metric["step"]) for metric in body.get("metrics", ())}
                if steps & server.refused:
                    self.answer(400, {"error_code": "INVALID_PARAMETER_VALUE", "message": "no"})
                    return
                server.metrics += [{**m, "step": int(m["step"])} for m in body.get("metrics", ())]
                server.params |= {p["key"]: p["value"] for p in body.get("params", ())}
                self.answer(200, {})
            case "runs/update":
                server.status = body["status"]
                self.answer(200, {"run_info": run["info"]})
            case "runs/create" | "runs/get":
                self.answer(200, {"run": run})
            case _:
                self.answer(404, {"error_code": "RESOURCE_DOES_NOT_EXIST", "message": name})

    do_GET = do_POST  # noqa: N815

    def answer(self, code, content):
        sent = json.dumps(content).encode()
        self.send_response(code)
        self.send_header("content-length", str(len(sent)))
        self.end_headers()
        self.wfile.write(sent)

    def log_message(self, *args):
        pass


@pytest.fixture
def server(monkeypatch):
    for name in mlflow_runs._LIMITS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    monkeypatch.setattr(outbox, "_LONGEST_PAUSE", 0.3)
    monkeypatch.setattr(outbox, "_FIRST_PAUSE", 0.1)
    monkeypatch.setattr(outbox, "FLUSH_SECONDS", 1.0)
    monkeypatch.setattr(outbox, "CLOSE_SECONDS", 10.0)
    monkeypatch.setattr(outbox, "CLOSE_FAILING_SECONDS", 1.5)
    monkeypatch.setitem(mlflow_runs._LIMITS, "MLFLOW_HTTP_REQUEST_TIMEOUT", 1)
    made = Server()
    yield made
    made.how = "works"
    made.stop()


def opened(folder, server):
    return writers.mlflow(folder / "run", uri=f"http://127.0.0.1:{server.port}")


def messages(said):
    return [str(warning.message) for warning in said if issubclass(warning.category, RuntimeWarning)]


def wait_until(holds, seconds=20):
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("how", OUTAGES)
def test_initial_outage_blocks_nothing_and_lost_points_are_counted(tmp_path, server, how):
    server.goes(how)
    healthy = writers.jsonl(tmp_path / "a.jsonl")
    observer = observers.write(opened(tmp_path, server), healthy)
    began = time.monotonic()
    with pytest.warns(RuntimeWarning) as said:
        for step in range(1, 101):
            observer(None, StepEnd(step=step, time=0.0, metrics={"loss": 1.0}), Control())
            if step % 10 == 0:
                observer.flush()
        training = time.monotonic() - began
        observer.close()
    assert training < 2.0
    assert time.monotonic() - began - training < 3.0
    assert len((tmp_path / "a.jsonl").read_text().splitlines()) == 100
    found = messages(said)
    assert found[0].startswith("MLflow does not answer. Points are queued and sent when it does.")
    assert found[-1].startswith("MLflow: 100 points of steps 1 to 100 were not sent and are lost (")
    assert len(found) == 2


@pytest.mark.parametrize("how", OUTAGES)
def test_points_of_an_outage_are_sent_once_and_in_order_afterwards(tmp_path, server, how):
    writer = opened(tmp_path, server)
    with pytest.warns(RuntimeWarning) as said:
        for step in range(1, 6):
            writer.write_scalars(step, {"loss": float(step)})
        writer.flush()
        assert server.steps == [1, 2, 3, 4, 5]
        server.goes(how)
        for step in range(6, 11):
            writer.write_scalars(step, {"loss": float(step)})
        writer.flush()
        time.sleep(1.2)
        assert server.steps == [1, 2, 3, 4, 5]
        server.goes("works")
        wait_until(lambda: len(server.steps) == 10)
        writer.write_scalars(11, {"loss": 11.0})
        writer.close()
    assert server.steps == list(range(1, 12))
    assert [metric["value"] for metric in server.metrics] == [float(step) for step in range(1, 12)]
    assert server.status == "FINISHED"
    first, second = messages(said)
    assert first.startswith("MLflow does not answer")
    assert second == "MLflow answers again. Queued points are being sent."


def test_points_beyond_the_queue_limit_are_dropped_and_counted(tmp_path, server, monkeypatch):
    monkeypatch.setattr(backlog, "MOST_POINTS", 20)
    server.goes("fails")
    writer = opened(tmp_path, server)
    with pytest.warns(RuntimeWarning) as said:
        writer.write_hparams({"lr": 0.1})
        for step in range(1, 101):
            writer.write_scalars(step, {"loss": 1.0})
        writer.flush()
        server.goes("works")
        writer.close()
    assert server.steps == list(range(82, 101))
    assert server.params == {"lr": "0.1"}
    found = messages(said)
    assert any(message.startswith("MLflow does not keep up. From step 20 on") for message in found)
    assert found[-1] == "MLflow: 81 points of steps 1 to 81 were not sent and are lost."


def test_rejected_points_do_not_affect_others(tmp_path, server):
    server.refused = {3, 5}
    writer = opened(tmp_path, server)
    with pytest.warns(RuntimeWarning) as said:
        for step in range(1, 8):
            writer.write_scalars(step, {"loss": 1.0})
        writer.close()
    assert server.steps == [1, 2, 4, 6, 7]
    found = messages(said)
    assert found[0].startswith("MLflow rejected the points of step 3, which are lost: RestException: ")
    assert found[-1] == "MLflow: 2 points of steps 3 to 5 were not sent and are lost."


def test_rewind_in_an_outage_sends_no_point_twice(tmp_path, server, recwarn):
    writer = opened(tmp_path, server)
    writer.write_scalars(1, {"loss": 1.0})
    writer.flush()
    server.goes("fails")
    for step in (2, 3, 4):
        writer.write_scalars(step, {"loss": 1.0})
    wait_until(lambda: server.has_failed)
    writer.purge(2)
    writer.write_scalars(3, {"loss": 30.0})
    server.goes("works")
    writer.close()
    assert sorted(set(server.steps)) in ([1, 2, 3], [1, 2, 3, 4])
    doubled = any("cannot delete points" in str(warning.message) for warning in recwarn)
    assert doubled == (server.steps != [1, 2, 3])


def test_outage_fails_a_required_writer(tmp_path, server):
    server.goes("fails")
    observer = observers.required(observers.write(opened(tmp_path, server)))
    with pytest.warns(RuntimeWarning), pytest.raises(Exception, match=r"failed with exception|500"):
        for step in range(1, 10):
            observer(None, StepEnd(step=step, time=0.0, metrics={"loss": 1.0}), Control())
            observer.flush()
    with pytest.warns(RuntimeWarning, match="were not sent and are lost"):
        observer.close()


def test_tensors_are_sent_with_their_values_at_the_write(tmp_path, server, monkeypatch):
    server.goes("fails")
    sent = []

    def keep(self, run, folder, path):
        sent.append([path.read_bytes() for path in sorted(pathlib.Path(folder).rglob("*.png"))])

    monkeypatch.setattr("mlflow.MlflowClient.log_artifacts", keep)
    writer = opened(tmp_path, server)
    loss, pixels = torch.tensor(0.5), torch.zeros(4, 4)
    with pytest.warns(RuntimeWarning):
        writer.write(1, {"loss": loss, "picture": Image(pixels)})
        loss.fill_(9.0)
        pixels.fill_(1.0)
        wait_until(lambda: server.has_failed)
        server.goes("works")
        writer.close()
    assert server.metrics[0]["value"] == 0.5
    ((content,),) = sent
    assert not np.array(PIL.Image.open(io.BytesIO(content))).any()


def test_request_limits_apply_only_to_the_thread_of_the_writer(tmp_path, server, monkeypatch):
    from mlflow.environment_variables import MLFLOW_HTTP_REQUEST_MAX_RETRIES, MLFLOW_HTTP_REQUEST_TIMEOUT

    before = dict(os.environ)
    writer = opened(tmp_path, server)
    writer.write_scalars(1, {"loss": 1.0})
    writer.flush()
    assert (MLFLOW_HTTP_REQUEST_TIMEOUT.get(), MLFLOW_HTTP_REQUEST_MAX_RETRIES.get()) == (120, 7)
    assert dict(os.environ) == before
    found = []

    def look():
        mlflow_runs.limit_requests()
        found.append((MLFLOW_HTTP_REQUEST_TIMEOUT.get(), MLFLOW_HTTP_REQUEST_MAX_RETRIES.get()))

    for timeout in (None, "33"):
        if timeout:
            monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", timeout)
        thread = threading.Thread(target=look)
        thread.start()
        thread.join()
    assert found == [(1, 0), (33, 0)]
    writer.close()


RUN = """
    import os, signal, sys, threading, time, warnings
    sys.path.insert(0, sys.argv[3])
    import problem
    import fxtrain as fx

    port, kind, folder = int(sys.argv[1]), sys.argv[2], sys.argv[4]
    if kind == "mlflow":
        writer = fx.writers.mlflow(folder, uri=f"http://127.0.0.1:{port}")
    else:
        writer = fx.writers.wandb(folder, mode="online")

    def observe(state, event, control):
        if isinstance(event, fx.StepEnd) and event.step == 30:
            print("training", flush=True)
            os.kill(os.getpid(), signal.SIGTERM)

    result = fx.fit(
        problem.start(), problem.step(), problem.data() * 40, steps=100,
        observers=[fx.observers.write(writer, fx.writers.jsonl(folder + "/a.jsonl"), flush_seconds=0.01), observe],
        checkpointer=fx.checkpointer(folder + "/checkpoints"),
    )
    print("ended", int(result.state.step), flush=True)
    sys.exit(result.exit_code)
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Runs in all outages at once, because they mostly wait: futures of the process, its seconds and its folder."""
    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        yield {
            (kind, how): pool.submit(run, tmp_path_factory.mktemp(kind), kind, how)
            for kind in ("mlflow", "wandb")
            for how in OUTAGES
        }


def run(folder, kind, how):
    server = Server()
    server.goes(how)
    environment = {
        **os.environ,
        "WANDB_BASE_URL": f"http://127.0.0.1:{server.port}",
        "WANDB_API_KEY": "a" * 40,
        "WANDB_SILENT": "true",
        **{f"WANDB_{name}_DIR": str(folder / "elsewhere") for name in ("DATA", "CACHE", "CONFIG")},
    }
    command = [sys.executable, "-c", textwrap.dedent(RUN), str(server.port), kind, os.path.dirname(__file__)]
    began = time.monotonic()
    ended = subprocess.run(
        [*command, str(folder / "run")], capture_output=True, text=True, timeout=120, env=environment
    )
    took = time.monotonic() - began
    if how != "refuses":
        server.goes("works")
        server.stop()
    return ended, took, folder / "run"


@pytest.mark.slow
@pytest.mark.parametrize("how", OUTAGES)
@pytest.mark.parametrize("kind", ["mlflow", "wandb"])
def test_signal_in_an_outage_ends_a_run_in_bounded_time(runs, kind, how):
    """Uses the real limits in a subprocess, so that the time of its exit is included."""
    ended, took, folder = runs[kind, how].result()
    assert ended.returncode == 128 + signal.SIGTERM, ended.stderr
    assert "ended 30" in ended.stdout
    assert "points of steps 1 to 30 were not sent and are lost" in ended.stderr
    assert len((folder / "a.jsonl").read_text().splitlines()) == 30
    imports, wandbs_own_exit = 15, 20
    assert took < imports + outbox.FLUSH_SECONDS + outbox.CLOSE_FAILING_SECONDS + wandbs_own_exit + 15, took
