"""Checkpoints, exports and code as artifacts of Weights & Biases and MLflow, read back from their files."""

import json
import pathlib
import warnings

import pytest
import torch
from test_remote_writers import at_home as at_home  # a fixture
from test_remote_writers import client, identity, opened, records, wandb

import fxtrain as fx
from fxtrain import callbacks, observers, writers
from fxtrain.core import RunInfo
from fxtrain.values import Artifact

TX = fx.optim.sgd(0.75)


def train(folder, *given, keep=3):
    """Trains w, whose evaluation is best at step 2 of 3."""
    return fx.fit(
        fx.init({"w": torch.tensor(0.0)}, TX),
        fx.train_step(lambda model, batch: (model["w"] - batch).square(), TX),
        [torch.tensor(1.0)],
        steps=3,
        callbacks=callbacks.save_best("far"),
        observers=given,
        eval_step=fx.eval_step(lambda model, batch: {"far": (model["w"] - 0.8).abs()}),
        eval_data=[torch.tensor(1.0)],
        checkpointer=fx.checkpointer(folder / "checkpoints", keep=keep),
        run=RunInfo(name="baseline", project="zoo"),
    )


def everything(folder, source, writer):
    source.mkdir()
    (source / "train.py").write_text("print('hello')")
    return (
        observers.record_code(folder, source=source, writers=[writer]),
        observers.export(folder / "best", writers=[writer]),
        observers.write_checkpoints(writer, best="save_best"),
        observers.write(writer),
    )


def stored(folder):
    """The artifacts of a run of wandb: name without the run, type, aliases, step and files, in order."""
    found = []
    for session in records(folder):
        for record in session:
            if record.WhichOneof("record_type") == "request" and record.request.HasField("log_artifact"):
                found.append(record.request.log_artifact.artifact)
            elif record.WhichOneof("record_type") == "artifact":
                found.append(record.artifact)
    return [
        (
            artifact.name.rpartition("-")[0],
            artifact.type,
            sorted(artifact.aliases),
            json.loads(artifact.metadata)["step"],
            sorted(entry.path for entry in artifact.manifest.contents),
        )
        for artifact in found
    ]


def test_wandb_has_checkpoints_exports_and_code(tmp_path):
    run = tmp_path / "run"
    train(run, *everything(run, tmp_path / "source", wandb(run)), keep=1)
    found = stored(run)
    (code,) = [entry for entry in found if entry[0] == "code"]
    assert code[1:4] == ("code", ["latest"], 0)
    assert [path.endswith(".zip") for path in code[4]] == [True]
    models = [entry for entry in found if entry[0] == "model"]
    assert [entry[2:4] for entry in models] == [(["best", "latest"], 1), (["best", "latest"], 2)]
    assert models[0][4] == ["metrics.json", "model.safetensors"]
    checkpoints = [entry for entry in found if entry[0] == "checkpoint"]
    assert {entry[3]: entry[2] for entry in checkpoints}[2] == ["best", "latest"]
    assert {entry[3]: entry[2] for entry in checkpoints}[3] == ["latest"]
    assert "manifest.jsonl" in checkpoints[-1][4]
    assert not (run / ".artifacts").exists()
    (info,) = [r.run for session in records(run) for r in session if r.WhichOneof("record_type") == "run"]
    assert (info.project, info.display_name) == ("zoo", "baseline")


def test_mlflow_has_checkpoints_exports_and_code(tmp_path, monkeypatch):
    run = tmp_path / "run"
    train(run, *everything(run, tmp_path / "source", opened(run)))
    there, name = client(run), identity(run)

    def listed(place):
        return [entry.path.rpartition("/")[2] for entry in there.list_artifacts(name, place)]

    tags = there.get_run(name).data.tags
    assert (tags["checkpoint.latest"], tags["checkpoint.best"]) == (
        "checkpoint/step-000000003",
        "checkpoint/step-000000002",
    )
    assert tags["model.best"] == "model/step-000000002"
    assert listed("model/step-000000002") == ["metrics.json", "model.safetensors"]
    assert "manifest.jsonl" in listed("checkpoint/step-000000003")
    assert [path[-4:] for path in listed("code/step-000000000")] == [".zip"]
    copy = fx.load_weights(fx.init({"w": torch.tensor(0.0)}), there.download_artifacts(name, tags["model.best"]))
    assert float(copy.params["w"]) == 0.75


def test_artifact_is_uploaded_as_it_was_when_it_was_written(tmp_path):
    model = tmp_path / "model"
    writer = opened(tmp_path / "run")
    for step in (1, 2):
        model.mkdir()
        (model / "w.txt").write_text(str(step))
        writer.write(step, {"model": Artifact(model)})
        (model / "w.txt").unlink()
        model.rmdir()
    writer.close()
    there, name = client(tmp_path / "run"), identity(tmp_path / "run")
    for step in (1, 2):
        folder = there.download_artifacts(name, f"model/step-{step:09d}")
        assert pathlib.Path(folder, "w.txt").read_text() == str(step)


def test_missing_artifact_warns_and_other_values_are_written(tmp_path):
    writer = opened(tmp_path / "run")
    with pytest.warns(RuntimeWarning, match=r"MLflow does not get the artifact 'model', because it cannot be copied"):
        writer.write(1, {"model": Artifact(tmp_path / "missing"), "loss": 0.5})
    writer.close()
    there, name = client(tmp_path / "run"), identity(tmp_path / "run")
    assert [point.value for point in there.get_metric_history(name, "loss")] == [0.5]


def test_unsent_artifacts_do_not_fill_the_disk(tmp_path):
    from fxtrain.writers._staging import Staging

    (tmp_path / "w").write_text("1")
    staging = Staging(tmp_path / "staged")
    copies = [staging.add(Artifact(tmp_path / "w")) for _ in range(9)]
    assert len(list((tmp_path / "staged").iterdir())) == 4
    assert pathlib.Path(copies[-1].path).read_text() == "1"


@pytest.mark.parametrize("make", [writers.console, lambda: writers.multi(writers.console())])
def test_writers_without_files_ignore_artifacts(make, capsys):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make().write(1, {"model": Artifact("missing"), "loss": 0.5})
    assert "missing" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((3,), "expected path to be a path, got 3"),
        (("w", 3), "expected kind to be a string, got 3"),
        (("w", "model", "best"), "expected aliases to be a list of strings, got 'best'"),
    ],
)
def test_wrong_artifact_is_refused(arguments, message):
    with pytest.raises(TypeError, match=message):
        Artifact(*arguments)


def test_write_checkpoints_needs_a_writer_and_its_slot(tmp_path):
    with pytest.raises(ValueError, match=r"expected at least one writer for write_checkpoints\(\), got none"):
        observers.write_checkpoints()
    with pytest.warns(RuntimeWarning, match=r"expected best to be the slot of save_best(.|\n)*got 'bset'"):
        train(tmp_path, observers.write_checkpoints(writers.console(), best="bset"))
