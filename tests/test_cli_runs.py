"""``fxtrain runs``: the state of each run, its step, its best metric and the reason of its end."""

import json
import os
import socket
import subprocess
import sys

import pytest

from fxtrain.cli import main

HERE = socket.gethostname()


def make_run(folder, *sessions, metrics=(("eval/loss", 3, 0.5), ("eval/loss", 6, 0.25), ("eval/accuracy", 6, 0.75))):
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps({"config": {}, "sessions": sessions}))
    lines = [{"step": step, "metrics": {name: value}} for name, step, value in metrics]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def session(reason=None, *, began="2100-01-01T12:30:00+00:00", to_step=6, host=HERE, process=None):
    found = {"began": began, "from_step": 0, "environment": {"host": host, "process": process or os.getpid()}}
    return found if reason is None else {**found, "ended": began, "to_step": to_step, "reason": reason, "seconds": 1.0}


def table(capsys, *arguments):
    """Returns the cells of each run by its name."""
    assert main(["runs", *map(str, arguments)]) == 0
    head, *rows = capsys.readouterr().out.splitlines()
    starts = [head.index(name) for name in head.split()]
    ends = [*starts[1:], None]
    cells = [[row[start:end].strip() for start, end in zip(starts, ends, strict=True)] for row in rows]
    return {row[0]: dict(zip(head.split(), row, strict=True)) for row in cells}


def dead_process():
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_each_state_is_recognized(capsys, tmp_path):
    make_run(tmp_path / "a", session("finished 3 epochs"))
    make_run(tmp_path / "b", session("interrupted by SIGINT"))
    make_run(tmp_path / "c", session())
    make_run(tmp_path / "d", session(process=dead_process()))
    make_run(tmp_path / "e", session(host="elsewhere"))
    make_run(tmp_path / "f", session("interrupted by SIGTERM"), session("loss below 0.1"))
    make_run(tmp_path / "g")
    rows = table(capsys, tmp_path)
    assert {name: (row["state"], row["reason"]) for name, row in rows.items()} == {
        "a": ("finished", "finished 3 epochs"),
        "b": ("interrupted", "interrupted by SIGINT"),
        "c": ("running", ""),
        "d": ("interrupted", "killed: its end was not recorded"),
        "e": ("unknown", "no end was recorded on elsewhere"),
        "f": ("finished", "loss below 0.1"),
        "g": ("unknown", "it has no record (fxtrain.observers.record_run)"),
    }


def test_process_number_of_a_younger_process_is_not_the_run(capsys, tmp_path):
    make_run(tmp_path / "a", session(began="2000-01-01T12:30:00+00:00"))
    assert table(capsys, tmp_path)["a"]["state"] == "interrupted"


def test_step_begin_and_best_metric_are_shown(capsys, tmp_path):
    make_run(tmp_path / "a", session("finished", to_step=7))
    make_run(tmp_path / "b", session(), metrics=[("train/loss", 9, 1.5), ("train/loss", 10, float("nan"))])
    make_run(tmp_path / "c", session(), metrics=[])
    rows = table(capsys, tmp_path)
    assert (rows["a"]["step"], rows["a"]["best"], rows["a"]["began"]) == ("7", "eval/loss 0.2500", "2100-01-01 12:30")
    assert (rows["b"]["step"], rows["b"]["best"]) == ("10", "train/loss 1.5000")
    assert (rows["c"]["step"], rows["c"]["best"]) == ("0", "")
    best = table(capsys, tmp_path, "--metric", "eval/loss", "--mode", "max")["a"]["best"]
    assert best == "eval/loss 0.5000"


def test_runs_are_listed_by_their_begin_and_other_folders_are_left_out(capsys, tmp_path):
    make_run(tmp_path / "late", session("finished", began="2002-01-01T00:00:00+00:00"))
    make_run(tmp_path / "early", session("finished", began="2001-01-01T00:00:00+00:00"))
    (tmp_path / "other").mkdir()
    (tmp_path / "file").touch()
    assert list(table(capsys, tmp_path)) == ["early", "late"]
    assert list(table(capsys, tmp_path / "late")) == ["late"]


def test_damaged_record_and_control_characters_do_not_break_the_table(capsys, tmp_path):
    make_run(tmp_path / "a", session("bad\n\x1b[31mreason"))
    make_run(tmp_path / "b")
    (tmp_path / "b/run.json").write_text("{")
    make_run(tmp_path / "c", {"began": "yesterday", "environment": {"host": HERE, "process": "many"}})
    rows = table(capsys, tmp_path)
    assert rows["a"]["reason"] == "bad \\x1b[31mreason"
    assert rows["b"]["state"] == "unknown"
    assert rows["c"]["state"] == "interrupted"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "expected a folder of runs, got nowhere (No such file or directory). Check the path."),
        (["empty"], "expected a folder of runs, got empty, which has none. Check the path."),
        (["some", "--metric", "eval/los"], "got 'eval/los'. Did you mean 'eval/loss'?"),
        (
            ["some", "--metric", "x"],
            "expected --metric to be a metric of a run, got 'x'. The runs have eval/accuracy, ",
        ),
    ],
)
def test_folder_without_runs_and_unknown_metric_are_refused(capsys, monkeypatch, tmp_path, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    make_run(tmp_path / "some/a", session())
    assert main(["runs", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("fxtrain runs: ")
    assert captured.err.count("\n") == 1
    assert message in captured.err


def test_options_are_read_from_a_file_and_changed_on_the_command_line(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    make_run(tmp_path / "some/a", session())
    (tmp_path / "runs.yaml").write_text("folder: some\nmetric: eval/loss\nmode: max\n")
    assert table(capsys, "--config", "runs.yaml")["a"]["best"] == "eval/loss 0.5000"
    assert table(capsys, "--config", "runs.yaml", "--mode", "min")["a"]["best"] == "eval/loss 0.2500"
    (tmp_path / "runs.yaml").write_text("mode: mx\n")
    assert main(["runs", "--config", "runs.yaml"]) == 2
    assert (
        capsys.readouterr().err == "fxtrain runs: expected mode to be 'min' or 'max', got 'mx'. Did you mean 'max'?\n"
    )
