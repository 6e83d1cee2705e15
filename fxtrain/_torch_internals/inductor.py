"""Inductor and AOTInductor, which compile graphs."""

from __future__ import annotations

import contextlib
import getpass
import importlib.util
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from fxtrain._torch_internals.dead_values import dead_values_skipped
from fxtrain._torch_internals.decomposed import compile_decomposed
from fxtrain._torch_internals.dtype_rules import dtype_rules_kept
from fxtrain._torch_internals.empty_tails import empty_tails_skipped
from fxtrain._torch_internals.interface import Feature, Interface
from fxtrain._torch_internals.kernels import linked_at_the_end as linked_at_the_end
from fxtrain._torch_internals.kernels import shared_libraries
from fxtrain._torch_internals.vector_instructions import widest_sought

COMPILE = Interface("torch._inductor.compile", "compiling a traced step", Feature.INDUCTOR)
MODE_OPTIONS = Interface("torch._inductor.list_mode_options", "compile modes", Feature.INDUCTOR)
CONFIG = Interface("torch._inductor.config", "compiling a traced step", Feature.INDUCTOR)
OUTPUT = Interface("torch._inductor.output_code.CompiledFxGraph", "calls with low dispatch overhead", Feature.INDUCTOR)
LOWERING = Interface("torch._inductor.lowering.register_lowering", "operators of fxtrain", Feature.INDUCTOR)
POINTWISE = Interface("torch._inductor.lowering.make_pointwise", "operators of fxtrain", Feature.INDUCTOR)
LOOP = Interface("torch._inductor.ir.Pointwise", "operators of fxtrain", Feature.INDUCTOR)
STRIDED_BUFFER = Interface(
    "torch._inductor.ir.ExternKernel.require_exact_strides", "operators of fxtrain", Feature.INDUCTOR
)
BUFFER = Interface("torch._inductor.ir.ExternKernel.require_contiguous", "operators of fxtrain", Feature.INDUCTOR)
LOOP_OPERATORS = Interface("torch._inductor.virtualized.ops", "operators of fxtrain", Feature.INDUCTOR)
KERNELS = Interface("torch._inductor.metrics.generated_kernel_count", "the number of kernels in fx.explain")
PACKAGE = Interface("torch._inductor.aoti_compile_and_package", "compilation ahead of time", Feature.AHEAD)
LOAD = Interface("torch._inductor.aoti_load_package", "compilation ahead of time", Feature.AHEAD)
CACHE = Interface("torch._inductor.runtime.cache_dir_utils.cache_dir", "compilation ahead of time", Feature.AHEAD)
SETTINGS = Interface("torch._inductor.config._config", "compiled graphs as files")
UNSET = Interface("torch.utils._config_module._UNSET_SENTINEL", "compiled graphs as files")
EXTERN = Interface("torch._inductor.select_algorithm.extern_kernels", "compiled graphs as files")
DATA_POINTER = Interface("torch._C._dynamo.guards._torchinductor_pyobject_tensor_data_ptr", "compiled graphs as files")

# Settings that do not change generated code, or that name files and processes.
_WITHOUT_EFFECT = (
    "aot_inductor.metadata",  # a result of compilation
    *("trace", "compile_threads", "worker", "quiesce", "fx_graph_", "force_disable_caches", "bundle", "autotune_local"),
    *("autotune_remote", "use_static", "cpp_cache", "verbose", "save_args", "kernel_name", "warn", "developer"),
)

MODULE = "torch._inductor"
"""The package whose modules generated code imports."""

_POINTER_VARIABLE = "_TORCHINDUCTOR_PYOBJECT_TENSOR_DATA_PTR"
_FOLDER_VARIABLE = "TORCHINDUCTOR_CACHE_DIR"
_CACHE_VARIABLES = ("TORCHINDUCTOR_FX_GRAPH_CACHE", "TORCHINDUCTOR_FORCE_DISABLE_CACHES", "TORCH_COMPILE_FORCE")


def compile_graph(graph: torch.fx.GraphModule, examples: Sequence[torch.Tensor], options: Mapping[str, object]) -> Any:
    """Compiles a graph. Returns a function of its inputs.

    Args:
        graph: A graph of operators, from ``make_fx``.
        examples: Fake tensors, one for each input.
        options: Settings of Inductor by name.
    """
    with shared_libraries(), _less_work():
        with CONFIG.get().patch(dict(options)):
            compiled = compile_decomposed(graph, examples, CONFIG.get())
        return COMPILE.get()(graph, examples, options=dict(options)) if compiled is None else compiled


@contextlib.contextmanager
def _less_work() -> Iterator[None]:
    """A context in which Inductor leaves out work that does not change its code."""
    with dead_values_skipped(), empty_tails_skipped(), dtype_rules_kept():
        yield


def instructions_sought(examples: Iterable[torch.Tensor]) -> contextlib.AbstractContextManager[None]:
    """A context for imports of Inductor and a compilation, in which another thread looks for vector instructions.

    Args:
        examples: The inputs of the graph. It may have kernels for this processor if one of them is on it.
    """
    is_on_cpu = any(example.device.type == "cpu" for example in examples)
    return widest_sought() if is_on_cpu else contextlib.nullcontext()


def mode_options(mode: str) -> dict[str, Any]:
    """Returns the settings of Inductor that a mode of ``torch.compile`` stands for."""
    return dict(MODE_OPTIONS.get()(mode))


def has_option(name: str) -> bool:
    """Whether Inductor has a setting."""
    return hasattr(CONFIG.get(), name)


def compiled_graph_class() -> type[Any]:
    """Returns the class of compiled graphs, with ``current_callable`` and ``output_strides``."""
    return OUTPUT.get()


def is_lowering_loaded() -> bool:
    """Whether the part of Inductor that compiles operators has been imported, which takes a second."""
    return "torch._inductor.lowering" in sys.modules


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


def contiguous_buffer(x: Any) -> Any:
    """Returns a lowering of ``x`` in contiguous memory, which is that of ``x`` if possible."""
    x.realize()
    return BUFFER.get()(x)


def strided_buffer(x: Any, strides: Sequence[int]) -> Any:
    """Returns a lowering of ``x`` in memory with these strides, which is that of ``x`` if possible."""
    x.realize()
    return STRIDED_BUFFER.get()(x, strides)


def loop_operators() -> Any:
    """Returns the operators on single elements that Inductor's loops consist of."""
    return LOOP_OPERATORS.get()


def is_loaded() -> bool:
    """Whether Inductor has been imported, which takes a second. It has its default settings before."""
    return CONFIG.path in sys.modules


def kernel_count() -> int | None:
    """Returns how many kernels Inductor has generated in this process. None where torch does not count them."""
    if not KERNELS.exists:
        return None
    from torch._inductor import metrics

    return metrics.generated_kernel_count


def count_kernels(count: int) -> None:
    """Adds kernels that were loaded from a file to those that Inductor has generated in this process.

    Before Inductor is imported, nothing is compared with their number.
    """
    if is_loaded() and KERNELS.exists:
        from torch._inductor import metrics

        metrics.generated_kernel_count += count


def changed_settings() -> dict[str, str] | None:
    """Returns Inductor's settings that differ from their defaults and change code, as text.

    None if torch does not tell, or if a setting is an object whose text would not identify it, such as a pass.
    """
    if not is_loaded():
        return {}
    if not (SETTINGS.exists and UNSET.exists):
        return None
    config, values = CONFIG.get(), dict[str, str]()
    for name, entry in sorted(SETTINGS.get().items()):
        if not name.startswith(_WITHOUT_EFFECT) and not (entry.alias or entry.hide):
            # Compared with the default, because Inductor leaves overrides with the value of the default behind.
            value, default = getattr(config, name), _default(entry)
            if value is not default and value != default:
                values[name] = repr(value)
    return None if any(" at 0x" in value for value in values.values()) else values


def _default(setting: Any) -> object:
    """Returns the value of a setting that the user has not changed. Environment variables come before the code."""
    unset = UNSET.get()
    values = (setting.env_value_force, setting.env_value_default)
    return next((value for value in values if value is not unset), setting.default)


def are_files_allowed() -> bool:
    """Whether the user has left torch's cache of compiled code on."""
    if not is_loaded() and not any(name.startswith(_CACHE_VARIABLES) for name in os.environ):
        # The only setting of caches that other modules of torch can change.
        return not getattr(sys.modules.get("torch.compiler.config"), "force_disable_caches", False)
    config = CONFIG.get()
    return not getattr(config, "force_disable_caches", False) and getattr(config, "fx_graph_cache", True)


def extern_functions() -> dict[str, Any]:
    """Returns the functions that generated code calls by name."""
    return vars(EXTERN.get()) if EXTERN.exists else {}


def load_kernels(path: Path, name: str) -> Any:
    """Returns the module in the library of C++ kernels.

    Raises:
        ImportError: The library cannot be loaded.
    """
    os.environ[_POINTER_VARIABLE] = str(DATA_POINTER.get())
    specification: Any = importlib.util.spec_from_file_location(f"{path.stem}.{name}", path)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def compile_package(program: torch.export.ExportedProgram, path: str, options: Mapping[str, object]) -> None:
    """Compiles an exported program ahead of time into a file."""
    PACKAGE.get()(program, package_path=path, inductor_configs=dict(options))


def load_package(path: str) -> Callable[[list[torch.Tensor]], Sequence[torch.Tensor]]:
    """Returns the function in a file from ``compile_package``. It clears the list of inputs that it is called with."""
    return LOAD.get()(path).loader.boxed_run


def cache_folder() -> str:
    """Returns the folder of torch's compiled code."""
    if is_loaded():
        return CACHE.get()()
    try:
        user = getpass.getuser()
    except (KeyError, ImportError, OSError):  # as in a container, whose user may have no name
        user = f"uid_{os.getuid()}" if hasattr(os, "getuid") else "unknown_user"
    default = os.path.join(tempfile.gettempdir(), "torchinductor_" + re.sub(r'[\\/:*?"<>|]', "_", user))
    return os.path.abspath(os.environ.get(_FOLDER_VARIABLE, default))
