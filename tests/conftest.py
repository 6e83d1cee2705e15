"""Settings and fixtures of all tests. One thread, because bitwise equality holds for a fixed number of threads."""

import importlib
import os

# Processes that tests start inherit the setting. Without it, each starts a thread per core, and the threads of parallel
# tests busy-wait for the same cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Otherwise each process that compiles first starts another one, and in a new cache a compiler, only to try whether
# vector instructions that the processor has can be loaded.
os.environ.setdefault("TORCHINDUCTOR_VEC_ISA_OK", "1")

import collections
import functools
import gc
import signal
import sys

import pytest
import torch
import torch.distributed as dist

from fxtrain.loop import _interrupts as interrupts
from tests import processes, shared_checks

torch.set_num_threads(1)
os.environ.setdefault("FXTRAIN_TRACEBACK", "full")  # failures show the frames of fxtrain

if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # a shell ignores SIGINT in its background jobs
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items):
    """Runs files with slow tests first, because a worker that starts one of them last runs it while others are idle."""
    slow = collections.Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: -slow[item.path])


def pytest_collection_finish():
    gc.set_threshold(*processes.COLLECTION)
    _exempt_from_collection()


def _exempt_from_collection():
    """Exempts the collected tests and all imported modules from garbage collection, because they live to the end.

    Without it, each full collection visits a million objects, and a forked process copies their pages.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _quiet_generator():
    """Restores the state of the global generator after each test."""
    before = torch.random.get_rng_state()
    yield
    torch.random.set_rng_state(before)


@pytest.fixture(autouse=True)
def _no_pending_signal():
    """Clears pending signals, because SIGTERM in one test would also end the next one."""
    yield
    interrupts._pending.clear()


@pytest.fixture(autouse=True)
def _no_process_group():
    """Destroys the process group of an earlier test or doctest, which would determine the rank of the next one."""
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.fixture(autouse=True, scope="module")
def _no_graphs_of_other_files():
    """Clears Dynamo's graphs before each file, because it limits those of a code object, which all steps share."""
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()
    _exempt_from_collection()


@pytest.fixture(scope="session")
def checked(tmp_path_factory):
    """Returns a function that runs checks of several ranks once, and fails with the errors of one of them."""

    @functools.cache
    def outcomes(module, names, **options):
        return shared_checks.outcomes(module, names, tmp_path_factory.mktemp(module), **options)

    def passes(name, module, names, **options):
        shared_checks.assert_passed(outcomes(module, tuple(names), **options), name)

    return passes


@pytest.fixture
def fresh_dynamo():
    """Clears Dynamo's graphs before and after a test that compiles many steps."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def own_handler():
    """Installs a user handler for SIGTERM, so later sessions still start. Returns the list of received signals."""
    received = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: received.append(number))
    yield received
    signal.signal(signal.SIGTERM, before)


@pytest.fixture
def double():
    """Float64 as the default dtype, because torch.optim stores counts and values derived from them in it."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def without_pyav(monkeypatch):
    """Makes the import of PyAV fail, so that videos are GIFs wherever the tests run."""
    monkeypatch.setitem(sys.modules, "av", None)


@pytest.fixture
def interpreted(monkeypatch):
    """Runs traced graphs operation by operation, which takes less time than to compile them."""
    traced = importlib.import_module("fxtrain.compiler.lowering._trace")
    monkeypatch.setattr(traced, "_compiled", lambda graph, *_: lambda tensors: graph(*tensors))
