"""The ``fxtrain lm`` command: output, run folder, interruption, resume and rejected arguments."""

import concurrent.futures
import datetime
import json
import os
import pathlib
import re
import signal

import processes
import pytest
import yaml

from fxtrain import writers
from fxtrain.cli import _lm as lm
from fxtrain.cli import main
from fxtrain.cli._arguments import parse, saved_options
from fxtrain.cli._run_folder import make_folder

SHAPE = ["--layers", "1", "--width", "16", "--heads", "2", "--length", "16", "--batch-size", "4"]
SMALL = [*SHAPE, "--eval-interval", "10", "--snapshot-interval", "10"]


@pytest.fixture
def text(tmp_path):
    source = pathlib.Path(json.__file__).read_text()
    path = tmp_path / "text.py"
    path.write_text(source)
    return path


def start(*arguments, cwd):
    return processes.Process(["-m", "fxtrain", "lm", *arguments], cwd=cwd)


def run(*arguments, cwd):
    return processes.run(["-m", "fxtrain", "lm", *arguments], cwd=cwd)


def checkpoint(folder):
    """Returns the checksums of the newest checkpoint's leaves by path.

    Excludes the seconds counted by ``throughput``, because they differ between runs.
    """
    newest = sorted((folder / "checkpoints").glob("[0-9]*"))[-1]
    clocks = ("throughput'].seconds", "throughput'].waited", "throughput'].evaluating")
    leaves = map(json.loads, (newest / "manifest.jsonl").read_text().splitlines()[1:-1])
    return {leaf["path"]: leaf["xxh3"] for leaf in leaves if not leaf["path"].endswith(clocks)}


def only_run(folder):
    (found,) = (folder / "runs").iterdir()
    return found


@pytest.mark.slow
def test_interrupted_run_reports_and_resumes_bitwise(tmp_path, text):
    options = ["--dataset", str(text), "--steps", "60", "--no-compile", "--dropout", "0.1", *SMALL]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    whole.mkdir(), cut.mkdir()

    code, out, err = run(*options, cwd=whole)
    assert (code, err) == (0, "")
    for said in ("corpus", "parameters", "device", "reached 60 steps", "this model", "xz -9", "trigrams", "unigrams"):
        assert said in out
    folder = only_run(whole)
    assert f"fxtrain lm --resume runs/{folder.name}" in out
    names = {path.name.split(".")[0] for path in folder.iterdir()}
    assert {"config", "metrics", "events", "checkpoints", "result"} <= names
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert {"StepEnd", "EvalEnd"} <= {line["event"] for line in lines}

    with start(*options, cwd=cut) as process:
        for line in process.stdout:
            if re.match(r"step +2\d/60", line):
                process.send_signal(signal.SIGINT)
                break
        out, err = process.communicate(timeout=300)
    assert process.returncode == 130
    assert "interrupted by SIGINT" in out
    resume = re.search(r"fxtrain lm (--resume \S+)", out)[1].split()

    code, out, err = run(*resume, cwd=cut)
    assert (code, err) == (0, "")
    assert checkpoint(only_run(cut)) == checkpoint(folder)
    both = [json.loads((only_run(base) / "result.json").read_text()) for base in (whole, cut)]
    assert both[0] == both[1]
    records = writers.read_jsonl(only_run(cut) / "metrics.jsonl")
    steps = [record["step"] for record in records if record["event"] == "StepEnd"]
    assert steps == sorted(set(steps))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dataset", "/not/there"], "got '/not/there', which does not exist"),
        (["--steps", "0"], "expected --steps to be at least 1, got 0"),
        (["--lr", "-1"], "expected --lr to be above 0, got -1.0"),
        (["--width", "30"], "expected width to be a multiple of 8"),
        (["--device", "abacus"], "expected --device to be available, got abacus ("),
        (["--device", "meta"], "expected --device to be available, got meta ("),
        (["--lr", "inf"], "expected --lr to be finite, got inf"),
        (["--min-delta", "nan"], "expected --min-delta to be finite and at least 0, got nan"),
        (["--seed", str(2**64)], "expected --seed to fit in a signed 64-bit integer"),
        (["--steps", str(10**30)], "expected --steps to be at most 2147483648"),
        (["--keep", "0"], "expected --keep to be at least 1, got 0"),
        (["--patience", str(10**30)], "expected --patience to be at most 2147483648"),
        (["--resume", "nowhere"], "expected the folder of a run for --resume, got nowhere (No such file or directory)"),
    ],
)
def test_invalid_arguments_are_rejected_before_start(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert main(["lm", *arguments]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.out == ""
    assert list(tmp_path.iterdir()) == []


def test_earlier_spellings_are_accepted_on_the_command_line():
    given = parse(
        lm.Options, "lm", ["--text", "a.txt", "--early_stop_patience", "3", "--early-stop-min-delta", "0.001"]
    )
    assert (given.dataset, given.patience, given.min_delta) == ("a.txt", 3, 0.001)


@pytest.mark.slow
def test_patience_in_epochs_and_monitors_at_epochs(tmp_path, monkeypatch, capsys, text):
    monkeypatch.chdir(tmp_path)
    stopping = ["--early-stopping", "--min-delta", "9", "--patience", "2", "--patience-unit", "epochs", "--keep", "3"]
    shape = [*SHAPE[:-1], "16", "--eval-interval", "10", "--snapshot-interval", "10", "--no-compile"]
    monitor = ["--gradient-monitor", "--monitor-at-epochs"]
    assert main(["lm", "--dataset", "text.py", "--epochs", "9", *stopping, *monitor, *shape]) == 0
    assert "loss has not improved for 2 epochs" in capsys.readouterr().out
    folder = only_run(tmp_path)
    lines = writers.read_jsonl(folder / "metrics.jsonl")
    logged = [line["step"] for line in lines if "grad_norm/total" in line.get("metrics", {})]
    epoch = next(line["step"] for line in lines if line.get("epoch") == 1.0)
    assert epoch in logged
    assert epoch % 10
    assert 3 <= len(list((folder / "checkpoints").glob("[0-9]*"))) <= 4


def test_text_shorter_than_batch_is_rejected(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "short.txt").write_text("hello\n" * 20)
    assert main(["lm", "--dataset", "short.txt"]) == 2
    assert "bytes of training text, for one batch of 16 sequences of 128, got " in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_resume_rejects_changed_options_and_text(tmp_path, monkeypatch, capsys, text):
    monkeypatch.chdir(tmp_path)
    assert main(["lm", "--dataset", "text.py", "--steps", "2", "--no-compile", *SMALL]) == 0
    folder = only_run(tmp_path)
    assert main(["lm", "--resume", str(folder), "--lr", "0.5"]) == 2
    refused = capsys.readouterr().err.splitlines()
    assert refused[0] == "  lr: 0.003 -> 0.5"
    assert refused[1].startswith(
        f"fxtrain lm: expected lr=0.003, with which {folder} was started, got 0.5. Text, model,"
    )
    text.write_text(text.read_text() + "# changed\n")
    assert main(["lm", "--resume", str(folder)]) == 2
    assert "expected the text that " in capsys.readouterr().err


@pytest.mark.slow
def test_early_stopping_and_gradient_monitor_are_logged(tmp_path, monkeypatch, capsys, text):
    monkeypatch.chdir(tmp_path)
    stopping = ["--early_stopping", "--min-delta", "9", "--patience", "1"]  # no evaluation improves by 9 nats
    monitor = ["--gradient_monitor", "--gradient_monitor_interval", "15"]
    shape = [*SHAPE, "--eval-interval", "10", "--snapshot_interval", "10", "--no-compile"]
    assert main(["lm", "--dataset", "text.py", "--epochs", "9", *stopping, *monitor, *shape]) == 0
    assert "loss has not improved for 1 evaluation" in capsys.readouterr().out
    folder = only_run(tmp_path)
    logged = writers.read_jsonl(folder / "metrics.jsonl")
    for name in ("grad_norm/total", "grad_flow/gain_mean"):
        assert [line["step"] for line in logged if name in line.get("metrics", {})] == [10, 15, 20]
    saved = sorted((folder / "checkpoints").glob("[0-9]*"))
    assert [path.name.rpartition("-")[2] for path in saved] == ["000000010", "000000020"]


def test_main_lists_commands(capsys):
    assert main([]) == 0
    assert "lm      train a small byte-level transformer" in capsys.readouterr().out
    assert main(["lim"]) == 2
    assert "expected a command, got 'lim'" in capsys.readouterr().err


# Run folders


class AtOneTime(datetime.datetime):
    @classmethod
    def now(cls, tz=None):
        return cls(2024, 5, 17, 12, 30, 45)


def number_in(folder):
    return yaml.safe_load((folder / "config.yaml").read_text())["number"]


def test_runs_of_same_second_get_distinct_folders(tmp_path, monkeypatch):
    monkeypatch.setattr("fxtrain.cli._run_folder.datetime.datetime", AtOneTime)
    found = [make_folder(tmp_path / "runs", "lm", {"number": number}) for number in range(3)]
    names = ["lm-20240517-123045", "lm-20240517-123045-2", "lm-20240517-123045-3"]
    assert [folder.name for folder in found] == names
    assert [number_in(folder) for folder in found] == [0, 1, 2]


def test_concurrent_runs_get_distinct_folders(tmp_path, monkeypatch):
    monkeypatch.setattr("fxtrain.cli._run_folder.datetime.datetime", AtOneTime)
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        found = list(pool.map(lambda number: make_folder(tmp_path, "lm", {"number": number}), range(64)))
    assert [number_in(folder) for folder in found] == list(range(64))


def refused(capsys, code, *arguments):
    assert main(["lm", *arguments]) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("fxtrain lm: ")
    assert captured.err.count("\n") == 1
    return captured.err


def test_unwritable_runs_folder_is_rejected(tmp_path, monkeypatch, capsys, text):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    for runs in ("file", "file/runs", "/proc/runs", "a" * 5000):
        said = refused(capsys, 1, "--dataset", "text.py", "--runs", runs, *SMALL)
        assert "expected a writable folder for runs" in said
        assert "Choose another one with --runs." in said


@pytest.fixture
def started(tmp_path, monkeypatch, text):
    """The folder of a run without a checkpoint."""
    monkeypatch.chdir(tmp_path)
    small = ["--dataset", "text.py", "--steps", "1", "--no-compile", *SHAPE]
    options = saved_options(parse(lm.Options, "lm", small))
    folder = make_folder(tmp_path / "runs", "lm", options)
    (folder / "corpus.json").write_text(json.dumps({"digest": lm.read_corpus("text.py").digest}))
    return folder


def changed(path, **options):
    config = yaml.safe_load(path.read_text()) | options
    path.write_text(yaml.safe_dump({name: value for name, value in config.items() if value != "MISSING"}))


@pytest.mark.parametrize(
    "content", ["{", "[]", "null", "a: 1\na: 2", "\0" * 100, "[" * 10_000, "\xff"], ids=lambda content: content[:12]
)
def test_damaged_config_is_rejected(started, capsys, content):
    (started / "config.yaml").write_bytes(content.encode("latin-1"))
    assert "config.yaml is damaged: expected " in refused(capsys, 1, "--resume", str(started))


@pytest.mark.parametrize("content", ["", "{", "[]", "null", "\0" * 100, "[" * 10_000], ids=lambda content: content[:12])
def test_damaged_record_of_text_is_rejected(started, capsys, content):
    (started / "corpus.json").write_text(content)
    assert "corpus.json is damaged: expected " in refused(capsys, 1, "--resume", str(started))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"zzz": 3}, "expected an argument of config.yaml, got zzz. It has dataset, steps,"),
        ({"stepps": 3}, "expected an argument of config.yaml, got stepps. Did you mean 'steps'?"),
        ({"resume": "x"}, "expected an argument of config.yaml, got resume."),
        ({"steps": "5"}, "expected steps to be an int or null, got '5'."),
        ({"steps": True}, "expected steps to be an int or null, got True."),
        ({"lr": None}, "expected lr to be a number, got None."),
        ({"compile": 0}, "expected compile to be true or false, got 0."),
        ({"runs": ["a"]}, "expected runs to be a path, got ['a']."),
        ({"patience_unit": "step"}, "expected patience_unit to be 'evaluations', 'steps' or 'epochs', got 'step'."),
    ],
)
def test_config_with_wrong_options_is_rejected(started, capsys, options, message):
    changed(started / "config.yaml", **options)
    assert message in refused(capsys, 1, "--resume", str(started))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("stepps: 3", "expected an argument of lm.yaml, got stepps. Did you mean 'steps'?"),
        ("steps: '3'", "expected steps to be an int or null, got '3'."),
        ("steps: [", "expected YAML in lm.yaml, got "),
        ("- steps", "expected lm.yaml to be a mapping of arguments, got ['steps']. Write key: value."),
        ("lr: -1", "expected --lr to be above 0, got -1"),
    ],
)
def test_config_file_is_checked_before_start(tmp_path, monkeypatch, capsys, text, content, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lm.yaml").write_text(content)
    assert message in refused(capsys, 2, "--config", "lm.yaml", "--dataset", "text.py")
    assert {path.name for path in tmp_path.iterdir()} == {"lm.yaml", "text.py"}


def test_missing_config_file_is_rejected(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert "expected a readable YAML file, got no.yaml (No such file" in refused(capsys, 2, "--config", "no.yaml")


def test_printed_config_has_all_options_and_is_accepted(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lm.yaml").write_text("steps: 5\nlr: 1e-4\n")
    assert main(["lm", "--config", "lm.yaml", "--lr", "0.5", "--print-config"]) == 0
    printed = capsys.readouterr().out
    options = yaml.safe_load(printed)
    assert (options["steps"], options["lr"], options["width"]) == (5, 0.5, 128)
    (tmp_path / "lm.yaml").write_text(printed)
    assert main(["lm", "--config", "lm.yaml", "--print-config"]) == 0
    assert capsys.readouterr().out == printed


def test_config_with_out_of_range_value_is_rejected(started, capsys):
    changed(started / "config.yaml", steps=0)
    assert "expected --steps to be at least 1" in refused(capsys, 2, "--resume", str(started))


@pytest.mark.parametrize("kind", ["fifo", "folder", "link"])
def test_special_config_file_is_rejected(started, capsys, kind):
    path = started / "config.yaml"
    path.unlink()
    {"fifo": lambda: os.mkfifo(path), "folder": path.mkdir, "link": lambda: path.symlink_to(path)}[kind]()
    assert "config.yaml: " in refused(capsys, 1, "--resume", str(started))


@pytest.mark.parametrize("place", ["text.py", "", "nothing/at/all", "text.py/below", "a" * 5000])
def test_resume_rejects_path_without_run(tmp_path, monkeypatch, capsys, text, place):
    monkeypatch.chdir(tmp_path)
    assert "expected the folder of a run for --resume, got" in refused(capsys, 2, "--resume", place)


@pytest.mark.slow
def test_resume_without_checkpoint_starts_at_first_step(started, capsys):
    assert main(["lm", "--resume", str(started), "--eval-interval", "5"]) == 0
    captured = capsys.readouterr()
    assert captured.err == f"{started} has no checkpoint yet, so the run starts at its first step.\n"
    assert json.loads((started / "result.json").read_text())["step"] == 1
    assert yaml.safe_load((started / "config.yaml").read_text())["eval_interval"] == 5


def test_printed_config_of_a_resumed_run_is_that_of_the_run(started, capsys):
    assert main(["lm", "--resume", str(started), "--keep", "3", "--print-config"]) == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert (printed["keep"], printed["steps"], printed["width"]) == (3, 1, 16)
