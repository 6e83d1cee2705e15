"""Captured values: what a function reads besides its arguments, from closures, globals and defaults."""

from __future__ import annotations

import dis
import functools
import os
import sysconfig
import time
import types
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

_DEEPEST = 3  # functions that functions call


def captured(function: Callable[..., Any]) -> Iterator[tuple[str, Any]]:
    """The values that a function and the functions of users that it calls read, each with a name for it.

    Modules, classes, functions and attributes that are looked up while it runs are not among them.

    Example:
        >>> scale = 2.0
        >>> def loss_fn(model, batch):
        ...     return model(batch).mean() * scale
        >>> list(captured(loss_fn))
        [('scale', 2.0)]
    """
    for owner, name, value in _reads(function):
        if not _is_ours(owner) and not isinstance(value, type | types.ModuleType | types.BuiltinFunctionType):
            yield name, value


def clocks(function: Callable[..., Any]) -> Iterator[tuple[dict[str, Any], str, Callable[[], Any]]]:
    """The functions of the module ``time`` that a function reads by a name of their own: namespace, name, clock.

    Example:
        >>> from time import perf_counter
        >>> [clock is perf_counter for _, _, clock in clocks(lambda: perf_counter())]
        [True]
    """
    for owner, name, value in _reads(function):
        is_clock = any(value is clock for clock in CLOCKS)
        if is_clock and isinstance(owner, types.FunctionType) and owner.__globals__.get(name) is value:
            yield owner.__globals__, name, value


def is_of_users(filename: str) -> bool:
    """Whether a file is neither Python's, nor installed, nor this library's."""
    return not filename.startswith(_installed())


CLOCKS = (time.time, time.time_ns, time.perf_counter, time.perf_counter_ns, time.monotonic, time.monotonic_ns)


def _reads(function: Callable[..., Any]) -> Iterator[tuple[Any, str, Any]]:
    """What a function and those that it calls read: the reader, the name and the value."""
    seen: set[int] = set()
    todo: list[tuple[Any, int]] = [(function, 0)]
    while todo:
        part, depth = todo.pop()
        if id(part) in seen or depth > _DEEPEST:
            continue
        seen.add(id(part))
        for name, value in _read(part):
            if _is_code(value) or (_is_ours(value) and callable(value)):
                todo.append((value, depth if _is_ours(part) else depth + 1))
            else:
                yield part, name, value


def _is_ours(part: Any) -> bool:
    """Whether it is code of this library, such as a step around a loss function."""
    if isinstance(part, types.FunctionType):
        return part.__code__.co_filename.startswith(_ours())
    return type(part).__module__.startswith("fxtrain.")


def _read(part: Any) -> Iterator[tuple[str, Any]]:
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
        if not is_of_users(part.__code__.co_filename) and not _is_ours(part):
            return
        for name, cell in zip(part.__code__.co_freevars, part.__closure__ or (), strict=True):
            if cell != types.CellType():
                yield name, cell.cell_contents
        for name in dict.fromkeys(_global_names(part.__code__)):
            if name in part.__globals__:
                yield name, part.__globals__[name]
        names = part.__code__.co_varnames[: part.__code__.co_argcount]
        yield from zip(reversed(names), reversed(part.__defaults__ or ()), strict=False)
        yield from (part.__kwdefaults__ or {}).items()
    elif _is_ours(part):
        yield from getattr(part, "__dict__", {}).items()
    elif not isinstance(part, nn.Module) and callable(part):
        yield "", types.MethodType(type(part).__call__, part)


def _is_code(value: Any) -> bool:
    return isinstance(value, types.FunctionType | types.MethodType | functools.partial)


def _global_names(code: types.CodeType) -> Iterator[str]:
    for instruction in dis.get_instructions(code):
        if instruction.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
            yield instruction.argval
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _global_names(constant)


@functools.cache
def _installed() -> tuple[str, ...]:
    return tuple({_ours()} | {sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")})


@functools.cache
def _ours() -> str:
    return os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep
