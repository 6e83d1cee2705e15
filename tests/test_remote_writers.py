"""Runs of Weights & Biases and MLflow, read back from their files without network access."""

import json
import os
import pathlib
import struct
import subprocess
import sys
import textwrap
import time
import wave

import numpy as np
import PIL.Image
import pytest
import torch
from matplotlib.figure import Figure as Canvas

from fxtrain import observers, writers
from fxtrain.core import Control, FitBegin, RunInfo, StepEnd
from fxtrain.values import Audio, ConfusionMatrix, Figure, Histogram, HParams, Image, PointCloud, Table, Text, Video
from fxtrain.writers import mlflow

pytestmark = pytest.mark.usefixtures("without_pyav")  # videos are GIFs


@pytest.fixture(autouse=True)
def at_home(tmp_path, monkeypatch):
    """Confines both packages to the test's folder, without network access."""
    for name in ("WANDB_DATA_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "elsewhere"))
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")


def canvas():
    drawn = Canvas(figsize=(2, 1), dpi=100)
    drawn.subplots().plot([1, 4, 9])
    return drawn


PIXELS = torch.arange(2 * 8 * 8 * 3, dtype=torch.float64).reshape(2, 8, 8, 3) / 384
POINTS, COLORS = torch.arange(12.0).reshape(4, 3), torch.arange(12, dtype=torch.uint8).reshape(4, 3)


def everything():
    """Values of every kind, some in several variants."""
    return {
        "train/loss": 0.5,
        "n": 3,
        "flag": True,
        "nan": float("nan"),
        "text": Text("a < b\nwörld"),
        "image": Image(PIXELS[0]),
        "images": Image(PIXELS),
        "gray": Image(torch.zeros(8, 8)),
        "video": Video(torch.rand(4, 8, 8, 3), fps=5),
        "sound": Audio(torch.linspace(-1, 1, 100), 8000),
        "sounds": Audio(torch.zeros(2, 100, 2), 16000),
        "histogram": Histogram(torch.arange(90.0)),
        "fine": Histogram(counts=torch.ones(1300), edges=torch.arange(1301.0)),
        "table": Table(
            {"word": ["a", None], "mixed": [1, "x"], "score": torch.tensor([0.5, float("nan")]), "look": Image(PIXELS)}
        ),
        "confusion": ConfusionMatrix(torch.tensor([[8, 2], [1, 9]]), labels=("cat", "dog")),
        "points": PointCloud(POINTS),
        "colored": PointCloud(POINTS, COLORS),
        "figure": Figure(canvas()),
        "hparams": HParams({"optim": {"lr": 0.1}, "name": "adamw", "nesterov": True}),
    }


# Weights & Biases


def wandb(folder):
    return writers.wandb(folder, mode="offline")


def records(folder):
    """The records of each session, in order. Waits for wandb's process, which completes files after a run ends."""
    deadline = time.monotonic() + 60
    while True:
        sessions = logs(folder)
        ended = sessions and all(r and r[-1].WhichOneof("record_type") == "exit" for r in sessions)
        if ended or time.monotonic() > deadline:
            return sessions
        time.sleep(0.01)


def logs(folder):
    """Parses wandb's files, which are in the format of LevelDB's log, into records."""
    from wandb.proto.wandb_internal_pb2 import Record

    sessions = []
    for path in sorted(folder.glob("wandb/offline-run-*/*.wandb"), key=lambda path: path.stat().st_mtime_ns):
        data, place, part, found = path.read_bytes(), 7, b"", []
        assert data[:4] == b":W&B"
        while place + 7 <= len(data):
            left = 32768 - place % 32768
            if left < 7:
                place += left
                continue
            _, length, kind = struct.unpack("<IHB", data[place : place + 7])
            if place + 7 + length > len(data):  # still being written
                break
            part += data[place + 7 : place + 7 + length]
            place += 7 + length
            if kind in (1, 4):  # a whole record, or its last part
                found.append(Record.FromString(part))
                part = b""
        sessions.append(found)
    return sessions


def rows(session):
    """The history of a session, with nested keys as nested dicts."""
    made = []
    for record in session:
        if record.WhichOneof("record_type") == "history":
            row = {}
            for item in record.history.item:
                *outer, last = item.nested_key or [item.key]
                place = row
                for key in outer:
                    place = place.setdefault(key, {})
                place[last] = json.loads(item.value_json)
            made.append(row)
    return made


def identities(sessions):
    return [r.run.run_id for session in sessions for r in session if r.WhichOneof("record_type") == "run"]


def test_wandb_stores_every_kind_of_value(tmp_path):
    writer = wandb(tmp_path / "new" / "run")
    writer.write(3, everything(), StepEnd(step=3, metrics={}))
    writer.close()
    (session,) = records(tmp_path / "new" / "run")
    (row,) = rows(session)
    assert (row["step"], row["train/loss"], row["n"], row["flag"]) == (3, 0.5, 3, True)
    assert np.isnan(row["nan"])
    (files,) = (tmp_path / "new" / "run").glob("wandb/offline-run-*/files")

    assert "a &lt; b\nwörld" in (files / row["text"]["path"]).read_text()
    for name, count in (("image", 1), ("images", 2), ("gray", 1), ("figure", 1)):
        assert (row[name]["_type"], row[name]["count"]) == ("images/separated", count)
    shown = [np.array(PIL.Image.open(files / path)) for path in row["images"]["filenames"]]
    np.testing.assert_array_equal(np.stack(shown), Image(PIXELS).frames)
    assert PIL.Image.open(files / row["figure"]["filenames"][0]).size == (200, 100)
    (video,) = row["video"]["videos"]
    assert PIL.Image.open(files / video["path"]).n_frames == 4
    for name, channels, rate in (("sound", 1, 8000), ("sounds/0", 2, 16000), ("sounds/1", 2, 16000)):
        with wave.open(str(files / row[name]["path"])) as sound:
            assert (sound.getnchannels(), sound.getframerate(), sound.getnframes()) == (channels, rate, 100)

    histogram, fine = row["histogram"], row["fine"]
    assert (sum(histogram["values"]), len(histogram["values"]), len(histogram["bins"])) == (90, 30, 31)
    assert (sum(fine["values"]), fine["bins"][0], fine["bins"][-1]) == (1300, 0, 1300)
    assert len(fine["values"]) <= 512

    points, colored = (json.loads((files / row[name]["path"]).read_text()) for name in ("points", "colored"))
    assert points == POINTS.tolist()
    assert colored == torch.cat([POINTS, COLORS], 1).tolist()

    counted = json.loads((files / row["confusion"]["path"]).read_text())
    assert (counted["columns"], counted["data"]) == (["truth", "cat", "dog"], [["cat", 8, 2], ["dog", 1, 9]])
    table = json.loads((files / row["table"]["path"]).read_text())
    assert table["columns"] == ["word", "mixed", "score", "look"]
    assert [cells[:2] for cells in table["data"]] == [["a", 1], [None, "x"]]
    (kept,) = (r.artifact for r in session if r.artifact.name.endswith("-table"))
    looks = [entry.local_path for entry in kept.manifest.contents if entry.path.endswith(".png")]
    found = {np.array(PIL.Image.open(path)).tobytes() for path in looks}
    assert found == {frame.tobytes() for frame in Image(PIXELS).frames}
    assert all(str(tmp_path) in path for path in looks)

    config = {item.key: json.loads(item.value_json) for r in session for item in r.config.update}
    assert {**config, "_wandb": None} == {"optim/lr": 0.1, "name": "adamw", "nesterov": True, "_wandb": None}
    assert "hparams" not in row
    metrics = {r.metric.name or r.metric.glob_name: r.metric for r in session if r.HasField("metric")}
    assert metrics["*"].step_metric == "step"


def test_wandb_shows_captions_grids_and_videos(tmp_path):
    writer = wandb(tmp_path)
    video = Video(torch.rand(2, 3, 4, 8, 8), "CTHW", caption=["one", "two"])
    pairs = Image(PIXELS, caption=["cat", "dog"])
    writer.write(1, {"pair": pairs, "grid": Image(PIXELS, caption=["cat", "dog"], grid=True), "video": video})
    writer.close()
    (session,) = records(tmp_path)
    (row,) = rows(session)
    assert row["pair"]["captions"] == ["cat", "dog"]
    assert (row["grid"]["count"], row["grid"]["captions"]) == (1, ["cat | dog"])
    assert [video["caption"] for video in row["video"]["videos"]] == ["one", "two"]


def test_wandb_tables_have_media_in_cells(tmp_path):
    image = Image(PIXELS[0], caption="cat")
    sound, video = Audio(torch.zeros(100), 8000), Video(torch.rand(3, 8, 8, 3))
    writer = wandb(tmp_path)
    rows_given = [(image, video, sound, Text("*a*")), (image, video, sound, None)]
    writer.write(1, {"table": Table.from_rows(["image", "video", "sound", "text"], rows_given)})
    writer.close()
    (session,) = records(tmp_path)
    (kept,) = (r.artifact for r in session if r.artifact.name.endswith("-table"))
    (path,) = (e.local_path for e in kept.manifest.contents if e.path.endswith(".table.json"))
    table = json.loads(pathlib.Path(path).read_text())
    first, second = table["data"]
    assert [cell["_type"] for cell in first[:3]] == ["image-file", "video-file", "audio-file"]
    assert (first[0]["caption"], first[3], second[3]) == ("cat", "*a*", None)
    types = table["column_types"]["params"]["type_map"]
    for name, kind in (("image", "image-file"), ("video", "video-file"), ("sound", "audio-file"), ("text", "any")):
        assert f'"{kind}"' in json.dumps(types[name])


def test_wandb_run_has_project_name_group_and_tags(tmp_path):
    options = {"project": "mine", "name": "first", "group": "all", "tags": ["a", "b"]}
    writer = writers.wandb(tmp_path, mode="offline", **options)
    writer.write_scalars(1, {"loss": 1.0})
    writer.close()
    (session,) = records(tmp_path)
    run = next(record.run for record in session if record.WhichOneof("record_type") == "run")
    assert (run.project, run.display_name, run.run_group, list(run.tags)) == ("mine", "first", "all", ["a", "b"])


RUN = RunInfo(
    project="shared", group="all", name="by fit", description="A note.", tags=["a", "b"], config={"betas": (0.9, None)}
)


def test_wandb_run_takes_its_facts_from_the_run_unless_the_writer_has_its_own(tmp_path):
    writer = writers.wandb(tmp_path, mode="offline", name="own")
    observers.write(writer)(None, FitBegin(step=0, run=RUN), Control())
    writer.close()
    (session,) = records(tmp_path)
    run = next(record.run for record in session if record.WhichOneof("record_type") == "run")
    assert (run.project, run.display_name, run.run_group, list(run.tags)) == ("shared", "own", "all", ["a", "b"])
    assert run.notes == "A note."
    updates = [item for record in session for item in record.config.update] + list(run.config.update)
    config = {item.key or item.nested_key[0]: json.loads(item.value_json) for item in updates}
    assert config["betas"] == [0.9, None]


def test_wandb_continues_a_run_and_warns_of_points_that_remain(tmp_path, recwarn):
    writer = wandb(tmp_path)
    writer.purge(0)
    for step in (1, 2, 3, 3):
        writer.write_scalars(step, {"loss": float(step)})
    writer.close()
    writer = wandb(tmp_path)
    writer.purge(3)
    writer.purge(7)
    assert [str(w.message) for w in recwarn if w.category is RuntimeWarning] == []
    with pytest.warns(RuntimeWarning, match="those of steps 2 to 3 stay"):
        writer.purge(1)
    writer.purge(1)
    writer.write_scalars(2, {"loss": 20.0})
    writer.write_texts(2, {"said": "again"})
    writer.close()
    writer.close()
    sessions = records(tmp_path)
    assert [[(row["step"], row.get("loss")) for row in rows(session)] for session in sessions] == [
        [(1, 1.0), (2, 2.0), (3, 3.0), (3, 3.0)],
        [(2, 20.0), (2, None)],
    ]
    assert len(set(identities(sessions))) == 1
    assert len([w for w in recwarn if w.category is RuntimeWarning]) == 0


def test_wandb_supports_concurrent_runs_and_writes_after_close(tmp_path):
    import wandb as package

    theirs = package.init(dir=str(tmp_path / "theirs"), project="other", mode="offline")
    first, second = wandb(tmp_path / "a"), wandb(tmp_path / "b")
    for writer in (first, second):
        writer.write_scalars(1, {"loss": 1.0})
    first.close()
    first.write_scalars(2, {"loss": 2.0})
    first.close()
    second.close()
    assert package.run is theirs
    theirs.log({"x": 1})
    theirs.finish()
    assert [len(rows(session)) for session in records(tmp_path / "a")] == [1, 1]
    assert [len(rows(session)) for session in records(tmp_path / "b")] == [1]
    assert len(set(identities(records(tmp_path / "a") + records(tmp_path / "b")))) == 2


def test_wandb_accepts_any_name_and_splits_many_images(tmp_path):
    writer = wandb(tmp_path)
    name = 'a "name", with: all/chäracters?\n'
    writer.write(
        1, {name: 1.0, f"{name}!": Text("t"), "../../../x": Text("out"), "many": Image(torch.zeros(110, 4, 4, 1))}
    )
    with pytest.raises(ValueError, match="expected names other than 'step', the axis of wandb's charts"):
        writer.write_scalars(2, {"step": 2})
    writer.close()
    (row,) = rows(*records(tmp_path))
    assert row[name] == 1.0
    assert [row[f"many/{index}"]["count"] for index in (0, 1)] == [108, 2]
    files = next(tmp_path.glob("wandb/offline-run-*/files")).resolve()
    for text in (f"{name}!", "../../../x"):
        assert files in (files / row[text]["path"]).resolve().parents


def test_last_step_of_a_wandb_run_survives_kill_and_exit(tmp_path):
    script = """
        import os, sys
        from fxtrain.writers import wandb
        writer = wandb(sys.argv[1], mode="offline")
        for step in range(1, 51):
            writer.write_scalars(step, {"loss": float(step)})
        writer.flush()
        if sys.argv[2] == "killed":
            os.kill(os.getpid(), 9)
        writer.close()
    """
    for how in ("killed", "ended"):
        command = [sys.executable, "-c", textwrap.dedent(script), str(tmp_path / how), how]
        ended = subprocess.run(command, timeout=60, capture_output=True, text=True, env=dict(os.environ))
        assert ended.returncode == (-9 if how == "killed" else 0), ended.stderr
        with pytest.warns(RuntimeWarning, match="steps 41 to 50 stay"):
            wandb(tmp_path / how).purge(40)
    assert len(rows(*records(tmp_path / "ended"))) == 50


# MLflow


def client(folder):
    from mlflow import MlflowClient

    return MlflowClient((folder / "runs").as_uri())


def opened(folder, **options):
    return mlflow(folder / "run", uri=(folder / "runs").as_uri(), **options)


def identity(folder):
    return json.loads((folder / "run" / "mlflow-run.json").read_text())["id"]


def points(folder, name):
    return [(m.step, m.value) for m in client(folder).get_metric_history(identity(folder), name)]


def test_mlflow_stores_every_kind_of_value(tmp_path, recwarn):
    writer = opened(tmp_path, experiment="mine", name="first")
    values = everything()
    for name in ("histogram", "fine"):
        del values[name]
    writer.write(3, values, StepEnd(step=3, metrics={}))
    with pytest.warns(RuntimeWarning, match="does not store histograms"):
        writer.write(3, {"h": Histogram(torch.ones(3))})
    writer.close()
    run = client(tmp_path).get_run(identity(tmp_path))
    assert (run.info.run_name, run.info.status) == ("first", "FINISHED")
    assert client(tmp_path).get_experiment(run.info.experiment_id).name == "mine"
    assert run.data.params == {"optim/lr": "0.1", "name": "adamw", "nesterov": "True"}
    assert points(tmp_path, "train/loss") == [(3, 0.5)]
    assert (points(tmp_path, "n"), points(tmp_path, "flag")) == ([(3, 3.0)], [(3, 1.0)])
    assert np.isnan(points(tmp_path, "nan")[0][1])
    folder = tmp_path / client(tmp_path).download_artifacts(run.info.run_id, "media", str(tmp_path))
    endings = {"text": "md", "image": "png", "gray": "png", "video": "gif", "sound": "wav", "table": "json"}
    endings |= {"confusion": "json", "points": "ply", "colored": "ply", "figure": "png"}
    for name, ending in endings.items():
        assert (folder / name / f"00000003.{ending}").stat().st_size > 0
    for name, ending in (("images", "png"), ("sounds", "wav"), ("table", "png")):
        assert [path.name for path in sorted((folder / name).glob(f"*.{ending}"))] == [
            f"00000003-{index}.{ending}" for index in (0, 1)
        ]
    assert (folder / "text" / "00000003.md").read_text() == "a < b\nwörld"


def test_mlflow_run_takes_its_facts_from_the_run_unless_the_writer_has_its_own(tmp_path):
    writer = opened(tmp_path, name="own")
    observers.write(writer)(None, FitBegin(step=0, run=RUN), Control())
    writer.close()
    run = client(tmp_path).get_run(identity(tmp_path))
    assert client(tmp_path).get_experiment(run.info.experiment_id).name == "shared"
    assert run.info.run_name == "own"
    tags = {"group": "all", "tags": "a, b", "mlflow.note.content": "A note."}
    assert {name: run.data.tags[name] for name in tags} == tags
    assert run.data.params == {"betas": "[0.9, None]"}


def test_mlflow_continues_a_run_and_warns_of_points_that_remain(tmp_path, recwarn):
    writer = opened(tmp_path)
    for step in (1, 2, 3, 3):
        writer.write_scalars(step, {"loss": float(step)})
    writer.flush()
    assert client(tmp_path).get_run(identity(tmp_path)).info.status == "RUNNING"
    writer.close()
    first = identity(tmp_path)
    writer = opened(tmp_path)
    writer.purge(3)
    assert not recwarn
    with pytest.warns(RuntimeWarning, match="MLflow cannot delete points, so those of steps 2 to 3 stay"):
        writer.purge(1)
    writer.purge(1)
    writer.write_scalars(2, {"loss": 20.0})
    writer.flush()
    assert client(tmp_path).get_run(first).info.status == "RUNNING"
    writer.close()
    assert identity(tmp_path) == first
    assert points(tmp_path, "loss") == [(1, 1.0), (2, 2.0), (3, 3.0), (3, 3.0), (2, 20.0)]
    assert not recwarn
    assert json.loads((tmp_path / "run" / "mlflow-run.json").read_text())["step"] == 2


def test_mlflow_warns_that_a_changed_parameter_keeps_its_first_value(tmp_path, recwarn):
    writer = opened(tmp_path)
    writer.write_hparams({"lr": 0.1, "long": "x" * 7000, **{f"p{index}": index for index in range(250)}})
    writer.write_hparams({"lr": 0.1, "long": "x" * 7000})
    writer.flush()
    assert not recwarn
    writer.write_hparams({"lr": 0.2, "new": 1})
    with pytest.warns(RuntimeWarning, match=r"it keeps the first values of lr\. Start a new run"):
        writer.close()
    parameters = client(tmp_path).get_run(identity(tmp_path)).data.params
    assert (parameters["lr"], parameters["new"], parameters["p249"], len(parameters)) == ("0.1", "1", "249", 253)


def test_mlflow_accepts_any_name(tmp_path):
    names = ['a "name", with: all/chäracters?\n', "../../up", "/absolute", "a//b", "end/", "l" * 300]
    writer = opened(tmp_path)
    writer.write(1, {**dict.fromkeys(names[:-1], 0.5), names[-1]: 1.0})
    writer.write(1, dict.fromkeys(names[:-1], Text("t")))
    writer.write_hparams(dict.fromkeys(names, 1))
    writer.write_scalars(2, {f"m{index}": 1.0 for index in range(1500)})
    writer.close()
    data = client(tmp_path).get_run(identity(tmp_path)).data
    kept = {"a _name__ with: all/chäracters__", "_/_/up", "_/absolute", "a/_/b", "end/_", "l" * 250}
    assert set(data.params) == kept
    assert set(data.metrics) == kept | {f"m{index}" for index in range(1500)}
    (media,) = (tmp_path / "runs").rglob("media")
    assert len(list(media.rglob("*.md"))) == 5


@pytest.mark.parametrize("make", [writers.wandb, mlflow])
def test_unwritable_folder_raises_at_creation(tmp_path, make):
    options = {"uri": tmp_path.as_uri()} if make is mlflow else {}
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "folder"):
        with pytest.raises(OSError, match=r"cannot write to .*file.*Use a writable path"):
            make(path, **options)


@pytest.mark.parametrize("content", ["", "[]", '{"id": "x', "\0" * 40])
@pytest.mark.parametrize("make", [writers.wandb, mlflow])
def test_damaged_identity_is_set_aside_and_a_new_run_begins(tmp_path, make, content):
    options = {"uri": tmp_path.as_uri()} if make is mlflow else {}
    for name in ("wandb-run.json", "mlflow-run.json"):
        (tmp_path / name).write_text(content)
    with pytest.warns(RuntimeWarning, match=r"run.json does not identify a run of .*, so a new run begins"):
        writer = make(tmp_path, **options)
    assert writer.identity is None
    (damaged,) = tmp_path.glob("*.damaged")
    assert damaged.read_text() == content


def test_wandb_and_mlflow_are_imported_lazily():
    script = "import fxtrain, fxtrain.writers, sys; print([m for m in ('wandb', 'mlflow') if m in sys.modules])"
    told = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    assert told.stdout == "[]\n"
