"""Writers: written values are read back from event files and JSON lines."""

import contextlib
import datetime
import importlib.util
import inspect
import json
import logging
import struct
import sys
import time
import types

import numpy as np
import psutil
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.plugin_hparams_pb2 import HParamsPluginData
from tensorboardX.record_writer import masked_crc32c

from fxtrain.core import EvalEnd, EvalStep, FitBegin, StepEnd
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


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


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


# JSON lines


def test_jsonl_line_has_all_values_of_an_event(tmp_path):
    path = tmp_path / "new" / "metrics.jsonl"
    writer = jsonl(path, clock=None)
    event = StepEnd(step=12, position=5, epoch_length=10, time=3.25, metrics={})
    values = {
        "train/loss": 0.5,
        "note": Text("wörld\n"),
        "weights": Histogram(counts=torch.tensor([2, 6]), edges=torch.tensor([0.0, 1, 3])),
        "config": HParams({"optim": {"lr": 0.1}}),
    }
    publish(writer, event, values)
    publish(writer, EvalStep(step=12, index=3, batch=None, metrics={}), {"x": 1})
    assert lines(path) == [
        {
            "event": "StepEnd",
            "step": 12,
            "epoch": 0.5,
            "time": 3.25,
            "metrics": {"train/loss": 0.5},
            "texts": {"note": "wörld\n"},
            "histograms": {"weights": {"counts": [2.0, 6.0], "edges": [0.0, 1.0, 3.0]}},
            "hparams": {"optim/lr": 0.1},
        },
        {"event": "EvalStep", "step": 12, "index": 3, "epoch": None, "time": 0.0, "metrics": {"x": 1}},
    ]
    writer.close()


def test_jsonl_line_has_the_date_and_time_of_its_clock(tmp_path):
    zone = datetime.timezone(datetime.timedelta(hours=2))
    now = datetime.datetime(2024, 1, 1, 12, tzinfo=zone)
    writer = jsonl(tmp_path / "a.jsonl", clock=lambda: now)
    publish(writer, StepEnd(step=2, time=3.25, metrics={}), {"x": 1})
    now += datetime.timedelta(milliseconds=1500)
    writer.write_hparams({"lr": 0.1})
    writer.purge(1)
    writer.close()
    first, hparams, marker = lines(tmp_path / "a.jsonl")
    assert (first["time"], first["timestamp"]) == (3.25, "2024-01-01T12:00:00.000+02:00")
    assert hparams["timestamp"] == marker["timestamp"] == "2024-01-01T12:00:01.500+02:00"
    assert [record.get("step") for record in read_jsonl(tmp_path / "a.jsonl")] == [None]


def test_jsonl_timestamp_is_the_time_of_writing_in_utc(tmp_path):
    before = datetime.datetime.now(datetime.UTC)
    writer = jsonl(tmp_path / "a.jsonl")
    writer.write_scalars(1, {"x": 1})
    writer.close()
    (line,) = lines(tmp_path / "a.jsonl")
    stamp = datetime.datetime.fromisoformat(line["timestamp"])
    assert stamp.utcoffset() == datetime.timedelta(0)
    assert before - datetime.timedelta(milliseconds=1) <= stamp <= datetime.datetime.now(datetime.UTC)


@pytest.mark.parametrize("now", [datetime.datetime(2024, 1, 1), 1.5], ids=["without a zone", "a number"])
def test_jsonl_refuses_a_clock_without_time_zone(tmp_path, now):
    with pytest.raises(ValueError, match=r"expected clock to return a datetime with a time zone, got .*\. Pass lambda"):
        jsonl(tmp_path / "a.jsonl", clock=lambda: now)
    assert not list(tmp_path.iterdir())


def test_jsonl_calls_of_one_step_are_read_as_one_record(tmp_path):
    writer = jsonl(tmp_path / "a.jsonl", clock=None)
    writer.write_hparams({"lr": 0.1})
    writer.write_scalars(1, {"loss": np.float32(0.5), "acc": torch.tensor(0.25)})
    writer.write_texts(1, {"said": "hello"})
    writer.write_scalars(1, {"loss": 0.75})
    writer.write_histograms(2, {"w": np.array([0.0, 1.0])}, {"w": 2})
    writer.close()
    assert read_jsonl(tmp_path / "a.jsonl") == [
        {"hparams": {"lr": 0.1}},
        {"step": 1, "metrics": {"loss": 0.75, "acc": 0.25}, "texts": {"said": "hello"}},
        {"step": 2, "histograms": {"w": {"counts": [1.0, 1.0], "edges": [0.0, 0.5, 1.0]}}},
    ]


def test_jsonl_non_finite_values_are_strings(tmp_path):
    writer = jsonl(tmp_path / "a.jsonl")
    writer.write_scalars(1, {"a": float("nan"), "b": float("inf"), "c": torch.tensor(-float("inf"))})
    writer.close()
    text = (tmp_path / "a.jsonl").read_text()
    (line,) = json.loads(f"[{text}]", parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert line["metrics"] == {"a": "NaN", "b": "Infinity", "c": "-Infinity"}
    (record,) = read_jsonl(tmp_path / "a.jsonl")
    assert list(record["metrics"].values())[1:] == [float("inf"), -float("inf")]
    assert np.isnan(record["metrics"]["a"])


WHOLE = b"".join(b'{"step": %d, "metrics": {"loss": %d.5}}\n' % (n, n) for n in range(1, 4))


@pytest.mark.parametrize("cut", range(len(WHOLE) + 1))
def test_jsonl_repairs_a_line_torn_at_any_byte(tmp_path, cut, recwarn):
    path = tmp_path / "a.jsonl"
    path.write_bytes(WHOLE[:cut])
    writer = jsonl(path)
    whole = WHOLE[:cut].count(b"\n")
    torn = cut - (WHOLE[:cut].rfind(b"\n") + 1)
    assert [str(w.message) for w in recwarn] == (
        [
            f"{path} ended in the middle of a line, possibly after a crash. Its last {torn} bytes "
            "were moved to a.jsonl.damaged."
        ]
        if torn
        else []
    )
    writer.write_scalars(9, {"loss": 9.5})
    writer.close()
    assert [line["step"] for line in lines(path)] == [*range(1, whole + 1), 9]


def test_jsonl_repairs_a_torn_line_longer_than_a_block(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(WHOLE + b'{"step": 4, "texts": {"t": "' + b"x" * 200_000)
    with pytest.warns(RuntimeWarning, match="Its last 200028 bytes"):
        jsonl(path).close()
    assert path.read_bytes() == WHOLE


def filled(path, steps=5):
    writer = jsonl(path, clock=None)
    for step in range(1, steps + 1):
        publish(writer, StepEnd(step=step, metrics={}), {"train/loss": float(step)})
        if step % 2 == 0:
            publish(writer, EvalEnd(step=step, metrics={}), {"eval/loss": float(step)})
    return writer


def test_jsonl_purge_abandons_later_values_and_keeps_all_lines(tmp_path):
    path = tmp_path / "a.jsonl"
    writer = filled(path)
    before = path.read_bytes()
    writer.purge(5)
    assert path.read_bytes() == before
    for _ in range(2):
        writer.purge(2)
        assert path.read_bytes() == before + b'{"rewound_to": 2}\n'
    publish(writer, StepEnd(step=3, metrics={}), {"train/loss": 30.0})
    writer.close()
    assert path.read_bytes().startswith(before)
    assert [(record["event"], record["step"], *record["metrics"].values()) for record in read_jsonl(path)] == [
        ("StepEnd", 1, 1.0), ("StepEnd", 2, 2.0), ("EvalEnd", 2, 2.0), ("StepEnd", 3, 30.0),
    ]  # fmt: skip
    writer = jsonl(path, clock=None)
    writer.purge(3)
    writer.close()
    assert len(lines(path)) == 9


@pytest.mark.parametrize("reopened", [False, True])
def test_jsonl_merges_into_the_line_of_the_resumed_step(tmp_path, reopened):
    path = tmp_path / "a.jsonl"
    writer = filled(path, steps=4)
    if reopened:
        writer.close()
        writer = jsonl(path)
    writer.purge(4)
    publish(writer, EvalEnd(step=4, time=1.0, metrics={}), {"eval/loss": 40.0, "eval/acc": 1.0})
    publish(writer, StepEnd(step=5, metrics={}), {"train/loss": 5.0})
    writer.close()
    assert [(record["event"], record["step"]) for record in read_jsonl(path)][-3:] == [
        ("StepEnd", 4), ("EvalEnd", 4), ("StepEnd", 5),
    ]  # fmt: skip
    assert read_jsonl(path)[-2]["metrics"] == {"eval/loss": 40.0, "eval/acc": 1.0}


@pytest.mark.parametrize("cut", range(len(b'{"rewound_to": 2}\n') + 1))
def test_jsonl_marker_torn_at_any_byte_is_written_again(tmp_path, cut):
    path = tmp_path / "a.jsonl"
    writer = filled(path)
    writer.purge(2)
    writer.close()
    marker = len(b'{"rewound_to": 2}\n')
    path.write_bytes(path.read_bytes()[: path.stat().st_size - marker + cut])
    with contextlib.nullcontext() if cut in (0, marker) else pytest.warns(RuntimeWarning, match="middle of a line"):
        writer = jsonl(path)
    writer.purge(2)
    writer.close()
    assert [record["step"] for record in read_jsonl(path)] == [1, 2, 2]
    assert len(lines(path)) == 8


def test_jsonl_purge_keeps_hparams_and_skips_damaged_lines(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"hparams": {"lr": 0.1}}\n\0\0\0\n[1]\n{"step": "x"}\n{"rewound_to": null}\n' + WHOLE)
    writer = jsonl(path)
    writer.purge(1)
    writer.close()
    assert read_jsonl(path) == [{"hparams": {"lr": 0.1}}, {"step": 1, "metrics": {"loss": 1.5}}]


@settings(deadline=None, max_examples=50)
@given(sessions=st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=1, max_size=6))
def test_jsonl_has_one_record_for_each_event_and_step(tmp_path_factory, sessions):
    path = tmp_path_factory.mktemp("law") / "a.jsonl"
    expected, last = {}, 0
    for number, (back, steps) in enumerate(sessions):
        begin = max(last - back, 0)
        writer = jsonl(path)
        writer.purge(begin)
        expected = {key: value for key, value in expected.items() if key[1] <= begin}
        for step in range(begin + 1, begin + steps + 1):
            for event in (StepEnd(step=step, metrics={}), EvalEnd(step=step, metrics={})):
                publish(writer, event, {"session": number})
                expected[type(event).__name__, step] = number
        last = begin + steps
        writer.close()
    found = [((record["event"], record["step"]), record["metrics"]["session"]) for record in read_jsonl(path)]
    assert found == list(expected.items())


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
