"""The end of a process while its worker compiles."""

import threading
import time

import pytest
import torch

from fxtrain.compiler.lowering import _compile_thread as worker

pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")


@pytest.fixture
def leave():
    """Starts a job and leaves it, as a process does at its end. Returns whether its thread has ended."""

    def leave(function):
        begun = threading.Event()
        job = worker.Job(lambda: function(begun), torch.device("cpu"))
        assert begun.wait(30)
        job.leave()
        job.close()
        return not job._thread.is_alive()

    return leave


def test_thread_that_ignores_the_first_exception_ends(leave):
    def stubborn(begun):
        try:
            while True:
                begun.set()
        except SystemExit:
            pass
        while True:
            sum(range(1000))

    assert leave(stubborn)


def test_import_is_not_interrupted(leave):
    code, seen = "begun.set()\nwhile clock() < end: pass\nseen.append('imported')", []

    def imports(begun):
        given = {"begun": begun, "clock": time.monotonic, "end": time.monotonic() + 0.5, "seen": seen}
        exec(compile(code, "<frozen importlib._bootstrap>", "exec"), given)
        while True:
            sum(range(1000))

    assert leave(imports)
    assert seen == ["imported"]
