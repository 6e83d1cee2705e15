"""The compile modes, and that of shared libraries, ``ahead-of-time``.

A library from AOTInductor runs without Python between its kernels. It takes longer to build than Inductor's default
output and is faster for small steps.
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.fx import GraphModule

from fxtrain._torch_internals.inductor import compile_package, load_package
from fxtrain.compiler.artefacts._file import Entry
from fxtrain.compiler.artefacts._folder import extract
from fxtrain.compiler.lowering._cuda_graphs import Call
from fxtrain.compiler.lowering._stored import Compiled

AHEAD = "ahead-of-time"
MODES = (None, AHEAD, "reduce-overhead", "default", "lite", "max-autotune", "max-autotune-no-cudagraphs")
"""All modes: the one above, and those of ``torch.compile``."""
REPLAYED = ("reduce-overhead", "max-autotune")
"""The modes with CUDA graphs."""


def without_cuda_graphs(mode: str) -> str:
    """Returns the mode of ``torch.compile`` that differs only in that it captures no CUDA graphs.

    torch's own graphs return memory that the next call overwrites, whereas states and metrics outlive it.
    """
    return {"reduce-overhead": "default", "max-autotune": "max-autotune-no-cudagraphs"}.get(mode, mode)


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
