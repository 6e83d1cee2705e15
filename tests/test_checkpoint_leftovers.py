"""What killed writers leave is deleted by the next one; what a living one writes, and what is not ours, is not."""

import os
import signal
import subprocess
import sys

import problem
import pytest
import torch

import fxtrain as fx
from fxtrain import disk
from fxtrain.checkpoint import _folder as folders
from fxtrain.checkpoint import _orphaned_slots as unclaimed

WRITER = """
import os, signal, sys, time, torch, fxtrain as fx
from fxtrain.checkpoint import _folder as folder
def stop(*arguments):
    print("writing", flush=True)
    time.sleep(600)
folder._write_leaves = stop
fx.save(sys.argv[1], fx.init(torch.nn.Linear(1, 1)))
"""


def unfinished(folder):
    return sorted(folder.glob(".unfinished-*"))


@pytest.fixture
def writer(tmp_path):
    """A process in the middle of ``fx.save(tmp_path / "first")``."""
    with subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path / "first")], stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"writing\n"
        yield process
        process.kill()


def test_killed_save_is_cleared_by_the_next_one(tmp_path, writer):
    os.kill(writer.pid, signal.SIGKILL)
    writer.wait()
    assert len(unfinished(tmp_path)) == 1
    fx.save(tmp_path / "second", problem.start())
    assert unfinished(tmp_path) == []


def test_living_save_is_left_alone(tmp_path, writer):
    before = unfinished(tmp_path)
    fx.save(tmp_path / "second", problem.start())
    fx.save(tmp_path / "first", problem.start())  # of the same name: the one that ends first is there
    assert unfinished(tmp_path) == before


@pytest.mark.parametrize("name", [".unfinished-thesis", ".unfinished-first-12", ".unfinished-first-0123abcd"])
def test_folder_of_another_owner_is_left_alone(tmp_path, name):
    (tmp_path / name).mkdir()
    (tmp_path / name / "chapter.txt").write_text("x")
    fx.save(tmp_path / "first", problem.start())
    assert (tmp_path / name / "chapter.txt").exists()


def test_file_and_link_of_that_name_are_left_alone(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / ".unfinished-a-01234567").write_text("x")
    (tmp_path / ".unfinished-b-01234567").symlink_to(tmp_path / "data")
    fx.save(tmp_path / "first", problem.start())
    assert len(unfinished(tmp_path)) == 2
    assert (tmp_path / "data").exists()


def test_failed_save_leaves_nothing(tmp_path, monkeypatch):
    def no_room(*arguments):
        raise OSError("No space left on device")

    monkeypatch.setattr(folders, "_write_leaves", no_room)
    with pytest.raises(fx.CheckpointError, match="No space left"):
        fx.save(tmp_path / "first", problem.start())
    assert list(tmp_path.iterdir()) == []


def test_all_names_above_are_synced_whoever_made_them(tmp_path, monkeypatch):
    """A power cut takes names that were not synced, and a folder without a name is lost with all that is in it."""
    run = tmp_path / "runs" / "1"
    run.mkdir(parents=True)  # by a writer of metrics, say
    (tmp_path / "link").symlink_to(run)
    synced, whole = [], disk.sync_folder
    for module in (disk, folders):
        monkeypatch.setattr(module, "sync_folder", lambda folder: (synced.append(folder), whole(folder)))
    with fx.checkpointer(tmp_path / "link" / "checkpoints") as checkpoints:
        checkpoints.save(problem.start())
    assert {run, run.parent, tmp_path} <= {path.resolve() for path in synced}
    synced.clear()
    fx.save(tmp_path / "link" / "single", problem.start())
    assert {run, run.parent, tmp_path} <= {path.resolve() for path in synced}
    synced.clear()
    monkeypatch.chdir(run)
    fx.save("relative", problem.start())
    assert run.parent in synced


def test_disk_that_fails_to_sync_a_name_is_an_error(tmp_path, monkeypatch):
    def fails(folder):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(disk, "sync_folder", fails)
    with pytest.raises(fx.CheckpointError, match="Input/output error"):
        fx.checkpointer(tmp_path / "run").save(problem.start())


@pytest.mark.parametrize(
    "slot",
    [
        [torch.tensor(1), {}, torch.tensor(2)],
        {True: torch.tensor(1), "a": torch.tensor(2)},
        [{}, [torch.tensor(1)]],
        {"a": [torch.tensor(1)], "b": (torch.tensor(2), torch.tensor(3))},
    ],
)
def test_slot_without_its_callback_comes_back_as_it_was(tmp_path, slot):
    state = problem.start().replace(slots={"x": slot})
    with pytest.warns(UserWarning, match="only in the checkpoint"):
        without = fx.restore(fx.save(tmp_path / "1", state), like=problem.start())
    back = fx.restore(fx.save(tmp_path / "2", without), like=fx.tree.zeros_like(state))
    fx.tree.map(lambda got, wanted: torch.testing.assert_close(got, wanted), back.slots["x"], slot)


def test_odd_rows_become_no_tree():
    rows = [([], torch.tensor(1)), ([["key", "a"]], torch.tensor(2))]
    assert isinstance(unclaimed.rebuild(rows), unclaimed.Unclaimed)
    rows = [([["index", 0]] * 5000, torch.tensor(1)), ([["index", 1]], torch.tensor(2))]
    assert len(unclaimed.rebuild(rows)) == 2
