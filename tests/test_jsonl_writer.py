"""JSON lines: what a line has, repairs of torn lines, and purges."""

import contextlib
import datetime
import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fxtrain.core import EvalEnd, EvalStep, StepEnd
from fxtrain.values import Histogram, HParams, Text
from fxtrain.writers import jsonl, read_jsonl


def publish(writer, event, values):
    writer.write(event.step, values, event)


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


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
