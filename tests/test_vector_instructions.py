"""The search for vector instructions: while a graph is compiled, Inductor knows only the set that it uses."""

import sys
import threading

import pytest
import torch

from fxtrain._torch_internals import inductor, tracing, vector_instructions

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
