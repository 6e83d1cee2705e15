"""Stand-ins for CUDA: captures that run on the CPU, and streams and events that record the order of their use.

They show what fxtrain asks of torch and in which order. Whether a device then does it, only ``test_gpu.py`` shows.
"""

import ctypes
import itertools
import types

import torch

from fxtrain._torch_internals import memory


class HostCaptures:
    """Captures on the CPU. A replay repeats the recorded call on the same addresses.

    As on a device, the capture itself computes nothing, keeps no memory alive but that of its outputs, and each replay
    overwrites the outputs in place.
    """

    def __init__(self, error=None):
        self.error, self.stream, self.acts = error, "stream 1", []

    def place(self):
        return self.stream

    def warm_up(self, call, tensors):
        self.acts.append("warm up")
        return call(tensors)

    def capture(self, call, tensors):
        self.acts.append("capture")
        if self.error is not None:
            raise self.error
        recorded, outputs = [at_address_of(tensor) for tensor in tensors], []

        def replay():
            self.acts.append("replay")
            computed = call(recorded)
            if not outputs:
                outputs.extend(value.clone() for value in computed)
            for output, value in zip(outputs, computed, strict=True):
                output.copy_(value)

        return replay, outputs


def at_address_of(tensor):
    """Returns a tensor of the same memory without a reference to its owner."""
    elements = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    memory = (ctypes.c_char * (elements * tensor.itemsize)).from_address(tensor.data_ptr())
    return torch.frombuffer(memory, dtype=torch.uint8).view(tensor.dtype).as_strided(tensor.shape, tensor.stride())


class Streams:
    """Streams, events and devices in place of those of ``torch.cuda``. Records the acts on them in order."""

    def __init__(self, monkeypatch):
        self.acts = []
        self.index, self.now, self.count = 0, None, 0
        self.default = [Stream(self, f"default stream of {index}", index) for index in range(2)]
        for name, stand_in in {
            "Stream": self.new,
            "Event": lambda **options: Event(self),
            "current_stream": self.current,
            "current_device": lambda: self.index,
            "stream": self.on,
            "device": lambda device: self.on_device(self.index_of(device)),
        }.items():
            monkeypatch.setattr(torch.cuda, name, stand_in)

    def index_of(self, device):
        index = None if device is None else torch.device(device).index
        return self.index if index is None else index

    def new(self, device=None):
        self.count += 1
        return Stream(self, f"stream {self.count}", self.index_of(device))

    def current(self, device=None):
        index = self.index_of(device)
        return self.now if self.now is not None and self.now.index == index else self.default[index]

    def on(self, stream):
        return Context(self, stream, stream.index)

    def on_device(self, index):
        return Context(self, self.now, index)


class Context:
    """The context of a current stream and device. Like torch's, it restores them only at its end."""

    def __init__(self, streams, stream, index):
        self.streams, self.chosen = streams, (stream, index)

    def __enter__(self):
        self.before = self.streams.now, self.streams.index
        self.streams.now, self.streams.index = self.chosen

    def __exit__(self, *error):
        self.streams.now, self.streams.index = self.before


class Stream:
    """A stream that records what it waits for."""

    def __init__(self, streams, name, index):
        self.streams, self.name, self.index, self.cuda_stream = streams, name, index, name

    def wait_stream(self, other):
        self.streams.acts.append(f"{self.name} waits for {other.name}")

    def wait_event(self, event):
        self.streams.acts.append(f"{self.name} waits for the event on {event.stream}")

    def record_event(self):
        event = Event(self.streams)
        event.record(self)
        return event


class Event:
    """An event that records on which stream it is recorded, and that the host waits for it."""

    def __init__(self, streams):
        self.streams, self.stream = streams, None

    def record(self, stream=None):
        self.stream = (stream or self.streams.current()).name
        self.streams.acts.append(f"event on {self.stream}")

    def synchronize(self):
        self.streams.acts.append(f"host waits for the event on {self.stream}")


class OnDevice(torch.Tensor):
    """A host tensor that claims to be on the CUDA device ``cuda:1``, as do the results of its operations."""

    is_cpu, is_cuda, device = False, True, torch.device("cuda", 1)

    def record_stream(self, stream):
        stream.streams.acts.append(f"memory used on {stream.name}")


def on_device(tensor):
    """Returns the tensor as one that claims to be on ``cuda:1``."""
    return tensor.as_subclass(OnDevice)


def on_host(tensor):
    """Returns the tensor as an ordinary one."""
    with torch._C.DisableTorchFunctionSubclass():
        return tensor.as_subclass(torch.Tensor)


def record_copies(streams, monkeypatch):
    """Records copies from the device to the host with their stream, and allocates pinned memory as ordinary memory."""
    copy, copy_all, empty, empty_like = torch.Tensor.copy_, torch._foreach_copy_, torch.empty, torch.empty_like

    def record(source, non_blocking):
        if isinstance(source, OnDevice):
            how = "asynchronous" if non_blocking else "blocking"
            streams.acts.append(f"{how} copy to the host on {streams.current(source.device).name}")

    def copied(target, source, non_blocking=False):
        record(source, non_blocking)
        return copy(on_host(target), on_host(source))

    def all_copied(targets, sources, non_blocking=False):
        for source in sources:
            record(source, non_blocking)
        copy_all(targets, list(map(on_host, sources)))

    def pinned(make):
        def allocate(first, *args, pin_memory=False, **options):
            if pin_memory:
                streams.acts.append("pinned memory")
            return make(on_host(first) if isinstance(first, OnDevice) else first, *args, **options)

        return allocate

    monkeypatch.setattr(torch.Tensor, "copy_", copied)
    # Not in torch, where it has been looked up once for the whole process.
    monkeypatch.setattr(memory, "COPY_ALL", types.SimpleNamespace(exists=True, get=lambda: all_copied))
    monkeypatch.setattr(torch, "empty", pinned(empty))
    monkeypatch.setattr(torch, "empty_like", pinned(empty_like))


def add_graphs(streams, monkeypatch):
    """Replaces the graphs of ``torch.cuda``. Like torch's, their context does not restore the stream if it fails."""
    pools = itertools.count()

    class Graph:
        def __init__(self):
            self.id = next(pools)

        def pool(self):
            return self.id

        def replay(self):
            pass

    class Capture:
        def __init__(self, graph, *, pool, stream, capture_error_mode):
            self.context = streams.on(stream)
            graph.id = graph.id if pool is None else pool
            self.described = f"{stream.name} of cuda:{stream.index}, {capture_error_mode}, pool {pool}"

        def __enter__(self):
            self.context.__enter__()
            streams.acts.append(f"capture on {self.described}")

        def __exit__(self, kind, *rest):
            streams.acts.append("end")
            if kind is not None:
                raise RuntimeError("capture was invalidated")
            self.context.__exit__(None, None, None)

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", Capture)
