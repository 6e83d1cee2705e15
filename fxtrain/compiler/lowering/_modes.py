"""The compile modes ``ahead-of-time`` and ``reduce-overhead``: shared libraries and CUDA graphs.

A library from AOTInductor runs without Python between its kernels. It takes longer to build than Inductor's default
output and is faster for small steps. Libraries are cached next to torch's other compiled code, so later processes load
them. A CUDA graph replays a compiled graph that updates its state in place.
"""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from fxtrain._torch_internals.inductor import cache_folder, compile_package, load_package
from fxtrain.compiler.lowering._executable import kinds
from fxtrain.core import Tree

AHEAD = "ahead-of-time"
REPLAYED = "reduce-overhead"
MODES = (None, AHEAD, REPLAYED, "default", "lite", "max-autotune", "max-autotune-no-cudagraphs")
"""All modes: those above, and those of ``torch.compile``."""

Call = Callable[[Sequence[Tensor]], Sequence[Tensor]]
Capture = Callable[[Callable[[], Any]], tuple[Callable[[], Any], Any]]


def compile_ahead(graph: GraphModule, examples: Sequence[Tensor], options: Mapping[str, object]) -> Call:
    """Compiles a graph into a library, or loads the library from the cache.

    Args:
        graph: A graph module from ``make_fx``.
        examples: Tensors with the shapes, strides, dtypes and devices of the inputs.
        options: Options for Inductor.

    Returns:
        A function from a sequence of tensors to a sequence of tensors.
    """
    path = Path(cache_folder(), "fxtrain", f"{_key(graph, examples, options)}.pt2")
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name(f"{path.stem}.{os.getpid()}.pt2")
        with warnings.catch_warnings():
            # torch warns about its own use of pytrees.
            warnings.simplefilter("ignore", FutureWarning)
            exported = torch.export.export(graph, tuple(examples), strict=False)
            compile_package(exported, str(unfinished), options)
        os.replace(unfinished, path)
    run = load_package(str(path))
    return lambda tensors: run(list(tensors))


def _key(graph: GraphModule, examples: Sequence[Tensor], options: Mapping[str, object]) -> str:
    """Hashes everything that the compiled library depends on."""
    devices = sorted({str(leaf.device) for leaf in examples})
    parts = [
        torch.__version__,
        torch.get_num_threads(),
        torch.backends.cpu.get_cpu_capability(),
        [torch.cuda.get_device_properties(device).name for device in devices if device.startswith("cuda")],
        torch.are_deterministic_algorithms_enabled(),
        sorted(options.items()),
        graph.code,
        kinds(examples),
    ]
    digest = hashlib.sha256(repr(parts).encode())
    for name, constant in graph.named_buffers():
        digest.update(f"{name} {constant.dtype} {list(constant.shape)}".encode())
        digest.update(constant.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:32]


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
