"""Restores from damaged checkpoint folders return a verified state or raise CheckpointError."""

import errno
import os
import pathlib
import shutil
import socket
import warnings

import problem
import pytest
from saved_steps import at, saved

import fxtrain as fx
from fxtrain import testing
from fxtrain.checkpoint import DamagedError

FILES = ["manifest.jsonl", "leaves.bin"]


def a_fifo(file):
    os.mkfifo(file)


def a_folder(file):
    file.mkdir()


def a_socket(file):
    server = socket.socket(socket.AF_UNIX)
    before = os.getcwd()
    os.chdir(file.parent)  # because the length of a socket's path is limited
    try:
        server.bind(file.name)
    finally:
        os.chdir(before)
    return server


def a_device(file):
    file.symlink_to("/dev/zero")


def a_loop(file):
    file.symlink_to(file)


def a_dangling_link(file):
    file.symlink_to(file.with_name("nothing"))


def a_sparse_file(file):
    file.touch()
    os.truncate(file, 2**42)


class TestSpecialFiles:
    @pytest.mark.parametrize("file", FILES)
    @pytest.mark.parametrize(
        "kind",
        [a_fifo, a_folder, a_socket, a_device, a_loop, a_dangling_link, a_sparse_file],
        ids=lambda kind: kind.__name__,
    )
    def test_special_file_is_damage(self, tmp_path, file, kind):
        _, newest = saved(tmp_path, 1, 2)
        (newest / file).unlink()
        kept = kind(newest / file)
        with pytest.raises(DamagedError):
            fx.restore(newest, like=problem.start())
        with pytest.warns(UserWarning, match="It is kept as unreadable-.*, and step 1 is restored"):
            assert int(fx.checkpointer(tmp_path).restore(problem.start()).step) == 1
        if kept is not None:
            kept.close()

    @pytest.mark.parametrize("kind", [a_fifo, a_folder, a_loop, a_dangling_link, lambda path: path.write_text("x")])
    def test_special_file_replacing_checkpoint_is_skipped(self, tmp_path, kind):
        (path,) = saved(tmp_path, 1)
        kind(path.with_name(path.name.replace("00000000-", "00000001-").replace("step-000000001", "step-000000002")))
        with pytest.warns(UserWarning, match="and step 1 is restored"):
            assert int(fx.checkpointer(tmp_path).restore(problem.start()).step) == 1


class TestReadErrors:
    """A failed read does not prove that a checkpoint is damaged."""

    @pytest.mark.parametrize("file", FILES)
    @pytest.mark.parametrize("code", [errno.EACCES, errno.EIO, errno.EMFILE, errno.ESTALE])
    def test_open_error_raises_and_keeps_checkpoint(self, tmp_path, monkeypatch, file, code):
        _, newest = saved(tmp_path, 1, 2)
        whole = os.open

        def fails(path, *arguments, **options):
            if str(path) == str(newest / file):
                raise OSError(code, os.strerror(code), str(path))
            return whole(path, *arguments, **options)

        monkeypatch.setattr(os, "open", fails)
        for attempt in (
            lambda: fx.checkpointer(tmp_path).restore(problem.start()),
            lambda: fx.checkpointer(tmp_path).restore(problem.start(), step=2),
            lambda: fx.restore(newest, like=problem.start()),
            lambda: fx.checkpointer(tmp_path).read_newest_until(2, problem.start()),
            lambda: fx.fit(
                problem.start(),
                problem.step(),
                problem.data(),
                steps=3,
                checkpointer=fx.checkpointer(tmp_path),
                resume=True,
            ),
        ):
            with pytest.raises(fx.CheckpointError, match=r"expected a readable file at .* may be undamaged") as caught:
                attempt()
            assert not isinstance(caught.value, DamagedError)
        assert newest.exists()

    def test_error_mid_file_raises_and_keeps_checkpoint(self, tmp_path, monkeypatch):
        _, newest = saved(tmp_path, 1, 2)

        def fails(*arguments):
            raise OSError(errno.EIO, "Input/output error")

        monkeypatch.setattr(os, "preadv", fails)
        with pytest.raises(fx.CheckpointError, match="may be undamaged") as caught:
            fx.checkpointer(tmp_path).restore(problem.start())
        assert not isinstance(caught.value, DamagedError)
        assert newest.exists()

    def test_best_with_unreadable_metrics_is_not_deleted(self, tmp_path, monkeypatch):
        with fx.checkpointer(tmp_path, keep=1, best="loss") as checkpoints:
            for step, loss in ((1, 0.1), (2, 0.5)):
                checkpoints.save(at(step), {"loss": loss})
        best = min(tmp_path.glob("*-step-*"))
        whole = os.open

        def fails(path, *arguments, **options):
            if str(path) == str(best / "manifest.jsonl"):
                raise OSError(errno.EIO, "Input/output error", str(path))
            return whole(path, *arguments, **options)

        with monkeypatch.context() as broken, fx.checkpointer(tmp_path, keep=1, best="loss") as checkpoints:
            broken.setattr(os, "open", fails)
            checkpoints.restore(problem.start())
            with pytest.raises(fx.CheckpointError, match="may be undamaged"):
                checkpoints.best()
            checkpoints.save(at(3), {"loss": 0.3})
            with pytest.warns(RuntimeWarning, match="nothing was deleted: .* may be undamaged"):
                checkpoints.wait()
        with fx.checkpointer(tmp_path, keep=1, best="loss") as checkpoints:
            checkpoints.restore(problem.start())
            checkpoints.save(at(4), {"loss": 0.4})
            assert checkpoints.steps() == [1, 4]

    def test_unlistable_folder_is_rejected(self, tmp_path, monkeypatch):
        saved(tmp_path, 1)

        def fails(self):
            raise PermissionError(errno.EACCES, "Permission denied")

        monkeypatch.setattr("pathlib.Path.iterdir", fails)
        with pytest.raises(fx.CheckpointError, match="expected a folder that can be listed"):
            fx.checkpointer(tmp_path).latest()


class TestLockFile:
    def test_symbolic_link_is_rejected(self, tmp_path):
        (tmp_path / "diary").write_text("dear diary")
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / ".lock").symlink_to(tmp_path / "diary")
        with pytest.raises(fx.CheckpointError, match=r"expected the lock of a folder at .*, got a symbolic link"):
            fx.checkpointer(tmp_path / "run").save(at(1))
        assert (tmp_path / "diary").read_text() == "dear diary"

    def test_file_with_other_content_is_rejected(self, tmp_path):
        (tmp_path / ".lock").write_text("dear diary")
        with pytest.raises(fx.CheckpointError, match="got a file with other content"):
            fx.checkpointer(tmp_path).save(at(1))
        assert (tmp_path / ".lock").read_text() == "dear diary"

    @pytest.mark.parametrize("kind", [a_fifo, a_folder])
    def test_special_file_is_rejected(self, tmp_path, kind):
        kind(tmp_path / ".lock")
        with pytest.raises(fx.CheckpointError, match=r"expected a writable folder at|not a regular file"):
            fx.checkpointer(tmp_path).save(at(1))

    @pytest.mark.parametrize("content", ["", "process 1 on there\n", "proc", "\0\0\0\0"])
    def test_stale_lock_is_taken(self, tmp_path, content):
        (tmp_path / ".lock").write_text(content)
        with fx.checkpointer(tmp_path) as checkpoints:
            checkpoints.save(at(1))
        assert (tmp_path / ".lock").read_text().startswith(f"process {os.getpid()} on ")


class TestUndeletable:
    """A failed deletion of an old checkpoint wastes space, but does not end the run."""

    def run(self, tmp_path):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            with fx.checkpointer(tmp_path, keep=1) as checkpoints:
                if checkpoints.has_any():
                    checkpoints.restore(problem.start())
                for step in (11, 12, 13, 14):
                    checkpoints.save(at(step))
        return [str(warning.message) for warning in caught if issubclass(warning.category, RuntimeWarning)]

    def test_link_is_kept_with_one_warning(self, tmp_path):
        (path,) = saved(tmp_path / "run", 1)
        path.rename(tmp_path / "elsewhere")
        path.symlink_to(tmp_path / "elsewhere")
        (told,) = self.run(tmp_path / "run")
        assert str(path) in told
        assert "expected to delete the expired checkpoint" in told
        assert "got a symbolic link" in told
        assert (path / "leaves.bin").exists()

    @pytest.mark.parametrize("call", ["pathlib.Path.rename", "shutil.rmtree"])
    @pytest.mark.parametrize("code", [errno.EBUSY, errno.EPERM, errno.EACCES, errno.EIO])
    def test_failed_deletion_warns_once(self, tmp_path, monkeypatch, call, code):
        saved(tmp_path, 1)
        whole = pathlib.Path.rename if call.endswith("rename") else shutil.rmtree

        def fails(path, *arguments, **options):
            if "step-000000001" in str(path) and not options.get("ignore_errors"):
                raise OSError(code, os.strerror(code), str(path))
            return whole(path, *arguments, **options)

        monkeypatch.setattr(call, fails)
        (told,) = self.run(tmp_path)
        assert "expected to delete the expired checkpoint" in told
        assert fx.checkpointer(tmp_path).latest() == 14

    def test_run_continues_after_failed_deletion(self, tmp_path, monkeypatch):
        def fails(path, *arguments, ignore_errors=False, **options):
            if not ignore_errors:
                raise OSError(errno.EBUSY, "Device or resource busy", str(path))

        monkeypatch.setattr("shutil.rmtree", fails)
        with pytest.warns(RuntimeWarning, match="expected to delete the expired checkpoint"):
            result = fx.fit(
                problem.start(),
                problem.step(),
                problem.data(),
                steps=6,
                callbacks=fx.callbacks.save(),
                checkpointer=fx.checkpointer(tmp_path, keep=1),
            )
        assert result.reason == "reached 6 steps"
        testing.assert_equal(fx.checkpointer(tmp_path).restore(problem.start()).params, result.state.params, "the last")
