"""CUDA graphs of compiled steps: when to capture, what to copy, and the memory that all graphs share.

A captured graph reads and writes fixed addresses. A donated state is updated in place, so its addresses can be part of
the capture. Everything else is copied into, and out of, memory that belongs to the graph.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from fxtrain.core import warn

Call = Callable[[Sequence[Tensor]], Sequence[Tensor]]
_Outputs = Sequence[Tensor]

_MAX_CALLS_BEFORE_CAPTURE = 64


class Captures(Protocol):
    """Runs and captures functions on one device."""

    def place(self) -> Hashable:
        """Returns the thread and the stream of the current call. A graph is replayed only where it was captured."""
        ...

    def warm_up(self, call: Call, tensors: Sequence[Tensor]) -> _Outputs:
        """Calls the function on the stream that captures."""
        ...

    def capture(self, call: Call, tensors: Sequence[Tensor]) -> tuple[Callable[[], object], _Outputs]:
        """Records a call without running it. Returns a function that replays it, and the recorded outputs.

        Keeps no reference to the tensors, because a state that is referenced elsewhere is copied before it is donated.
        """
        ...


class CudaGraphReplay:
    """Calls a function, and replays it as a CUDA graph while the state stays at the same addresses.

    The first call with new addresses runs the function, and the second one captures it. Each further change of
    addresses doubles the number of calls before the next capture, because a capture takes as long as many steps.

    Inputs are copied into static buffers. So are scalars of the state that move while the rest stays, such as a stop
    flag that callbacks set. Outputs are cloned, because the next replay overwrites them. A function that cannot be
    captured is reported once, and then called as it is.

    Args:
        call: A function of a sequence of tensors, all on one GPU. If it updates tensors in place, they are among the
            first ``count``.
        count: The number of tensors in the state.
        captures: Captures the function.
    """

    def __init__(self, call: Call, count: int, captures: Captures) -> None:
        self._call, self._count, self._captures = call, count, captures
        self._staying, self._moving = list(range(count)), list[int]()
        self._place: Hashable = None
        self._addresses: list[int] | None = None  # of the staying tensors
        self._calls_before_capture, self._calls = 1, 0
        self._is_refused = False
        self._forget()

    def __call__(self, tensors: Sequence[Tensor]) -> _Outputs:
        place, addresses = self._captures.place(), [tensors[index].data_ptr() for index in self._staying]
        if self._addresses is None:
            self._place, self._addresses = place, addresses
            # Libraries create handles and workspaces for each stream, which a capture does not allow.
            return self._captures.warm_up(self._call, tensors)
        if place != self._place or addresses != self._addresses:
            self._move(place, addresses, self._addresses, tensors)
            return self._call(tensors)
        self._calls += 1
        if self._is_refused or self._calls < self._calls_before_capture:
            return self._call(tensors)
        if self._replay is None:
            self._capture(tensors)
        if self._replay is None:
            return self._call(tensors)
        for index, buffer in self._buffers.items():
            buffer.copy_(_flat(tensors[index]), non_blocking=True)
        self._replay()
        for index in self._moving:
            _flat(tensors[index]).copy_(self._buffers[index], non_blocking=True)
        return [output.clone() for output in self._outputs]

    def _move(self, place: Hashable, new: list[int], old: list[int], tensors: Sequence[Tensor]) -> None:
        """Drops the graph after a change of addresses or of the stream."""
        moved = [index for index, was, now in zip(self._staying, old, new, strict=True) if was != now]
        if place == self._place and all(tensors[index].numel() == 1 for index in moved):
            self._moving = sorted((*self._moving, *moved))
            self._staying = [index for index in self._staying if index not in moved]
        elif self._replay is not None:
            self._calls_before_capture = min(2 * self._calls_before_capture, _MAX_CALLS_BEFORE_CAPTURE)
        self._place, self._addresses = place, [tensors[index].data_ptr() for index in self._staying]
        self._calls = 0
        self._forget()

    def _capture(self, tensors: Sequence[Tensor]) -> None:
        """Captures the function, if it can be captured."""
        static = list(tensors)
        buffers: dict[int, Tensor] = {}
        for index in (*self._moving, *range(self._count, len(static))):
            buffers[index] = _flat(tensors[index]).clone()
            # The strides are part of the compiled code, also those of a slice or of an expanded tensor.
            static[index] = buffers[index].as_strided(tensors[index].shape, tensors[index].stride())
        try:
            self._replay, self._outputs = self._captures.capture(self._call, static)
        except RuntimeError as error:
            # Nothing has run, so the state is as it was.
            self._is_refused = True
            warn(
                f"expected a step that can be captured as a CUDA graph, got {_reason(error)}. It runs without one. "
                "Choose another mode to silence this.",
                RuntimeWarning,
            )
        else:
            self._buffers = buffers

    def _forget(self) -> None:
        """Frees the graph with its memory."""
        self._replay: Callable[[], object] | None = None
        self._buffers: dict[int, Tensor] = {}
        self._outputs: _Outputs = ()


class _Side(NamedTuple):
    """A stream to capture on, and the live graphs that were captured on it."""

    stream: torch.cuda.Stream
    graphs: weakref.WeakSet[torch.cuda.CUDAGraph]


class _Sides(threading.local):
    """The capture streams of a thread: one for each device and stream that graphs are replayed on.

    Graphs may share memory only if they never run concurrently, and share it only if they are captured on one stream.
    """

    def __init__(self) -> None:
        self.by_place: dict[Hashable, _Side] = {}


_sides = _Sides()


class CudaCaptures:
    """Captures of one GPU. All graphs that a thread replays on one stream share one memory pool.

    Args:
        device: The GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def place(self) -> Hashable:
        return threading.get_ident(), torch.cuda.current_stream(self._device).cuda_stream

    def warm_up(self, call: Call, tensors: Sequence[Tensor]) -> _Outputs:
        before, side = torch.cuda.current_stream(self._device), self._side()
        side.stream.wait_stream(before)
        with torch.cuda.stream(side.stream):
            outputs = call(tensors)
        before.wait_stream(side.stream)
        for output in outputs:
            # A metric without inputs, such as a constant, may be on the CPU.
            if output.is_cuda:
                output.record_stream(before)
        return outputs

    def capture(self, call: Call, tensors: Sequence[Tensor]) -> tuple[Callable[[], object], _Outputs]:
        side, graph = self._side(), torch.cuda.CUDAGraph()
        # A pool ends with its last graph and must not be used afterwards, so another graph is held during the capture.
        other = next(iter(side.graphs), None)
        pool = None if other is None else other.pool()
        # The outer context restores the stream if the capture fails, which torch's own context does not. It also makes
        # the device current. Threads that save or read batches use the device meanwhile, which the mode allows.
        with (
            torch.cuda.stream(side.stream),
            torch.cuda.graph(graph, pool=pool, stream=side.stream, capture_error_mode="thread_local"),
        ):
            outputs = call(tensors)
        side.graphs.add(graph)
        return graph.replay, outputs

    def _side(self) -> _Side:
        place = self._device, self.place()
        if place not in _sides.by_place:
            _sides.by_place[place] = _Side(torch.cuda.Stream(self._device), weakref.WeakSet())
        return _sides.by_place[place]


def only_gpu(tensors: Sequence[Tensor]) -> torch.device | None:
    """Returns the CUDA device that all tensors are on. None if there is no such device."""
    devices = {tensor.device for tensor in tensors}
    return devices.pop() if len(devices) == 1 and tensors[0].is_cuda else None


def _flat(tensor: Tensor) -> Tensor:
    """Returns the memory from the first to the last element of a tensor, as a view of one dimension."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.as_strided((last + 1 if tensor.numel() else 0,), (1,))


def _reason(error: BaseException) -> str:
    """Returns the first line of the error that others followed from, such as that of the end of a broken capture."""
    causes: list[Any] = [error]
    while (before := causes[-1].__context__) is not None:
        causes.append(before)
    return next(iter(str(causes[-1]).strip().splitlines()), type(causes[-1]).__name__)
