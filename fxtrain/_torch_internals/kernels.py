"""One C++ library for the kernels of a compiled graph.

Inductor compiles each kernel as a library of its own. Most of that time goes into reading headers and linking, so that
the kernels of a small transformer take ten times as long as in one library. Within ``shared_libraries()``, the kernels
of a graph are compiled together, by the same flags. Each is in a namespace of its own. Long code is split into several
libraries. Each is compiled as soon as its kernels are generated, while Inductor generates the next ones.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import logging
import re
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

from fxtrain._torch_internals.interface import Interface
from fxtrain._torch_internals.replaced_methods import ReplacedMethods

COMPILER = Interface("torch._inductor.async_compile.AsyncCompile", "one library for all kernels of a graph")
THREADS = Interface("torch._inductor.async_compile.get_compile_threads", "one library for all kernels of a graph")
LIBRARIES = Interface("torch._inductor.codecache.CppPythonBindingsCodeCache", "one library for all kernels of a graph")
WRAPPER = Interface(
    "torch._inductor.codegen.wrapper.PythonWrapperCodegen", "compiling kernels while others are generated"
)

R = TypeVar("R")

_log = logging.getLogger(__name__)

_CHARACTERS = 80_000
"""Source per library, if there are several threads. It compiles in two seconds, of which a quarter are headers."""

_ENTRY = re.compile(r'^extern "C"\s+void\s+kernel\(', re.MULTILINE)
_DIRECTIVE = re.compile(r"^[ \t]*#[ \t]*(?!pragma\b|include\b)", re.MULTILINE)
_INCLUDE = re.compile(r"^#include .*\n", re.MULTILINE)
_DEFINITION = "async_compile.cpp_pybinding("

_BINDINGS = """
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <cstdlib>
#include <stdexcept>
#include <type_traits>

static void* (*data_pointer)(PyObject*);

template <typename T> static inline T argument(PyObject* value) {
    if constexpr (std::is_pointer_v<T>) {
        return static_cast<T>(data_pointer(value));
    } else {
        T result;
        if constexpr (std::is_floating_point_v<T>) {
            result = static_cast<T>(PyFloat_AsDouble(value));
        } else if constexpr (std::is_unsigned_v<T>) {
            result = static_cast<T>(PyLong_AsUnsignedLongLong(value));
        } else {
            result = static_cast<T>(PyLong_AsLongLong(value));
        }
        if (PyErr_Occurred()) [[unlikely]] throw std::runtime_error("expected a number as an argument of a kernel");
        return result;
    }
}

template <typename F> static PyObject* guarded(Py_ssize_t found, Py_ssize_t expected, F call) {
    if (found != expected) {
        PyErr_Format(PyExc_TypeError, "expected %zd arguments of a kernel, got %zd.", expected, found);
        return nullptr;
    }
    try {
        call();
    } catch (std::exception const& error) {
        PyErr_SetString(PyExc_RuntimeError, error.what());
        return nullptr;
    }
    Py_RETURN_NONE;
}
"""
_BINDING = """
static PyObject* call_{name}(PyObject*, PyObject* const* args, Py_ssize_t count) {{
    return guarded(count, {count}, [&] {{ {name}::kernel({arguments}); }});
}}
"""
_METHOD = '    {{"{name}", (PyCFunction)(void (*)(void))call_{name}, METH_FASTCALL, nullptr}},\n'
_MODULE = """
static PyMethodDef methods[] = {{
{methods}    {{nullptr, nullptr, 0, nullptr}},
}};

static PyModuleDef definition = {{PyModuleDef_HEAD_INIT, "kernels", nullptr, -1, methods}};

PyMODINIT_FUNC PyInit_kernels(void) {{
    char const* address = std::getenv("_TORCHINDUCTOR_PYOBJECT_TENSOR_DATA_PTR");
    if (address == nullptr) {{
        PyErr_SetString(PyExc_RuntimeError, "_TORCHINDUCTOR_PYOBJECT_TENSOR_DATA_PTR must be set");
        return nullptr;
    }}
    data_pointer = reinterpret_cast<decltype(data_pointer)>(std::strtoull(address, nullptr, 10));
    return PyModule_Create(&definition);
}}
"""


class Kernel(NamedTuple):
    """A kernel that is not compiled yet.

    Args:
        types: The C++ types of its arguments, such as ``const float*``.
        source: Code with one function ``kernel``.
    """

    types: Sequence[str]
    source: str

    @property
    def is_alone(self) -> bool:
        """Whether its code may not stand beside other code in one file."""
        return len(_ENTRY.findall(self.source)) != 1 or _DIRECTIVE.search(self.source) is not None


@contextlib.contextmanager
def shared_libraries() -> Generator[None]:
    """A context in which Inductor compiles the kernels of each graph together, in this thread.

    Without the interfaces that this needs, Inductor compiles each kernel alone, as outside of this context.
    """
    outer, _current.early = _current.early, _Early()
    try:
        with _METHODS.active(), _GENERATORS.active():
            yield
    finally:
        _current.early = outer


@contextlib.contextmanager
def linked_at_the_end() -> Generator[None]:
    """A context in which this thread generates the code of further graphs while kernels are compiled.

    The kernels are ready when the context ends. No graph may be called before.
    """
    outer, _current.unfinished = _current.unfinished, []
    try:
        yield
        for finish in _current.unfinished:
            finish()
    finally:
        _current.unfinished = outer


class _Early:
    """The libraries of a graph that are compiled before all of its kernels are generated."""

    def __init__(self) -> None:
        self._group = list[Kernel]()
        self.pending: dict[str, Callable[[], Any]] = {}

    def add(self, kernel: Kernel) -> None:
        """Adds the next kernel, and starts the compilation of a library if its code is complete."""
        self._group.append(kernel)
        if THREADS.get()() > 1 and _is_complete(self._group):
            source = library_source(self._group)
            self._group = []
            self.pending[source] = _libraries().load_async(source, submit_fn=COMPILER.get().submit)


class _Current(threading.local):
    """What this thread compiles early, and the graphs whose kernels are linked later. None outside of the contexts."""

    early: _Early | None = None
    unfinished: list[Callable[[], None]] | None = None


_current = _Current()


def _announcing(define: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(define)
    def define_kernel(self: Any, kernel_name: str, kernel_body: str, *args: Any, **kwargs: Any) -> None:
        define(self, kernel_name, kernel_body, *args, **kwargs)
        if _GENERATORS.are_active and _current.early is not None:
            kernel = _parsed(kernel_body)
            if kernel is not None and not kernel.is_alone:
                _current.early.add(kernel)

    return define_kernel


def _parsed(definition: str) -> Kernel | None:
    """Returns the kernel of a definition in generated code, or None for one that is not compiled by C++."""
    if not definition.startswith(_DEFINITION):
        return None
    call: Any = ast.parse(definition, mode="eval").body
    return Kernel(*map(ast.literal_eval, call.args))


def _collecting(compile_alone: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(compile_alone)
    def cpp_pybinding(self: Any, argtypes: Sequence[str], source_code: str) -> Any:
        kernel = Kernel(argtypes, source_code)
        if not _METHODS.are_active or kernel.is_alone:
            return compile_alone(self, argtypes, source_code)
        return kernel

    return cpp_pybinding


def _building(wait: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(wait)
    def wait_for_all(self: Any, scope: dict[str, Any]) -> None:
        kernels = {name: value for name, value in scope.items() if isinstance(value, Kernel)}
        if not kernels:
            wait(self, scope)
            return
        build = _unless_it_fails(begin_build, list(kernels.values()), self.submit)

        def finish() -> None:
            functions = None if build is None else _unless_it_fails(build)
            if functions is None:
                compile_alone = type(self).cpp_pybinding.__wrapped__
                functions = [compile_alone(self, *kernel) for kernel in kernels.values()]
            scope.update(zip(kernels, functions, strict=True))
            wait(self, scope)

        if _current.unfinished is None:
            finish()
        else:
            _current.unfinished.append(finish)

    return wait_for_all


def _unless_it_fails(function: Callable[..., R], *args: Any) -> R | None:
    try:
        return function(*args)
    except Exception as error:
        _log.debug("Kernels cannot be compiled together.", exc_info=error)
        return None


_METHODS = ReplacedMethods(COMPILER, {"cpp_pybinding": _collecting, "wait": _building}, THREADS, LIBRARIES)
_GENERATORS = ReplacedMethods(WRAPPER, {"define_kernel": _announcing}, COMPILER, THREADS, LIBRARIES)


def begin_build(
    kernels: Sequence[Kernel], submit: Callable[..., Any] | None = None
) -> Callable[[], list[Callable[..., None]]]:
    """Begins to compile kernels, if there are several threads.

    Args:
        kernels: The kernels, each of which ``is_alone`` is false for.
        submit: Runs a function in another thread, and returns its future. None for this thread.

    Returns:
        A function that waits for the kernels and returns them as functions of tensors and numbers, in the same order.
    """
    threads = THREADS.get()()
    groups = list(_groups(kernels, threads))
    started = {} if _current.early is None else _current.early.pending
    pending = list[Callable[[], Any]]()
    for source in map(library_source, groups):
        submit_fn = submit if threads > 1 else None
        pending.append(started.pop(source, None) or _libraries().load_async(source, submit_fn=submit_fn))
    return lambda: [
        getattr(library(), _name(place))
        for group, library in zip(groups, pending, strict=True)
        for place in range(len(group))
    ]


def library_source(kernels: Sequence[Kernel]) -> str:
    """Returns the code of a Python module with one function for each kernel."""
    includes = dict.fromkeys(line for kernel in kernels for line in _INCLUDE.findall(kernel.source))
    parts, methods = [*includes], list[str]()
    for place, kernel in enumerate(kernels):
        name = _name(place)
        code = _ENTRY.sub("static void kernel(", _INCLUDE.sub("", kernel.source))
        parts.append(f"namespace {name} {{\n{code.strip()}\n}}\n")
        methods.append(_METHOD.format(name=name))
    parts.append(_BINDINGS)
    for place, kernel in enumerate(kernels):
        types = (kind.replace("const ", "") for kind in kernel.types)
        arguments = ", ".join(f"argument<{kind}>(args[{index}])" for index, kind in enumerate(types))
        parts.append(_BINDING.format(name=_name(place), count=len(kernel.types), arguments=arguments))
    return "".join([*parts, _MODULE.format(methods="".join(methods))])


def _groups(kernels: Sequence[Kernel], threads: int) -> Iterator[list[Kernel]]:
    """Splits kernels into groups, one per library. More kernels add to the last group and follow it."""
    group = list[Kernel]()
    for kernel in kernels:
        group.append(kernel)
        if threads > 1 and _is_complete(group):
            yield group
            group = []
    if group:
        yield group


def _is_complete(group: Sequence[Kernel]) -> bool:
    return sum(len(kernel.source) for kernel in group) >= _CHARACTERS


def _name(place: int) -> str:
    return f"kernel_{place}"


@functools.cache
def _libraries() -> Any:
    """Returns Inductor's cache of libraries of several functions."""

    class KernelLibraries(LIBRARIES.get()):
        """Python modules with several kernels, by the hash of their code."""

        cache: dict[str, Callable[[], Any]] = {}  # noqa: RUF012
        entry_function = "kernels"

    return KernelLibraries
