"""The source of a run, as ``record_code`` archives it in the run's folder."""

import os
import subprocess
import zipfile

import pytest
from run_records import NOTHING, lines

from fxtrain import observers
from fxtrain.core import FitBegin


def git(folder, *arguments):
    names = ("-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false")
    subprocess.run(["git", "-C", folder, *names, *arguments], check=True, capture_output=True)


@pytest.fixture
def source(tmp_path):
    folder = tmp_path / "source"
    for name, content in {
        "train.py": "print(1)\n",
        "pack/model.py": "x = 1\n",
        "pack/config.yaml": "lr: 0.1\n",
        "data.bin": "\0\1",
        ".env": "secret\n",
        ".hidden/a.py": "",
        "big.py": "#" * (2**20 + 1),
        "just.py": "#" * 2**20,
        "venv/pyvenv.cfg": "",
        "venv/lib/site.py": "",
    }.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)
    return folder


def recorded(folder, source, step=0):
    """Records the source in one session; returns its line and the archived files."""
    observers.record_code(folder, source=source)(None, FitBegin(step=step), NOTHING)
    line = lines(folder / "code" / "sessions.jsonl")[-1]
    with zipfile.ZipFile(folder / "code" / line["archive"]) as archive:
        return line, {name: archive.read(name).decode() for name in archive.namelist()}


def test_source_outside_a_repository_is_selected_by_suffix(tmp_path, source):
    line, files = recorded(tmp_path / "run", source)
    assert list(files) == ["just.py", "pack/config.yaml", "pack/model.py", "train.py"]
    assert files["pack/model.py"] == "x = 1\n"
    assert set(line) == {"step", "archive"}


def test_source_in_a_repository_is_tracked_files_and_unignored_source(tmp_path, source):
    git(source, "init", "-q")
    (source / ".gitignore").write_text("venv\nignored.py\n")
    (source / "ignored.py").write_text("")
    (source / "gone.py").write_text("")
    git(source, "add", "train.py", "data.bin", ".gitignore", ".hidden", "gone.py", "big.py")
    line, files = recorded(tmp_path / "run", source)
    assert set(line) == {"step", "archive"}  # no commit yet
    git(source, "commit", "-qm", "first")
    (source / "gone.py").unlink()
    (source / "train.py").write_text("print(2)\n")
    line, files = recorded(tmp_path / "run", source)
    assert list(files) == [
        ".gitignore", ".hidden/a.py", "data.bin", "just.py", "pack/config.yaml", "pack/model.py", "train.py",
    ]  # fmt: skip
    assert files["train.py"] == "print(2)\n"
    assert files["data.bin"] == "\0\1"
    assert len(line["commit"]) == 40
    assert line["changed"] is True
    git(source, "add", "--all")
    git(source, "commit", "-qm", "second")
    assert recorded(tmp_path / "run", source)[0]["changed"] is False


def test_subfolder_of_a_repository_is_recorded_alone(tmp_path, source):
    git(source, "init", "-q")
    git(source, "add", "pack", "train.py")
    git(source, "commit", "-qm", "first")
    (source / "train.py").write_text("print(2)\n")
    line, files = recorded(tmp_path / "run", source / "pack")
    assert list(files) == ["config.yaml", "model.py"]
    assert line["changed"] is False


def test_unchanged_source_is_archived_once_with_a_line_per_session(tmp_path, source):
    run = tmp_path / "run"
    first, _ = recorded(run, source)
    os.utime(source / "train.py", (0, 0))
    resumed, _ = recorded(run, source, step=7)
    assert (first["step"], resumed["step"]) == (0, 7)
    assert first["archive"] == resumed["archive"]
    (source / "train.py").write_text("print(2)\n")
    changed, files = recorded(run, source, step=9)
    assert changed["archive"] != first["archive"]
    assert files["train.py"] == "print(2)\n"
    assert len(list((run / "code").glob("*.zip"))) == 2
    assert len(lines(run / "code" / "sessions.jsonl")) == 3


def test_moved_file_changes_the_archive(tmp_path, source):
    before, _ = recorded(tmp_path / "run", source)
    (source / "train.py").rename(source / "main.py")
    assert recorded(tmp_path / "run", source)[0]["archive"] != before["archive"]


@pytest.mark.parametrize("with_git", [False, True])
def test_run_folder_inside_the_source_is_excluded(source, with_git):
    if with_git:
        git(source, "init", "-q")
        git(source, "add", "train.py", "pack", "just.py", "big.py", ".env", ".hidden", "venv", "data.bin")
        git(source, "commit", "-qm", "first")
    run = source / "runs" / "1"
    first, files = recorded(run, source)
    (run / "run.json").write_text("{}")
    second, _ = recorded(run, source, step=1)
    assert first["archive"] == second["archive"]
    assert not [name for name in files if name.startswith("runs")]
    assert second.get("changed", False) is False


def test_archives_are_excluded_if_the_run_folder_contains_the_source(source):
    for run in (source, source.parent):
        first, files = recorded(run, source)
        assert "train.py" in files
        assert recorded(run, source, step=1)[0]["archive"] == first["archive"]


def test_archive_is_compressed_and_keeps_file_modes(tmp_path, source):
    (source / "train.py").chmod(0o755)
    line, _ = recorded(tmp_path / "run", source)
    path = tmp_path / "run" / "code" / line["archive"]
    assert path.stat().st_size < 10_000  # from over a megabyte of source
    with zipfile.ZipFile(path) as archive:
        assert archive.getinfo("train.py").external_attr >> 16 & 0o777 == 0o755
    assert not list(path.parent.glob("*.tmp"))


def test_source_is_recorded_without_git(tmp_path, source, monkeypatch):
    git(source, "init", "-q")
    monkeypatch.setenv("PATH", "")
    assert "train.py" in recorded(tmp_path / "run", source)[1]


def test_missing_source_folder_is_refused(tmp_path):
    with pytest.raises(NotADirectoryError, match=r"expected source to be a folder, got .* Give the one with the code"):
        observers.record_code(tmp_path, source=tmp_path / "missing")


def test_archive_emptied_by_a_power_cut_is_rewritten(tmp_path, source):
    run = tmp_path / "run"
    line, files = recorded(run, source)
    (run / "code" / line["archive"]).write_bytes(b"")
    with open(run / "code" / "sessions.jsonl", "ab") as file:
        file.write(b"\0" * 30)
    with pytest.warns(RuntimeWarning, match="ended in the middle of a line"):
        again, found = recorded(run, source, step=1)
    assert (again["archive"], found) == (line["archive"], files)
    assert len(lines(run / "code" / "sessions.jsonl")) == 2
