"""Python values from outside that a traced function changes: counters, lists, caches and hidden states."""

from __future__ import annotations

import types
import warnings
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any, NamedTuple

from torch import Tensor, nn

from fxtrain.fold._subscription import name_of
from fxtrain.model._captured import is_of_users, reads
from fxtrain.model._contents import refill
from fxtrain.model._first_calls import FirstCalls, Reads, ValuesNeededError


class CapturedStateError(RuntimeError):
    """A traced function keeps state in Python values from outside, which a graph would not change again."""


class _Place(NamedTuple):
    name: str
    read: Callable[[], Any]
    write: Callable[[Any], None]
    value: Any
    elements: Any  # of a container, before


class Outside:
    """The Python values that a function and its modules can change from outside of them, as they are now.

    Values are those of closures, globals, classes of users' modules, and attributes of users' objects among them.

    Args:
        function: Runs the modules.
        modules: Only those count that users defined.
    """

    def __init__(self, function: Callable[..., Any], modules: Iterable[nn.Module]) -> None:
        self._places: list[_Place] = []
        self._caches: list[tuple[str, Any, int]] = []
        seen: set[Any] = set()
        for name, key, value, write in _found(function, modules):
            if key in seen:
                continue
            seen.add(key)
            if hasattr(value, "cache_info") and hasattr(value, "cache_clear"):
                self._caches.append((name, value, value.cache_info().misses))
            elif isinstance(value, _CONTAINERS):
                self._places.append(_Place(name, *write, value, value.copy()))
            elif not isinstance(value, _CONSTANTS) and not callable(value):
                self._places.append(_Place(name, *write, value, None))

    @property
    def tensors(self) -> frozenset[int]:
        """The ids of the tensors among the values, and in containers among them."""
        held = [part for place in self._places for part in (place.value, *_elements(place.elements))]
        return frozenset(id(part) for part in held if isinstance(part, Tensor))

    def changed(self, read: Collection[int]) -> tuple[list[str], list[str]]:
        """The names of what changed, and of containers to which values without tensors were only added.

        A tensor that is replaced and not read is none of it, as the last activation that a forward hook stores.

        Args:
            read: The ids of tensors that the function read.
        """
        changed = [name for name, cache, misses in self._caches if cache.cache_info().misses != misses]
        grown: list[str] = []
        for place in self._places:
            now = place.read()
            if not _is_same(now, place.value, read):
                changed.append(place.name)
            elif place.elements is not None and not _is_intact(now, place.elements, read):
                (grown if _is_log(now, place.elements) else changed).append(place.name)
        return changed, grown

    def put_back(self) -> None:
        """Puts all values back, and clears caches. What was logged stays."""
        for place in self._places:
            if place.elements is not None and not _is_log(place.value, place.elements):
                refill(place.value, place.elements)
            if place.read() is not place.value:
                place.write(place.value)
        for _, cache, misses in self._caches:
            if cache.cache_info().misses != misses:
                cache.cache_clear()

    def refuse_changes(self, who: str, read: Collection[int], *, again: bool) -> bool:
        """Puts back what changed since, and says so.

        Args:
            who: The function, for errors.
            read: The ids of tensors that it read.
            again: Whether it changed in an earlier trace too, although an uncompiled call came between.

        Returns:
            Whether an uncompiled call may settle it, as that fills a cache.

        Raises:
            CapturedStateError: If ``again``.
        """
        changed, grown = self.changed(read)
        self.put_back()
        if grown:
            warnings.warn(
                f"{who} adds to {', '.join(grown)} while it is traced, and a compiled step does not repeat that. "
                "Return what is to be kept as a metric, or append in an observer.",
                RuntimeWarning,
                stacklevel=2,
            )
        if not changed:
            return False
        if not again:
            return True
        raise CapturedStateError(
            f"expected {who} to change nothing outside of the state, got changes of {', '.join(changed[:_SHOWN])}, "
            "which a compiled step would not repeat, and no checkpoint holds. Keep what must last in a buffer, "
            "self.register_buffer(name, tensor), or in a slot of a callback, read the step from the batch, or leave "
            "the step uncompiled."
        )


def traced_apart(
    call: Callable[[], Any], function: Callable[..., Any], modules: Iterable[nn.Module], seen: FirstCalls
) -> Any:
    """The result of a traced call, which leaves values from outside as they were.

    Args:
        call: Runs the function.
        function: Runs the modules.
        modules: As ``Outside`` takes them.
        seen: Functions whose trace has changed something, although an uncompiled call may settle it.

    Raises:
        CapturedStateError: If it changes values that each call changes.
        ValuesNeededError: If it changes values that the first call alone may change, as a cache.
    """
    outside = Outside(function, modules)
    try:
        with Reads(outside.tensors) as reads:
            result = call()
    except BaseException:
        outside.put_back()
        raise
    who = name_of(function)
    if outside.refuse_changes(who, reads.found, again=seen.has_seen_like(function)):
        seen.add(function)
        raise ValuesNeededError(
            f"expected {who} to change nothing outside of the state while it is traced. Call the step once "
            "uncompiled, which fills its caches, before it is traced."
        )
    return result


_CONTAINERS = (list, dict, set, deque)
_CONSTANTS = (type, types.ModuleType, nn.Module)
_SCALARS = (bool, int, float, complex, str, bytes, type(None))
_SHOWN = 3  # names in an error


def _found(
    function: Callable[..., Any], modules: Iterable[nn.Module]
) -> Iterator[tuple[str, Any, Any, tuple[Callable[[], Any], Callable[[Any], None]]]]:
    """Each value with its name, what tells its place apart, and how to read and write that."""
    yield from _of_functions([function])
    classes = {cls for module in modules for cls in type(module).__mro__ if _is_users(cls)}
    for cls in classes:
        for name, value in list(vars(cls).items()):
            if not name.startswith("__") and not isinstance(value, _DESCRIPTORS):
                yield f"{cls.__qualname__}.{name}", (id(cls), name), value, _attribute(cls, name)
        yield from _of_functions([value for value in vars(cls).values() if isinstance(value, types.FunctionType)])


_DESCRIPTORS = (types.FunctionType, property, classmethod, staticmethod)


def _of_functions(functions: Iterable[Any]) -> Iterator[tuple[str, Any, Any, Any]]:
    for function in functions:
        for owner, name, value in reads(function):
            if isinstance(owner, types.FunctionType):
                yield name, *_variable(owner, name, value)
            if not isinstance(value, (*_CONTAINERS, *_CONSTANTS, *_SCALARS, Tensor)) and _is_users(type(value)):
                for key, part in list(getattr(value, "__dict__", {}).items()):
                    yield f"{name}.{key}", (id(value), key), part, _attribute(value, key)


def _variable(function: types.FunctionType, name: str, value: Any) -> tuple[Any, Any, Any]:
    if name in function.__code__.co_freevars:
        cell = (function.__closure__ or ())[function.__code__.co_freevars.index(name)]
        return id(cell), value, (lambda: cell.cell_contents, lambda new: setattr(cell, "cell_contents", new))
    if function.__globals__.get(name) is value:
        names = function.__globals__
        return (id(names), name), value, (lambda: names.get(name), lambda new: names.__setitem__(name, new))
    return (id(function), name), value, (lambda: value, lambda new: None)  # a default


def _attribute(owner: Any, name: str) -> tuple[Callable[[], Any], Callable[[Any], None]]:
    return lambda: getattr(owner, name, None), lambda value: setattr(owner, name, value)


def _is_users(cls: type) -> bool:
    codes = (getattr(value, "__code__", None) for value in vars(cls).values())
    return any(code is not None and is_of_users(code.co_filename) for code in codes)


def _elements(values: Any) -> list[Any]:
    return list(values.values() if isinstance(values, dict) else values or ())


def _is_same(now: Any, before: Any, read: Collection[int]) -> bool:
    if now is before:
        return True
    if isinstance(now, Tensor) and isinstance(before, Tensor):
        return id(before) not in read
    return type(now) is type(before) and isinstance(now, _SCALARS) and (now == before or now != now)


def _is_intact(now: Any, before: Any, read: Collection[int]) -> bool:
    if len(now) != len(before):
        return False
    if isinstance(now, dict):
        return all(key in before and _is_same(value, before[key], read) for key, value in now.items())
    return (
        now == before if isinstance(now, set) else all(_is_same(*pair, read) for pair in zip(now, before, strict=True))
    )


def _is_log(now: Any, before: Any) -> bool:
    """Whether elements without tensors were added, and nothing else changed."""
    if isinstance(now, dict) or len(now) <= len(before):
        return False
    if isinstance(now, set):
        added, kept = now - before, before <= now
    else:
        added, kept = list(now)[len(before) :], _is_intact(list(now)[: len(before)], list(before), ())
    return kept and not any(isinstance(part, Tensor) for part in added)
