"""Leases of compilations: one process compiles for all, and no holder blocks the others."""

import contextlib
import subprocess
import sys
import threading
import time

import pytest

from fxtrain.compiler.artefacts import _lease as lease


class TestLease:
    @pytest.mark.parametrize("turn", [lease.turn, lease.local_turn])
    def test_one_compiles_for_all(self, turn, tmp_path):
        done, entered, begun = tmp_path / "done", [], threading.Barrier(5)

        def work():
            begun.wait()
            with turn(tmp_path / "x.lease", done.exists, lambda: None):
                if not done.exists():
                    entered.append(threading.get_ident())
                    time.sleep(0.3)
                    done.touch()

        threads = [threading.Thread(target=work) for _ in range(5)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        assert len(entered) == 1
        assert not (tmp_path / "x.lease").exists()

    def test_killed_holder_on_this_machine_is_followed_at_once(self, tmp_path):
        path = tmp_path / "x.lease"
        code = (
            "import pathlib, sys, time\n"
            "from fxtrain.compiler.artefacts._lease import local_turn\n"
            "with local_turn(pathlib.Path(sys.argv[1]), lambda: False, lambda: None):\n"
            "    print('holds', flush=True)\n"
            "    time.sleep(600)\n"
        )
        waits, entered = threading.Event(), threading.Event()

        def work():
            with lease.local_turn(path, lambda: False, waits.set):
                entered.set()

        with subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE, text=True) as holder:
            assert holder.stdout.readline() == "holds\n"
            thread = threading.Thread(target=work)
            thread.start()
            assert waits.wait(30)
            assert not entered.is_set()
            holder.kill()
            holder.wait()
            assert entered.wait(30)
            thread.join()
        assert not path.exists()

    def test_dead_holder_does_not_hang_others(self, monkeypatch, tmp_path):
        monkeypatch.setattr(lease, "_DEAD_SECONDS", 0.3)
        (tmp_path / "x.lease").touch()
        waited = []
        with lease.turn(tmp_path / "x.lease", lambda: False, lambda: waited.append(1)):
            assert waited == [1]
        assert not (tmp_path / "x.lease").exists()

    def test_living_holder_keeps_its_lease(self, monkeypatch, tmp_path):
        monkeypatch.setattr(lease, "_DEAD_SECONDS", 0.5)
        monkeypatch.setattr(lease, "_BEAT_SECONDS", 0.1)
        monkeypatch.setattr(lease, "_MAX_WAIT_SECONDS", 1.5)
        path = tmp_path / "x.lease"
        with lease.turn(path, lambda: False, lambda: None):
            began = time.monotonic()
            with lease.turn(path, lambda: False, lambda: None):
                # The wait is bounded, and the second process does not take the lease.
                assert time.monotonic() - began > 1.4
            assert path.exists()

    @pytest.mark.parametrize("turn", [lease.turn, lease.local_turn])
    def test_failed_holder_lets_another_compile(self, turn, tmp_path):
        path = tmp_path / "x.lease"
        with contextlib.suppress(ZeroDivisionError), turn(path, lambda: False, lambda: None):
            raise ZeroDivisionError
        with turn(path, lambda: False, lambda: pytest.fail("waits")):
            pass

    @pytest.mark.parametrize("turn", [lease.turn, lease.local_turn])
    def test_folder_without_leases_is_entered_by_all(self, turn, tmp_path):
        (tmp_path / "file").touch()
        with turn(tmp_path / "file" / "x.lease", lambda: False, lambda: pytest.fail("waits")):
            pass

    def test_lease_that_cannot_be_removed(self, monkeypatch, tmp_path):
        monkeypatch.setattr(lease, "_DEAD_SECONDS", 0.2)
        (tmp_path / "x.lease").mkdir()
        with lease.turn(tmp_path / "x.lease", lambda: False, lambda: None):
            pass
        assert (tmp_path / "x.lease").is_dir()
