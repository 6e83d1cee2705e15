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
from typing import Any

import torch
from torch import Tensor


def compile_ahead(
    graph: Any, examples: Sequence[Tensor], options: Mapping[str, Any]
) -> Callable[[Sequence[Tensor]], Sequence[Tensor]]:
    """Compiles a graph into a library, or loads the library from the cache.

    Args:
        graph: A graph module from ``make_fx``.
        examples: Tensors with the shapes, strides, dtypes and devices of the inputs.
        options: Options for Inductor.

    Returns:
        A function from a sequence of tensors to a sequence of tensors.
    """
    import torch._inductor as inductor
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    path = Path(cache_dir(), "fxtrain", f"{_key(graph, examples, options)}.pt2")
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name(f"{path.stem}.{os.getpid()}.pt2")
        with warnings.catch_warnings():
            # torch warns about its own use of pytrees.
            warnings.simplefilter("ignore", FutureWarning)
            exported = torch.export.export(graph, tuple(examples), strict=False)
            inductor.aoti_compile_and_package(exported, package_path=str(unfinished), inductor_configs=dict(options))
        os.replace(unfinished, path)
    run = inductor.aoti_load_package(str(path)).loader.boxed_run
    return lambda tensors: run(list(tensors))


def _key(graph: Any, examples: Sequence[Tensor], options: Mapping[str, Any]) -> str:
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
        digest.update(constant.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:32]
