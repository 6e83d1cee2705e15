"""Ahead: a graph built by AOTInductor as a library, called without any Python between its kernels.

Building takes about twice as long as compiling does, and a small step half of its time afterwards. What was built is
kept with torch's other compiled code, so that another process loads it.
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
    """A function of a sequence of tensors.

    Args:
        graph: From ``make_fx``.
        examples: Tensors like those that it will be called with.
        options: For Inductor.
    """
    import torch._inductor as inductor
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    path = Path(cache_dir(), "fxtrain", f"{_key(graph, examples, options)}.pt2")
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name(f"{path.stem}.{os.getpid()}.pt2")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # about torch's own use of its pytrees
            exported = torch.export.export(graph, tuple(examples), strict=False)
            inductor.aoti_compile_and_package(exported, package_path=str(unfinished), inductor_configs=dict(options))
        os.replace(unfinished, path)
    run = inductor.aoti_load_package(str(path)).loader.boxed_run
    return lambda tensors: run(list(tensors))


def _key(graph: Any, examples: Sequence[Tensor], options: Mapping[str, Any]) -> str:
    """All that what is built depends on."""
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
