"""The next save deletes leftovers of killed writers, and keeps files of running writers and other owners."""

import os
import signal
import stat
import subprocess
import sys

import problem
import pytest
import torch
from disk_syncs import before_sync, no_room

import fxtrain as fx
from fxtrain.checkpoint import _orphaned_slots as unclaimed

WRITER = """
import os, stat, sys, time, torch, fxtrain as fx
def stop(descriptor):
    if stat.S_ISREG(os.fstat(descriptor).st_mode):
        print("writing", flush=True)
        time.sleep(600)
os.fsync = stop
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


def test_next_save_deletes_leftovers_of_killed_save(tmp_path, writer):
    os.kill(writer.pid, signal.SIGKILL)
    writer.wait()
    assert len(unfinished(tmp_path)) == 1
    fx.save(tmp_path / "second", problem.start())
    assert unfinished(tmp_path) == []


def test_running_save_is_left_alone(tmp_path, writer):
    before = unfinished(tmp_path)
    fx.save(tmp_path / "second", problem.start())
    fx.save(tmp_path / "first", problem.start())  # same name: the save that finishes first wins
    assert unfinished(tmp_path) == before


@pytest.mark.parametrize("name", [".unfinished-thesis", ".unfinished-first-12", ".unfinished-first-0123abcd"])
def test_foreign_folder_is_left_alone(tmp_path, name):
    (tmp_path / name).mkdir()
    (tmp_path / name / "chapter.txt").write_text("x")
    fx.save(tmp_path / "first", problem.start())
    assert (tmp_path / name / "chapter.txt").exists()


def test_file_and_link_with_unfinished_name_are_left_alone(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / ".unfinished-a-01234567").write_text("x")
    (tmp_path / ".unfinished-b-01234567").symlink_to(tmp_path / "data")
    fx.save(tmp_path / "first", problem.start())
    assert len(unfinished(tmp_path)) == 2
    assert (tmp_path / "data").exists()


def test_failed_save_leaves_no_files(tmp_path, monkeypatch):
    before_sync(monkeypatch, no_room)
    with pytest.raises(fx.CheckpointError, match="No space left"):
        fx.save(tmp_path / "first", problem.start())
    assert list(tmp_path.iterdir()) == []


def test_all_parent_folders_are_synced(tmp_path, monkeypatch):
    """Power loss removes directory entries that were not synced, with everything below them."""
    run = tmp_path / "runs" / "1"
    run.mkdir(parents=True)  # for example by a metrics writer
    (tmp_path / "link").symlink_to(run)
    synced = set()
    before_sync(monkeypatch, lambda descriptor: synced.add(os.fstat(descriptor).st_ino), of=stat.S_ISDIR)
    parents = {folder.stat().st_ino for folder in (run, run.parent, tmp_path)}
    with fx.checkpointer(tmp_path / "link" / "checkpoints") as checkpoints:
        checkpoints.save(problem.start())
    assert parents <= synced
    synced.clear()
    fx.save(tmp_path / "link" / "single", problem.start())
    assert parents <= synced
    synced.clear()
    monkeypatch.chdir(run)
    fx.save("relative", problem.start())
    assert run.parent.stat().st_ino in synced


def test_failed_folder_sync_is_an_error(tmp_path, monkeypatch):
    def fails(descriptor):
        raise OSError(5, "Input/output error")

    before_sync(monkeypatch, fails, of=stat.S_ISDIR)
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
def test_orphaned_slot_is_restored_unchanged(tmp_path, slot):
    state = problem.start().replace(slots={"x": slot})
    with pytest.warns(UserWarning, match="only in the checkpoint"):
        without = fx.restore(fx.save(tmp_path / "1", state), like=problem.start())
    back = fx.restore(fx.save(tmp_path / "2", without), like=fx.tree.zeros_like(state))
    fx.tree.map(lambda got, wanted: torch.testing.assert_close(got, wanted), back.slots["x"], slot)


def test_slot_restored_without_its_callback_is_used_once_the_callback_is_attached(tmp_path):
    stop = fx.callbacks.early_stopping("loss", patience=2)
    state = fx.attach(problem.start(), stop)
    state = state.with_slot("early_stopping", fx.tree.map(lambda leaf: leaf + 1, state.slots["early_stopping"]))
    with pytest.warns(UserWarning, match="only in the checkpoint"):
        without = fx.restore(fx.save(tmp_path / "1", state), like=problem.start())
    again = fx.attach(without, stop)
    assert type(again.slots["early_stopping"]) is type(state.slots["early_stopping"])
    assert not again.diff(state)


def test_slot_restored_for_another_callback_of_the_same_name_is_refused(tmp_path):
    state = fx.attach(problem.start(), fx.callbacks.early_stopping("loss", patience=2))
    with pytest.warns(UserWarning, match="only in the checkpoint"):
        without = fx.restore(fx.save(tmp_path / "1", state), like=problem.start())
    other = fx.stateful("early_stopping", lambda state: [torch.zeros(2)], lambda state, event, slot: slot)
    message = r"expected the restored slot 'early_stopping' to have \[0\] .*, as its callback has, got best .*='drop'"
    with pytest.raises(ValueError, match=message):
        fx.attach(without, other)


def test_inconsistent_rows_are_not_rebuilt():
    rows = [([], torch.tensor(1)), ([["key", "a"]], torch.tensor(2))]
    assert isinstance(unclaimed.rebuild(rows), unclaimed.OrphanedSlot)
    rows = [([["index", 0]] * 5000, torch.tensor(1)), ([["index", 1]], torch.tensor(2))]
    assert len(unclaimed.rebuild(rows)) == 2
