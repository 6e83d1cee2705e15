"""Ahead-of-time compilation of a graph into a shared library by AOTInductor.

The library runs without Python between its kernels. It takes longer to build than Inductor's default output and is
faster for small steps. Libraries are cached next to torch's other compiled code, so later processes load them.
"""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.fx import GraphModule

from fxtrain._torch_internals.inductor import cache_folder, compile_package, load_package


def compile_ahead(
    graph: GraphModule, examples: Sequence[Tensor], options: Mapping[str, object]
) -> Callable[[Sequence[Tensor]], Sequence[Tensor]]:
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
        [(leaf.shape, leaf.stride(), leaf.dtype, leaf.device) for leaf in examples],
    ]
    digest = hashlib.sha256(repr(parts).encode())
    for name, constant in graph.named_buffers():
        digest.update(f"{name} {constant.dtype} {list(constant.shape)}".encode())
        digest.update(constant.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:32]
