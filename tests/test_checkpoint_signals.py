"""Exceptions from signal handlers, at any point of a call, damage no checkpoint and leave no write untracked."""

import os
import stat
import sys
import time

import processes
import pytest
import torch

import fxtrain as fx

pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # raised in a finalizer

# Frames in which the exception is raised: those of fxtrain, and of standard libraries that may hold a lock.
WATCHED = ("fxtrain/checkpoint/", "concurrent/futures/", "threading.py", "multiprocessing/util.py", "contextlib.py")


class FromHandler(BaseException):
    """Raised by a signal handler."""


class Tracer:
    """Counts lines (and instructions) of watched frames in this thread, and raises at count ``at``."""

    def __init__(self, at=None, *, instructions=True):
        self.at, self.count, self.instructions = at, 0, instructions

    def __call__(self, frame, event, argument):
        if not any(part in frame.f_code.co_filename for part in WATCHED):
            return None
        frame.f_trace_opcodes = self.instructions
        if event in ("line", "opcode", "return"):
            self.count += 1
            if self.count == self.at:
                raise FromHandler
        return self

    def __enter__(self):
        sys.settrace(self)
        return self

    def __exit__(self, kind, error, trace):
        sys.settrace(None)
        return kind is FromHandler


LIKE = fx.init(torch.nn.Linear(40, 8))


def at(step):
    params = {name: torch.full_like(value, step) for name, value in LIKE.params.items()}
    return LIKE.replace(step=torch.tensor(step), params=params)


@pytest.fixture(autouse=True)
def slow_writes(monkeypatch):
    """Replaces the sync of files by a delay, so that writes overlap the next call, and disables that of folders."""

    def fsync(descriptor):
        if stat.S_ISREG(os.fstat(descriptor).st_mode):
            time.sleep(0.001)

    monkeypatch.setattr("os.fsync", fsync)


def prepared(folder, *, waits):
    checkpoints = fx.checkpointer(folder, keep=None)
    checkpoints.save(at(1))
    if waits:
        checkpoints.wait()
    return checkpoints


CALLS = {
    "the first save": (False, lambda checkpoints: checkpoints.save(at(2))),
    "a save": (True, lambda checkpoints: checkpoints.save(at(2))),
    "a save behind another": (True, lambda checkpoints: checkpoints.save(at(2))),
    "a snapshot": (True, lambda checkpoints: checkpoints.save(at(2), role="snapshot")),
    "wait": (True, lambda checkpoints: checkpoints.wait()),
    "committed": (True, lambda checkpoints: checkpoints.committed()),
    "close": (True, lambda checkpoints: checkpoints.close()),
    "begin": (False, lambda checkpoints: checkpoints.begin(at(1), resume=False)),
}


def trial(folder, name, point, instructions):
    """Interrupts one call at ``point``, then uses the checkpointer again. Returns the number of points."""
    follows, call = CALLS[name]
    checkpoints = prepared(folder, waits=name == "a save") if follows else fx.checkpointer(folder, keep=None)
    with Tracer(point, instructions=instructions) as tracer:
        call(checkpoints)
    for step in (3, 4):
        checkpoints.save(at(step))
    checkpoints.close()
    with fx.checkpointer(folder) as other:  # the lock is free, and every checkpoint is intact
        steps = other.steps()
        for step in steps:
            restored = other.restore(LIKE, step=step)
            assert all((leaf == step).all() for leaf in restored.params.values()), f"step {step} has other values"
        snapshot = other.read_newest_until(2, LIKE)
        assert snapshot is None or all((leaf == snapshot.state.step).all() for leaf in snapshot.state.params.values())
    assert {1, 3, 4} - set(steps) == (set() if follows else {1})
    assert not list(folder.glob("unreadable-*"))
    return tracer.count


def interrupted_everywhere(tmp_path, name, stride, *, instructions):
    total = trial(tmp_path / "whole", name, None, instructions)
    assert total > 5
    for point in range(1, total + 1, stride):
        trial(tmp_path / str(point), name, point, instructions)


@pytest.mark.parametrize("name", CALLS)
def test_exception_damages_no_checkpoint(tmp_path, name):
    interrupted_everywhere(tmp_path, name, 61, instructions=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize(("instructions", "stride"), [(False, 1), (True, 17)], ids=["lines", "instructions"])
def test_exception_at_any_line_damages_no_checkpoint(tmp_path, name, instructions, stride):
    interrupted_everywhere(tmp_path, name, stride, instructions=instructions)
    assert torch.is_grad_enabled()


SLOW_SYNC = """
import os, stat, time
def slowly(descriptor):
    if stat.S_ISREG(os.fstat(descriptor).st_mode):
        time.sleep(slow)
os.fsync = slowly
"""


def session(folder, *lines, slow=0.0):
    """Runs lines in a subprocess whose writes take ``slow`` seconds. Returns the result and its duration."""
    code = [
        "import signal, sys, torch, fxtrain as fx",
        SLOW_SYNC,
        f"slow = {slow}",
        "state, checkpoints = fx.init(torch.nn.Linear(1, 1)), fx.checkpointer(sys.argv[1])",
        *lines,
    ]
    began = time.monotonic()
    done = processes.run(["-c", "\n".join([*code, ""]), folder])
    return done, time.monotonic() - began


class TestExit:
    def test_exit_waits_for_save(self, tmp_path):
        done, _ = session(tmp_path, "checkpoints.save(state)", slow=0.3)
        assert done.returncode == 0, done.stderr
        assert fx.checkpointer(tmp_path).steps() == [0]

    @pytest.mark.parametrize("method", ["fork", "spawn"])
    def test_multiprocessing_child_waits_for_save(self, tmp_path, method):
        script = tmp_path / "script.py"
        script.write_text(
            "import multiprocessing, sys, torch, fxtrain as fx\n"
            f"{SLOW_SYNC}slow = 0.3\n"
            "def child(folder):\n"
            "    checkpoints = fx.checkpointer(folder)\n"
            "    checkpoints.save(fx.init(torch.nn.Linear(1, 1)))\n"
            "if __name__ == '__main__':\n"
            f"    process = multiprocessing.get_context('{method}').Process(target=child, args=(sys.argv[1],))\n"
            "    process.start(), process.join()\n"
        )
        assert processes.run([script, tmp_path / "run"]).returncode == 0
        assert fx.checkpointer(tmp_path / "run").steps() == [0]

    def test_interrupted_exit_does_not_wait_for_save(self, tmp_path):
        done, seconds = session(
            tmp_path,
            "checkpoints.save(state), checkpoints.wait()",
            "slow = 60",
            "checkpoints.save(state.replace(step=torch.tensor(1)))",
            "os.kill(os.getpid(), signal.SIGINT)",
            "time.sleep(60)",
        )
        assert "KeyboardInterrupt" in done.stderr
        assert seconds < 40
        assert fx.checkpointer(tmp_path).steps() == [0]

    def test_caught_interrupt_does_not_lose_save(self, tmp_path):
        done, _ = session(
            tmp_path,
            "try: os.kill(os.getpid(), signal.SIGINT), time.sleep(60)",
            "except KeyboardInterrupt: pass",
            "checkpoints.save(state)",
            slow=0.3,
        )
        assert done.returncode == 0, done.stderr
        assert fx.checkpointer(tmp_path).steps() == [0]
