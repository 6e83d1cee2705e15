"""Writers: written values are read back from event files of TensorBoard, and several writers act as one."""

import importlib.util
import inspect
import logging
import struct
import sys
import time
import types

import numpy as np
import psutil
import pytest
import torch
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.plugin_hparams_pb2 import HParamsPluginData
from tensorboardX.record_writer import masked_crc32c

from fxtrain.core import FitBegin, StepEnd
from fxtrain.values import Histogram, HParams, Image, Text, Video
from fxtrain.writers import Writer, jsonl, multi, read_jsonl, tensorboard


def records(path):
    """Returns the events of one file, and verifies their checksums."""
    data, place, events = path.read_bytes(), 0, []
    while place < len(data):
        header = data[place : place + 8]
        (length,) = struct.unpack("Q", header)
        body = data[place + 12 : place + 12 + length]
        assert struct.unpack("I", data[place + 8 : place + 12])[0] == masked_crc32c(header)
        assert struct.unpack("I", data[place + 12 + length : place + 16 + length])[0] == masked_crc32c(body)
        events.append(Event.FromString(body))
        place += 16 + length
    return events


def shown(folder):
    """Returns the summaries that TensorBoard shows, as (step, value).

    It reads files in the order of their names. A session start discards the points at its step and later.
    """
    kept = []
    for path in sorted(folder.glob("*tfevents*")):
        events = records(path)
        assert events[0].file_version == "brain.Event:2"
        for event in events:
            if event.session_log.status == SessionLog.START:
                kept = [(step, value) for step, value in kept if step < event.step]
            kept += [(event.step, value) for value in event.summary.value]
    return kept


def curve(folder, tag):
    return [(step, value.simple_value) for step, value in shown(folder) if value.tag == tag]


def publish(writer, event, values):
    writer.write(event.step, values, event)


# TensorBoard


def test_tensorboard_scalars_and_texts_are_read_back(tmp_path):
    writer = tensorboard(tmp_path / "new" / "folder")
    writer.write_scalars(3, {"a name, with: all/characters": torch.tensor(0.5), "nan": float("nan"), "n": 7})
    writer.write_texts(4, {"said": "**hello**, wörld"})
    writer.close()
    (_, first), (_, nan), (_, n), (step, text) = shown(tmp_path / "new" / "folder")
    assert (first.tag, first.simple_value, n.simple_value) == ("a name, with: all/characters", 0.5, 7.0)
    assert np.isnan(nan.simple_value)
    assert (step, text.tensor.string_val[0].decode()) == (4, "**hello**, wörld")
    assert text.metadata.plugin_data.plugin_name == "text"


def test_tensorboard_captions_are_a_text_beside_the_images(tmp_path):
    writer = tensorboard(tmp_path)
    pixels = torch.rand(2, 4, 4, 3)
    writer.write(1, {"pair": Image(pixels, caption=["cat", "dog_*1*"]), "one": Image(pixels[0], caption="- *")})
    writer.write(1, {"film": Video(pixels, caption="a film"), "none": Image(pixels)})
    writer.close()
    found = {value.tag: value for _, value in shown(tmp_path)}
    images = {"pair/0", "pair/1", "one", "film", "none/0", "none/1"}
    assert found.keys() == images | {"pair/caption", "one/caption", "film/caption"}
    texts = [found[f"{name}/caption"].tensor.string_val[0].decode() for name in ("pair", "one", "film")]
    assert texts == ["pair/0: cat  \npair/1: dog\\_\\*1\\*", "\\- \\*", "a film"]


def test_tensorboard_scalars_of_a_step_share_a_record(tmp_path):
    writer = tensorboard(tmp_path)
    writer.write_scalars(1, {"a": 1.0, "b": 2.0})
    writer.close()
    (path,) = tmp_path.iterdir()
    assert [len(event.summary.value) for event in records(path)] == [0, 2]


def test_tensorboard_histograms_hold_every_finite_value(tmp_path):
    values = torch.cat([torch.linspace(-1, 2, 300), torch.tensor([float("nan"), float("inf")])])
    writer = tensorboard(tmp_path)
    writer.write_histograms(2, {"raw": values, "wide": np.arange(12.0)}, {"wide": 4})
    writer.write_histograms(2, {"counted": Histogram(counts=torch.tensor([2, 6]), edges=torch.tensor([0.0, 1, 3]))})
    with pytest.warns(RuntimeWarning, match="'empty' of step 2 is not written"):
        writer.write_histograms(2, {"empty": torch.full((3,), float("nan"))})
    writer.close()
    raw, wide, counted = (value.histo for _, value in shown(tmp_path))
    assert (raw.num, sum(raw.bucket), len(raw.bucket)) == (300, 300, 30)
    assert (raw.min, raw.max, raw.bucket_limit[-1]) == (-1.0, 2.0, 2.0)
    assert list(wide.bucket) == [3.0, 3.0, 3.0, 3.0]
    assert (list(counted.bucket), list(counted.bucket_limit), counted.min) == ([2.0, 6.0], [1.0, 3.0], 0.0)
    assert (counted.num, counted.sum) == (8, 2 * 0.5 + 6 * 2)


def test_tensorboard_hparams_are_read_back(tmp_path):
    writer = tensorboard(tmp_path)
    writer.write_hparams({"lr": 0.5, "name": "adamw", "nesterov": True, "decay": None})
    writer.close()
    ((_, value),) = shown(tmp_path)
    session = HParamsPluginData.FromString(value.metadata.plugin_data.content).session_start_info
    assert session.hparams["lr"].number_value == 0.5
    assert session.hparams["name"].string_value == "adamw"
    assert session.hparams["nesterov"].bool_value is True
    assert "decay" not in session.hparams


def test_tensorboard_flush_writes_all_points(tmp_path):
    writer = tensorboard(tmp_path)
    for step in range(50):
        writer.write_scalars(step, {"loss": float(step)})
    writer.flush()
    assert len(curve(tmp_path, "loss")) == 50
    writer.close()


def test_tensorboard_purges_within_one_second_duplicate_no_point(tmp_path, monkeypatch):
    monkeypatch.setattr(time, "time", lambda: 1_700_000_000.0)  # tensorboardX would overwrite its file
    writer = tensorboard(tmp_path)
    for begin in (0, 5, 3, 8):  # the run rewinds three times
        writer.purge(begin)
        for step in range(begin + 1, 11):
            writer.write_scalars(step, {"loss": float(100 * begin + step)})
    writer.close()
    assert curve(tmp_path, "loss") == [
        *[(step, float(step)) for step in range(1, 4)],
        *[(step, 300.0 + step) for step in range(4, 9)],
        *[(step, 800.0 + step) for step in range(9, 11)],
    ]


def test_tensorboard_resumes_after_the_clock_was_set_back(tmp_path, monkeypatch):
    for session, (begin, now) in enumerate([(0, 1_700_000_900), (4, 1_700_000_500), (6, 1_700_000_100)]):
        monkeypatch.setattr(time, "time", lambda now=now: float(now))
        writer = tensorboard(tmp_path)
        writer.purge(begin)
        for step in range(begin + 1, 9):
            writer.write_scalars(step, {"session": float(session)})
        writer.close()
    assert curve(tmp_path, "session") == [(s, 0.0 if s <= 4 else 1.0 if s <= 6 else 2.0) for s in range(1, 9)]


def test_tensorboard_creates_files_lazily_and_reopens_after_close(tmp_path):
    writer = tensorboard(tmp_path)
    writer.purge(0)
    writer.flush()
    writer.close()
    assert list(tmp_path.iterdir()) == []
    for step in (1, 2):
        writer.write_scalars(step, {"loss": 1.0})
        writer.close()
        writer.close()
    assert [step for step, _ in curve(tmp_path, "loss")] == [1, 2]
    assert len(list(tmp_path.iterdir())) == 2


# Several writers


def test_multi_forwards_every_method_to_every_writer(tmp_path):
    writer = multi(tensorboard(tmp_path / "tb"), multi(jsonl(tmp_path / "a.jsonl"), jsonl(tmp_path / "b.jsonl")))
    publish(writer, FitBegin(step=0), {"config": HParams({"lr": 0.1})})
    publish(writer, StepEnd(step=1, metrics={}), {"loss": 1.0})
    writer.write_scalars(2, {"loss": 2.0})
    writer.write_texts(2, {"text": "t"})
    writer.write_histograms(2, {"h": np.ones(3)}, {"h": 1})
    writer.write_hparams({"lr": 0.2})
    writer.flush()
    for name in ("a.jsonl", "b.jsonl"):
        assert [record.get("step") for record in read_jsonl(tmp_path / name)] == [0, 1, 2, None]
    assert len(shown(tmp_path / "tb")) == 6
    writer.purge(1)
    writer.close()
    assert curve(tmp_path / "tb", "loss") == [(1, 1.0)]
    assert [record.get("step") for record in read_jsonl(tmp_path / "b.jsonl")] == [0, 1, None]


def open_files():
    return {file.path for file in psutil.Process().open_files()}


def test_multi_closes_every_writer_and_then_raises_the_first_error(tmp_path):
    class Failing:
        def write(self, step, values, event): ...

        def close(self):
            raise OSError("full")

    last = jsonl(tmp_path / "a.jsonl")
    last.write_scalars(1, {"loss": 1.0})
    assert str(tmp_path / "a.jsonl") in open_files()
    with pytest.raises(OSError, match="full"):
        multi(Failing(), last).close()
    assert str(tmp_path / "a.jsonl") not in open_files()
    with pytest.raises(ValueError, match="expected at least one writer"):
        multi()


@pytest.mark.parametrize("make", [tensorboard, lambda path: jsonl(path / "a.jsonl")])
def test_unwritable_path_is_refused_on_creation(tmp_path, make):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"cannot write to .*file.* \(Not a directory|File exists"):
        make(tmp_path / "file" / "folder")
    with pytest.raises(OSError, match="Use a writable path"):
        make(tmp_path / "file")


@pytest.fixture
def clu_writers(monkeypatch):
    """Imports clu's writers without their package, which imports TensorFlow."""
    package = types.ModuleType("clu.metric_writers")
    package.__path__ = [f"{importlib.util.find_spec('clu').submodule_search_locations[0]}/metric_writers"]
    for name in [name for name in sys.modules if name.startswith("clu.metric_writers")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "clu.metric_writers", package)
    yield lambda name: importlib.import_module(f"clu.metric_writers.{name}")
    for name in [name for name in sys.modules if name.startswith("clu.metric_writers.")]:
        monkeypatch.delitem(sys.modules, name)


def test_method_signatures_equal_those_of_clu(tmp_path, clu_writers):
    theirs = clu_writers("interface").MetricWriter
    ours = tensorboard(tmp_path), jsonl(tmp_path / "a.jsonl"), multi(jsonl(tmp_path / "b.jsonl"))
    verbs = [name for name in vars(Writer) if name.startswith("write_") or name in ("flush", "close")]
    assert len(verbs) == 9
    for verb in verbs:
        wanted = [(p.name, p.default) for p in inspect.signature(getattr(theirs, verb)).parameters.values()]
        for writer in (Writer, *map(type, ours)):
            assert [(p.name, p.default) for p in inspect.signature(getattr(writer, verb)).parameters.values()] == wanted


def test_clu_writers_and_ours_are_interchangeable(tmp_path, clu_writers, caplog):
    theirs = clu_writers("logging_writer").LoggingWriter()
    assert isinstance(theirs, Writer)
    both = clu_writers("multi_writer").MultiWriter(
        [theirs, jsonl(tmp_path / "a.jsonl", clock=None), tensorboard(tmp_path / "tb")]
    )
    with caplog.at_level(logging.INFO, logger="absl"):
        values = {"loss": 0.5, "note": Text("hello"), "w": Histogram(torch.arange(4.0)), "c": HParams({"lr": 0.25})}
        publish(multi(both), StepEnd(step=3, metrics={}), values)
    both.close()
    assert "loss=0.5" in caplog.text
    assert "lr" in caplog.text
    first, config = read_jsonl(tmp_path / "a.jsonl")
    assert (first["metrics"], first["texts"], config) == ({"loss": 0.5}, {"note": "hello"}, {"hparams": {"lr": 0.25}})
    assert curve(tmp_path / "tb", "loss") == [(3, 0.5)]
