"""Runs of ``fxtrain train``: the run folder, exit codes, signals, and resumes with a kept or changed configuration."""

import json
import re
import shutil
import signal
import subprocess
import sys

import processes
import pytest
import yaml
from trainings import CONFIG, MODULE

from fxtrain import writers
from fxtrain.cli import main


@pytest.fixture
def shop(tmp_path, monkeypatch):
    """A folder with the package and the configuration, which is the current one."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "shop", raising=False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "shop.py").write_text(MODULE)
    (tmp_path / "run.yaml").write_text(CONFIG)
    return tmp_path


def only_run(folder):
    (found,) = (folder / "runs").iterdir()
    return found


def trained(*arguments):
    """Runs the command in a process."""
    done = processes.run(["-m", "fxtrain", "train", *arguments])
    assert "Traceback" not in done.stderr
    return done


def interrupted(number, *arguments):
    """Starts the command, sends a signal once it trains, and returns its exit code and output."""
    with processes.Process(["-m", "fxtrain", "train", *arguments]) as process:
        for line in process.stdout:
            if re.match(r"step +\d", line) and int(line.split()[1].split("/")[0]) > 4:
                process.send_signal(number)
                break
        out, err = process.communicate(timeout=300)
    assert "Traceback" not in err
    return process.returncode, out


def checkpoint(folder):
    """Returns the checksums of the newest checkpoint's leaves by path."""
    newest = sorted((folder / "checkpoints").glob("[0-9]*"))[-1]
    leaves = map(json.loads, (newest / "manifest.jsonl").read_text().splitlines()[1:-1])
    return {leaf["path"]: leaf["xxh3"] for leaf in leaves}


def test_run_folder_has_configuration_metrics_and_checkpoints(shop, capsys):
    assert main(["train", "run.yaml", "run.name=first"]) == 0
    out = capsys.readouterr().out
    folder = only_run(shop)
    assert "finished 3 epochs" in out
    assert f"resume      fxtrain train --resume runs/{folder.name}" in out
    assert f"report      fxtrain report runs/{folder.name}" in out
    names = {path.name for path in folder.iterdir()}
    assert names == {
        "checkpoints", "config.yaml", "events.jsonl", "metrics.jsonl", "more.jsonl", "run.json", "summary.txt",
    }  # fmt: skip
    assert {"StepEnd", "EvalEnd"} <= {line["event"] for line in writers.read_jsonl(folder / "metrics.jsonl")}
    record = json.loads((folder / "run.json").read_text())
    assert record["run"] == {"name": "first"}
    assert record["config"]["model"] == {"shop.Net": {"width": 16}}


def test_kept_configuration_reproduces_the_run(shop, capsys):
    assert main(["train", "run.yaml"]) == 0
    first = only_run(shop)
    first.rename(shop / "first")
    assert main(["train", "first/config.yaml"]) == 0
    assert checkpoint(only_run(shop)) == checkpoint(shop / "first")


def test_weights_depend_on_the_seed(shop, capsys):
    for seed in (0, 1):
        assert main(["train", "run.yaml", "steps=0", f"seed={seed}", f"--runs=runs{seed}"]) == 0
    first, second = (checkpoint(next((shop / f"runs{seed}").iterdir())) for seed in (0, 1))
    name = "state.params['layers.0.weight']"
    assert first[name] != second[name]


def test_function_is_trained_and_resumed_with_more_steps(shop, capsys):
    assert main(["train", "shop:baseline", "steps=4"]) == 0
    folder = only_run(shop)
    assert yaml.safe_load((folder / "config.yaml").read_text()) == {
        "function": "shop:baseline", "width": 8, "steps": 4, "lr": 0.1,
    }  # fmt: skip
    assert main(["train", "--resume", str(folder), "steps=6"]) == 0
    out = capsys.readouterr().out
    assert "resuming from step 4" in out
    assert "reached 6 steps" in out
    assert yaml.safe_load((folder / "config.yaml").read_text())["steps"] == 6


def test_resume_accepts_what_does_not_define_the_run(shop, capsys):
    assert main(["train", "run.yaml"]) == 0
    folder = only_run(shop)
    changes = ["epochs=4", "callbacks=[]", "observers=[]", "eval_data=null"]
    assert main(["train", "--resume", str(folder), *changes]) == 0
    assert "finished 4 epochs" in capsys.readouterr().out
    config = yaml.safe_load((folder / "config.yaml").read_text())
    assert (config["epochs"], config["callbacks"]) == (4, [])


def test_resume_refuses_what_defines_the_run_and_shows_the_difference(shop, capsys):
    assert main(["train", "run.yaml", "epochs=1"]) == 0
    folder = only_run(shop)
    before = (folder / "config.yaml").read_text()
    capsys.readouterr()
    changes = ["epochs=4", "seed=3", "optimizer.chain[1].adamw.learning_rate.cosine.decay_steps=200"]
    assert main(["train", "--resume", str(folder), *changes]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.splitlines() == [
        "  optimizer.chain[1].adamw.learning_rate.cosine.decay_steps: 100 -> 200",
        "  epochs: 1 -> 4",
        "  seed: 0 -> 3",
        "fxtrain train: expected optimizer.chain[1].adamw.learning_rate.cosine.decay_steps=100, with which "
        f"{folder} was started, got 200 and 1 other change. Model, optimizer, loss, data, seed and precision "
        "define the run. Its length, callbacks, observers, evaluations and checkpoints may change. Omit the others, or "
        "start a new run.",
    ]
    assert main(["train", "--resume", str(folder), "run.yaml", "data.batches.batch_size=8"]) == 2
    assert "  data.batches.batch_size: 16 -> 8" in capsys.readouterr().err.splitlines()
    assert (folder / "config.yaml").read_text() == before


def test_resume_refuses_changed_arguments_of_a_function(shop, capsys):
    assert main(["train", "shop:baseline", "steps=2"]) == 0
    folder = only_run(shop)
    capsys.readouterr()
    assert main(["train", "--resume", str(folder), "width=4"]) == 2
    assert capsys.readouterr().err.splitlines() == [
        "  width: 8 -> 4",
        f"fxtrain train: expected width=8, with which {folder} was started, got 4. Of the arguments of a function, "
        "only steps and epochs may change. Omit the change, or start a new run.",
    ]


@pytest.mark.parametrize(
    ("folder", "code", "message"),
    [
        ("nowhere", 2, "expected the folder of a run for --resume, got nowhere (No such file or directory)."),
        (
            ".",
            2,
            "expected the folder of a run for --resume, got ., which has no config.yaml. Give one that fxtrain train",
        ),
        ("damaged", 1, "whose config.yaml is damaged: expected YAML in config.yaml, got "),
    ],
)
def test_resume_refuses_a_folder_without_a_run(shop, capsys, folder, code, message):
    (shop / "damaged").mkdir()
    (shop / "damaged/config.yaml").write_text("a: [")
    assert main(["train", "--resume", folder]) == code
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "code", "message"),
    [
        (
            "callbacks[0].early_stopping.metric=los",
            1,
            "expected the metric 'los' at EvalEnd for early_stopping, got 'loss'.",
        ),
        (
            "observers=[{shop.pair: {first: $RUN, second: {shop.broken: }}}]",
            2,
            "observers[0].shop.pair.second.shop.broken:",
        ),
    ],
)
def test_run_that_fails_before_its_first_event_leaves_no_folder(shop, capsys, change, code, message):
    assert main(["train", "run.yaml", change]) == code
    assert message in capsys.readouterr().err
    assert not (shop / "runs").exists()


def test_error_of_the_training_is_one_line_with_its_place(shop, capsys):
    assert main(["train", "run.yaml", "loss=shop.failing_loss"]) == 1
    err = capsys.readouterr().err
    line = next(number for number, text in enumerate(MODULE.splitlines(), 1) if "no loss today" in text)
    assert err.splitlines()[-1] == (
        f"fxtrain train: RuntimeError: no loss today in {shop / 'shop.py'}, line {line}. Add --debug for the traceback."
    )


def test_command_runs_in_a_process_with_modules_of_the_current_folder(shop):
    command = [sys.executable, "-m", "fxtrain", "train", "shop.py:baseline", "steps=2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "reached 2 steps" in done.stdout
    failed = trained("run.yaml", "epochs=x")
    assert (failed.returncode, failed.stdout) == (2, "")
    assert failed.stderr == "fxtrain train: expected epochs to be an int or null, got 'x'.\n"


SLOW = ["observers=[{shop.slow: {seconds: 0.05}}]", "epochs=6"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_stopped_run_resumes_bitwise(shop, number, capsys):
    assert main(["train", "run.yaml", "epochs=6", "--runs", "whole"]) == 0
    code, _ = interrupted(number, "run.yaml", *SLOW)
    assert code == (-number if number == signal.SIGKILL else 128 + number)
    folder = only_run(shop)
    resumed = trained("--resume", str(folder), "observers=[]")
    assert resumed.returncode == 0
    (first,) = (shop / "whole").iterdir()
    assert checkpoint(folder) == checkpoint(first)
    shutil.rmtree(shop / "whole")


def test_help_teaches_with_examples(capsys):
    assert main(["train", "--help"]) == 0
    out = capsys.readouterr().out
    assert "callbacks: [{early_stopping: {metric: loss, patience: 3}}]" in out
    assert "fxtrain train my_package.runs:baseline width=128" in out


@pytest.mark.parametrize("command", ["train", "lm", "runs", "report", "inspect"])
def test_every_command_has_an_example_in_its_help(capsys, command):
    assert main([command, "--help"]) == 0
    out = capsys.readouterr().out
    assert f"fxtrain {command} " in out.split("xample:")[1]
    assert "--debug" in out


def test_exit_codes_are_documented(capsys):
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    assert "exit codes:" in out
    assert "130 for Ctrl-C" in out
