"""Replays a compiled graph that updates its state in place as a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fxtrain.core import Tree

Call = Callable[[Sequence[Tensor]], Sequence[Tensor]]
Capture = Callable[[Callable[[], Any]], tuple[Callable[[], Any], Any]]


class CudaGraphReplay:
    """Calls a function, and replays it as a CUDA graph while the state stays at the same addresses.

    The first call with new addresses runs the function, the second one captures it. A donated state is updated in
    place, so its addresses can be part of the capture. Inputs are copied into static buffers. Outputs are cloned,
    because the next replay overwrites them.

    Args:
        call: A function of a sequence of tensors, all on one GPU. It updates the state, its first ``count`` tensors, in
            place.
        count: The number of tensors in the state.
        capture: From a function to a function that replays it, and the captured outputs. By default captures a CUDA
            graph.
    """

    def __init__(self, call: Call, count: int, capture: Capture | None = None) -> None:
        self._call, self._count, self._capture = call, count, capture or _captured
        self._where: list[int] = []
        self._replay: Callable[[], Any] | None = None
        self._inputs: list[Tensor] = []
        self._outputs: Sequence[Tensor] = ()

    def __call__(self, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        state, inputs = tensors[: self._count], tensors[self._count :]
        where = [leaf.data_ptr() for leaf in state]
        if where != self._where:
            # An ordinary call, because it may load kernels and create handles, which a capture does not allow.
            self._where, self._replay = where, None
            return self._call(tensors)
        if self._replay is None:
            self._inputs = [leaf.clone() for leaf in inputs]
            self._replay, self._outputs = self._capture(lambda: self._call([*state, *self._inputs]))
        for own, given in zip(self._inputs, inputs, strict=True):
            own.copy_(given, non_blocking=True)
        self._replay()
        return [output.clone() for output in self._outputs]


def _captured(function: Callable[[], Tree]) -> tuple[Callable[[], object], Tree]:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = function()
    return graph.replay, outputs
