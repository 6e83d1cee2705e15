"""The README tells the truth: its example runs as it is written, and CI runs its test command."""

import pathlib
import re

import pytest
import torch
import torch.nn.functional as F

import fxtrain as fx

ROOT = pathlib.Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.S)


def test_the_example_runs_word_for_word(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    x = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))
    rows = {"x": x, "y": (x[:, 0] > 0).long()}
    names = {
        "F": F,
        "module": torch.nn.Linear(4, 2),
        "data": fx.data.batches(rows, 16),
        "held_out": fx.data.batches(rows, 32),
    }
    (example,) = blocks("python")
    exec(example.replace("fx.compile(fx.train_step(loss_fn, tx))", "fx.train_step(loss_fn, tx)"), names)
    assert names["result"].reason == "finished 3 epochs"
    assert names["result"].last.step == 12
    assert (tmp_path / "runs/1").is_dir()


def test_the_test_command_is_that_of_ci():
    main, tests = blocks("sh")
    assert main.strip().endswith("fxtrain lm")
    assert tests.strip() in (ROOT / ".ci/run").read_text()


def test_is_short():
    assert len(README.splitlines()) <= 120


@pytest.mark.parametrize("name", re.findall(r"help\((?:fx|fxtrain)\.([\w.]+)\)", README))
def test_what_it_names_is_there(name):
    found = fx
    for part in name.split("."):
        found = getattr(found, part)
    assert found.__doc__
