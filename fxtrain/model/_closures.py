"""Functions that modules hold, such as hooks and lambdas, bound to the copies of what they close over.

``copy.deepcopy`` shares functions and weak references with the original, so those of a copied module would go on
reading the original one, whose parameters no step trains.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import types
import weakref
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from fxtrain.core import describe, name_of
from fxtrain.core._tracebacks import is_of_users, place
from fxtrain.model._captured_values import captured_values, globals_read, variables_read

_BUILTINS = (list, tuple, set, frozenset, dict, collections.OrderedDict, collections.defaultdict)
_WEAK = (weakref.ref, weakref.WeakMethod)
# Longer containers are taken for data.
_MAX_ELEMENTS = 4096


def bind_closures(root: nn.Module, copies: Mapping[int, object]) -> None:
    """Binds the functions, bound methods and weak references below a copied module to copies.

    Functions that share a variable of an outer function share its copy, and those that reach nothing that was copied
    stay the same objects.

    Args:
        root: The copy. Its containers are changed.
        copies: The copies by the ids of the originals, as in the memo of ``copy.deepcopy``.
    """
    bound, owned = _Bound(copies), {id(copy) for copy in copies.values()}
    seen: set[int] = set()
    todo: list[Any] = [root]
    while todo:
        part = todo.pop()
        if id(part) in seen:
            continue
        seen.add(id(part))
        if isinstance(part, dict):
            places: Any = part.items()
        elif isinstance(part, list | collections.deque):
            places = enumerate(part)
        else:
            todo += _held_by(part, owned)
            continue
        for key, value in list(places) if len(part) <= _MAX_ELEMENTS else ():
            new = value if isinstance(value, dict | list | set | collections.deque) else bound(value)
            if new is not value:
                part[key] = new
            todo.append(new)


def refuse_other_references(root: nn.Module, copies: Mapping[int, object]) -> None:
    """Raises if a function of a module reaches a part of the model in a way that its copy cannot.

    These are global variables, and variables of outer functions and defaults that are parameters or buffers, in whose
    place a call puts other tensors.

    Args:
        root: The original module.
        copies: As for ``bind_closures``.

    Raises:
        ValueError: Names the function and the variable.
    """

    def is_part(value: object, kinds: type | tuple[type, ...]) -> bool:
        return isinstance(value, kinds) and copies.get(id(value), value) is not value

    for path, function in _functions(root):
        found = [f"reads the global {name}" for name, value in globals_read(function) if is_part(value, _PARTS)]
        found += [
            f"holds the tensor {name}"
            for name, value in _variables(function)
            if any(is_part(part, Tensor) for part in _elements(value, copies))
        ]
        if found:
            where = place(function.__code__.co_filename, function.__code__.co_firstlineno)
            raise ValueError(
                f"expected functions of modules that read parameters and buffers as attributes of modules, got {path}, "
                f"{name_of(function)} at {where}, which {found[0]}. fxtrain.init copies modules, and each call puts "
                "the tensors of a state into the copy. Read an attribute of self, or of an argument of the hook."
            )


_PARTS = (nn.Module, Tensor)


def _variables(function: types.FunctionType) -> Iterator[tuple[str, object]]:
    """Yields the variables of outer functions that a function and the functions among them read, and defaults."""
    seen: set[int] = set()
    todo: list[object] = [function]
    while todo:
        part = todo.pop()
        part = part.func if isinstance(part, functools.partial) else part
        if not isinstance(part, types.FunctionType) or id(part) in seen:
            continue
        seen.add(id(part))
        for name, value in variables_read(part):
            yield name, value
            todo.append(value)


def _elements(value: Any, copies: Mapping[int, object]) -> Iterator[object]:
    """Yields a value, and the elements of a container, unless that is an attribute too, whose elements a call fills."""
    yield value
    if type(value) in _BUILTINS and len(value) <= _MAX_ELEMENTS and (type(value) is tuple or id(value) not in copies):
        yield from value.values() if isinstance(value, dict) else value


def refuse_captured_hooks(who: str, function: Callable[..., object], owners: Iterable[weakref.ref[Any]]) -> None:
    """Raises if a function reads an object whose methods are hooks of the model, because their copies run instead.

    Args:
        who: The function that runs the modules, for errors.
        function: The function.
        owners: The objects that the user's modules refer to, as from ``hook_owners``.

    Raises:
        RuntimeError: Names the object.
    """
    alive = {id(owner): owner for reference in owners if (owner := reference()) is not None}
    for name, value in captured_values(function) if alive else ():
        for part in (value, *(value if isinstance(value, list | tuple) else ()), *_values(value)):
            if id(part) in alive:
                raise RuntimeError(
                    f"expected {who} to read features from what the model returns, got {name}, {describe(part)}, whose "
                    "method is a hook of the model. The model is a copy, with a hook that writes to a copy of this "
                    "object. Return the features from forward, or record statistics of them with fxtrain.tap."
                )


def hook_owners(root: nn.Module) -> tuple[weakref.ref[Any], ...]:
    """Returns the objects other than modules whose bound methods are hooks of modules below ``root``."""
    found: dict[int, weakref.ref[Any]] = {}
    for module in root.modules():
        for name, hooks in vars(module).items():
            for hook in _values(hooks) if name.endswith("_hooks") else ():
                owner = getattr(hook, "__self__", None) if isinstance(hook, types.MethodType) else None
                if owner is not None and not isinstance(owner, nn.Module | type):
                    with contextlib.suppress(TypeError):  # an object without weak references
                        found[id(owner)] = weakref.ref(owner)
    return tuple(found.values())


def _values(value: object) -> Collection[object]:
    return value.values() if isinstance(value, dict) else ()


def _functions(root: nn.Module) -> Iterator[tuple[str, types.FunctionType]]:
    """Yields the user-defined hooks and functions among the attributes, and the ``forward`` methods, with paths."""
    seen: set[int] = set()
    for name, module in root.named_modules():
        prefix = f"model.{name.partition('.')[2]}".rstrip(".")
        forward = getattr(type(module), "forward", None)
        found = [(f"{prefix}.forward", forward)]
        for key, value in vars(module).items():
            values = value.values() if isinstance(value, dict) else value if isinstance(value, list) else [value]
            if "state_dict" not in key:  # hooks of saving and loading, which no call runs
                found += [(f"{prefix}.{key}", each) for each in values if isinstance(each, types.FunctionType)]
        for path, function in found:
            if id(function) not in seen and isinstance(function, types.FunctionType):
                seen.add(id(function))
                if is_of_users(function.__code__.co_filename):
                    yield path, function


def _held_by(part: object, owned: Collection[int]) -> list[object]:
    """Returns what a module, a bound method, a partial, a tuple or a copied object refers to."""
    if isinstance(part, types.MethodType):
        return [part.__self__]
    if isinstance(part, functools.partial):
        return [part.func, *part.args, *part.keywords.values()]
    if isinstance(part, tuple):
        return list(part) if len(part) <= _MAX_ELEMENTS else []
    is_searched = isinstance(part, nn.Module) or (id(part) in owned and not isinstance(part, Tensor | type))
    return [vars(part)] if is_searched and hasattr(part, "__dict__") else []


class _Bound:
    """Maps values of the original to those of the copy. Values that reach nothing that was copied stay the same."""

    def __init__(self, copies: Mapping[int, object]) -> None:
        self._copies = copies
        # Originals and what takes their place, by the ids of the originals, which are kept alive.
        self._made: dict[int, tuple[object, Any]] = {}

    def __call__(self, value: Any) -> Any:
        if self._is_copied(value):
            return self._copies[id(value)]
        if id(value) in self._made:
            return self._made[id(value)][1]
        if not isinstance(value, _REFERRING) or not self._reaches(value, set()):
            return value
        if isinstance(value, types.FunctionType):
            return self._function(value)
        self._made[id(value)] = value, value  # until it is made, if it contains itself
        made: Any
        if isinstance(value, types.MethodType):
            made = types.MethodType(self(value.__func__), self(value.__self__))
        elif isinstance(value, functools.partial):
            made = type(value)(self(value.func), *map(self, value.args), **self._items(value.keywords))
        elif isinstance(value, weakref.ref):
            made = type(value)(self(value()))
        elif isinstance(value, dict):
            made = type(value)(value.default_factory) if isinstance(value, collections.defaultdict) else type(value)()
            made.update(self._items(value))
        elif hasattr(value, "_fields"):
            made = type(value)(*map(self, value))
        else:
            made = type(value)(map(self, value))
        self._made[id(value)] = value, made
        return made

    def _items(self, values: Mapping[Any, Any]) -> dict[Any, Any]:
        return {key: self(value) for key, value in values.items()}

    def _function(self, function: types.FunctionType) -> types.FunctionType:
        closure = function.__closure__ or ()
        cells = tuple(map(self._cell, closure))
        made = types.FunctionType(function.__code__, function.__globals__, function.__name__, None, cells)
        self._made[id(function)] = function, made  # before its variables, because it may be one of them
        for cell, new in zip(closure, cells, strict=True):
            if new == types.CellType() != cell:
                new.cell_contents = self(cell.cell_contents)
        functools.update_wrapper(made, function, updated=())
        made.__defaults__, made.__kwdefaults__ = self(function.__defaults__), self(function.__kwdefaults__)
        vars(made).clear()  # of the attribute that the wrapper adds
        vars(made).update(self._items(vars(function)))
        return made

    def _cell(self, cell: types.CellType) -> types.CellType:
        """Returns the variable of an outer function: an empty one, if it takes another value."""
        if id(cell) not in self._made:
            self._made[id(cell)] = cell, types.CellType() if self._reaches(cell, set()) else cell
        return self._made[id(cell)][1]

    def _is_copied(self, value: object) -> bool:
        return self._copies.get(id(value), value) is not value

    def _reaches(self, value: object, seen: set[int]) -> bool:
        """Whether a value refers to something that was copied."""
        if id(value) in seen:
            return False
        seen.add(id(value))
        return self._is_copied(value) or any(self._reaches(part, seen) for part in _parts(value))


_REFERRING = (types.FunctionType, types.MethodType, functools.partial, weakref.ref, *_BUILTINS)


def _parts(value: Any) -> Collection[object]:
    if isinstance(value, types.FunctionType):
        defaults = (*(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values())
        return (*(value.__closure__ or ()), *defaults, *vars(value).values())
    if isinstance(value, types.CellType):
        return () if value == types.CellType() else (value.cell_contents,)
    if isinstance(value, types.MethodType):
        return value.__func__, value.__self__
    if isinstance(value, functools.partial):
        return value.func, *value.args, *value.keywords.values()
    if type(value) in _WEAK:
        return (value(),)
    if type(value) in _BUILTINS or hasattr(value, "_fields"):
        return (value.values() if isinstance(value, dict) else value) if len(value) <= _MAX_ELEMENTS else ()
    return ()
