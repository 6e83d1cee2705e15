"""Snapshots and restores the Python attributes of modules, including nested containers and objects."""

from __future__ import annotations

import collections
import functools
import operator
import types
import weakref
from collections.abc import Collection, Iterator, Mapping
from typing import Any, TypeGuard

import numpy as np
import torch
from torch import Tensor, nn

from fxtrain.rng import _host_generators as host

# Attributes of a module that a call fills from the state.
_TENSOR_ATTRIBUTES = ("_parameters", "_buffers")
_ATOMS = (type, types.FunctionType, types.BuiltinFunctionType, types.ModuleType, Tensor, torch.Generator)
_DICTS = (dict, collections.OrderedDict, collections.defaultdict, collections.Counter)
# Longer lists and dicts are compared as a whole, without a path for each element.
_MAX_LISTED_ELEMENTS = 4096

Container = dict[object, object] | list[object] | set[object] | collections.deque[object]


class AttributeSnapshot:
    """A snapshot of the containers below some modules, from which they can be restored.

    Args:
        roots: Modules by path.
        owned: Ids of the plain objects whose attributes are included. Other objects are shared with the rest of the
            program, such as loggers and enum members, which are not copied with a module.
    """

    def __init__(self, roots: Mapping[str, nn.Module], owned: Collection[int]) -> None:
        self._dicts: list[tuple[dict[Any, Any], dict[Any, Any]]] = []
        self._others: list[tuple[Any, Any]] = []
        self._slots: list[tuple[Any, dict[str, Any]]] = []
        # Most containers are empty, such as dicts of hooks. A truth test is enough for them.
        self._empty: list[Any] = []
        self.containers: list[Any] = []
        self.tensors: list[tuple[str, Tensor]] = []
        self.generators: list[tuple[str, Any, Any]] = []
        for path, part in _walk(roots, owned, with_tensors=True):
            if isinstance(part, Tensor):
                self.tensors.append((path, part))
                continue
            if (state := host.state_of(part)) is not None:
                self.generators.append((path, part, state))
                continue
            # The container of the part's contents: the part itself, or its ``__dict__``.
            values = part if _is_container(part) else getattr(part, "__dict__", None)
            if values is not part and (slots := _slots(part)):
                self._slots.append((part, slots))
            if isinstance(values, dict | list | set | collections.deque):
                self.containers.append(values)
                self._keep(values)
        self.ids = frozenset(map(id, self.containers))

    def _keep(self, values: Container) -> None:
        if not values:
            self._empty.append(values)
        elif isinstance(values, dict) and type(values) in _DICTS:
            self._dicts.append((values, values.copy()))
        else:
            self._others.append((values, contents(values)))

    def is_intact(self) -> bool:
        """Returns whether each container still holds the same objects."""
        return (
            not any(self._empty)
            and all(
                now.keys() == before.keys() and all(map(operator.is_, now.values(), before.values()))
                for now, before in self._dicts
            )
            and all(
                len(now) == len(before) and all(map(operator.is_, _in_order(contents(now)), _in_order(before)))
                for now, before in self._others
            )
        )

    def restore(self) -> None:
        """Restores all containers, generators and slots."""
        for now, before in self._dicts:
            now.clear()
            now.update(before)
        for now in self._empty:
            if now:
                _builtin_type(now).clear(now)
        for now, before in self._others:
            refill(now, before)
        for _, generator, state in self.generators:
            host.set_state(generator, state)
        for part, before in self._slots:
            for name, value in before.items():
                object.__setattr__(part, name, value)


def leaves(roots: Mapping[str, nn.Module], owned: Collection[int]) -> dict[str, object]:
    """Returns the attribute values of modules, by path. A container contributes its type and its values.

    Parameters and buffers are left out. Values that can change in place are copied.
    """
    found: dict[str, Any] = {}
    for path, part in _walk(roots, owned):
        if not _is_walked(part, owned):
            continue
        found[path] = type(part)
        for name, value in _children(path, part):
            if not _is_walked(value, owned):
                found[name] = _frozen(value)
        is_set = isinstance(part, set | frozenset)
        if _is_container(part) and (is_set or len(part) > _MAX_LISTED_ELEMENTS):
            found[f"{path} (elements)"] = tuple(part)
    return found


def are_alike(value: object, other: object, read: Collection[int] = ()) -> bool:
    """Returns whether replacing one value of ``leaves`` by the other leaves the next call unchanged.

    Any two tensors are alike unless the id of one is in ``read``, because a tensor that nothing reads is not state.
    """
    if value is other:
        return True
    if isinstance(value, Tensor) and isinstance(other, Tensor):
        return id(other) not in read and id(value) not in read
    if type(value) is not type(other):
        return False
    if isinstance(value, types.FunctionType):
        return isinstance(other, types.FunctionType) and value.__code__ is other.__code__
    if isinstance(value, _COMPARED_BY_VALUE):
        return value == other or value != value
    return not isinstance(value, type)


_COMPARED_BY_VALUE = (
    *(bool, int, float, complex, str, bytes, tuple, type, np.generic),
    *(torch.dtype, torch.device, torch.layout, torch.memory_format),
)


def _walk(
    roots: Mapping[str, nn.Module], owned: Collection[int], *, with_tensors: bool = False
) -> Iterator[tuple[str, object]]:
    """Yields each container, module, owned object and tensor below the roots once, with its path.

    Args:
        roots: Modules by path.
        owned: Ids of the plain objects to search.
        with_tensors: Whether to include parameters and buffers, and the dicts that hold them.
    """
    seen: set[int] = set()
    todo: list[tuple[str, Any]] = list(roots.items())[::-1]
    while todo:
        path, part = todo.pop()
        if id(part) in seen:
            continue
        seen.add(id(part))
        yield path, part
        if _is_walked(part, owned):
            children = list(_children(path, part))[::-1]
            todo += [child for child in children if _is_walked(child[1], owned) or _is_kept(child[1])]
        if with_tensors and isinstance(part, nn.Module):
            for name in _TENSOR_ATTRIBUTES:
                yield f"{path}.{name}", vars(part)[name]
                todo += [(f"{path}.{key}", value) for key, value in vars(part)[name].items() if value is not None]


def _children(path: str, part: object) -> Iterator[tuple[str, object]]:
    if isinstance(part, nn.Module):
        for name, value in vars(part).items():
            if name == "_modules":
                for inner, module in value.items():
                    yield f"{path}.{inner}", module
            if name not in _TENSOR_ATTRIBUTES:
                yield f"{path}.{name}", value
    elif isinstance(part, dict):
        for key, value in part.items() if len(part) <= _MAX_LISTED_ELEMENTS else ():
            yield f"{path}[{key!r}]" if isinstance(key, str | int) else f"{path}[<{type(key).__name__}>]", value
    elif isinstance(part, list | tuple | collections.deque):
        for index, value in enumerate(part if len(part) <= _MAX_LISTED_ELEMENTS else ()):
            yield f"{path}[{index}]", value
    elif isinstance(part, types.MethodType):
        yield f"{path}.__self__", part.__self__
    elif isinstance(part, functools.partial):
        yield f"{path}.func", part.func
        yield f"{path}.args", part.args
        yield f"{path}.keywords", part.keywords
    elif not isinstance(part, set | frozenset):
        for name, value in {**_slots(part), **getattr(part, "__dict__", {})}.items():
            yield f"{path}.{name}", value


def _is_container(value: object) -> TypeGuard[Collection[object]]:
    return isinstance(value, dict | list | tuple | set | frozenset | collections.deque)


def _is_walked(value: object, owned: Collection[int]) -> bool:
    if isinstance(value, nn.Module | types.MethodType | functools.partial):
        return True
    if _is_container(value):
        return not isinstance(value, torch.Size)
    if isinstance(value, _ATOMS) or host.state_of(value) is not None:
        return False
    return id(value) in owned and (hasattr(value, "__dict__") or bool(_slots(value)))


def _is_kept(value: object) -> bool:
    return isinstance(value, Tensor) or host.state_of(value) is not None


def _slots(part: object) -> dict[str, object]:
    if _is_container(part) or isinstance(part, nn.Module | types.MethodType | functools.partial):
        return {}
    declared = [cls.__dict__.get("__slots__", ()) for cls in type(part).__mro__]
    names = [name for slots in declared for name in ((slots,) if isinstance(slots, str) else slots)]
    ignored = ("__dict__", "__weakref__")
    return {name: getattr(part, name) for name in names if name not in ignored and hasattr(part, name)}


def _frozen(value: object) -> object:
    """Returns a value that later in-place changes do not affect."""
    if isinstance(value, weakref.ref):
        return value()
    if isinstance(value, np.ndarray):
        return "array", str(value.dtype), value.shape, value.tobytes() if value.dtype != object else id(value)
    if isinstance(value, bytearray):
        return bytes(value)
    if isinstance(value, torch.Generator):
        return "generator", value.initial_seed(), bytes(value.get_state().tolist())
    state = host.state_of(value)
    return value if state is None else ("generator", repr(state))


def _builtin_type(values: Container) -> Any:
    """Returns the built-in type of a container, because a subclass may override the methods that restore it."""
    return next(
        kind for kind in (collections.OrderedDict, dict, list, set, collections.deque) if isinstance(values, kind)
    )


def contents(values: Container) -> dict[Any, Any] | list[Any] | set[Any]:
    """Returns the elements in a built-in dict, list or set. Methods that a subclass overrides are not called."""
    base = _builtin_type(values)
    if isinstance(values, dict):
        return dict(base.items(values))
    return (set if isinstance(values, set) else list)(base.__iter__(values))


def _in_order(values: Container) -> Collection[object]:
    """Returns the elements, keys of dicts included. An unchanged set iterates in the same order."""
    if isinstance(values, dict):
        return [element for item in values.items() for element in item]
    return values


def refill(now: Container, before: Collection[object]) -> None:
    """Restores the contents of a container.

    Args:
        now: The container.
        before: Its elements: a dict if it is one, otherwise a collection.
    """
    base = _builtin_type(now)
    if isinstance(before, dict):
        if len(now) == len(before) and all(key in now and base.__getitem__(now, key) is before[key] for key in before):
            return
        base.clear(now)
        for key, value in before.items():
            base.__setitem__(now, key, value)
    else:
        base.clear(now)
        base.update(now, before) if isinstance(now, set) else base.extend(now, before)
