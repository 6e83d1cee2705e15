"""The search for vector instructions: while a graph is compiled, Inductor knows only the set that it uses."""

import os
import signal
import subprocess
import sys
import threading

import pytest
import torch

from fxtrain._torch_internals import inductor, tracing, vector_instructions
from fxtrain.compiler.lowering import _compile_thread as worker

cpu_vec_isa = pytest.importorskip("torch._inductor.cpu_vec_isa")

pytestmark = pytest.mark.skipif(vector_instructions.widest() is None, reason="has no vector instructions of x86")


def listed():
    return cpu_vec_isa.valid_vec_isa_list()


@pytest.fixture
def searches(monkeypatch):
    """Makes each search new. Returns the sets that were tried, in order."""
    tried = []

    class Instructions:
        def __init__(self, name, works):
            self.name, self.works = name, works

        def __str__(self):
            return self.name

        def __bool__(self):
            tried.append(self.name)
            return self.works

    candidates = [Instructions("avx512 new", True), Instructions("avx512", False), Instructions("avx2", True)]
    candidates.append(Instructions("sse", True))
    monkeypatch.setattr(vector_instructions, "FEATURES", Found(lambda: ["sse", "avx2", "avx512"]))
    monkeypatch.setattr(vector_instructions, "CANDIDATES", Found(candidates))
    vector_instructions._widest.cache_clear()
    yield tried
    vector_instructions._widest.cache_clear()


class Found:
    """A private interface that torch has."""

    exists = True

    def __init__(self, value):
        self._value = value

    def get(self):
        return self._value


def test_widest_that_works_is_found_and_narrower_sets_are_not_tried(searches):
    with vector_instructions.widest_sought():
        assert [str(each) for each in listed()] == ["avx2"]
        assert listed() is listed()
    assert searches == ["avx512", "avx2"]


def test_all_are_known_where_a_setting_asks_for_others(monkeypatch):
    every = listed()
    with vector_instructions.widest_sought():
        with torch._inductor.config.patch({"cpp.simdlen": 256}):
            assert listed() is every
        monkeypatch.setenv("ATEN_CPU_CAPABILITY", "avx2")
        assert listed() is every


def test_other_threads_know_all():
    every, found = listed(), []
    with vector_instructions.widest_sought():
        assert listed() == every[:1]
        thread = threading.Thread(target=lambda: found.append(listed()))
        thread.start()
        thread.join()
    assert found[0] is every
    assert listed() is every


def test_error_of_the_search_is_raised_where_the_result_is_needed(searches, monkeypatch):
    def fail():
        raise OSError("no compiler")

    monkeypatch.setattr(vector_instructions, "FEATURES", Found(fail))
    with vector_instructions.widest_sought(), pytest.raises(OSError, match="no compiler"):
        listed()


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_search_is_not_awaited_after_an_error(searches, monkeypatch, error):
    go_on, ended = threading.Event(), threading.Event()

    def wait():
        go_on.wait(30)
        ended.set()
        return ["avx2"]

    monkeypatch.setattr(vector_instructions, "FEATURES", Found(wait))
    with pytest.raises(error), vector_instructions.widest_sought():
        raise error
    assert not ended.is_set()
    go_on.set()
    assert ended.wait(30)


FORK = """
import os, signal
from fxtrain._torch_internals import vector_instructions

vector_instructions._widest = lambda: "found"
vector_instructions._lock.acquire()  # as the thread does that a child lacks
child = os.fork()
if not child:
    signal.alarm(30)
    os._exit(vector_instructions.widest() != "found")
raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_forked_process_can_search_too():
    assert subprocess.run([sys.executable, "-c", FORK], timeout=60).returncode == 0


def interrupts_blocked():
    """Whether Ctrl-C in a terminal leaves the processes alone that this thread starts."""
    status = subprocess.run(["grep", "SigBlk", "/proc/self/status"], capture_output=True, text=True, check=True).stdout
    return bool(int(status.split()[1], 16) >> signal.SIGINT - 1 & 1)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_compilers_of_threads_survive_an_interrupt(searches, monkeypatch):
    """A compiler that is killed would count as missing instructions for the rest of the process."""
    found = []
    monkeypatch.setattr(vector_instructions, "FEATURES", Found(lambda: found.append(interrupts_blocked()) or ["avx2"]))
    with vector_instructions.widest_sought():
        pass
    job = worker.Job(interrupts_blocked, torch.device("cpu"))
    assert job._has_ended.wait(30)
    job.close()
    assert found == [job.result] == [True]
    assert not interrupts_blocked()


@pytest.mark.skipif(sys.platform != "linux", reason="compiles C++")
def test_kernels_use_the_same_instructions_as_without(monkeypatch):
    picked = []
    pick = cpu_vec_isa.pick_vec_isa
    monkeypatch.setattr(cpu_vec_isa, "pick_vec_isa", lambda: picked.append(pick()) or picked[-1])
    graph = tracing.make_fx(lambda x: [x.sigmoid() + 1], tracing_mode="fake")(torch.ones(37))
    fakes = [node.meta["val"] for node in graph.graph.find_nodes(op="placeholder")]
    with inductor.instructions_sought(fakes):
        (result,) = inductor.compile_graph(graph, fakes, {"force_disable_caches": True})([torch.zeros(37)])
    assert result.tolist() == [1.5] * 37
    assert picked
    assert all(each is pick() for each in picked)
