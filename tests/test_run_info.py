"""The names, tags and configuration of a run, in all of its records."""

import argparse
import dataclasses
import enum
import io
import json
import pathlib
from typing import NamedTuple

import numpy as np
import pytest
import torch

import fxtrain as fx
from fxtrain import observers, values, writers
from fxtrain.core import Control, FitBegin
from fxtrain.writers import read_jsonl

CONFIG = {"lr": 0.1, "optim": {"betas": (0.9, 0.99), "decay": None}, "layers": [1, {"size": 2}]}
PLAIN = {"lr": 0.1, "optim": {"betas": [0.9, 0.99], "decay": None}, "layers": [1, {"size": 2}]}
RUN = fx.RunInfo(
    project="mine", group="small", name="first", description="Without *decay*.", tags=["a", "b"], config=CONFIG
)


class Size(enum.Enum):
    SMALL = "small"


@dataclasses.dataclass
class Options:
    width: int
    folder: pathlib.Path
    size: Size = Size.SMALL


class Pair(NamedTuple):
    low: float
    high: float


def fit(*given, run=RUN, **options):
    tx = fx.optim.sgd(0.1)
    step = fx.train_step(lambda model, batch: (model(batch) - 1).square().mean(), tx)
    state = fx.init(torch.nn.Linear(1, 1), tx)
    return fx.fit(state, step, [torch.ones(4, 1)], steps=2, observers=given, run=run, **options)


@pytest.mark.parametrize(
    ("config", "plain"),
    [
        (Options(3, pathlib.Path("a", "b")), {"width": 3, "folder": "a/b", "size": "small"}),
        (argparse.Namespace(lr=np.float32(0.5), many=np.int64(2)), {"lr": 0.5, "many": 2}),
        ({"a": Pair(0.0, 1.0), "b": {3, 1}, "c": None}, {"a": {"low": 0.0, "high": 1.0}, "b": [1, 3], "c": None}),
        (
            {"dtype": torch.bfloat16, "device": torch.device("cpu"), "x": torch.tensor(2)},
            {"dtype": "bfloat16", "device": "cpu", "x": 2},
        ),
        ({"runs": [Options(1, pathlib.Path("c"))]}, {"runs": [{"width": 1, "folder": "c", "size": "small"}]}),
        (None, {}),
    ],
)
def test_configuration_becomes_plain_values(config, plain):
    assert fx.RunInfo(config=config).config == plain
    json.dumps(plain)


def test_configuration_is_a_copy():
    config = {"layers": [1, 2]}
    run = fx.RunInfo(config=config)
    config["layers"].append(3)
    assert run.config == {"layers": [1, 2]}
    assert dataclasses.replace(run, name="x").config == {"layers": [1, 2]}


@pytest.mark.parametrize(
    ("given", "error", "says"),
    [
        ({"name": 3}, TypeError, "expected name to be a string, got 3. Convert it with str."),
        ({"project": " "}, ValueError, "expected project to be a text, got an empty string. Omit it."),
        ({"tags": "a"}, TypeError, "expected tags to be a list of strings, got 'a'. Pass a list."),
        ({"tags": [1]}, TypeError, "expected tags to be strings, got 1. Convert it with str."),
        ({"config": 3}, TypeError, "expected config to be a mapping or a dataclass, got 3."),
        ({"config": {"a": {"b": print}}}, TypeError, "expected a/b to be a string, number, bool or None"),
    ],
)
def test_wrong_run_info_is_refused(given, error, says):
    with pytest.raises(error) as caught:
        fx.RunInfo(**given)
    assert says in str(caught.value)


def test_wrong_run_is_refused_before_the_first_step():
    with pytest.raises(TypeError, match=r"expected run to be an fxtrain.RunInfo, got a dict .* Make one: fxt"):
        fit(run={"name": "x"})
    with pytest.raises(ValueError, match="expected HParams with distinct names, got 'a/b' twice"):
        fit(run=fx.RunInfo(config={"a/b": 1, "a": {"b": 2}}))


def test_callbacks_see_the_run_when_it_begins():
    seen = []

    def look(state, event: FitBegin):
        seen.append(event.run)
        return state, Control()

    fit(callbacks=[look])
    fit(callbacks=[look], run=None)
    assert seen == [RUN, None]


def test_run_is_recorded_and_kept_by_sessions_without_one(tmp_path):
    fit(observers.record_run(tmp_path))
    fit(observers.record_run(tmp_path), run=None)
    record = json.loads((tmp_path / "run.json").read_text())
    assert record["run"] == {
        "project": "mine", "group": "small", "name": "first", "tags": ["a", "b"], "description": "Without *decay*.",
    }  # fmt: skip
    assert record["config"] == PLAIN
    assert len(record["sessions"]) == 2
    fit(observers.record_run(tmp_path, {"own": 1}))
    assert json.loads((tmp_path / "run.json").read_text())["config"] == {"own": 1}


def test_files_of_writers_begin_with_the_run(tmp_path):
    page = io.StringIO()
    log = observers.write(
        writers.jsonl(tmp_path / "a.jsonl"), writers.csv(tmp_path / "a.csv"), writers.console(page), every=2
    )
    fit(log)
    first, *_ = read_jsonl(tmp_path / "a.jsonl")
    assert (first["event"], first["step"], first["run"]["name"], first["run"]["tags"]) == (
        "FitBegin", 0, "first", ["a", "b"],
    )  # fmt: skip
    config = {"lr": 0.1, "optim/betas": [0.9, 0.99], "optim/decay": None, "layers": [1, {"size": 2}]}
    assert {**first["hparams"], **config} == first["hparams"]
    line = "run | project mine | group small | name first | tags a, b | description Without *decay*.\n"
    assert page.getvalue().startswith(line)
    shown = [line.split(maxsplit=1) for line in page.getvalue().splitlines() if line.startswith("  ")]
    assert ["optim/betas", "[0.9, 0.99]"] in shown
    assert ["optim/decay", "None"] in shown


def test_hparams_of_a_writer_have_priority(tmp_path):
    fit(observers.write(writers.jsonl(tmp_path / "a.jsonl"), hparams={"own": [1, 2]}))
    hparams = read_jsonl(tmp_path / "a.jsonl")[0]["hparams"]
    assert hparams["own"] == [1, 2]
    assert "lr" not in hparams


def test_run_without_facts_writes_none(tmp_path):
    fit(observers.write(writers.jsonl(tmp_path / "a.jsonl")), run=fx.RunInfo())
    assert not {"run", "hparams"} & set(read_jsonl(tmp_path / "a.jsonl")[0])


def test_tensorboard_shows_the_run_and_lists_in_its_configuration(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboardX.proto.plugin_hparams_pb2 import HParamsPluginData

    fit(observers.write(writers.tensorboard(tmp_path)))
    found = EventAccumulator(str(tmp_path)).Reload()
    (text,) = found.Tensors("run")
    assert b"**name**: first" in text.tensor_proto.string_val[0]
    content = found.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    hparams = HParamsPluginData.FromString(content).session_start_info.hparams
    assert hparams["optim/betas"].string_value == "[0.9, 0.99]"
    assert "optim/decay" not in hparams  # None would turn a column of numbers into one of texts


def test_writers_of_other_libraries_get_text_and_scalars():
    written = {}

    class Clu:
        def write_scalars(self, step, scalars): ...

        def write_texts(self, step, texts):
            written["texts"] = dict(texts)

        def write_hparams(self, hparams):
            written["hparams"] = dict(hparams)

        def flush(self): ...

        def close(self): ...

    observers.write(Clu())(None, FitBegin(step=0, run=RUN), Control())
    assert "**project**: mine" in written["texts"]["run"]
    assert written["hparams"]["optim/betas"] == "[0.9, 0.99]"


def test_simplified_run_is_a_text():
    assert values.simplified(fx.RunInfo(name="x", tags=["a"]), {values.Text}) == values.Text(
        "**name**: x  \n**tags**: a"
    )


def test_report_shows_the_run_and_its_configuration(tmp_path):
    from fxtrain import report

    fit(observers.record_run(tmp_path), observers.write(writers.jsonl(tmp_path / "metrics.jsonl")))
    run = report.read_run(tmp_path)
    assert (run.about["name"], run.about["tags"], run.config) == ("first", ["a", "b"], PLAIN)
    assert run.folder.problems.lines() == []
    assert "Without *decay*." in report.page(run)
