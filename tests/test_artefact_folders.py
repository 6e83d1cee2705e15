"""Folders of compiled graphs: no damaged file and no failing write breaks a run."""

import errno
import os
import signal
import warnings

import pytest
import torch
from saved_graphs import BATCH, file_in, make, same, start, steps
from saved_graphs import compiled as compiled  # a fixture
from saved_graphs import folder as folder  # a fixture
from saved_graphs import made as made  # a fixture

import fxtrain as fx
from fxtrain.compiler.artefacts import _file as files


def flip(path, place):
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


DAMAGES = {
    "empty": lambda path: path.write_bytes(b""),
    "foreign": lambda path: path.write_bytes(b"PK\3\4" * 1000),
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-100]),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"x"),
    "bit of the library": lambda path: flip(path, -500),
    "bit of the header": lambda path: flip(path, 150),
    "bit of the checksum": lambda path: flip(path, 40),
    "folder": lambda path: (path.unlink(), path.mkdir()),
    "unreadable": lambda path: (path.unlink(), path.symlink_to("/proc/self/mem")),
    "dangling link": lambda path: (path.unlink(), path.symlink_to("nowhere")),
}


class TestDamage:
    @pytest.mark.parametrize("damage", DAMAGES)
    def test_step_is_compiled(self, folder, compiled, damage):
        DAMAGES[damage](file_in(folder))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            steps(make(folder))
        assert len(compiled) == 1
        assert any(str(folder) in str(each.message) for each in caught) or damage == "dangling link"

    def test_damaged_file_is_replaced(self, folder, compiled):
        path = file_in(folder)
        flip(path, -500)
        with pytest.warns(UserWarning, match=r"is damaged.*compiled, and the file is replaced"):
            steps(make(folder), 1)
        assert files.read_entry(path).header["kernels"] == 0

    def test_file_of_another_graph_under_this_name(self, folder, compiled, tmp_path):
        path = file_in(folder)
        entry = files.read_entry(path)
        files.write_entry(path, entry._replace(header={**entry.header, "graph": "0" * 64}))
        with pytest.warns(UserWarning, match="another graph"):
            steps(make(folder), 1)
        assert len(compiled) == 1

    def test_library_that_cannot_be_loaded(self, folder, compiled):
        path = file_in(folder)
        entry = files.read_entry(path)
        broken = {name: b"no library" if name.endswith(".so") else content for name, content in entry.files.items()}
        files.write_entry(path, entry._replace(files=broken))
        with pytest.warns(UserWarning, match="cannot be loaded"):
            steps(make(folder), 1)
        assert len(compiled) == 1

    def test_extracted_library_is_verified(self, made, folder, compiled, tmp_path):
        steps(make(folder), 1)
        for path in (tmp_path / "cache").rglob("*.so"):
            content = path.read_bytes()
            path.unlink()  # this process has mapped it
            path.write_bytes(content[:100])
        assert same(steps(make(folder)), made[1])

    def test_code_that_raises(self, folder, compiled):
        path = file_in(folder)
        entry = files.read_entry(path)
        files.write_entry(path, entry._replace(files={**entry.files, "code.py": b"call = 1 / 0"}))
        with pytest.warns(UserWarning, match="ZeroDivisionError"):
            steps(make(folder), 1)
        assert len(compiled) == 1


class TestFolder:
    def test_file_is_refused(self, tmp_path):
        path = tmp_path / "file"
        path.write_text("")
        with pytest.raises(ValueError, match=r"expected artefacts to be a folder, got the file .*file"):
            make(path)

    def test_path_that_is_none_is_refused(self, tmp_path):
        with pytest.raises(TypeError, match="expected artefacts to be a path, got 5"):
            make(5)
        with pytest.raises(ValueError, match="expected artefacts to be a path, got 'xxx"):
            make("x" * 300)
        link = tmp_path / "link"
        link.symlink_to(tmp_path / "gone")
        with pytest.raises(ValueError, match=r"expected artefacts to be a folder, got a link to .*gone, which"):
            make(link)

    @pytest.mark.parametrize("options", [{"backend": "eager"}, {"dynamic": True}])
    def test_options_that_exclude_it(self, tmp_path, options):
        with pytest.raises(ValueError, match="expected artefacts without backend and dynamic"):
            make(tmp_path, **options)

    def test_folder_is_created_with_its_first_graph(self, compiled, tmp_path):
        step = make(tmp_path / "deep" / "folder")
        assert not (tmp_path / "deep").exists()
        steps(step, 1)
        assert file_in(tmp_path / "deep" / "folder").stat().st_mode & 0o044
        assert not list((tmp_path / "deep" / "folder").glob("*.lease"))

    @pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES])
    def test_run_goes_on_if_nothing_can_be_written(self, monkeypatch, compiled, tmp_path, number):
        def fail(*_, **__):
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(files.tempfile, "mkstemp", fail)
        with pytest.warns(UserWarning, match=f"cannot be saved.*{os.strerror(number)}"):
            steps(make(tmp_path / "full"))
        assert len(compiled) == 1

    def test_disk_that_fills_while_writing_leaves_no_file(self, monkeypatch, compiled, tmp_path):
        def fail(handle):
            raise OSError(errno.ENOSPC, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(files.os, "fsync", fail)
            with pytest.warns(UserWarning, match="No space left"):
                steps(make(tmp_path / "full"), 1)
        assert not list((tmp_path / "full").iterdir())

    def test_graph_is_read_from_a_read_only_folder(self, made, folder, compiled):
        folder.chmod(0o555)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                assert same(steps(make(folder)), made[1])
        finally:
            folder.chmod(0o755)
        assert not compiled

    @pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
    @pytest.mark.parametrize("call", ["fsync", "replace"])
    def test_kill_while_writing_leaves_the_old_file(self, tmp_path, call):
        path = tmp_path / "x.fxc"
        files.write_entry(path, files.Entry({"old": 1}, {"a": b"old"}))
        child = os.fork()
        if not child:
            setattr(files.os, call, lambda *_: os.kill(os.getpid(), signal.SIGKILL))
            files.write_entry(path, files.Entry({"new": 1}, {"a": b"new" * 10**6}))
            os._exit(0)
        _, status = os.waitpid(child, 0)
        assert os.WTERMSIG(status) == signal.SIGKILL
        assert files.read_entry(path) == files.Entry({"old": 1}, {"a": b"old"})
        (left,) = set(tmp_path.iterdir()) - {path}
        os.utime(left, (0, 0))
        files.write_entry(path, files.Entry({}, {"a": b"newer"}))
        assert set(tmp_path.iterdir()) == {path}

    def test_graph_that_cannot_be_saved_is_compiled_with_a_warning(self, compiled, tmp_path):
        @torch.library.custom_op("artefacts_test::twice", mutates_args=())
        def twice(x: torch.Tensor) -> torch.Tensor:
            return 2 * x

        twice.register_fake(torch.empty_like)
        step = fx.compile(fx.eval_step(lambda model, batch: {"x": twice(batch).sum()}), artefacts=tmp_path / "none")
        with pytest.warns(
            UserWarning, match=r"cannot be saved in .*none, because it calls the operator artefacts_test"
        ):
            step(start(), BATCH)
        assert not (tmp_path / "none").exists()
