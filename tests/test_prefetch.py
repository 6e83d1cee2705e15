"""Prefetching: same batches and errors as without it, and its threads end."""

import gc
import subprocess
import sys
import threading
import time
import traceback

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sources import Augmented, Rows, assert_same, in_order, indexed_sources, same, take
from torch.utils.data import DataLoader

from fxtrain.data import Exhausted, Source, batches, from_iterable, from_loader, prefetch
from fxtrain.data._seeding import seeded


def threads():
    return [thread for thread in threading.enumerate() if thread.name == "fxtrain prefetch"]


@pytest.fixture
def _no_threads_left():
    yield
    if threads():
        gc.collect()
    assert not threads()


pytestmark = pytest.mark.usefixtures("_no_threads_left")


@pytest.mark.parametrize("size", [1, 4])
@pytest.mark.parametrize("device", [None, "cpu"])
@given(positions=st.lists(st.integers(0, 13), min_size=1, max_size=8))
@settings(max_examples=15, deadline=None)
def test_prefetch_leaves_batches_unchanged(size, device, positions):
    data = prefetch(indexed_sources()["dataset"], size, device=device)
    assert_same([data[position] for position in positions], [in_order("dataset")[position] for position in positions])
    assert_same([data[position] for position in range(14)], in_order("dataset"))
    data.close()
    assert same(data[3], in_order("dataset")[3])  # reopens after close
    data.close()


def test_two_prefetch_threads_share_global_generators():
    for _ in range(5):
        sources = [prefetch(indexed_sources()["dataset"], 3), prefetch(indexed_sources()["loader"], 3)]
        for position in range(14):
            for data, name in zip(sources, ("dataset", "loader"), strict=True):
                assert same(data[position], in_order(name)[position])
        for data in sources:
            data.close()


def test_prefetch_inside_a_source_is_rejected():
    inner = prefetch(batches(torch.arange(8), 2))
    with pytest.raises(RuntimeError, match=r"would deadlock the two threads\. Apply prefetch to the outer"):
        from_iterable(inner[position] for position in range(4))[0]
    inner.close()


@pytest.mark.slow
def test_worker_process_does_not_inherit_a_held_lock():
    held, done = threading.Event(), threading.Event()

    def hold():
        with seeded(1):
            held.set()
            done.wait(60)

    thread = threading.Thread(target=hold)
    data = from_loader(DataLoader(Augmented(), 4, num_workers=1, sampler=range(23)))
    data.begin_epoch(0, 0)  # generates the order, which takes the lock
    thread.start()
    held.wait(60)
    assert data[0]["i"].tolist() == [0, 1, 2, 3]
    done.set()
    thread.join()
    data.close()


def test_prefetch_reads_exactly_size_batches_ahead():
    asked = []
    data = prefetch(batches(torch.arange(100), 1).map(lambda b, at: asked.append(at) or b, with_position=True), 3)
    data[0]
    deadline = time.monotonic() + 5
    while len(asked) < 4 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.05)
    assert asked == [0, 1, 2, 3]
    data.close()


def failing(batch, position):
    if position == 2:
        raise KeyError("no such file")
    return batch


def test_error_is_raised_at_its_position_with_its_traceback():
    data = prefetch(batches(torch.arange(100), 1).map(failing, with_position=True), 4)
    take(data, range(2))
    for _ in range(2):
        with pytest.raises(KeyError, match="no such file") as raised:
            data[2]
        assert "failing" in [frame.name for frame in traceback.extract_tb(raised.value.__traceback__)]
    take(data, range(3, 6))
    data.close()


def test_epoch_length_is_unknown_until_the_end_is_read():
    data = prefetch(from_iterable(Rows(3)), 4)
    for position in range(3):
        data[position]
        time.sleep(0.02)  # the thread reaches the end during this time
        assert data.epoch_length is None
    with pytest.raises(Exhausted):
        data[3]
    assert data.epoch_length == 3
    assert [int(data[i]["i"][0]) for i in range(3, 8)] == [0, 1, 2, 0, 1]
    data.close()


def test_deleted_prefetch_ends_its_thread():
    data = prefetch(batches(torch.arange(100), 1))
    data[0]
    assert len(threads()) == 1
    del data
    gc.collect()
    assert not threads()


@pytest.mark.parametrize("end", ["pass", "raise SystemExit(3)", "raise KeyboardInterrupt"])
def test_interpreter_exits_during_a_read(end):
    program = (
        "import time, torch\nfrom fxtrain.data import batches, prefetch\n"
        "data = prefetch(batches(torch.arange(100), 1).map(lambda b: time.sleep(0.05) or b))\ndata[0]\n" + end
    )
    done = subprocess.run([sys.executable, "-c", program], timeout=60, capture_output=True, text=True, check=False)
    assert done.returncode == {"pass": 0, "raise SystemExit(3)": 3}.get(end, -2)
    assert "terminate" not in done.stderr


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_prefetch_copies_to_device():
    plain = batches({"x": torch.randn(4096, 256)}, 512)
    data = prefetch(plain, 3, device="cuda")
    for position in range(40):
        batch = data[position]["x"]
        assert batch.is_cuda
        assert batch.cpu().equal(plain[position]["x"])
    data.close()


def test_close_does_not_wait_for_a_read():
    go, events = threading.Event(), []

    class Slow(Source):
        epoch_length = 9

        def fetch(self, position):
            if position == 1:
                go.wait()
            events.append(position)
            return torch.tensor(position)

        def close(self):
            events.append("closed")

    data = prefetch(Slow())
    data[0]
    data.close()
    assert events == [0]
    threading.Timer(0.2, go.set).start()
    assert data[2] == 2  # waits for the previous thread
    assert events[:4] == [0, 1, "closed", 2]
    data.close()
