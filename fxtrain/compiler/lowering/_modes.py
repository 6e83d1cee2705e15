"""The compile modes ``ahead-of-time`` and ``reduce-overhead``: shared libraries and CUDA graphs.

A library from AOTInductor runs without Python between its kernels. It takes longer to build than Inductor's default
output and is faster for small steps. A CUDA graph replays a compiled graph that updates its state in place.
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from fxtrain._torch_internals.inductor import compile_package, load_package
from fxtrain.compiler.artefacts._file import Entry
from fxtrain.compiler.artefacts._folder import extract
from fxtrain.compiler.lowering._stored import Compiled
from fxtrain.core import Tree

AHEAD = "ahead-of-time"
REPLAYED = "reduce-overhead"
MODES = (None, AHEAD, REPLAYED, "default", "lite", "max-autotune", "max-autotune-no-cudagraphs")
"""All modes: those above, and those of ``torch.compile``."""

Call = Callable[[Sequence[Tensor]], Sequence[Tensor]]
Capture = Callable[[Callable[[], Any]], tuple[Callable[[], Any], Any]]


def compile_ahead(graph: GraphModule, examples: Sequence[Tensor], options: Mapping[str, object]) -> Compiled:
    """Compiles a graph into a library.

    Args:
        graph: A graph module from ``make_fx``.
        examples: Tensors with the shapes, strides, dtypes and devices of the inputs.
        options: Options for Inductor.

    Returns:
        A function from a sequence of tensors to a sequence of tensors, with its files.
    """
    with tempfile.TemporaryDirectory(prefix="fxtrain-") as folder, warnings.catch_warnings():
        # torch warns about its own use of pytrees.
        warnings.simplefilter("ignore", FutureWarning)
        exported = torch.export.export(graph, tuple(examples), strict=False)
        path = Path(folder, "step.pt2")
        compile_package(exported, str(path), options)
        files = {path.name: path.read_bytes()}
    return Compiled(load_ahead(Entry({}, files)), lambda: files, {})


def load_ahead(entry: Entry) -> Call:
    """Returns the function of a library."""
    (content,) = entry.files.values()
    run = load_package(str(extract(content, ".pt2")))
    return lambda tensors: run(list(tensors))


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
