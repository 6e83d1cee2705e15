"""Captured values: what a function reads besides its arguments, from closures, globals and defaults."""

from __future__ import annotations

import dis
import functools
import sysconfig
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
    seen: set[int] = set()
    todo: list[tuple[Any, int]] = [(function, 0)]
    while todo:
        part, depth = todo.pop()
        if id(part) in seen or depth > _DEEPEST:
            continue
        seen.add(id(part))
        for name, value in _read(part):
            if _is_code(value):
                todo.append((value, depth + 1))
            elif not isinstance(value, type | types.ModuleType | types.BuiltinFunctionType):
                yield name, value


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
        if not _is_of_users(part.__code__.co_filename):
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
    return tuple({sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")})


def _is_of_users(filename: str) -> bool:
    return not filename.startswith(_installed())
