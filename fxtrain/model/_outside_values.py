"""Detects changes of outside Python values by a traced function: counters, lists, caches and hidden states."""

from __future__ import annotations

import contextlib
import threading
import types
from collections import deque
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator
from typing import Any, NamedTuple

from torch import Tensor, nn

from fxtrain.core import Tree, name_of, warn
from fxtrain.model._attribute_snapshots import Container, contents, refill
from fxtrain.model._captured_values import is_of_users, values_read
from fxtrain.model._first_call_checks import CheckedFunctions, ValuesNeededError
from fxtrain.model._tensor_access import TensorReads
from fxtrain.model._types import Out


class CapturedStateError(RuntimeError):
    """A traced function changes Python values outside the state, and a graph would not repeat the change.

    Example:
        >>> import torch, fxtrain as fx
        >>> sums = []
        >>> def loss_fn(model, batch):
        ...     sums.append(batch.sum())
        ...     return model(batch).mean()
        >>> step = fx.compile(fx.eval_step(loss_fn), backend="eager")
        >>> try:
        ...     step(fx.init(torch.nn.Linear(1, 1)), torch.ones(1, 1))
        ... except CapturedStateError as error:
        ...     print(error)
        expected loss_fn to change nothing outside the state, got changes to sums...
    """


Access = tuple[Callable[[], object], Callable[[object], None]]
"""Functions that read and write a value."""


class _Place(NamedTuple):
    name: str
    read: Callable[[], Any]
    write: Callable[[Any], None]
    value: Any
    elements: Any  # A copy of the container's elements; None for other values.


class OutsideValues:
    """A snapshot of the outside Python values that a function and its modules can change.

    Values come from closures, globals, classes of user-defined modules, and attributes of user-defined objects.

    Args:
        function: The function that runs the modules.
        modules: The modules. Classes of libraries are not searched.
    """

    def __init__(self, function: Callable[..., object], modules: Iterable[nn.Module]) -> None:
        self._places: list[_Place] = []
        self._caches: list[tuple[str, Any, int]] = []
        seen: set[Any] = set()
        for name, key, value, access in _found(function, modules):
            if key in seen:
                continue
            seen.add(key)
            if hasattr(value, "cache_info") and hasattr(value, "cache_clear"):
                self._caches.append((name, value, value.cache_info().misses))
            elif isinstance(value, _CONTAINERS) or (not isinstance(value, _CONSTANTS) and not callable(value)):
                elements = contents(value) if isinstance(value, _CONTAINERS) else None
                self._places.append(_Place(name, *access, value, elements))

    @property
    def tensors(self) -> frozenset[int]:
        """Ids of the tensors in the snapshot, including those in containers."""
        held = [part for place in self._places for part in (place.value, *_elements(place.elements))]
        return frozenset(id(part) for part in held if isinstance(part, Tensor))

    def changed(self, read: Collection[int]) -> tuple[list[str], list[str]]:
        """Returns the names of changed values, and of containers that only gained values other than tensors.

        A tensor that is replaced but never read does not count, such as the last activation that a forward hook stores.

        Args:
            read: Ids of the tensors that the function read.
        """
        changed = [name for name, cache, misses in self._caches if cache.cache_info().misses != misses]
        grown: list[str] = []
        for place in self._places:
            now = place.read()
            if not _is_same(now, place.value, read):
                changed.append(place.name)
            elif place.elements is not None and not _is_intact(elements := contents(now), place.elements, read):
                (grown if _only_gained_elements(elements, place.elements) else changed).append(place.name)
        return changed, grown

    def restore(self, *, gained: bool = False) -> None:
        """Restores all values, and clears caches that gained entries.

        Args:
            gained: Whether to remove appended elements too, such as log entries.
        """
        for place in self._places:
            if place.elements is not None and (
                gained or not _only_gained_elements(contents(place.value), place.elements)
            ):
                refill(place.value, place.elements)
            if place.read() is not place.value:
                place.write(place.value)
        for _, cache, misses in self._caches:
            if cache.cache_info().misses != misses:
                cache.cache_clear()


class _ThreadState(threading.local):
    repeats = 0


_thread = _ThreadState()


@contextlib.contextmanager
def repeating() -> Iterator[None]:
    """A context for calls that repeat others of this thread. They change no outside values of functions with a model.

    Traced calls, which would warn of such changes, fail instead.

    Example:
        >>> import torch, fxtrain as fx
        >>> log = []
        >>> step = fx.eval_step(lambda model, batch: log.append("called") or {"mean": model(batch).mean()})
        >>> with repeating():
        ...     _ = step(fx.init(torch.nn.ReLU()), torch.ones(2))
        >>> log
        []
    """
    _thread.repeats += 1
    try:
        yield
    finally:
        _thread.repeats -= 1


def without_repeated_changes(
    call: Callable[[], Out], function: Callable[..., object], modules: Iterable[nn.Module]
) -> Out:
    """Returns the result of an uncompiled call. Inside ``repeating``, outside values are restored after it."""
    if not _thread.repeats:
        return call()
    outside = OutsideValues(function, modules)
    try:
        return call()
    finally:
        outside.restore(gained=True)


def restoring_outside_values(
    call: Callable[[], Out], function: Callable[..., object], modules: Iterable[nn.Module], seen: CheckedFunctions
) -> Out:
    """Returns the result of a traced call, and restores the outside values that it changed.

    Elements that containers gained, such as log entries, are kept, except inside ``repeating``.

    Args:
        call: Runs the function.
        function: The function that runs the modules.
        modules: The modules.
        seen: Functions whose earlier trace made changes that an uncompiled call might have settled.

    Raises:
        CapturedStateError: If the function changes values at every call, or any inside ``repeating``.
        ValuesNeededError: If it changes values that perhaps only the first call changes, such as a cache.
    """
    outside, is_repeated = OutsideValues(function, modules), _thread.repeats > 0
    try:
        with TensorReads(outside.tensors) as reads:
            result = call()
    except BaseException:
        outside.restore(gained=is_repeated)
        raise
    who = name_of(function)
    changed, grown = outside.changed(reads.found)
    outside.restore(gained=is_repeated)
    if grown and is_repeated:
        raise CapturedStateError(f"expected {who} to repeat its call, got additions to {', '.join(grown)}.")
    if grown:
        warn(
            f"{who} adds to {', '.join(grown)} while it is traced, and a compiled step does not repeat that. Return "
            "the value as a metric, or append it in an observer.",
            RuntimeWarning,
        )
    if changed and seen.has_seen_like(function):
        raise CapturedStateError(
            f"expected {who} to change nothing outside the state, got changes to {', '.join(changed[:_MAX_NAMED])}, "
            "which a compiled step would not repeat and a checkpoint would not contain. Keep persistent values in a "
            "buffer, self.register_buffer(name, tensor), or in a slot of a callback. Pass a step counter in the "
            "batch. Or leave the step uncompiled."
        )
    if changed:
        seen.add(function)
        raise ValuesNeededError(
            f"expected {who} to change nothing outside the state while it is traced, got changes. Call the step once "
            "uncompiled before tracing it, to fill its caches."
        )
    return result


_CONTAINERS = (list, dict, set, deque)
_CONSTANTS = (type, types.ModuleType, nn.Module)
_SCALARS = (bool, int, float, complex, str, bytes, type(None))
# Maximum number of names in an error.
_MAX_NAMED = 3


def _found(
    function: Callable[..., object], modules: Iterable[nn.Module]
) -> Iterator[tuple[str, Hashable, Any, Access]]:
    """Yields the name of each value, a key of its place, the value, and functions that read and write the place."""
    yield from _found_in_functions([function])
    classes = {cls for module in modules for cls in type(module).__mro__ if _is_user_defined(cls)}
    for cls in classes:
        for name, value in list(vars(cls).items()):
            if not name.startswith("__") and not isinstance(value, _DESCRIPTORS):
                yield f"{cls.__qualname__}.{name}", (id(cls), name), value, _attribute(cls, name)
        yield from _found_in_functions([value for value in vars(cls).values() if isinstance(value, types.FunctionType)])


_DESCRIPTORS = (types.FunctionType, property, classmethod, staticmethod)


def _found_in_functions(functions: Iterable[Callable[..., object]]) -> Iterator[tuple[str, Hashable, Any, Access]]:
    for function in functions:
        for owner, name, value in values_read(function):
            if isinstance(owner, types.FunctionType):
                yield name, *_variable(owner, name, value)
            if not isinstance(value, (*_CONTAINERS, *_CONSTANTS, *_SCALARS, Tensor)) and _is_user_defined(type(value)):
                for key, part in list(getattr(value, "__dict__", {}).items()):
                    yield f"{name}.{key}", (id(value), key), part, _attribute(value, key)


def _variable(function: types.FunctionType, name: str, value: object) -> tuple[Hashable, object, Access]:
    if name in function.__code__.co_freevars:
        cell = (function.__closure__ or ())[function.__code__.co_freevars.index(name)]
        return id(cell), value, (lambda: cell.cell_contents, lambda new: setattr(cell, "cell_contents", new))
    if function.__globals__.get(name) is value:
        names = function.__globals__
        return (id(names), name), value, (lambda: names.get(name), lambda new: names.__setitem__(name, new))
    # The value is a default argument.
    return (id(function), name), value, (lambda: value, lambda new: None)


def _attribute(owner: object, name: str) -> Access:
    return lambda: getattr(owner, name, None), lambda value: setattr(owner, name, value)


def _is_user_defined(cls: type) -> bool:
    codes = (getattr(value, "__code__", None) for value in vars(cls).values())
    return any(code is not None and is_of_users(code.co_filename) for code in codes)


def _elements(values: Container | None) -> list[object]:
    return list(values.values() if isinstance(values, dict) else values or ())


def _is_same(now: object, before: object, read: Collection[int]) -> bool:
    if now is before:
        return True
    if isinstance(now, Tensor) and isinstance(before, Tensor):
        return id(before) not in read
    return type(now) is type(before) and isinstance(now, _SCALARS) and (now == before or now != now)


def _is_intact(now: Tree, before: Tree, read: Collection[int]) -> bool:
    if len(now) != len(before):
        return False
    if isinstance(now, dict):
        return all(key in before and _is_same(value, before[key], read) for key, value in now.items())
    if isinstance(now, set):
        return now == before
    return all(_is_same(*pair, read) for pair in zip(now, before, strict=True))


def _only_gained_elements(now: Tree, before: Tree) -> bool:
    """Returns whether elements other than tensors were added, and nothing else changed."""
    if isinstance(now, dict) or len(now) <= len(before):
        return False
    if isinstance(now, set):
        added, kept = now - before, before <= now
    else:
        added, kept = list(now)[len(before) :], _is_intact(list(now)[: len(before)], list(before), ())
    return kept and not any(isinstance(part, Tensor) for part in added)
