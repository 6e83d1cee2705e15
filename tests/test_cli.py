"""The command line as a process: closed pipes, full disks, narrow terminals and signals."""

import json
import os
import pathlib
import signal
import subprocess
import sys

import processes
import pytest

from fxtrain import cli
from fxtrain.cli._streams import lasting_streams

FXTRAIN = [sys.executable, "-m", "fxtrain"]


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "metrics.jsonl").write_text('{"step": 1, "metrics": {"train/loss": 1.0}}\n')
    return folder


def shell(command, **more):
    done = subprocess.run(
        ["bash", "-c", command], capture_output=True, text=True, timeout=120, env=os.environ | more, check=False
    )
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr
    return done


def fxtrain(*arguments):
    return " ".join(map(str, (*FXTRAIN, *arguments)))


@pytest.mark.parametrize("arguments", [("report", "RUN"), ("--help",), ("lm", "--help"), ("nothing",)])
def test_closed_pipe_is_not_an_error(run, arguments):
    arguments = [run if each == "RUN" else each for each in arguments]
    # The reader exits before the first write.
    done = shell(f"{{ sleep 0.2; {fxtrain(*arguments)} 2>&1; echo $? > {run}/code; }} | true")
    assert (done.stdout, done.stderr) == ("", "")
    assert (run / "code").read_text() == ("2\n" if arguments == ["nothing"] else "0\n")
    assert (run / "report.html").exists() == (arguments[0] == "report")


def test_full_disk_is_a_one_line_error(run):
    done = shell(f"{fxtrain('report', run)} > /dev/full")
    assert done.returncode == 1
    assert done.stderr == "fxtrain: expected standard output to be writable, got an error: No space left on device.\n"


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_streams_are_tolerated(run, closed):
    done = shell(f"{fxtrain('report', run)} {closed}")
    assert done.returncode == 0
    assert (run / "report.html").exists()


def test_unprintable_path_is_escaped(run):
    folder = run.rename(run.with_name("läuft"))
    done = shell(fxtrain("report", folder), PYTHONIOENCODING="ascii", PYTHONUTF8="0")
    assert done.returncode == 0
    assert done.stdout.endswith("/l\\xe4uft/report.html\n")


def test_control_characters_in_path_are_escaped(tmp_path, capsys):
    folder = tmp_path / "a\nb\x1b[31m"
    folder.mkdir()
    assert cli.main(["report", str(folder)]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "\x1b" not in err


@pytest.mark.parametrize("path", ["a\0b", "a" * 5000, "", "/dev/null", "/dev/null/a", "/proc/self/mem"])
@pytest.mark.parametrize("option", ["run", "--out"])
def test_invalid_path_is_a_one_line_error(run, tmp_path, monkeypatch, capsys, path, option):
    monkeypatch.chdir(tmp_path)
    code = cli.main(["report", path] if option == "run" else ["report", str(run), "--out", path])
    captured = capsys.readouterr()
    if (option, path) == ("--out", "/dev/null"):
        assert code == 0
    else:
        assert (code, captured.out) == (2 if option == "run" else 1, "")
        assert captured.err.startswith("fxtrain report: expected ")
        assert captured.err.count("\n") == 1


def test_report_can_be_written_to_pipe(run):
    done = shell(f"{fxtrain('report', run, '--out')} >(cat >&2)")
    assert done.returncode == 0
    assert done.stderr.startswith("<!doctype html>")
    assert done.stderr.endswith("</html>\n")


def test_pipe_without_reader_is_an_error(run, tmp_path, capsys):
    os.mkfifo(tmp_path / "pipe")
    assert cli.main(["report", str(run), "--out", str(tmp_path / "pipe")]) == 1
    assert "expected a writable path for the page" in capsys.readouterr().err


@pytest.mark.parametrize("columns", [0, 1, 2, 10])
@pytest.mark.parametrize("arguments", [("--help",), ("lm", "--help"), ("report", "--help"), ("lm", "--nothing")])
@pytest.mark.timeout(60)
def test_help_works_in_narrow_terminal(monkeypatch, capsys, columns, arguments):
    monkeypatch.setenv("COLUMNS", str(columns))
    assert cli.main(list(arguments)) == (2 if "--nothing" in arguments else 0)
    captured = capsys.readouterr()
    assert (1 if "--nothing" in arguments else 3) <= (captured.out + captured.err).count("\n") <= 150
    assert os.environ["COLUMNS"] == str(columns)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["report"], "expected the folder of a run, got none. Name at least one."),
        (["report", "--runs", "x"], "Unrecognized options: --runs, x. See fxtrain report --help."),
        (["report", "--out"], "Missing value for argument '--out'. Expected 1 values. See fxtrain report --help."),
        (["lm", "--step", "5"], "Unrecognized options: --step, 5. Perhaps you meant: --steps {None}|INT. See fxtrain"),
        (["lm", "--lr", "x"], "Error parsing --lr: could not convert string to float: 'x'. See fxtrain lm --help."),
        (["inspect"], "Missing from fxtrain inspect: PATH. See fxtrain inspect --help."),
    ],
)
def test_wrong_arguments_are_a_one_line_error(capsys, arguments, message):
    assert cli.main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(f"fxtrain {arguments[0]}: {message}")
    assert captured.err.count("\n") == 1


def test_replaced_streams_are_left_alone(capsys):
    before = sys.stdout, sys.stderr
    with lasting_streams() as failures:
        assert (sys.stdout, sys.stderr) == before
    assert failures == []


# Training

TEXT = pathlib.Path(json.__file__).read_text() * 4
SMALL = ["--layers", "1", "--width", "16", "--heads", "2", "--length", "16", "--batch-size", "4", "--no-compile"]


@pytest.mark.slow
def test_training_continues_after_pipe_closes(tmp_path):
    (tmp_path / "text.py").write_text(TEXT)
    command = fxtrain("lm", "--dataset", "text.py", "--steps", 3, *SMALL)
    done = shell(f"cd {tmp_path} && {{ {command}; echo $? > code; }} | head -1")
    assert done.stdout.startswith("corpus")
    assert (tmp_path / "code").read_text() == "0\n"
    (folder,) = (tmp_path / "runs").iterdir()
    assert json.loads((folder / "result.json").read_text())["step"] == 3


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signal_sets_exit_code(tmp_path, number, code):
    (tmp_path / "text.py").write_text(TEXT)
    arguments = ["-m", "fxtrain", "lm", "--dataset", "text.py", "--steps", "100000", *SMALL]
    with processes.Process(arguments, cwd=tmp_path) as process:
        for line in process.stdout:
            if line.startswith("step"):
                process.send_signal(number)
                break
        _, err = process.communicate(timeout=120)
    assert process.returncode == code
    assert "Traceback" not in err


def test_runs_of_a_report_are_read_from_a_file(run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "report.yaml").write_text("runs: [run]\nout: page.html\n")
    assert cli.main(["report", "--config", "report.yaml"]) == 0
    assert (tmp_path / "page.html").exists()
    assert cli.main(["report", "run", "--print-config"]) == 0
    assert capsys.readouterr().out == "page.html\nruns:\n- run\nout: null\n"
