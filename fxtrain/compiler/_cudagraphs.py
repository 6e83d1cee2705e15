"""Replay: a graph that writes its state in place, as one CUDA graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Call = Callable[[Sequence[Tensor]], Sequence[Tensor]]
Capture = Callable[[Callable[[], Any]], tuple[Callable[[], Any], Any]]


class Replay:
    """Calls ``call``, and from the second time on with the same memory replays what it had launched.

    A donated state stays where it is, so that its addresses can be part of what is replayed; inputs are copied to where
    they were, and outputs to memory of their own, as the next replay writes over them.

    Args:
        call: A function of a sequence of tensors, all on one GPU, that writes over the first of them.
        count: How many it writes over.
        capture: From a function to what replays it, and what it returned.
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
            # An ordinary call: it also loads kernels and makes handles, which may not happen during a capture.
            self._where, self._replay = where, None
            return self._call(tensors)
        if self._replay is None:
            self._inputs = [leaf.clone() for leaf in inputs]
            self._replay, self._outputs = self._capture(lambda: self._call([*state, *self._inputs]))
        for own, given in zip(self._inputs, inputs, strict=True):
            own.copy_(given, non_blocking=True)
        self._replay()
        return [output.clone() for output in self._outputs]


def _captured(function: Callable[[], Any]) -> tuple[Callable[[], Any], Any]:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = function()
    return graph.replay, outputs
