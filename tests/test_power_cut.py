"""Power cuts: points covered by a checkpoint survive, and a new session continues from the remaining files.

The tests model a disk that data reaches only through ``os.fsync``, so the state after a power cut changes only at these
calls. For the moments before and after each call, they lay out the remaining directory and run a new session in it.
"""

import contextlib
import json
import os
import pathlib
import shutil
import warnings

import pytest
import torch
from test_writers import curve

from fxtrain import observers, writers
from fxtrain.core import Control, EvalEnd, FitBegin, FitEnd, StepEnd
from fxtrain.values import Image, Text

NOTHING = Control()
SAVES = (3, 6)  # steps of checkpoints
STEPS = 8


class Disk:
    """Models the contents of an existing directory after a power cut."""

    def __init__(self, root):
        self.root = root
        self.contents = {}  # synced contents of files by inode
        self.names = {os.stat(root).st_ino: {}}  # synced entries of directories by inode
        self.unsynced = {}  # current sizes of files by inode

    def sync(self, descriptor):
        path = pathlib.Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        if self.root != path and self.root not in path.parents:
            return
        inode = os.fstat(descriptor).st_ino
        if path.is_dir():
            self.names[inode] = {entry.name: (entry.inode(), entry.is_dir()) for entry in os.scandir(path)}
        else:
            self.contents[inode] = path.read_bytes()

    def copy(self):
        other = Disk.__new__(Disk)
        other.root, other.contents, other.names = self.root, dict(self.contents), dict(self.names)
        return other

    def lay_out(self, target, lost):
        """Writes the remaining directory. A file with a synced name and unsynced content contains ``lost``."""
        self._lay_out(os.stat(self.root).st_ino, target, lost)

    def _lay_out(self, inode, target, lost):
        target.mkdir()
        for name, (inner, is_folder) in self.names.get(inode, {}).items():
            if is_folder:
                self._lay_out(inner, target / name, lost)
            else:
                (target / name).write_bytes(self.contents.get(inner, lost))

    def keep_names(self):
        """Marks all names as synced, but no further content, as the other extreme of a power cut."""
        for folder in (self.root, *(path for path in self.root.rglob("*") if path.is_dir())):
            entries = {entry.name: (entry.inode(), entry.is_dir()) for entry in os.scandir(folder)}
            self.names[os.stat(folder).st_ino] = entries
        return self


@contextlib.contextmanager
def watched(disk, monkeypatch):
    """Yields a list of (disk, last saved step) per moment, and the dict that holds the saved step."""
    moments, promised = [], {"step": 0}
    real = os.fsync

    def fsync(descriptor):
        moments.append((disk.copy().keep_names(), promised["step"]))
        real(descriptor)
        disk.sync(descriptor)
        moments.append((disk.copy(), promised["step"]))
        moments.append((disk.copy().keep_names(), promised["step"]))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        yield moments, promised


KINDS = {
    "jsonl": (
        lambda folder: writers.jsonl(folder / "deep" / "a.jsonl"),
        lambda folder: [
            (record["step"], record["metrics"]["train/loss"])
            for record in writers.read_jsonl(folder / "deep" / "a.jsonl")
            if record["event"] == "StepEnd"
        ],
    ),
    "csv": (
        lambda folder: writers.csv(folder / "deep" / "a.csv"),
        lambda folder: [(row["step"], row["train/loss"]) for row in writers.read_csv(folder / "deep" / "a.csv")],
    ),
    "tensorboard": (
        lambda folder: writers.tensorboard(folder / "deep" / "tb"),
        lambda folder: curve(folder / "deep" / "tb", "train/loss"),
    ),
    "media": (
        lambda folder: writers.media(folder / "deep" / "media"),
        lambda folder: [
            (step, float(path.read_text()))
            for step, (path,) in writers.read_media(folder / "deep" / "media")["note"].items()
        ],
    ),
}


def session(folder, kind, begin, promised=None, *, offset=0.0):
    """Runs steps with evaluations and saves. A completed save promises that all earlier points are on disk."""
    observer = observers.write(KINDS[kind][0](folder))
    log = {}
    observer(None, FitBegin(step=begin, time=0.0), NOTHING)
    for step in range(begin + 1, STEPS + 1):
        if kind == "media":
            log = {"note": Text(f"{step + offset}"), "deep/picture": Image(torch.zeros(2, 2))}
        observer(None, StepEnd(step=step, time=0.0, metrics={"loss": step + offset}), Control(log=log))
        if step % 2 == 0:
            observer(None, EvalEnd(step=step, time=0.0, metrics={"loss": 1.0, f"new{step}": 2.0}), NOTHING)
        if step in SAVES:
            observer.flush()
            if promised is not None:
                promised["step"] = step
    observer(None, FitEnd(step=STEPS, reason="done"), NOTHING)
    observer.close()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("lost", [b"", b"\0" * 100, b"\0\n\0"], ids=["empty", "zeros", "a line of zeros"])
@pytest.mark.parametrize("kind", KINDS)
def test_saved_points_survive_a_power_cut(tmp_path, monkeypatch, kind, lost):
    root = tmp_path / "disk"
    root.mkdir()
    with watched(Disk(root), monkeypatch) as (moments, promised):
        session(root, kind, 0, promised)
    assert {step for _, step in moments} == {0, *SAVES}
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # real syncs are slow
    for index, (disk, saved) in enumerate(moments):
        left = tmp_path / f"left{index}"
        disk.lay_out(left, lost)
        session(left, kind, saved, offset=0.5)
        expected = [(step, step + 0.5 * (step > saved)) for step in range(1, STEPS + 1)]
        assert KINDS[kind][1](left) == expected, (index, saved)
        shutil.rmtree(left)


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_resumed_session_keeps_synced_points(tmp_path, monkeypatch, kind):
    """Markers of a rewind and added columns keep all points."""
    root = tmp_path / "disk"
    root.mkdir()
    disk = Disk(root)
    with watched(disk, monkeypatch):
        session(root, kind, 0)
    with watched(disk, monkeypatch) as (moments, promised):
        promised["step"] = 3
        session(root, kind, 3, promised)
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # real syncs are slow
    for index, (disk, saved) in enumerate(moments):
        left = tmp_path / f"left{index}"
        disk.lay_out(left, b"")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            session(left, kind, saved, offset=0.5)
        expected = [(step, step + 0.5 * (step > saved)) for step in range(1, STEPS + 1)]
        assert KINDS[kind][1](left) == expected, (index, saved)
        shutil.rmtree(left)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("lost", [b"", b"\0" * 100], ids=["empty", "zeros"])
def test_run_record_continues_after_a_power_cut(tmp_path, monkeypatch, lost):
    root = tmp_path / "disk"
    root.mkdir()
    source = tmp_path / "source"
    source.mkdir()
    (source / "train.py").write_text("print(1)")

    def record(folder, promised=None):
        both = [observers.record_run(folder / "run", {"lr": 0.1}), observers.record_code(folder / "run", source=source)]
        for observer in both:
            observer(None, FitBegin(step=0), NOTHING)
        both[0].flush()
        if promised is not None:
            promised["step"] = 1
        both[0](None, FitEnd(step=1, reason="done"), NOTHING)
        both[0].close()

    with watched(Disk(root), monkeypatch) as (moments, promised):
        record(root, promised)
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # real syncs are slow
    for index, (disk, saved) in enumerate(moments):
        left = tmp_path / f"left{index}"
        disk.lay_out(left, lost)
        record(left)
        story = json.loads((left / "run" / "run.json").read_text())
        assert story["config"] == {"lr": 0.1}
        assert story["sessions"][-1]["reason"] == "done"
        assert len(story["sessions"]) == 1 + (1 if saved else len(story["sessions"]) - 1)
        events = [json.loads(line)["event"] for line in (left / "run" / "events.jsonl").read_text().splitlines()]
        assert events[-2:] == ["FitBegin", "FitEnd"]
        assert events[0] == "FitBegin"
        assert len(events) >= 3 * bool(saved)
        (archive,) = (left / "run" / "code").glob("*.zip")
        assert archive.stat().st_size > 0


def test_disk_model_drops_files_without_a_directory_sync(tmp_path, monkeypatch):
    """Checks the disk model itself: a synced file is lost if its directory was not synced."""
    root = tmp_path / "disk"
    root.mkdir()
    disk = Disk(root)
    with watched(disk, monkeypatch):
        (root / "a").mkdir()
        with open(root / "a" / "b", "wb") as file:
            file.write(b"x")
            file.flush()
            os.fsync(file.fileno())
    disk.lay_out(tmp_path / "left", b"")
    assert list((tmp_path / "left").iterdir()) == []
