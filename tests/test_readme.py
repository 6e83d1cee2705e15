"""The README's example, commands and references to names."""

import pathlib
import re

import pytest
import torch

import fxtrain as fx
from fxtrain import testing
from notebooks import picture

ROOT = pathlib.Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.S)


def test_example_runs_in_an_empty_namespace(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (example,) = blocks("python")
    exec(example, {})
    reason, accuracy = capsys.readouterr().out.rsplit(maxsplit=1)
    assert reason == "accuracy above 0.99"
    assert float(accuracy) > 0.99


def test_example_resumes_bitwise(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (example,) = blocks("python")
    (added,) = re.findall(r"Add\n`(checkpointer=[^`]*)`", README)
    data, training = example.split("result = fx.fit(")
    training = training.replace("epochs=40", "epochs=4")
    resumable = training.replace("epochs=4", f"epochs=4, {added}").replace("callbacks=[", "callbacks=[crash, ")

    def crash(state, event: fx.StepEnd):
        if event.step == crashing_step:
            raise RuntimeError("crash")
        return state, fx.Control()

    whole, resumed = {}, {"crash": crash}
    exec(data + "result = fx.fit(" + training, whole)
    crashing_step = 77
    with pytest.raises(RuntimeError, match="crash"):
        exec(data + "result = fx.fit(" + resumable, {"crash": crash})
    crashing_step = None
    exec(data + "result = fx.fit(" + resumable, resumed)
    testing.assert_equal(resumed["result"].state, whole["result"].state, "resumed run")


def test_picture_of_a_run_is_drawn(tmp_path):
    state = fx.init(torch.nn.Linear(2, 2))
    held_out = {"x": torch.zeros(4, 2), "y": torch.tensor([0, 1, 0, 1])}
    points = {f"{kind}/{name}": ([1, 2], [0.5, 0.9]) for kind in ("train", "eval") for name in ("loss", "accuracy")}
    result = fx.Result(state, state, "accuracy above 0.99", fx.History(points))
    picture.draw(result, held_out, tmp_path / "run.svg", "#000000")
    assert (tmp_path / "run.svg").read_text().rstrip().endswith("</svg>")


def test_ci_runs_the_test_command():
    main, tests = blocks("sh")
    assert main.strip().endswith("fxtrain lm")
    assert tests.strip() in (ROOT / ".ci/run").read_text()


def test_readme_has_at_most_90_lines():
    assert len(README.splitlines()) <= 90


@pytest.mark.parametrize("name", re.findall(r"help\((?:fx|fxtrain)\.([\w.]+)\)", README))
def test_referenced_names_are_documented(name):
    found = fx
    for part in name.split("."):
        found = getattr(found, part)
    assert found.__doc__
