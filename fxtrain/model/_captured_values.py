"""Finds the values that a function reads from closures, globals and defaults."""

from __future__ import annotations

import collections
import dis
import functools
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import Tensor, nn

from fxtrain.core._tracebacks import FXTRAIN_FOLDER, is_of_users

# Maximum depth of the calls that are followed.
_MAX_DEPTH = 3


def captured_values(function: Callable[..., object]) -> Iterator[tuple[str, Any]]:
    """Yields the values that a function reads besides its arguments, with their names.

    User-defined functions that it calls are searched too. Python modules, classes, functions, and attributes looked up
    at run time are left out.

    Example:
        >>> scale = 2.0
        >>> def loss_fn(model, batch):
        ...     return model(batch).mean() * scale
        >>> list(captured_values(loss_fn))
        [('scale', 2.0)]
    """
    for owner, name, value in values_read(function):
        if not _is_of_fxtrain(owner) and not isinstance(value, type | types.ModuleType | types.BuiltinFunctionType):
            yield name, value


def captured_tensors(function: Callable[..., object]) -> Iterator[tuple[str, Tensor]]:
    """Yields the tensors that a function captures, with their names. Modules and containers are searched."""
    seen: set[int] = set()
    todo = list(captured_values(function))[::-1]
    while todo and len(seen) < _MAX_SEARCHED_VALUES:
        name, part = todo.pop()
        if id(part) in seen:
            continue
        seen.add(id(part))
        if isinstance(part, Tensor):
            yield name, part
        elif isinstance(part, nn.Module):
            yield from ((f"{name}.{key}", value) for key, value in (*part.named_parameters(), *part.named_buffers()))
        else:
            todo += _parts(name, part)


def _parts(name: str, part: object) -> list[tuple[str, object]]:
    """Returns the elements of a container, or the attributes of a user-defined object, with their names."""
    if isinstance(part, dict):
        return [(f"{name}[{key!r}]", value) for key, value in part.items()]
    if isinstance(part, list | tuple | set | frozenset | collections.deque):
        return [(f"{name}[{index}]", value) for index, value in enumerate(part)]
    if isinstance(part, type | types.ModuleType | types.FunctionType) or _is_of_fxtrain(part):
        return []
    return [(f"{name}.{key}", value) for key, value in getattr(part, "__dict__", {}).items()]


# Maximum number of values that are searched for tensors.
_MAX_SEARCHED_VALUES = 4096


def captured_clocks(
    function: Callable[..., object], watched: Sequence[object]
) -> Iterator[tuple[dict[str, Any], str, Any]]:
    """Yields the clocks that a function reads through a global name, as (namespace, name, clock).

    Args:
        function: A user-defined function.
        watched: The callables that count as clocks.

    Example:
        >>> from time import perf_counter
        >>> [clock is perf_counter for _, _, clock in captured_clocks(lambda: perf_counter(), [perf_counter])]
        [True]
    """
    for owner, name, value in values_read(function):
        is_clock = any(value is clock for clock in watched)
        if is_clock and isinstance(owner, types.FunctionType) and owner.__globals__.get(name) is value:
            yield owner.__globals__, name, value


def values_read(function: Callable[..., object]) -> Iterator[tuple[object, str, Any]]:
    """Yields what a function and those that it calls read, as (reader, name, value).

    Example:
        >>> scale = 2.0
        >>> [(name, value) for _, name, value in values_read(lambda model, batch: model(batch) * scale)]
        [('scale', 2.0)]
    """
    seen: set[int] = set()
    todo: list[tuple[Any, int]] = [(function, 0)]
    while todo:
        part, depth = todo.pop()
        if id(part) in seen or depth > _MAX_DEPTH:
            continue
        seen.add(id(part))
        for name, value in _read(part):
            if _is_code(value) or (_is_of_fxtrain(value) and callable(value)):
                todo.append((value, depth if _is_of_fxtrain(part) else depth + 1))
            else:
                yield part, name, value


def variables_read(function: types.FunctionType) -> Iterator[tuple[str, Any]]:
    """Yields the variables of outer functions that a function reads, and its defaults, with their names.

    Example:
        >>> def scaled(scale):
        ...     return lambda x, shift=1: x * scale + shift
        >>> list(variables_read(scaled(2)))
        [('scale', 2), ('shift', 1)]
    """
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        if cell != types.CellType():
            yield name, cell.cell_contents
    names = function.__code__.co_varnames[: function.__code__.co_argcount]
    yield from zip(reversed(names), reversed(function.__defaults__ or ()), strict=False)
    yield from (function.__kwdefaults__ or {}).items()


def globals_read(function: types.FunctionType) -> Iterator[tuple[str, Any]]:
    """Yields the global variables that a function reads, with their names.

    Example:
        >>> scale = 2.0
        >>> list(globals_read(lambda x: x * scale))
        [('scale', 2.0)]
    """
    for name in dict.fromkeys(_global_names(function.__code__)):
        if name in function.__globals__:
            yield name, function.__globals__[name]


def _is_of_fxtrain(part: object) -> bool:
    """Whether this is code of fxtrain, such as a step around a loss function."""
    if isinstance(part, types.FunctionType):
        return part.__code__.co_filename.startswith(FXTRAIN_FOLDER)
    return type(part).__module__.startswith("fxtrain.")


def _read(part: object) -> Iterator[tuple[str, Any]]:
    if isinstance(part, functools.partial):
        yield "", part.func
        for index, value in enumerate(part.args):
            yield f"argument {index}", value
        yield from part.keywords.items()
    elif isinstance(part, types.MethodType):
        yield "", part.__func__
        if not isinstance(part.__self__, nn.Module | type):
            yield from ((f"self.{name}", value) for name, value in getattr(part.__self__, "__dict__", {}).items())
    elif isinstance(part, types.FunctionType):
        if not is_of_users(part.__code__.co_filename) and not _is_of_fxtrain(part):
            return
        yield from variables_read(part)
        yield from globals_read(part)
    elif _is_of_fxtrain(part):
        yield from getattr(part, "__dict__", {}).items()
    elif not isinstance(part, nn.Module) and callable(part):
        yield "", types.MethodType(type(part).__call__, part)


def _is_code(value: object) -> bool:
    return isinstance(value, types.FunctionType | types.MethodType | functools.partial)


def _global_names(code: types.CodeType) -> Iterator[str]:
    for instruction in dis.get_instructions(code):
        if instruction.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
            yield instruction.argval
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _global_names(constant)
