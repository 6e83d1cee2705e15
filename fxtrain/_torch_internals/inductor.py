"""Inductor and AOTInductor, which compile graphs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from fxtrain._torch_internals.interface import Feature, Interface

COMPILE = Interface("torch._inductor.compile", "compiling a traced step", Feature.INDUCTOR)
MODE_OPTIONS = Interface("torch._inductor.list_mode_options", "compile modes", Feature.INDUCTOR)
CONFIG = Interface("torch._inductor.config", "compiling a traced step", Feature.INDUCTOR)
OUTPUT = Interface("torch._inductor.output_code.CompiledFxGraph", "calls with low dispatch overhead", Feature.INDUCTOR)
LOWERING = Interface("torch._inductor.lowering.register_lowering", "operators of fxtrain", Feature.INDUCTOR)
POINTWISE = Interface("torch._inductor.lowering.make_pointwise", "operators of fxtrain", Feature.INDUCTOR)
LOOP = Interface("torch._inductor.ir.Pointwise", "operators of fxtrain", Feature.INDUCTOR)
LOOP_OPERATORS = Interface("torch._inductor.virtualized.ops", "operators of fxtrain", Feature.INDUCTOR)
KERNELS = Interface("torch._inductor.metrics.generated_kernel_count", "the number of kernels in fx.explain")
PACKAGE = Interface("torch._inductor.aoti_compile_and_package", "compilation ahead of time", Feature.AHEAD)
LOAD = Interface("torch._inductor.aoti_load_package", "compilation ahead of time", Feature.AHEAD)
CACHE = Interface("torch._inductor.runtime.cache_dir_utils.cache_dir", "compilation ahead of time", Feature.AHEAD)


def compile_graph(graph: torch.fx.GraphModule, examples: Sequence[object], options: Mapping[str, object]) -> Any:
    """Compiles a graph. Returns a function of its inputs.

    Args:
        graph: A graph of operators, from ``make_fx``.
        examples: Fake tensors, one for each input.
        options: Settings of Inductor by name.
    """
    return COMPILE.get()(graph, examples, options=dict(options))


def mode_options(mode: str) -> dict[str, Any]:
    """Returns the settings of Inductor that a mode of ``torch.compile`` stands for."""
    return dict(MODE_OPTIONS.get()(mode))


def has_option(name: str) -> bool:
    """Whether Inductor has a setting."""
    return hasattr(CONFIG.get(), name)


def compiled_graph_class() -> type[Any]:
    """Returns the class of compiled graphs, with ``current_callable`` and ``output_strides``."""
    return OUTPUT.get()


def register_lowering(operator: object, lowering: Callable[..., object]) -> None:
    """Registers how an operator is compiled: a function of Inductor's tensors, in the dtypes that it is called with."""
    LOWERING.get()(operator, type_promotion_kind=None)(lowering)


def pointwise(function: Callable[..., object]) -> Callable[..., Any]:
    """Returns a lowering that applies ``function``, written in ``loop_operators``, to each element."""
    return POINTWISE.get()(function)


def ordered_loop(x: Any, token: Any) -> Any:
    """Returns a lowering of ``x`` in a loop that also depends on ``token``: a buffer of any size but 0."""
    x.realize()
    token.realize()
    load, load_token = x.make_loader(), token.make_loader()
    start = [0] * len(token.get_size())

    def inner(index: Any) -> Any:
        load_token(start)
        return load(index)

    return LOOP.get().create(device=x.get_device(), dtype=x.get_dtype(), inner_fn=inner, ranges=x.get_size())


def loop_operators() -> Any:
    """Returns the operators on single elements that Inductor's loops consist of."""
    return LOOP_OPERATORS.get()


def kernel_count() -> int | None:
    """Returns how many kernels Inductor has generated in this process. None where torch does not count them."""
    if not KERNELS.exists:
        return None
    from torch._inductor import metrics

    return metrics.generated_kernel_count


def compile_package(program: torch.export.ExportedProgram, path: str, options: Mapping[str, object]) -> None:
    """Compiles an exported program ahead of time into a file."""
    PACKAGE.get()(program, package_path=path, inductor_configs=dict(options))


def load_package(path: str) -> Callable[[list[torch.Tensor]], Sequence[torch.Tensor]]:
    """Returns the function in a file from ``compile_package``. It clears the list of inputs that it is called with."""
    return LOAD.get()(path).loader.boxed_run


def cache_folder() -> str:
    """Returns the folder of torch's compiled code."""
    return CACHE.get()()
