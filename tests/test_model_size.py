"""The number of parameters as scalars and in the configuration that writers get."""

import torch
from torch import nn

import fxtrain as fx
from fxtrain import observers, writers
from fxtrain.callbacks import model_size
from fxtrain.core import Control, FitBegin
from fxtrain.writers import read_jsonl

TX = fx.optim.adam(0.1)
SIZES = {"model/num_parameters": 6, "model/trainable_parameters": 4}


def start():
    """A model with 6 parameters, of which 2 are frozen."""
    module = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1), nn.Linear(1, 1))
    module[0].requires_grad_(False)
    return fx.init(module, TX)


def fit(steps=4, **options):
    step = fx.train_step(lambda model, batch: (model(batch) - 1).square().mean(), TX)
    return fx.fit(start(), step, [torch.ones(4, 1)], steps=steps, callbacks=[model_size()], **options)


def test_sizes_are_logged_once_in_interrupted_runs_as_in_whole_ones(tmp_path):
    log = {}
    for name, stops in {"whole": [4], "resumed": [2, 4]}.items():
        for stop in stops:
            write = observers.write(writers.jsonl(tmp_path / f"{name}.jsonl", clock=None))
            fit(stop, checkpointer=fx.checkpointer(tmp_path / name), resume=True, observers=[write])
        lines = read_jsonl(tmp_path / f"{name}.jsonl")
        log[name] = [(line["step"], line["metrics"]) for line in lines if line["event"] == "FitBegin"]
    ((step, metrics),) = log["whole"]
    assert step == 0
    assert {**metrics, **SIZES} == metrics
    assert metrics["model/state_bytes"] > 6 * 4 + 2 * 4 * 4  # parameters, and two moments of those that move
    assert log["resumed"] == log["whole"]


def test_history_has_the_sizes():
    history = fit().history
    assert {name: history[name].values.tolist() for name in SIZES} == {name: [size] for name, size in SIZES.items()}


def test_hyperparameters_of_writers_include_the_sizes_unless_they_have_their_own(tmp_path):
    write = observers.write(writers.jsonl(tmp_path / "a.jsonl"))
    run = fx.RunInfo(config={"lr": 0.1, "model": {"num_parameters": "many"}})
    write(start(), FitBegin(step=0, run=run), Control())
    hparams = read_jsonl(tmp_path / "a.jsonl")[0]["hparams"]
    assert (hparams["lr"], hparams["model/num_parameters"], hparams["model/trainable_parameters"]) == (0.1, "many", 4)


def test_runs_without_hyperparameters_write_no_sizes(tmp_path):
    write = observers.write(writers.jsonl(tmp_path / "a.jsonl"))
    write(start(), FitBegin(step=0, run=fx.RunInfo(name="x")), Control())
    assert "hparams" not in read_jsonl(tmp_path / "a.jsonl")[0]


def test_state_without_a_model_counts_all_parameters():
    state = fx.init(torch.ones(3)).replace(model=None)
    assert model_size()(state, FitBegin(step=0))[1].log["model/trainable_parameters"].value == 3
