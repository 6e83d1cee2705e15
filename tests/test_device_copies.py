"""Copies between host and GPU of checkpoints and batches, by stand-ins for streams, events and pinned memory.

Doubts from torch's documentation and source, which a CPU cannot settle:

- A checkpoint is copied on the stream of the steps. So no step can overwrite a donated buffer before its copy, and the
  next step waits for the copy. A stream of its own would need that wait as well, at the same place.
- ``torch._foreach_copy_`` from a device to pinned memory takes torch's slow path, one copy for each leaf. Each is
  asynchronous by its source; its documentation does not say so.
- The writer thread waits for its event without the lock of the interpreter, but spins on one core.
- Pinned memory is never returned to the system by torch's allocator, unless its cache is emptied.
"""

import inspect

import problem
import pytest
import torch
from cuda_stand_ins import Streams, on_device, record_copies

import fxtrain as fx
from fxtrain.checkpoint._host_copy import Direct, HostCopy
from fxtrain.data import prefetch

ON_1 = "default stream of 1"


@pytest.fixture
def streams(monkeypatch):
    streams = Streams(monkeypatch)
    record_copies(streams, monkeypatch)
    return streams


def bytes_in(content):
    return [bytes(part) for _, part in content.parts()]


class TestCheckpoints:
    def test_state_is_copied_on_the_stream_of_its_steps(self, streams):
        """A step on the same stream can donate the state as soon as ``take`` returns, without a torn checkpoint."""
        host, state = HostCopy(), {"w": on_device(torch.ones(3)), "b": on_device(torch.zeros(2))}
        host.reserve(state)
        assert streams.acts == ["pinned memory"]
        host.take(state)
        copies = [act for act in streams.acts if "copy" in act]
        assert copies == [f"asynchronous copy to the host on {ON_1}"] * 2
        assert streams.acts[-1] == f"event on {ON_1}"
        host.wait()
        assert streams.acts[-1] == f"host waits for the event on {ON_1}"
        assert sorted(bytes_in(host)) == sorted([torch.ones(3).numpy().tobytes(), torch.zeros(2).numpy().tobytes()])

    def test_buffer_is_pinned_once(self, streams):
        host = HostCopy()
        for value in range(3):
            host.take({"w": on_device(torch.full((3,), float(value)))})
            host.wait()
        assert streams.acts.count("pinned memory") == 1
        assert bytes_in(host) == [torch.full((3,), 2.0).numpy().tobytes()]

    def test_snapshot_is_copied_on_a_stream_of_its_own(self, streams):
        """On the default stream, which all threads share, the next steps would wait for the writer's copies."""
        content = Direct({"w": on_device(torch.ones(3)), "turned": on_device(torch.arange(6).reshape(2, 3).t())})
        assert streams.acts == [f"event on {ON_1}", f"stream 1 waits for {ON_1}"]
        content.wait()
        found = bytes_in(content)
        assert found == [torch.arange(6).reshape(2, 3).t().contiguous().numpy().tobytes(), b"\0\0\x80?" * 3]
        copies = [act for act in streams.acts if "copy" in act]
        assert copies == ["asynchronous copy to the host on stream 1"] * 2
        after = [streams.acts[index + 1 : index + 3] for index, act in enumerate(streams.acts) if "copy" in act]
        assert after == [["event on stream 1", "host waits for the event on stream 1"]] * 2

    def test_scalar_of_a_snapshot_is_read_on_that_stream(self, streams):
        assert Direct((on_device(torch.tensor(7)),)).scalar(0) == 7
        assert streams.acts[-1] == "host waits for the event on stream 1"


class Pinned:
    """Imitates ``pin_memory`` and copies to a device, with the stream and the current device of each."""

    def __init__(self, streams, monkeypatch):
        to = torch.Tensor.to

        def pin_memory(leaf):
            streams.acts.append(f"pinned with cuda:{streams.index} current")
            return leaf

        def moved(leaf, device, non_blocking=False):
            if torch.device(device).type != "cuda":
                return to(leaf, device)
            name = streams.current(device).name
            streams.acts.append(f"{'asynchronous' if non_blocking else 'blocking'} copy to {device} on {name}")
            return on_device(leaf.as_subclass(torch.Tensor))

        monkeypatch.setattr(torch.Tensor, "pin_memory", pin_memory)
        monkeypatch.setattr(torch.Tensor, "to", moved)


class TestPrefetch:
    @pytest.fixture(autouse=True)
    def _pinned(self, streams, monkeypatch):
        Pinned(streams, monkeypatch)

    def read(self, batches, device):
        """Reads an iterator, because the thread would already copy batches of the next epoch of a list."""
        data = prefetch(iter(batches), 1, device=device)
        try:
            return [data[index] for index in range(len(batches))]
        finally:
            data.close()

    def test_copies_do_not_wait_for_the_steps(self, streams):
        """The thread's stream is the default one, on which the main thread has queued its steps."""
        self.read([torch.ones(2)] * 3, "cuda:1")
        assert f"stream 1 waits for {ON_1}" not in streams.acts
        assert streams.acts.count("asynchronous copy to cuda:1 on stream 1") == 3

    def test_batches_computed_on_the_device_are_waited_for(self, streams):
        self.read([on_device(torch.ones(2))], "cuda:1")
        assert streams.acts[0] == f"stream 1 waits for {ON_1}"

    def test_consumer_waits_for_the_copy_and_holds_its_memory(self, streams):
        """Memory of the copy's stream could otherwise be reused while the consumer's stream still reads it."""
        self.read([torch.ones(2)], "cuda:1")
        assert streams.acts[-2:] == [f"{ON_1} waits for the event on stream 1", f"memory used on {ON_1}"]

    def test_device_without_index_is_the_current_one_of_the_consumer(self, streams):
        """A thread begins with the first device as its current one. Each rank would make a context on it."""
        streams.index = 1
        current = streams.current
        self.read([torch.ones(2)], "cuda")
        assert "asynchronous copy to cuda:1 on stream 1" in streams.acts
        assert current().name == ON_1

    def test_memory_is_pinned_with_the_device_of_the_copy_current(self, streams):
        self.read([torch.ones(2)], "cuda:1")
        assert "pinned with cuda:1 current" in streams.acts
        assert "pinned with cuda:0 current" not in streams.acts


class TestLoop:
    @pytest.mark.slow
    def test_loop_makes_no_tensor_on_the_device_by_a_blocking_copy(self, monkeypatch, tmp_path):
        """``torch.tensor(value, device=...)`` synchronizes with the device.

        The loop makes tensors for each batch of an evaluation, each epoch, each request and each checkpoint. Reads of
        the device that the loop makes on purpose are those of its counters at the start and at a rewind, of ``done``,
        ``start`` and ``length`` once an epoch, and of the list of snapshots when one is retained.
        """
        made, real = [], torch.tensor

        def tensor(*args, device=None, **options):
            if device is not None and "fxtrain/loop" in (place := inspect.stack()[1].filename):
                made.append(place)
            return real(*args, device=device, **options)

        def save(state, event: fx.StepEnd):
            return state, fx.Control(save=event.step % 3 == 0)

        def run(steps):
            checkpoints = fx.checkpointer(tmp_path / str(steps))
            options = {"eval_step": problem.eval_step, "eval_data": problem.data(2), "eval_when": 2, "lag": 1}
            problem.fit(steps=steps, callbacks=[save], checkpointer=checkpoints, **options)

        monkeypatch.setattr(torch, "tensor", tensor)
        run(3)
        at_start = len(made)
        made.clear()
        run(12)
        assert len(made) == at_start
